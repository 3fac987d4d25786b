"""Fake (meta) implementations of every backend's operators: shapes, dtypes and strides."""

from torch import Tensor

from eca_fused.ops.checks import check, check_dy, check_gate, check_out, check_saved, check_x
from eca_fused.ops.results import output_strides, sums_dtype

__all__ = [
    "_inference_",
    "_inference_into",
    "backward",
    "forward",
    "inference",
    "inference_",
    "inference_into",
    "pool",
    "rescale",
    "rescale_backward",
]


def _like(x: Tensor) -> Tensor:
    return x.new_empty_strided(x.shape, output_strides(x))


def forward(x: Tensor, weight: Tensor, circular: bool = False) -> tuple[Tensor, Tensor, Tensor]:
    check(x, weight, circular)
    mean, gate = (x.new_empty(x.shape[:2], dtype=sums_dtype(x)) for _ in range(2))
    return _like(x), mean, gate


def inference(x: Tensor, weight: Tensor, circular: bool = False) -> Tensor:
    check(x, weight, circular)
    return _like(x)


def inference_(x: Tensor, weight: Tensor, circular: bool = False) -> None:
    check(x, weight, circular)


def inference_into(x: Tensor, weight: Tensor, out: Tensor, circular: bool = False) -> None:
    check(x, weight, circular)
    check_out(x, out)


_inference_, _inference_into = inference_, inference_into


def backward(
    dy: Tensor,
    x: Tensor,
    weight: Tensor,
    mean: Tensor,
    gate: Tensor,
    circular: bool = False,
    need_dx: bool = True,
    need_dweight: bool = True,
) -> tuple[Tensor, Tensor]:
    check(x, weight, circular)
    check_dy(x, dy)
    check_saved(x, mean, gate)
    dx = _like(x) if need_dx else x.new_empty(0)
    dweight = weight.new_empty(weight.shape if need_dweight else 0)
    return dx, dweight


def pool(x: Tensor) -> Tensor:
    check_x(x)
    return x.new_empty(x.shape[:2])


def rescale(x: Tensor, gate: Tensor, shift: Tensor | None = None) -> Tensor:
    check_gate(x, gate, shift)
    return _like(x)


def rescale_backward(
    dy: Tensor, x: Tensor, gate: Tensor, need_dx: bool = True
) -> tuple[Tensor, Tensor]:
    check_gate(x, gate)
    check_dy(x, dy)
    return _like(x) if need_dx else x.new_empty(0), gate.new_empty(gate.shape)
