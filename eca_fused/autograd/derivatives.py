"""Gradients of ECA, gradients of these, and tangents, in differentiable PyTorch operations.

This gives derivatives of any order. Means and gates are computed again from x and weight: those
from the kernels are constants to autograd, so derivatives through them would silently lack a part.
"""

import torch
from torch import Tensor

from eca_fused.ops.convolution import convolve, taps_gradient, transposed
from eca_fused.ops.graph import spread
from eca_fused.ops.results import sums_dtype
from eca_fused.torch_state import batched_by_autograd, transformed

__all__ = [
    "backward_tangents",
    "double_backward",
    "forward_tangent",
    "plain_backward",
    "plainly",
    "total",
]


def plainly(dy: Tensor) -> bool:
    """Whether plain PyTorch must compute the gradients in a backward pass.

    It must for create_graph, is_grads_batched, and a transform around this backward pass alone.
    """
    if torch.is_grad_enabled():
        return True
    return not torch.compiler.is_compiling() and (transformed() or batched_by_autograd(dy))


def pixels_of(x: Tensor) -> int:
    """S, the number of spatial positions of x (N, C, *spatial); 1 if x has no plane."""
    return x[0, 0].numel() if x.shape[0] and x.shape[1] else 1


def total(map_: Tensor) -> Tensor:
    """Sums over the spatial positions: (N, C, *spatial) to (N, C)."""
    spatial = tuple(range(2, map_.dim()))
    return map_.sum(spatial) if spatial else map_


def _forward(x: Tensor, weight: Tensor, circular: bool) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """x and the taps in the dtype of the sums, and means and gates (N, C)."""
    dtype = sums_dtype(x)
    v, w = x.to(dtype), weight.to(dtype)
    mean = total(v) / pixels_of(x)
    return v, w, mean, torch.sigmoid(convolve(mean, w, circular))


def plain_backward(
    dy: Tensor, x: Tensor, weight: Tensor, *, circular: bool
) -> tuple[Tensor, Tensor]:
    """The gradients of ECA for x and weight, in differentiable operations on whole tensors.

    Args:
        dy, x: (N, C, *spatial).
        weight: (1 or C, 1, k).
        circular: wrap around at the first and last channel.

    Returns:
        Gradients for x and weight, in their shapes and dtypes.
    """
    v, w, mean, a = _forward(x, weight, circular)
    g = dy.to(v.dtype)
    dz = total(g * v) * a * (1 - a)
    dm = transposed(dz, w, circular)
    dx = spread(a, x) * g + spread(dm / pixels_of(x), x)
    return dx.to(x.dtype), taps_gradient(dz, mean, w, circular).to(weight.dtype)


