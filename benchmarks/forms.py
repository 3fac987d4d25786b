"""ECA as plain PyTorch computes it, in the forms that are compared, and how far a result is off."""

from collections.abc import Callable

import torch
from torch import Tensor

import eca_fused

Layer = Callable[[Tensor, Tensor], Tensor]


def shifted(x: Tensor, weight: Tensor) -> Tensor:
    """ECA with the convolution as shifted additions, which torch.compile can fuse better."""
    mean = x.mean((2, 3))  # (N, C)
    k = weight.shape[-1]
    rows = torch.nn.functional.pad(mean, (k // 2, k // 2))
    z = weight[0, 0, 0] * rows[:, : x.shape[1]]
    for j in range(1, k):
        z = z + weight[0, 0, j] * rows[:, j : j + x.shape[1]]
    gate: Tensor = torch.sigmoid(z)[:, :, None, None].to(x.dtype)
    return x * gate


def plain(x: Tensor, weight: Tensor) -> Tensor:
    return eca_fused.reference.eca(x, weight)


def results(layer: Layer, x: Tensor, weight: Tensor, dy: Tensor) -> tuple[Tensor, ...]:
    """y, dx and dweight."""
    x, weight = x.detach().clone().requires_grad_(), weight.detach().clone().requires_grad_()
    with torch.enable_grad():
        y = layer(x, weight)
        return y.detach(), *torch.autograd.grad(y, (x, weight), dy)


def worst(got: Tensor, want: Tensor) -> float:
    """Largest error relative to the largest value; NaN where there is one."""
    return float((got.double() - want).abs().max() / want.abs().max())
