"""The operators between the passes of a residual block's tail; see TailKernels in kernels.py."""

import torch
from torch import Tensor

from eca_fused.ops import tail_fakes
from eca_fused.ops.checks import check, check_x
from eca_fused.ops.library import operators, qualified
from eca_fused.ops.results import sums_dtype
from eca_fused.ops.triton.coefficient_launch import (
    NormTensors,
    batch_statistics as launch_batch_statistics,
    tail_coefficients as launch_tail_coefficients,
    tail_gradient_coefficients as launch_tail_gradient_coefficients,
    tail_totals as launch_tail_totals,
)
from eca_fused.ops.triton.operators import on_device, operator

__all__ = [
    "batch_statistics",
    "compute_coefficients",
    "compute_gradient_coefficients",
    "compute_totals",
    "tail_coefficients",
    "tail_gradient_coefficients",
    "tail_totals",
]

# ---- what they take and give ----


def _given(
    x: Tensor, name: str, t: Tensor | None, sizes: tuple[int, ...], dtype: torch.dtype | None = None
) -> Tensor | None:
    """A small tensor as the kernels take it: contiguous.

    Raises:
        ValueError: it is not of these sizes, of the dtype or a floating one, or on the device of x.
    """
    if t is None:
        return None
    of_dtype = t.dtype.is_floating_point if dtype is None else t.dtype == dtype
    if t.shape != sizes or not of_dtype or t.device != x.device:
        raise ValueError(
            f"expected {name} of shape {tuple(sizes)} and "
            f"{'a floating dtype' if dtype is None else dtype} on {x.device}, got "
            f"{tuple(t.shape)}, {t.dtype}, on {t.device}"
        )
    return t.contiguous()


def _norm(
    x: Tensor,
    mean: Tensor | None,
    variance: Tensor | None,
    gamma: Tensor | None,
    beta: Tensor | None,
) -> NormTensors:
    """Raises ValueError as _given(), and for one of the statistics without the other."""
    if (mean is None) != (variance is None):
        raise ValueError("expected mean and variance of a norm, or neither, got one of them")
    tensors = {"mean": mean, "variance": variance, "gamma": gamma, "beta": beta}
    return NormTensors(*(_given(x, name, t, x.shape[1:2]) for name, t in tensors.items()))


def _taps(weight: Tensor | None) -> Tensor | None:
    return None if weight is None else weight.contiguous()


def _rows(x: Tensor, kinds: int, needed: bool = True) -> Tensor | None:
    """(kinds, C) in the dtype of sums; None if it is not needed."""
    return x.new_empty((kinds, x.shape[1]), dtype=sums_dtype(x)) if needed else None


def _planes(x: Tensor, *kinds: int, needed: bool = True) -> Tensor | None:
    """(*kinds, N, C), likewise."""
    return x.new_empty((*kinds, *x.shape[:2]), dtype=sums_dtype(x)) if needed else None


def _gradient(of: Tensor | None, needed: bool) -> Tensor | None:
    """A new tensor like a parameter; None if it is not needed."""
    return None if of is None or not needed else of.new_empty(of.shape)


def _results(x: Tensor, *results: Tensor | None) -> list[Tensor]:
    """Empty tensors for those that were not needed."""
    return [x.new_empty(0) if t is None else t for t in results]


# ---- the operators ----


def compute_statistics(planes: Tensor, pixels: int) -> tuple[Tensor, Tensor]:
    fits = planes.dim() == 3 and planes.shape[0] == 2 and planes.dtype == torch.float64
    if not (fits and planes.is_contiguous() and planes.shape[1] > 0 and pixels > 0):
        raise ValueError(
            "expected planes (2, N, C) as moments() returns them for a map with elements, got "
            f"{tuple(planes.shape)}, {planes.dtype}, and {pixels} pixels"
        )
    mean, variance = (planes.new_empty(planes.shape[2]) for _ in range(2))
    if planes.shape[2] != 0:
        with on_device(planes):
            launch_batch_statistics(planes, pixels, mean, variance)
    return mean, variance


