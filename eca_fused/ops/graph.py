"""The operators as plain PyTorch operations, for compilers and exporters that build a graph.

torch.compile fuses these with their neighbours, TorchScript differentiates them, and ONNX knows no
others. Like the kernels and unlike reference.py, they sum and gate in float32 (float64 for float64)
and round once. The taps are shifted sums, because a convolution would be a barrier to fusion.

torch.jit.script compiles this file too, and understands only a part of Python.
"""

import torch
from torch import Tensor

__all__ = ["eca", "gate", "mean", "padded", "pool", "rescale", "spread", "widened"]


def padded(values: Tensor, r: int, circular: bool) -> Tensor:
    """Rows of channels padded by r at both ends: (N, C) to (N, C + 2r)."""
    if r == 0:
        return values
    if not circular:
        return torch.nn.functional.pad(values, [r, r])
    channels = values.shape[1]
    ends = (values.narrow(1, channels - r, r), values, values.narrow(1, 0, r))
    return torch.cat(ends, 1)


def spread(values: Tensor, like: Tensor) -> Tensor:
    """Values (N, C) as (N, C, 1, ...), with the dimensions of a map."""
    for _ in range(like.dim() - 2):
        values = values.unsqueeze(-1)
    return values


def widened(x: Tensor) -> Tensor:
    """x in the dtype of the sums, once for all uses, so that its gradient is rounded once too."""
    return x.to(torch.float64 if x.dtype == torch.float64 else torch.float32)


def mean(x: Tensor) -> Tensor:
    """Means over the spatial positions: (N, C, *spatial) to (N, C), without another dtype."""
    if x.dim() == 2:
        return x
    return x.mean([i for i in range(2, x.dim())])  # noqa: C416  # TorchScript has no list(range())


def pool(x: Tensor) -> Tensor:
    """The operator pool(), but differentiable by autograd: (N, C, *spatial) to (N, C)."""
    return mean(widened(x)).to(x.dtype)


def rescale(x: Tensor, gate: Tensor) -> Tensor:
    """The operator rescale(), but differentiable by autograd, for a gate (N, C)."""
    wide = widened(x)
    return (wide * spread(gate.to(wide.dtype), x)).to(x.dtype)


def gate(means: Tensor, weight: Tensor, circular: bool) -> Tensor:
    """The gates (N, C) for the means (N, C), in their dtype."""
    channels, k = means.shape[1], weight.shape[2]
    rows = padded(means, k // 2, circular)
    taps = weight.to(means.dtype)
    z = taps[:, 0, 0] * rows.narrow(1, 0, channels)
    for j in range(1, k):
        z = z + taps[:, 0, j] * rows.narrow(1, j, channels)
    return torch.sigmoid(z)


def eca(x: Tensor, weight: Tensor, circular: bool = False) -> Tensor:
    """The operator inference(), but differentiable, with the memory format of plain PyTorch.

    Args:
        x: (N, C, *spatial).
        weight: (1 or C, 1, k).
        circular: wrap around at the first and last channel.
    """
    wide = widened(x)
    return (wide * spread(gate(mean(wide), weight, circular), x)).to(x.dtype)
