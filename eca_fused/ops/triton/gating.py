"""The operators of attention after an activation; see GatingKernels in kernels.py."""

import torch
from torch import Tensor

from eca_fused.ops import gating_fakes
from eca_fused.ops.checks import check_dy, check_x
from eca_fused.ops.gating import ACTIVATIONS
from eca_fused.ops.library import operators, qualified
from eca_fused.ops.triton.gating_launch import (
    activated_sums as launch_activated_sums,
    gated as launch_gated,
    gated_gradients as launch_gated_gradients,
)
from eca_fused.ops.triton.operators import check_coefficients, empty_like, on_device, operator

__all__ = ["activated_sums", "gated", "gated_gradients"]


def _check(
    x: Tensor,
    dy: Tensor | None,
    activation: int,
    coefficients: dict[str, tuple[Tensor, tuple[int, ...]]],
) -> None:
    """Raise TypeError or ValueError for arguments that do not fit.

    Args:
        x, dy: the maps; None for no dy.
        activation: a place in ACTIVATIONS.
        coefficients: by name, with the shapes that they must have.
    """
    check_x(x)
    if dy is not None:
        check_dy(x, dy)
    check_coefficients(x, activation, ACTIVATIONS, coefficients)


@operator(qualified("triton_activated_sums"), mutates_args=())
def _activated_sums(
    dy: Tensor | None, x: Tensor, channels: Tensor, activation: int, for_norm: bool
) -> Tensor:
    _check(x, dy, activation, {"channels": (channels, (3, *x.shape[1:2]))})
    if for_norm and dy is None:
        raise ValueError("expected dy for the sums of a norm's gradients, got None")
    sums = x.new_empty((5 if for_norm else 1, *x.shape[:2]), dtype=torch.float64)
    if x.numel() == 0:
        return sums.zero_()
    with on_device(x):
        launch_activated_sums(dy, x, channels, activation, sums)
    return sums


@operator(qualified("triton_gated"), mutates_args=())
def _gated(x: Tensor, gate: Tensor, channels: Tensor, activation: int) -> Tensor:
    coefficients = {"gate": (gate, x.shape[:2]), "channels": (channels, (3, *x.shape[1:2]))}
    _check(x, None, activation, coefficients)
    y = empty_like(x)
    if x.numel() != 0:
        with on_device(x):
            launch_gated(x, gate, channels, activation, y)
    return y


@operator(qualified("triton_gated_gradients"), mutates_args=())
def _gated_gradients(
    dy: Tensor,
    x: Tensor,
    planes: Tensor,
    channels: Tensor,
    gradient_channels: Tensor,
    activation: int,
    by_x: bool,
) -> Tensor:
    coefficients = {
        "planes": (planes, (2, *x.shape[:2])),
        "channels": (channels, (3, *x.shape[1:2])),
        "gradient_channels": (gradient_channels, (2, *x.shape[1:2])),
    }
    _check(x, dy, activation, coefficients)
    dx = empty_like(x)
    if x.numel() != 0:
        with on_device(x):
            launch_gated_gradients(dy, x, planes, channels, gradient_channels, activation, by_x, dx)
    return dx


for _body, _fake in (
    (_activated_sums, gating_fakes.activated_sums),
    (_gated, gating_fakes.gated),
    (_gated_gradients, gating_fakes.gated_gradients),
):
    _body.register_fake(_fake)

activated_sums = operators.triton_activated_sums.default
gated = operators.triton_gated.default
gated_gradients = operators.triton_gated_gradients.default
