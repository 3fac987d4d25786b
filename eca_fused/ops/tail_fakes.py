"""Fake (meta) implementations of the operators of a residual block's tail."""

import torch
from torch import Tensor

from eca_fused.ops.checks import ACTIVATIONS, check, check_dy, check_identity, check_x
from eca_fused.ops.results import mask_size, output_strides, sums_dtype
from eca_fused.ops.tail import GATE, IDENTITY, SCALE, WEIGHT, X

__all__ = [
    "batch_moments",
    "batch_statistics",
    "block_tail",
    "block_tail_backward",
    "moments",
    "tail",
    "tail_backward",
    "tail_coefficients",
    "tail_gradient_coefficients",
    "tail_gradients",
    "tail_inference",
    "tail_sums",
    "tail_totals",
    "tail_training",
]


def _like(x: Tensor, needed: bool = True) -> Tensor:
    return x.new_empty_strided(x.shape, output_strides(x)) if needed else x.new_empty(0)


def _doubles(x: Tensor, kinds: int) -> Tensor:
    return x.new_empty((kinds, *x.shape[:2]), dtype=torch.float64)


def _mask(x: Tensor, activation: int, needed: bool) -> Tensor:
    kept = needed and ACTIVATIONS[activation] == "relu"
    return x.new_empty(mask_size(x) if kept else 0, dtype=torch.uint8)


def _check(x: Tensor, identity: Tensor | None, dy: Tensor | None = None) -> None:
    check_x(x)
    if identity is not None:
        check_identity(x, identity)
    if dy is not None:
        check_dy(x, dy)


def moments(x: Tensor) -> Tensor:
    check_x(x)
    return _doubles(x, 2)


def tail(
    x: Tensor,
    identity: Tensor | None,
    planes: Tensor,
    channels: Tensor,
    activation: int,
    need_mask: bool,
) -> tuple[Tensor, Tensor]:
    _check(x, identity)
    return _like(x), _mask(x, activation, need_mask)


def tail_sums(
    dy: Tensor,
    x: Tensor,
    identity: Tensor | None,
    mask: Tensor,
    planes: Tensor,
    channels: Tensor,
    activation: int,
    identity_sum: bool,
) -> Tensor:
    _check(x, identity, dy)
    return _doubles(x, 3 if identity_sum else 2)