def double_backward(
    ddx: Tensor | None,
    ddweight: Tensor | None,
    dy: Tensor,
    x: Tensor,
    weight: Tensor,
    *,
    circular: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of <ddx, dx> + <ddweight, dweight>, where dx and dweight are the gradients of ECA.

    With m the means, K the convolution and a the gates,
    dx = a dy + K'(dz) / S and dz = a (1 - a) sum(dy x), so the sum above is
    sum_c a P + dz q with P = sum_s ddx dy and q = K mean(ddx) + convolve(m, ddweight).

    Args:
        ddx: (N, C, *spatial), or None for zero.
        ddweight: (1 or C, 1, k), or None for zero.
        dy, x: (N, C, *spatial).
        weight: (1 or C, 1, k).
        circular: wrap around at the first and last channel.

    Returns:
        Gradients for dy, x and weight, in their shapes and dtypes.
    """
    v, w, mean, a = _forward(x, weight, circular)
    dtype, pixels = v.dtype, pixels_of(x)
    g = dy.to(dtype)
    slope = a * (1 - a)
    da = total(g * v)
    dz = slope * da

    p = q = torch.zeros_like(a)
    mean_ddx = None
    if ddx is not None:
        ddx = ddx.to(dtype)
        p = total(ddx * g)
        mean_ddx = total(ddx) / pixels
        q = convolve(mean_ddx, w, circular)
    if ddweight is not None:
        ddweight = ddweight.to(dtype)
        q = q + convolve(mean, ddweight, circular)

    u = q * slope
    t = slope * (p + q * da * (1 - 2 * a))
    dmean = transposed(t, w, circular)
    dw = taps_gradient(t, mean, w, circular)
    if ddweight is not None:
        dmean = dmean + transposed(dz, ddweight, circular)
    if mean_ddx is not None:
        dw = dw + taps_gradient(dz, mean_ddx, w, circular)
    d_dy = spread(u, x) * v
    if ddx is not None:
        d_dy = d_dy + spread(a, x) * ddx
    d_x = spread(u, x) * g + spread(dmean / pixels, x)
    return d_dy.to(dy.dtype), d_x.to(x.dtype), dw.to(weight.dtype)


# ---- tangents ----


def _in(dtype: torch.dtype, tangent: Tensor | None, like: Tensor) -> Tensor:
    return (torch.zeros_like(like) if tangent is None else tangent).to(dtype)


def forward_tangent(
    tx: Tensor | None, tweight: Tensor | None, x: Tensor, weight: Tensor, *, circular: bool
) -> Tensor:
    """The derivative of y = a x in the direction of the tangents: ta x + a tx.

    Args:
        tx: (N, C, *spatial), or None for zero.
        tweight: (1 or C, 1, k), or None for zero.
        x: (N, C, *spatial).
        weight: (1 or C, 1, k).
        circular: wrap around at the first and last channel.

    Returns:
        (N, C, *spatial), the dtype of x.
    """
    v, w, mean, a = _forward(x, weight, circular)
    tv, tw = _in(v.dtype, tx, x), _in(v.dtype, tweight, weight)
    tz = convolve(total(tv) / pixels_of(x), w, circular) + convolve(mean, tw, circular)
    return (spread(a * (1 - a) * tz, x) * v + spread(a, x) * tv).to(x.dtype)


def backward_tangents(
    tdy: Tensor | None,
    tx: Tensor | None,
    tweight: Tensor | None,
    dy: Tensor,
    x: Tensor,
    weight: Tensor,
    *,
    circular: bool,
) -> tuple[Tensor, Tensor]:
    """The derivatives of ECA's gradients dx and dweight in the direction of the tangents.

    With K the convolution, K' its transpose, m the means and a the gates, dx = a dy + K'(dz) / S,
    dz = a (1 - a) sum(dy x) and dweight_j = sum_{n,c} dz[n, c] m[n, c + j - r].

    Args:
        tdy, tx: (N, C, *spatial), or None for zero.
        tweight: (1 or C, 1, k), or None for zero.
        dy, x: (N, C, *spatial).
        weight: (1 or C, 1, k).
        circular: wrap around at the first and last channel.

    Returns:
        Tangents of dx and dweight, in the shapes and dtypes of x and weight.
    """
    v, w, mean, a = _forward(x, weight, circular)
    dtype, pixels = v.dtype, pixels_of(x)
    g = dy.to(dtype)
    tg, tv, tw = _in(dtype, tdy, dy), _in(dtype, tx, x), _in(dtype, tweight, weight)
    tmean = total(tv) / pixels
    slope, da = a * (1 - a), total(g * v)
    ta = slope * (convolve(tmean, w, circular) + convolve(mean, tw, circular))
    dz = slope * da
    tdz = slope * total(tg * v + g * tv) + (1 - 2 * a) * ta * da
    tdm = transposed(tdz, w, circular) + transposed(dz, tw, circular)
    tdx = spread(ta, x) * g + spread(a, x) * tg + spread(tdm / pixels, x)
    tdw = taps_gradient(tdz, mean, w, circular) + taps_gradient(dz, tmean, w, circular)
    return tdx.to(x.dtype), tdw.to(weight.dtype)
