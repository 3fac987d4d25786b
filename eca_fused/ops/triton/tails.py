"""The operators of a residual block's tail that pass over maps; see TailKernels in kernels.py."""

import math
from typing import Any

import torch
from torch import Tensor

from eca_fused.ops import tail_fakes
from eca_fused.ops.checks import ACTIVATIONS, check_dy, check_identity, check_x
from eca_fused.ops.library import operators, qualified
from eca_fused.ops.results import mask_bytes, mask_size
from eca_fused.ops.triton.coefficients import batch_statistics, tail_coefficients
from eca_fused.ops.triton.maps import in_planes
from eca_fused.ops.triton.operators import check_coefficients, empty_like, on_device, operator
from eca_fused.ops.triton.tail_launch import (
    moments as launch_moments,
    tail as launch_tail,
    tail_gradients as launch_tail_gradients,
    tail_sums as launch_tail_sums,
)

__all__ = [
    "batch_moments",
    "check_arguments",
    "check_mask",
    "compute_moments",
    "compute_tail",
    "compute_tail_gradients",
    "compute_tail_sums",
    "moments",
    "need_identity",
    "new_mask",
    "tail",
    "tail_forward",
    "tail_gradients",
    "tail_sums",
    "tail_training",
]

# ---- what they check, beyond the maps ----


def check_arguments(
    x: Tensor,
    identity: Tensor | None,
    dy: Tensor | None,
    activation: int,
    coefficients: dict[str, tuple[Tensor, int, int]],
) -> None:
    """Raise TypeError or ValueError for arguments that do not fit.

    Args:
        x, identity, dy: the maps; None for those that are absent.
        activation: a place in ACTIVATIONS.
        coefficients: by name, how many there are and of how many dimensions of x, (C,) or (N, C).
    """
    check_x(x)
    if identity is not None:
        check_identity(x, identity)
    if dy is not None:
        check_dy(x, dy)
    shapes = {
        name: (t, (kinds, *x.shape[2 - dims : 2]))
        for name, (t, kinds, dims) in coefficients.items()
    }
    check_coefficients(x, activation, ACTIVATIONS, shapes)


def bits_size(x: Tensor, activation: int) -> int:
    return mask_size(x) if ACTIVATIONS[activation] == "relu" else 0


def check_mask(mask: Tensor, x: Tensor, activation: int) -> None:
    size = bits_size(x, activation)
    fits = mask.shape == (size,) and mask.dtype == torch.uint8 and mask.device == x.device
    if not (fits and mask.is_contiguous()):
        raise ValueError(
            f"expected mask as the forward operator returned it for x, {size} bytes, got "
            f"{tuple(mask.shape)}, {mask.dtype}, on {mask.device}"
        )


def new_mask(x: Tensor, activation: int, needed: bool) -> Tensor:
    """Bytes for ReLU's mask; none for other activations, or if it is not needed."""
    size = bits_size(x, activation) if needed else 0
    # The same bytes on every run, those too that only the other layout would need.
    whole = size == mask_bytes(x, in_planes(x))
    return (x.new_empty if whole else x.new_zeros)(size, dtype=torch.uint8)


def need_identity(identity: Tensor | None, needed: bool, what: str) -> None:
    if needed and identity is None:
        raise ValueError(f"expected identity for {what}, got None")


# ---- the operators ----


def compute_moments(x: Tensor) -> Tensor:
    check_x(x)
    found = x.new_empty((2, *x.shape[:2]), dtype=torch.float64)
    if x.numel() == 0:
        return found.zero_()
    with on_device(x):
        launch_moments(x, found)
    return found


def compute_tail(
    x: Tensor,
    identity: Tensor | None,
    planes: Tensor,
    channels: Tensor,
    activation: int,
    need_mask: bool,
) -> tuple[Tensor, Tensor]:
    check_arguments(
        x, identity, None, activation, {"planes": (planes, 2, 2), "channels": (channels, 3, 1)}
    )
    y, mask = empty_like(x), new_mask(x, activation, need_mask)
    if x.numel() != 0:
        with on_device(x):
            kept = None if mask.numel() == 0 else mask
            launch_tail(x, identity, planes, channels, activation, y, kept)
    return y, mask


