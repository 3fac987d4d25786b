"""The convolution over channels and its gradients, in differentiable PyTorch operations."""

import torch
from torch import Tensor

from eca_fused.ops.graph import padded

__all__ = ["convolve", "taps_gradient", "transposed"]


def convolve(values: Tensor, weight: Tensor, circular: bool) -> Tensor:
    """sum_j w[c, j] * values[n, c + j - r]; not by conv1d, whose inputs autocast would round."""
    k = weight.shape[2]
    return (padded(values, k // 2, circular).unfold(1, k, 1) * weight[:, 0]).sum(-1)


def transposed(values: Tensor, weight: Tensor, circular: bool) -> Tensor:
    """The transpose of convolve(): out[n, c] = sum_j w[c - j + r, j] * values[n, c - j + r]."""
    channels, k = values.shape[1], weight.shape[2]
    if weight.shape[0] == 1:  # fewer operations
        return convolve(values, weight.flip(2), circular)
    r = k // 2
    return torch.stack(
        [
            padded(values * weight[:, 0, j], r, circular).narrow(1, 2 * r - j, channels)
            for j in range(k)
        ]
    ).sum(0)


def taps_gradient(values: Tensor, inputs: Tensor, weight: Tensor, circular: bool) -> Tensor:
    """Gradient of sum(values * convolve(inputs, weight)) for the taps, in the shape of weight."""
    k = weight.shape[2]
    windows = padded(inputs, k // 2, circular).unfold(1, k, 1)  # (N, C, k)
    per_channel = (values.unsqueeze(-1) * windows).sum(0)
    return (per_channel if weight.shape[0] > 1 else per_channel.sum(0)).reshape(weight.shape)
