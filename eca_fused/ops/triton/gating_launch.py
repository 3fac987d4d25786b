"""Which kernels the operators of attention after an activation launch; as in launch.py.

Every map has elements here. The coefficients are contiguous, in the dtype of sums.
"""

from dataclasses import replace

from torch import Tensor

from eca_fused.ops.gating import ACTIVATIONS
from eca_fused.ops.triton import plan
from eca_fused.ops.triton.gating_passes import activated_parts, gated_gradient, gated_result
from eca_fused.ops.triton.launch import (
    Problem,
    finish_parts,
    pass_flags,
    pass_grid,
    problem,
    strides_of,
    wrap_triton,
)
from eca_fused.ops.triton.maps import in_planes, readable
from eca_fused.ops.triton.plan import Pass


def _plan(p: Problem, activation: int) -> Pass:
    return plan.tail(p.shape, ACTIVATIONS[activation] in ("silu", "gelu"))


def activated_sums(
    dy: Tensor | None, x: Tensor, channels: Tensor, activation: int, sums: Tensor
) -> None:
    """Write the sums of z, or of dy * z and what a norm's gradients need.

    Args:
        dy, x: (N, C, *spatial); without dy the sum of z.
        channels: (3, C), p, q and centre.
        activation: a place in ACTIVATIONS.
        sums: (1, N, C), or (5, N, C) with those for a norm, in float64.
    """
    planes = in_planes(x)
    source = readable(x, planes)
    gradient = None if dy is None else readable(dy, planes)
    p = problem(planes, [source] if gradient is None else [source, gradient])
    s, pass_ = p.shape, _plan(p, activation)
    whole = pass_.splits == 1
    partial = sums if whole else sums.new_empty((*sums.shape, pass_.splits))
    wrap_triton(activated_parts)[pass_grid(p, pass_)](
        gradient,
        source,
        channels,
        partial,
        s.samples,
        s.channels,
        s.pixels,
        pass_.splits,
        *strides_of(source if gradient is None else gradient, planes),
        *strides_of(source, planes),
        ACTIVATION=activation,
        GRADIENT=gradient is not None,
        FOR_NORM=sums.shape[0] == 5,
        **pass_flags(p, pass_),
    )
    if not whole:
        rows = replace(p, shape=replace(s, samples=sums.shape[0] * s.samples))
        finish_parts(rows, pass_, partial, sums, mean=False)


def gated(x: Tensor, gate: Tensor, channels: Tensor, activation: int, y: Tensor) -> None:
    """Write y.

    Args:
        x: (N, C, *spatial).
        gate: (N, C).
        channels, activation: as for activated_sums().
        y: like x.
    """
    planes = in_planes(x)
    source = readable(x, planes)
    p = problem(planes, [source, y])
    s, pass_ = p.shape, _plan(p, activation)
    wrap_triton(gated_result)[pass_grid(p, pass_)](
        source,
        y,
        gate,
        channels,
        s.channels,
        s.pixels,
        *strides_of(source, planes),
        *strides_of(y, planes),
        ACTIVATION=activation,
        **pass_flags(p, pass_),
    )


def gated_gradients(
    dy: Tensor,
    x: Tensor,
    planes: Tensor,
    channels: Tensor,
    gradient_channels: Tensor,
    activation: int,
    by_x: bool,
    dx: Tensor,
) -> None:
    """Write dx.

    Args:
        dy, x: (N, C, *spatial).
        planes: (2, N, C), gate and shift.
        channels, activation: as for activated_sums().
        gradient_channels: (2, C), slope and offset, not read without by_x.
        by_x: whether the gradient depends on x besides act'(v).
        dx: like x.
    """
    in_rows = in_planes(x)
    gradient, source = readable(dy, in_rows), readable(x, in_rows)
    p = problem(in_rows, [source, gradient, dx])
    s, pass_ = p.shape, _plan(p, activation)
    wrap_triton(gated_gradient)[pass_grid(p, pass_)](
        gradient,
        source,
        dx,
        planes,
        channels,
        gradient_channels,
        s.samples,
        s.channels,
        s.pixels,
        *strides_of(gradient, in_rows),
        *strides_of(source, in_rows),
        *strides_of(dx, in_rows),
        ACTIVATION=activation,
        BY_X=by_x,
        **pass_flags(p, pass_),
    )