def tail_gradients(
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
    _check(x, identity, dy)
    return _like(x, need_dx), _like(x, need_d_identity)


def block_tail(
    x: Tensor,
    identity: Tensor | None,
    weight: Tensor,
    scale: Tensor | None,
    channels: Tensor,
    circular: bool,
    activation: int,
    need_mask: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    _check(x, identity)
    check(x, weight, circular)
    distance, gate = (x.new_empty(x.shape[:2], dtype=sums_dtype(x)) for _ in range(2))
    return _like(x), _mask(x, activation, need_mask), distance, gate


def block_tail_backward(
    dy: Tensor,
    x: Tensor,
    identity: Tensor | None,
    mask: Tensor,
    weight: Tensor,
    scale: Tensor | None,
    channels: Tensor,
    distance: Tensor,
    gate: Tensor,
    circular: bool,
    activation: int,
    identity_sum: bool,
    need_dx: bool,
    need_d_identity: bool,
    need_dweight: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    _check(x, identity, dy)
    check(x, weight, circular)
    return (
        _like(x, need_dx),
        _like(x, need_d_identity),
        _doubles(x, 3 if identity_sum else 2),
        x.new_empty(x.shape[:2], dtype=sums_dtype(x)),
        weight.new_empty(weight.shape if need_dweight else 0),
    )


def tail_inference(
    x: Tensor,
    identity: Tensor | None,
    weight: Tensor | None,
    means: Tensor | None,
    gate: Tensor | None,
    scale: Tensor | None,
    mean: Tensor | None,
    variance: Tensor | None,
    gamma: Tensor | None,
    beta: Tensor | None,
    eps: float,
    identity_mean: Tensor | None,
    identity_variance: Tensor | None,
    identity_gamma: Tensor | None,
    identity_beta: Tensor | None,
    identity_eps: float,
    circular: bool,
    activation: int,
) -> Tensor:
    _check(x, identity)
    if weight is not None:
        check(x, weight, circular)
    return _like(x)


# ---- between the passes ----


def _rows(x: Tensor, kinds: int, needed: bool = True) -> Tensor:
    """(kinds, C), in the dtype of sums over x."""
    return x.new_empty((kinds, x.shape[1]) if needed else 0, dtype=_dtype(x, needed))


def _planes(x: Tensor, needed: bool, kinds: int | None = None) -> Tensor:
    """(N, C) or (kinds, N, C), in the dtype of sums over x."""
    shape = x.shape[:2] if kinds is None else (kinds, *x.shape[:2])
    return x.new_empty(shape if needed else 0, dtype=_dtype(x, needed))


def _dtype(x: Tensor, needed: bool) -> torch.dtype:
    return sums_dtype(x) if needed else x.dtype


def _gradient(t: Tensor | None, x: Tensor, needed: bool) -> Tensor:
    if t is None or not needed:
        return x.new_empty(0)
    return t.new_empty(t.shape)


def batch_statistics(planes: Tensor, pixels: int) -> tuple[Tensor, Tensor]:
    mean, variance = (planes.new_empty(planes.shape[2]) for _ in range(2))
    return mean, variance


def tail_coefficients(
    x: Tensor,
    weight: Tensor | None,
    means: Tensor | None,
    gate: Tensor | None,
    scale: Tensor | None,
    mean: Tensor | None,
    variance: Tensor | None,
    gamma: Tensor | None,
    beta: Tensor | None,
    eps: float,
    identity_mean: Tensor | None,
    identity_variance: Tensor | None,
    identity_gamma: Tensor | None,
    identity_beta: Tensor | None,
    identity_eps: float,
    circular: bool,
    need_planes: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    check_x(x)
    made = weight is not None and need_planes
    return (
        _planes(x, need_planes, 2),
        _rows(x, 6),
        _planes(x, made),
        _planes(x, means is not None),
    )


def tail_totals(
    x: Tensor,
    sums: Tensor,
    weight: Tensor | None,
    gate: Tensor | None,
    scale: Tensor | None,
    dmean: Tensor | None,
    distance: Tensor | None,
    mean: Tensor | None,
    variance: Tensor | None,
    gamma: Tensor | None,
    beta: Tensor | None,
    eps: float,
    circular: bool,
    need_dgate: bool,
    need_dscale: bool,
    need_dweight: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    check_x(x)
    return (
        x.new_empty((4, x.shape[1]), dtype=torch.float64),
        _gradient(gate, x, need_dgate),
        _gradient(scale, x, need_dscale),
        _planes(x, weight is not None),
        _gradient(weight, x, need_dweight),
    )


def tail_gradient_coefficients(
    x: Tensor,
    totals: Tensor | None,
    shares: Tensor | None,
    values: float,
    identity_values: float,
    gate: Tensor | None,
    scale: Tensor | None,
    dmean: Tensor | None,
    mean: Tensor | None,
    variance: Tensor | None,
    gamma: Tensor | None,
    beta: Tensor | None,
    eps: float,
    identity_mean: Tensor | None,
    identity_variance: Tensor | None,
    identity_gamma: Tensor | None,
    identity_beta: Tensor | None,
    identity_eps: float,
    need_planes: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    check_x(x)
    summed = totals is not None
    return (
        _planes(x, need_planes, 2),
        _rows(x, 4, need_planes),
        _gradient(gamma, x, summed),
        _gradient(beta, x, summed),
        _gradient(identity_gamma, x, summed),
        _gradient(identity_beta, x, summed),
    )


# ---- a direction in one call ----


def batch_moments(
    x: Tensor,
    running_mean: Tensor | None = None,
    running_variance: Tensor | None = None,
    factor: float = 0.0,
) -> tuple[Tensor, Tensor, Tensor]:
    planes = moments(x)
    return planes, *batch_statistics(planes, 0)


def tail_training(
    x: Tensor,
    identity: Tensor | None,
    weight: Tensor | None,
    means: Tensor | None,
    gate: Tensor | None,
    scale: Tensor | None,
    mean: Tensor | None,
    variance: Tensor | None,
    gamma: Tensor | None,
    beta: Tensor | None,
    eps: float,
    identity_mean: Tensor | None,
    identity_variance: Tensor | None,
    identity_gamma: Tensor | None,
    identity_beta: Tensor | None,
    identity_eps: float,
    circular: bool,
    activation: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    _check(x, identity)
    return (
        _like(x),
        _mask(x, activation, True),
        _planes(x, True, 2),
        _rows(x, 6)[3:],
        _planes(x, weight is not None),
        _planes(x, means is not None),
    )


def tail_backward(
    dy: Tensor,
    x: Tensor,
    identity: Tensor | None,
    mask: Tensor,
    planes: Tensor,
    channels: Tensor,
    weight: Tensor | None,
    gate: Tensor | None,
    scale: Tensor | None,
    distance: Tensor | None,
    mean: Tensor | None,
    variance: Tensor | None,
    gamma: Tensor | None,
    beta: Tensor | None,
    eps: float,
    identity_mean: Tensor | None,
    identity_variance: Tensor | None,
    identity_gamma: Tensor | None,
    identity_beta: Tensor | None,
    identity_eps: float,
    values: float,
    identity_values: float,
    circular: bool,
    activation: int,
    needed: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    _check(x, identity, dy)
    summed = bool(values > 0 or identity_values > 0 or weight is not None or needed >> GATE)

    def need(place: int) -> bool:
        return bool(needed >> place & 1)

    return (
        _like(x, need(X)),
        _like(x, need(IDENTITY)),
        _gradient(weight, x, need(WEIGHT)),
        _gradient(gate, x, need(GATE)),
        _gradient(scale, x, need(SCALE)),
        _gradient(gamma, x, summed),
        _gradient(beta, x, summed),
        _gradient(identity_gamma, x, summed),
        _gradient(identity_beta, x, summed),
    )
