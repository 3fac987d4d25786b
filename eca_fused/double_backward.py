"""Second derivatives of ECA in differentiable PyTorch operations, so that higher ones exist."""

import torch
from torch import Tensor

from eca_fused.reference import convolve, padded

__all__ = ["double_backward", "plain_backward"]


def _transposed(values: Tensor, weight: Tensor, padding_mode: str) -> Tensor:
    """The transpose of convolve(): out[n, c] = sum_j w[c - j + r, j] * values[n, c - j + r]."""
    channels, k = values.shape[1], weight.shape[2]
    r = k // 2
    return torch.stack(
        [
            padded(values * weight[:, 0, j], r, padding_mode).narrow(1, 2 * r - j, channels)
            for j in range(k)
        ]
    ).sum(0)


def _taps(values: Tensor, inputs: Tensor, weight: Tensor, padding_mode: str) -> Tensor:
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
    dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    g, v, w = dy.to(dtype), x.to(dtype), weight.to(dtype)
    spatial = tuple(range(2, x.dim()))
    mean = v.mean(spatial) if spatial else v  # (N, C)
    a = torch.sigmoid(convolve(mean, w, padding_mode))
    da = (g * v).sum(spatial) if spatial else g * v
    dz = da * a * (1 - a)
    pixels = x[0, 0].numel() if x.shape[0] and x.shape[1] else 1
    dm = _transposed(dz, w, padding_mode) / pixels
    ones = (1,) * len(spatial)
    dx = a.reshape(a.shape + ones) * g + dm.reshape(dm.shape + ones)
    return dx.to(x.dtype), _taps(dz, mean, w, padding_mode).to(weight.dtype)


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
    dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    g, v, w = dy.to(dtype), x.to(dtype), weight.to(dtype)
    spatial = tuple(range(2, x.dim()))
    pixels = x[0, 0].numel() if x.shape[0] and x.shape[1] else 1

    def total(map_: Tensor) -> Tensor:  # (N, C, *spatial) to (N, C)
        return map_.sum(spatial) if spatial else map_

    def spread(values: Tensor) -> Tensor:  # (N, C) to (N, C, 1, ...)
        return values.reshape(values.shape + (1,) * len(spatial))

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
    dmean = _transposed(t, w, padding_mode)
    dw = _taps(t, mean, w, padding_mode)
    if ddweight is not None:
        dmean = dmean + _transposed(dz, ddweight, padding_mode)
    if mean_ddx is not None:
        dw = dw + _taps(dz, mean_ddx, w, padding_mode)
    d_dy = spread(u) * v
    if ddx is not None:
        d_dy = d_dy + spread(a) * ddx
    d_x = spread(u) * g + spread(dmean / pixels)
    return d_dy.to(dy.dtype), d_x.to(x.dtype), dw.to(weight.dtype)
