"""The operators of a block's tail with ECA's gate in one call; see TailKernels in kernels.py.

Where whole planes do not fit into a program, they launch the passes of a tail.
"""

from typing import Any

import torch
from torch import Tensor

from eca_fused.ops import tail_fakes
from eca_fused.ops.checks import ACTIVATIONS, check, check_saved
from eca_fused.ops.library import operators, qualified
from eca_fused.ops.results import sums_dtype
from eca_fused.ops.tail import NormArguments
from eca_fused.ops.triton.block_tail_launch import (
    block_tail as launch_block_tail,
    block_tail_backward as launch_block_tail_backward,
)
from eca_fused.ops.triton.coefficients import (
    compute_coefficients,
    compute_gradient_coefficients,
    compute_totals,
    tail_coefficients,
)
from eca_fused.ops.triton.operators import check_coefficients, empty_like, on_device, operator
from eca_fused.ops.triton.tails import (
    check_arguments,
    check_mask,
    compute_moments,
    compute_tail,
    compute_tail_gradients,
    compute_tail_sums,
    need_identity,
    new_mask,
    tail_forward,
)

__all__ = ["block_tail", "block_tail_backward", "tail_inference"]


def _check(
    x: Tensor,
    identity: Tensor | None,
    dy: Tensor | None,
    weight: Tensor,
    scale: Tensor | None,
    channels: Tensor,
    circular: bool,
    activation: int,
) -> None:
    check(x, weight, circular)
    check_arguments(x, identity, dy, activation, {"channels": (channels, 6, 1)})
    if scale is not None:
        check_coefficients(x, activation, ACTIVATIONS, {"scale": (scale, tuple(x.shape[:1]))})


def _norms(channels: Tensor) -> tuple[NormArguments, NormArguments]:
    """Both norms as the operators between the passes take them, from their coefficients."""
    shift, alpha, beta, centre, identity_scale, identity_centre = channels.unbind()
    one = torch.ones_like(alpha)  # a variance that changes nothing
    return (centre, one, alpha, beta, 0.0), (identity_centre, one, identity_scale, shift, 0.0)


def compute_block_tail(
    x: Tensor,
    identity: Tensor | None,
    weight: Tensor,
    scale: Tensor | None,
    channels: Tensor,
    circular: bool,
    activation: int,
    need_mask: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    _check(x, identity, None, weight, scale, channels, circular, activation)
    y, mask = empty_like(x), new_mask(x, activation, need_mask)
    distance, gate = (x.new_empty(x.shape[:2], dtype=sums_dtype(x)) for _ in range(2))
    if x.numel() == 0:
        return y, mask, distance.zero_(), gate.zero_()
    taps = weight.contiguous()
    kept = None if mask.numel() == 0 else mask
    with on_device(x):
        given = x, identity, taps, scale, channels, circular, activation
        if launch_block_tail(*given, y, kept, distance, gate):
            return y, mask, distance, gate
    del y, mask  # or the largest maps would be there twice
    means = compute_moments(x)[0]
    own, other = _norms(channels)
    planes, rows, gate, distance = compute_coefficients(
        x, taps, means, None, scale, *own, *other, circular, True
    )
    y, mask = compute_tail(x, identity, planes, rows[3:], activation, need_mask)
    return y, mask, distance, gate


def compute_block_tail_backward(
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
    _check(x, identity, dy, weight, scale, channels, circular, activation)
    check_mask(mask, x, activation)
    check_saved(x, distance, gate)
    need_identity(identity, identity_sum, "its sum")
    dx = empty_like(x) if need_dx else None
    d_identity = empty_like(x) if need_d_identity else None
    dweight = weight.new_empty(weight.shape) if need_dweight else None
    sums = x.new_empty((3 if identity_sum else 2, *x.shape[:2]), dtype=torch.float64)
    dmean = gate.new_empty(gate.shape)

    def results() -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        a, b = (x.new_empty(0) if t is None else t for t in (dx, d_identity))
        return a, b, sums, dmean, weight.new_empty(0) if dweight is None else dweight

    if x.numel() == 0:
        for t in (sums, dmean, dweight):
            if t is not None:
                t.zero_()
        return results()
    taps, distance, gate = weight.contiguous(), distance.contiguous(), gate.contiguous()
    with on_device(x):
        given = dy, x, identity, mask, taps, scale, channels, distance, gate, circular, activation
        if launch_block_tail_backward(*given, sums, dmean, dx, d_identity, dweight):
            return results()
    dx = d_identity = None  # likewise
    own, other = _norms(channels)
    of_gate = x, None, None, gate, scale
    planes, rows, _, _ = compute_coefficients(*of_gate, *own, *other, circular, True)
    maps = dy, x, identity, mask, planes, rows[3:]
    sums = compute_tail_sums(*maps, activation, identity_sum)
    of_sums = x, sums, taps, gate, scale, None, distance
    _, _, _, dmean, dtaps = compute_totals(*of_sums, *own, circular, False, False, need_dweight)
    dweight = dtaps if need_dweight else None
    of_mean = x, None, None, 0.0, 0.0, gate, scale, dmean
    found = compute_gradient_coefficients(*of_mean, *own, *other, True)
    flags = activation, False, False, need_dx, need_d_identity
    dx, d_identity = compute_tail_gradients(*maps, found[0], found[1], *flags)
    return results()


for _name, _compute, _fake in (
    ("block_tail", compute_block_tail, tail_fakes.block_tail),
    ("block_tail_backward", compute_block_tail_backward, tail_fakes.block_tail_backward),
):
    operator(qualified(f"triton_{_name}"), mutates_args=())(_compute).register_fake(_fake)

block_tail = operators.triton_block_tail.default
block_tail_backward = operators.triton_block_tail_backward.default


# ---- not an operator: it only calls those ----


def tail_inference(
    x: Tensor,
    identity: Tensor | None,
    weight: Tensor | None,
    means: Tensor | None,
    gate: Tensor | None,
    scale: Tensor | None,
    *rest: Any,
) -> Tensor:
    if weight is None or means is not None:
        return tail_forward(x, identity, weight, means, gate, scale, *rest, need_mask=False)[0]
    *norms, circular, activation = rest
    channels = tail_coefficients(x, None, None, None, None, *norms, False, False)[1]
    y: Tensor = block_tail(x, identity, weight, scale, channels, circular, activation, False)[0]
    return y
