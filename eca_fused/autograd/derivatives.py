"""Gradients of ECA's gradients in differentiable PyTorch operations, so that higher ones exist."""

import torch
from torch import Tensor

from eca_fused.ops.results import sums_dtype
from eca_fused.reference import padded

__all__ = [
    "convolve",
    "double_backward",
    "pixels_of",
    "plain_backward",
    "spread",
    "taps_gradient",
    "total",
    "transposed",
]


def pixels_of(x: Tensor) -> int:
    """S, the number of spatial positions of x (N, C, *spatial); 1 where x has no plane."""
    return x[0, 0].numel() if x.shape[0] and x.shape[1] else 1


def total(map_: Tensor) -> Tensor:
    """Sums over the spatial positions: (N, C, *spatial) to (N, C)."""
    spatial = tuple(range(2, map_.dim()))
    return map_.sum(spatial) if spatial else map_


def spread(values: Tensor, map_: Tensor) -> Tensor:
    """Values (N, C) in a shape that broadcasts over the spatial positions of a map."""
    return values.reshape(values.shape + (1,) * (map_.dim() - 2))


def convolve(values: Tensor, weight: Tensor, padding_mode: str) -> Tensor:
    """reference.convolve() without a convolution, whose inputs autocast would round."""
    k = weight.shape[2]
    return (padded(values, k // 2, padding_mode).unfold(1, k, 1) * weight[:, 0]).sum(-1)


def transposed(values: Tensor, weight: Tensor, padding_mode: str) -> Tensor:
    """The transpose of convolve(): out[n, c] = sum_j w[c - j + r, j] * values[n, c - j + r]."""
    channels, k = values.shape[1], weight.shape[2]
    r = k // 2
    return torch.stack(
        [
            padded(values * weight[:, 0, j], r, padding_mode).narrow(1, 2 * r - j, channels)
            for j in range(k)
        ]
    ).sum(0)


def taps_gradient(values: Tensor, inputs: Tensor, weight: Tensor, padding_mode: str) -> Tensor:
    """Gradient of sum(values * convolve(inputs, weight)) for the taps, in their shape."""
    k = weight.shape[2]
    windows = padded(inputs, k // 2, padding_mode).unfold(1, k, 1)  # (N, C, k)
    per_channel = (values.unsqueeze(-1) * windows).sum(0)
    return (per_channel if weight.shape[0] > 1 else per_channel.sum(0)).reshape(weight.shape)


def plain_backward(
    dy: Tensor, x: Tensor, weight: Tensor, *, padding_mode: str
) -> tuple[Tensor, Tensor]:
    """The gradients of ECA for x and weight, in differentiable operations on whole tensors.

    Args:
        dy, x: (N, C, *spatial).
        weight: (1 or C, 1, k).
        padding_mode: "zeros" or "circular".

    Returns:
        Gradients for x and weight, in their shapes and dtypes.
    """
    dtype = sums_dtype(x)
    g, v, w = dy.to(dtype), x.to(dtype), weight.to(dtype)
    pixels = pixels_of(x)
    mean = total(v) / pixels  # (N, C)
    a = torch.sigmoid(convolve(mean, w, padding_mode))
    dz = total(g * v) * a * (1 - a)
    dm = transposed(dz, w, padding_mode)
    dx = spread(a, x) * g + spread(dm / pixels, x)
    return dx.to(x.dtype), taps_gradient(dz, mean, w, padding_mode).to(weight.dtype)


def double_backward(
    ddx: Tensor | None,
    ddweight: Tensor | None,
    dy: Tensor,
    x: Tensor,
    weight: Tensor,
    *,
    padding_mode: str,
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
        padding_mode: "zeros" or "circular".

    Returns:
        Gradients for dy, x and weight, in their shapes and dtypes.
    """
    dtype = sums_dtype(x)
    g, v, w = dy.to(dtype), x.to(dtype), weight.to(dtype)
    pixels = pixels_of(x)
    mean = total(v) / pixels
    a = torch.sigmoid(convolve(mean, w, padding_mode))
    slope = a * (1 - a)
    da = total(g * v)
    dz = slope * da

    p = q = torch.zeros_like(a)
    mean_ddx = None
    if ddx is not None:
        ddx = ddx.to(dtype)
        p = total(ddx * g)
        mean_ddx = total(ddx) / pixels
        q = convolve(mean_ddx, w, padding_mode)
    if ddweight is not None:
        ddweight = ddweight.to(dtype)
        q = q + convolve(mean, ddweight, padding_mode)

    u = q * slope
    t = slope * (p + q * da * (1 - 2 * a))
    dmean = transposed(t, w, padding_mode)
    dw = taps_gradient(t, mean, w, padding_mode)
    if ddweight is not None:
        dmean = dmean + transposed(dz, ddweight, padding_mode)
    if mean_ddx is not None:
        dw = dw + taps_gradient(dz, mean_ddx, w, padding_mode)
    d_dy = spread(u, x) * v
    if ddx is not None:
        d_dy = d_dy + spread(a, x) * ddx
    d_x = spread(u, x) * g + spread(dmean / pixels, x)
    return d_dy.to(dy.dtype), d_x.to(x.dtype), dw.to(weight.dtype)