def compute_tail_sums(
    dy: Tensor,
    x: Tensor,
    identity: Tensor | None,
    mask: Tensor,
    planes: Tensor,
    channels: Tensor,
    activation: int,
    identity_sum: bool,
) -> Tensor:
    check_arguments(
        x, identity, dy, activation, {"planes": (planes, 2, 2), "channels": (channels, 3, 1)}
    )
    check_mask(mask, x, activation)
    need_identity(identity, identity_sum, "its sum")
    sums = x.new_empty((3 if identity_sum else 2, *x.shape[:2]), dtype=torch.float64)
    if x.numel() == 0:
        return sums.zero_()
    with on_device(x):
        launch_tail_sums(dy, x, identity, mask, planes, channels, activation, sums)
    return sums


def compute_tail_gradients(
    dy: Tensor,
    x: Tensor,
    identity: Tensor | None,
    mask: Tensor,
    planes: Tensor,
    channels: Tensor,
    gradient_planes: Tensor,
    gradient_channels: Tensor,
    activation: int,
    by_x: bool,
    by_identity: bool,
    need_dx: bool,
    need_d_identity: bool,
) -> tuple[Tensor, Tensor]:
    coefficients = {
        "planes": (planes, 2, 2),
        "channels": (channels, 3, 1),
        "gradient_planes": (gradient_planes, 2, 2),
        "gradient_channels": (gradient_channels, 4, 1),
    }
    check_arguments(x, identity, dy, activation, coefficients)
    check_mask(mask, x, activation)
    need_identity(identity, by_identity, "a gradient that it is part of")
    dx = empty_like(x) if need_dx else None
    d_identity = empty_like(x) if need_d_identity else None
    if x.numel() != 0 and (need_dx or need_d_identity):
        with on_device(x):
            launch_tail_gradients(
                dy,
                x,
                identity,
                mask,
                planes,
                channels,
                gradient_planes,
                gradient_channels,
                activation,
                by_x,
                by_identity,
                dx,
                d_identity,
            )
    return (
        x.new_empty(0) if dx is None else dx,
        x.new_empty(0) if d_identity is None else d_identity,
    )


for _name, _compute, _fake in (
    ("moments", compute_moments, tail_fakes.moments),
    ("tail", compute_tail, tail_fakes.tail),
    ("tail_sums", compute_tail_sums, tail_fakes.tail_sums),
    ("tail_gradients", compute_tail_gradients, tail_fakes.tail_gradients),
):
    operator(qualified(f"triton_{_name}"), mutates_args=())(_compute).register_fake(_fake)

moments = operators.triton_moments.default
tail = operators.triton_tail.default
tail_sums = operators.triton_tail_sums.default
tail_gradients = operators.triton_tail_gradients.default


# ---- not operators: they only call those ----


def batch_moments(x: Tensor, *_: Any) -> tuple[Tensor, Tensor, Tensor]:
    """Does not update running statistics."""
    planes = moments(x)
    return planes, *batch_statistics(planes, math.prod(x.shape[2:]))


def tail_training(*arguments: Any) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    return tail_forward(*arguments, need_mask=True)


def tail_forward(
    x: Tensor,
    identity: Tensor | None,
    weight: Tensor | None,
    means: Tensor | None,
    gate: Tensor | None,
    scale: Tensor | None,
    *rest: Any,
    need_mask: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    coefficients: Any = tail_coefficients
    planes, channels, made, distance = coefficients(x, weight, means, gate, scale, *rest[:-1], True)
    y, mask = tail(x, identity, planes, channels[3:], rest[-1], need_mask)
    return y, mask, planes, channels[3:], made, distance