def compute_coefficients(
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
    if weight is not None:
        check(x, weight, circular)
        if need_planes and (means is None or gate is not None):
            raise ValueError("expected the means of x for taps, and no gate")
    made = _planes(x, needed=weight is not None and need_planes)
    distance = _planes(x, needed=means is not None)
    planes, rows = _planes(x, 2, needed=need_planes), _rows(x, 6)
    assert rows is not None, "needed"
    given = (
        None if made is None else _taps(weight),
        _given(x, "means", means, x.shape[:2]),
        _given(x, "gate", gate, x.shape[:2]),
        _given(x, "scale", scale, x.shape[:1]),
        _norm(x, mean, variance, gamma, beta),
        eps,
        _norm(x, identity_mean, identity_variance, identity_gamma, identity_beta),
        identity_eps,
        circular,
    )
    if x.shape[1] != 0:
        with on_device(x):
            launch_tail_coefficients(x, *given, planes, rows, made, distance)
    found = _results(x, planes, rows, made, distance)
    return found[0], found[1], found[2], found[3]


def compute_totals(
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
    if weight is not None:
        check(x, weight, circular)
        if gate is None or dmean is not None:
            raise ValueError("expected the gate that the taps made, and no dmean beside taps")
    if (weight is not None or dmean is not None) and distance is None:
        raise ValueError("expected distance, as the forward operator returned it")
    kinds = 3 if sums.dim() == 3 and sums.shape[0] == 3 else 2
    doubles = _given(x, "sums", sums, (kinds, *x.shape[:2]), torch.float64)
    assert doubles is not None, "given"
    made = _planes(x, needed=weight is not None)
    totals = x.new_empty((4, x.shape[1]), dtype=torch.float64)
    dgate, dscale = _gradient(gate, need_dgate), _gradient(scale, need_dscale)
    dweight = _gradient(weight, need_dweight)
    given = (
        _taps(weight),
        _given(x, "gate", gate, x.shape[:2]),
        _given(x, "scale", scale, x.shape[:1]),
        made if weight is not None else _given(x, "dmean", dmean, x.shape[:2]),
        _given(x, "distance", distance, x.shape[:2], sums_dtype(x)),
        _norm(x, mean, variance, gamma, beta),
        eps,
        circular,
    )
    if x.shape[0] != 0 and x.shape[1] != 0:
        with on_device(x):
            launch_tail_totals(x, doubles, *given, totals, dgate, dscale, dweight)
    else:
        for t in (totals, dscale, dweight):
            if t is not None:
                t.zero_()
    found = _results(x, dgate, dscale, made, dweight)
    return totals, found[0], found[1], found[2], found[3]


def compute_gradient_coefficients(
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
    of_channels = (4, x.shape[1])
    planes, rows = _planes(x, 2, needed=need_planes), _rows(x, 4, need_planes)
    summed = totals is not None
    gradients = tuple(
        _gradient(parameter, summed) for parameter in (gamma, beta, identity_gamma, identity_beta)
    )
    given = (
        _given(x, "totals", totals, of_channels, torch.float64),
        _given(x, "shares", shares, of_channels, torch.float64),
        values,
        identity_values,
        _given(x, "gate", gate, x.shape[:2]),
        _given(x, "scale", scale, x.shape[:1]),
        _given(x, "dmean", dmean, x.shape[:2]),
        _norm(x, mean, variance, gamma, beta),
        eps,
        _norm(x, identity_mean, identity_variance, identity_gamma, identity_beta),
        identity_eps,
    )
    if x.shape[1] != 0 and (need_planes or summed):
        with on_device(x):
            launch_tail_gradient_coefficients(x, *given, planes, rows, gradients)
    found = _results(x, planes, rows, *gradients)
    return found[0], found[1], found[2], found[3], found[4], found[5]


for _name, _compute, _fake in (
    ("batch_statistics", compute_statistics, tail_fakes.batch_statistics),
    ("tail_coefficients", compute_coefficients, tail_fakes.tail_coefficients),
    ("tail_totals", compute_totals, tail_fakes.tail_totals),
    (
        "tail_gradient_coefficients",
        compute_gradient_coefficients,
        tail_fakes.tail_gradient_coefficients,
    ),
):
    operator(qualified(f"triton_{_name}"), mutates_args=())(_compute).register_fake(_fake)

batch_statistics = operators.triton_batch_statistics.default
tail_coefficients = operators.triton_tail_coefficients.default
tail_totals = operators.triton_tail_totals.default
tail_gradient_coefficients = operators.triton_tail_gradient_coefficients.default
