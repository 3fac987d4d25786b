"""Fake (meta) implementations of the operators of attention after an activation."""

import torch
from torch import Tensor

from eca_fused.ops.checks import check, check_dy, check_x
from eca_fused.ops.results import output_strides, sums_dtype

__all__ = ["activated_sums", "gated", "gated_block", "gated_gradients"]


def _like(x: Tensor) -> Tensor:
    return x.new_empty_strided(x.shape, output_strides(x))


def activated_sums(
    dy: Tensor | None, x: Tensor, channels: Tensor, activation: int, for_norm: bool
) -> Tensor:
    check_x(x)
    if dy is not None:
        check_dy(x, dy)
    return x.new_empty((5 if for_norm else 1, *x.shape[:2]), dtype=torch.float64)


def gated(x: Tensor, gate: Tensor, channels: Tensor, activation: int) -> Tensor:
    check_x(x)
    return _like(x)


def gated_gradients(
    dy: Tensor,
    x: Tensor,
    planes: Tensor,
    channels: Tensor,
    gradient_channels: Tensor,
    activation: int,
    by_x: bool,
) -> Tensor:
    check_x(x)
    check_dy(x, dy)
    return _like(x)


def gated_block(
    x: Tensor, weight: Tensor, channels: Tensor, circular: bool, activation: int
) -> tuple[Tensor, Tensor, Tensor]:
    check(x, weight, circular)
    mean, gate = (x.new_empty(x.shape[:2], dtype=sums_dtype(x)) for _ in range(2))
    return _like(x), mean, gate
