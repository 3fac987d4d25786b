"""The Triton backend. This module implements the interface Kernels, see ops/kernels.py.

It serves GPUs that the extension was not compiled for, and torch.compile, which traces through
these operators down to the kernels. Importing it imports Triton, so backend.py does so on demand.
"""

from torch import Tensor

from eca_fused.ops import fakes, flops, library, writing
from eca_fused.ops.checks import check, check_dy, check_gate, check_out, check_saved, check_x
from eca_fused.ops.library import qualified
from eca_fused.ops.triton.block_tails import block_tail, block_tail_backward, tail_inference
from eca_fused.ops.triton.coefficients import (
    tail_coefficients,
    tail_gradient_coefficients,
    tail_totals,
)
from eca_fused.ops.triton.gating import activated_sums, gated, gated_gradients
from eca_fused.ops.triton.launch import (
    backward as launch_backward,
    forward as launch_forward,
    pool as launch_pool,
    rescale as launch_rescale,
    rescale_backward as launch_rescale_backward,
)
from eca_fused.ops.triton.maps import apart, in_planes, overlap, readable, same_memory
from eca_fused.ops.triton.operators import INTERPRETED, empty_like, on_device, operator
from eca_fused.ops.triton.tails import (
    batch_moments,
    moments,
    tail,
    tail_gradients,
    tail_sums,
    tail_training,
)

__all__ = [
    "activated_sums",
    "backward",
    "batch_moments",
    "block_tail",
    "block_tail_backward",
    "description",
    "devices",
    "forward",
    "gated",
    "gated_gradients",
    "gating_devices",
    "inference",
    "inference_",
    "inference_into",
    "moments",
    "name",
    "one_pass_gating_devices",
    "one_pass_tail_devices",
    "pool",
    "rescale",
    "rescale_backward",
    "tail",
    "tail_coefficients",
    "tail_devices",
    "tail_gradient_coefficients",
    "tail_gradients",
    "tail_inference",
    "tail_sums",
    "tail_totals",
    "tail_training",
    "whole_tail_devices",
]

name = "triton"
devices = frozenset({"cpu", "cuda"} if INTERPRETED else {"cuda"})
tail_devices = devices
one_pass_tail_devices = devices
whole_tail_devices: frozenset[str] = frozenset()
gating_devices = devices
one_pass_gating_devices: frozenset[str] = frozenset()
description = "its interpreter, on any device: slow, for tests" if INTERPRETED else "GPUs"


@operator(qualified("triton_forward"), mutates_args=())
def _forward(x: Tensor, weight: Tensor, circular: bool = False) -> tuple[Tensor, Tensor, Tensor]:
    check(x, weight, circular)
    y = empty_like(x)
    with on_device(x):
        kept = launch_forward(x, weight, circular, y, keep=True)
    assert kept is not None
    return y, *kept


@operator(qualified("triton_inference"), mutates_args=())
def _inference(x: Tensor, weight: Tensor, circular: bool = False) -> Tensor:
    check(x, weight, circular)
    y = empty_like(x)
    with on_device(x):
        launch_forward(x, weight, circular, y, keep=False)
    return y


def _write(x: Tensor, weight: Tensor, circular: bool, out: Tensor, name: str) -> None:
    """Write y into out, which may be x; `name` is the caller's name for out."""
    check(x, weight, circular)
    check_out(x, out)
    if x.numel() == 0:
        return
    planes = in_planes(x)
    source = readable(x, planes)
    shared = overlap(source, out)
    same = shared and same_memory(source, out)
    if overlap(weight, out):  # some of y may be written before the last of the taps is read
        weight = weight.clone()
    with on_device(x):
        if apart(out, planes) and (same or not shared):
            launch_forward(source, weight, circular, source if same else out, keep=False)
            return
        if any(
            size > 1 and stride == 0 for size, stride in zip(out.shape, out.stride(), strict=True)
        ):
            raise RuntimeError(
                f"more than one element of {name} refers to the same memory, as after expand(), so "
                "it cannot be written in place; clone() it first"
            )
        y = empty_like(x) if source is x else source
        launch_forward(source, weight, circular, y, keep=False)
        out.copy_(y)


# The operators without the leading "_" also check gradients and count writes: see writing.py.
@operator(qualified("_triton_inference_"), mutates_args=("x",))
def _inference_(x: Tensor, weight: Tensor, circular: bool = False) -> None:
    _write(x, weight, circular, x, "x")


@operator(qualified("_triton_inference_into"), mutates_args=("out",))
def _inference_into(x: Tensor, weight: Tensor, out: Tensor, circular: bool = False) -> None:
    _write(x, weight, circular, out, "out")


@operator(qualified("triton_backward"), mutates_args=())
def _backward(
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
    dx = empty_like(x) if need_dx else None
    dweight = weight.new_empty(weight.shape) if need_dweight else None
    if x.shape[0] == 0 or x.shape[1] == 0:
        if dweight is not None:
            dweight.zero_()
    elif need_dx or need_dweight:
        with on_device(x):
            launch_backward(dy, x, weight, mean, gate, circular, dx, dweight)
    unused = x.new_empty(0)
    return unused if dx is None else dx, unused.clone() if dweight is None else dweight


@operator(qualified("triton_pool"), mutates_args=())
def _pool(x: Tensor) -> Tensor:
    check_x(x)
    mean = x.new_empty(x.shape[:2])
    if mean.numel() != 0:
        with on_device(x):
            launch_pool(x, mean)
    return mean


@operator(qualified("triton_rescale"), mutates_args=())
def _rescale(x: Tensor, gate: Tensor, shift: Tensor | None = None) -> Tensor:
    check_gate(x, gate, shift)
    y = empty_like(x)
    if x.numel() != 0:
        with on_device(x):
            launch_rescale(x, gate, shift, y)
    return y


@operator(qualified("triton_rescale_backward"), mutates_args=())
def _rescale_backward(
    dy: Tensor, x: Tensor, gate: Tensor, need_dx: bool = True
) -> tuple[Tensor, Tensor]:
    check_gate(x, gate)
    check_dy(x, dy)
    dx = empty_like(x) if need_dx else None
    dgate = gate.new_empty(gate.shape)
    if x.numel() == 0:
        dgate.zero_()
    else:
        with on_device(x):
            launch_rescale_backward(dy, x, gate, dx, dgate)
    return x.new_empty(0) if dx is None else dx, dgate


# Without these, torch would trace the operators' bodies to find the strides of their results.
for _body, _fake in (
    (_forward, fakes.forward),
    (_inference, fakes.inference),
    (_inference_, fakes.inference_),
    (_inference_into, fakes.inference_into),
    (_backward, fakes.backward),
    (_pool, fakes.pool),
    (_rescale, fakes.rescale),
    (_rescale_backward, fakes.rescale_backward),
):
    _body.register_fake(_fake)

_operators = library.operators
inference_ = _operators._triton_inference_.default
inference_into = _operators._triton_inference_into.default
writing.define("triton_", inference_, inference_into)
flops.register("triton_")
forward = _operators.triton_forward.default
backward = _operators.triton_backward.default
inference = _operators.triton_inference.default
pool = _operators.triton_pool.default
rescale = _operators.triton_rescale.default
rescale_backward = _operators.triton_rescale_backward.default
