"""Directional derivatives of ECA and of its gradients, in differentiable PyTorch operations.

Means and gates are computed anew from x and weight: those that the kernels return are constants to
autograd, so that a derivative of what is made of them would silently lack a part.
"""

import torch
from torch import Tensor

from eca_fused.autograd.derivatives import (
    convolve,
    pixels_of,
    spread,
    taps_gradient,
    total,
    transposed,
)
from eca_fused.ops.results import sums_dtype

__all__ = ["backward_tangents", "forward_tangent"]


def _in(dtype: torch.dtype, tangent: Tensor | None, like: Tensor) -> Tensor:
    return (torch.zeros_like(like) if tangent is None else tangent).to(dtype)


def forward_tangent(
    tx: Tensor | None, tweight: Tensor | None, x: Tensor, weight: Tensor, *, padding_mode: str
) -> Tensor:
    """The derivative of y = a x in the direction of the tangents: ta x + a tx.

    Args:
        tx: (N, C, *spatial), or None for zero.
        tweight: (1 or C, 1, k), or None for zero.
        x: (N, C, *spatial).
        weight: (1 or C, 1, k).
        padding_mode: "zeros" or "circular".

    Returns:
        (N, C, *spatial), the dtype of x.
    """
    dtype = sums_dtype(x)
    v, w, tv, tw = x.to(dtype), weight.to(dtype), _in(dtype, tx, x), _in(dtype, tweight, weight)
    pixels = pixels_of(x)
    mean = total(v) / pixels  # (N, C)
    a = torch.sigmoid(convolve(mean, w, padding_mode))
    tz = convolve(total(tv) / pixels, w, padding_mode) + convolve(mean, tw, padding_mode)
    return (spread(a * (1 - a) * tz, x) * v + spread(a, x) * tv).to(x.dtype)


def backward_tangents(
    tdy: Tensor | None,
    tx: Tensor | None,
    tweight: Tensor | None,
    dy: Tensor,
    x: Tensor,
    weight: Tensor,
    *,
    padding_mode: str,
) -> tuple[Tensor, Tensor]:
    """The derivatives of ECA's gradients dx and dweight in the direction of the tangents.

    With K the convolution, K' its transpose, m the means and a the gates, dx = a dy + K'(dz) / S,
    dz = a (1 - a) sum(dy x) and dweight_j = sum_{n,c} dz[n, c] m[n, c + j - r].

    Args:
        tdy, tx: (N, C, *spatial), or None for zero.
        tweight: (1 or C, 1, k), or None for zero.
        dy, x: (N, C, *spatial).
        weight: (1 or C, 1, k).
        padding_mode: "zeros" or "circular".

    Returns:
        Tangents of dx and dweight, in the shapes and dtypes of x and weight.
    """
    dtype = sums_dtype(x)
    g, v, w = dy.to(dtype), x.to(dtype), weight.to(dtype)
    tg, tv, tw = _in(dtype, tdy, dy), _in(dtype, tx, x), _in(dtype, tweight, weight)
    pixels = pixels_of(x)
    mean, tmean = total(v) / pixels, total(tv) / pixels  # (N, C)
    a = torch.sigmoid(convolve(mean, w, padding_mode))
    slope, da = a * (1 - a), total(g * v)
    ta = slope * (convolve(tmean, w, padding_mode) + convolve(mean, tw, padding_mode))
    dz = slope * da
    tdz = slope * total(tg * v + g * tv) + (1 - 2 * a) * ta * da
    tdm = transposed(tdz, w, padding_mode) + transposed(dz, tw, padding_mode)
    tdx = spread(ta, x) * g + spread(a, x) * tg + spread(tdm / pixels, x)
    tdw = taps_gradient(tdz, mean, w, padding_mode) + taps_gradient(dz, tmean, w, padding_mode)
    return tdx.to(x.dtype), tdw.to(weight.dtype)
