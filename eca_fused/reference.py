"""ECA and its two ends in plain PyTorch: the definition that every kernel is checked against.

Formulas: Wang et al., "ECA-Net: Efficient Channel Attention for Deep Convolutional Neural Networks"
(CVPR 2020), equations 7 to 9; the taps of each channel (ECA-NS) are equation 6.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["convolve", "eca", "gate", "pool", "rescale", "residual_tail"]


def pool(x: Tensor) -> Tensor:
    """Means over the spatial positions: (N, C, *spatial) to (N, C), the dtype of x."""
    return x.mean(tuple(range(2, x.dim()))) if x.dim() > 2 else x


def rescale(x: Tensor, gate: Tensor) -> Tensor:
    """x (N, C, *spatial) times the gate (N, C) of each channel, in the shape and dtype of x."""
    return x * gate.to(x.dtype).reshape(gate.shape + (1,) * (x.dim() - 2))


def _padded(values: Tensor, r: int, padding_mode: str) -> Tensor:
    """Rows of channels padded by r at both ends: (N, C) to (N, C + 2r)."""
    if r == 0:
        return values
    if padding_mode == "zeros":
        return F.pad(values, (r, r))
    # F.pad(mode="circular") writes in place, which torch.func.linearize() treats as constant.
    return torch.cat([values[:, -r:], values, values[:, :r]], dim=1)


def convolve(values: Tensor, weight: Tensor, padding_mode: str = "zeros") -> Tensor:
    """Convolution over channels, z[n, c] = sum_j w[c, j] * values[n, c + j - r], r = k // 2.

    Args:
        values: (N, C).
        weight: (1, 1, k), or (C, 1, k) for separate taps per channel; the dtype of values.
        padding_mode: "zeros", or "circular" to wrap around at the first and last channel.

    Returns:
        (N, C), the dtype of values.
    """
    k = weight.shape[-1]
    rows = _padded(values, k // 2, padding_mode)
    if weight.shape[0] == 1:
        return F.conv1d(rows.unsqueeze(1), weight).squeeze(1)
    return (rows.unfold(1, k, 1) * weight[:, 0]).sum(-1)


def gate(x: Tensor, weight: Tensor, padding_mode: str = "zeros") -> Tensor:
    """The gates of x, a = sigmoid(convolve(mean over the spatial positions)).

    Args:
        x: (N, C, *spatial).
        weight: (1, 1, k) or (C, 1, k), in float32 or the dtype of x.
        padding_mode: "zeros" or "circular".

    Returns:
        (N, C), the dtype of x, each from 0 to 1.
    """
    z = convolve(pool(x).to(weight.dtype), weight, padding_mode)
    return torch.sigmoid(z).to(x.dtype)


def eca(x: Tensor, weight: Tensor, *, padding_mode: str = "zeros") -> Tensor:
    """Efficient channel attention, y = gate * x, as plain PyTorch computes it.

    Args:
        x: (N, C, *spatial) with 0 to 3 spatial dimensions, float32, float64, float16 or bfloat16.
        weight: taps (1, 1, k), or (C, 1, k), k odd, in float32 or the dtype of x.
        padding_mode: "zeros" or "circular".

    Returns:
        A tensor of the shape and dtype of x.
    """
    return rescale(x, gate(x, weight, padding_mode))


ACTIVATIONS = {"none": lambda v: v, "relu": torch.relu, "silu": F.silu, "gelu": F.gelu}


def residual_tail(
    x: Tensor,
    identity: Tensor | None,
    weight: Tensor | None,
    *,
    gate: Tensor | None = None,
    scale: Tensor | None = None,
    activation: str = "relu",
    padding_mode: str = "zeros",
) -> Tensor:
    """The end of a residual block, act(gate * scale * x + identity), as plain PyTorch computes it.

    Args:
        x: (N, C, *spatial).
        identity: (N, C, *spatial), or None for zero.
        weight: taps of ECA's gate, (1, 1, k) or (C, 1, k); or None.
        gate: (N, C), instead of taps; or None.
        scale: (N,), a factor of each sample; None for one.
        activation: "none", "relu", "silu" or "gelu".
        padding_mode: "zeros" or "circular".

    Returns:
        A tensor of the shape and dtype of x.
    """
    y = x
    if weight is not None:
        y = eca(x, weight, padding_mode=padding_mode)
    elif gate is not None:
        y = rescale(x, gate)
    if scale is not None:
        y = y * scale.to(y.dtype).reshape((-1,) + (1,) * (y.dim() - 1))
    if identity is not None:
        y = y + identity
    result: Tensor = ACTIVATIONS[activation](y)
    return result
