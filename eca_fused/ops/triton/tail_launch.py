"""Which kernels the operators of a residual block's tail launch; as in launch.py.

Every map has elements here. The coefficients are contiguous, in the dtype of sums.
"""

from dataclasses import replace

from torch import Tensor

from eca_fused.ops.checks import ACTIVATIONS
from eca_fused.ops.triton import plan
from eca_fused.ops.triton.launch import (
    Problem,
    channels_with,
    finish_parts,
    pass_flags,
    pass_grid,
    problem,
    strides_of,
    wrap_triton,
)
from eca_fused.ops.triton.maps import in_planes, readable
from eca_fused.ops.triton.plan import ceil_div, power_of_two
from eca_fused.ops.triton.tail_passes import (
    gradient_maps,
    gradient_sums,
    merge_moments,
    plane_moments,
    tail_result,
)


def is_smooth(activation: int) -> bool:
    """Whether the gradients need v itself; for the others the mask is enough."""
    return ACTIVATIONS[activation] not in ("none", "relu")


def readable_or_none(x: Tensor | None, planes: bool) -> Tensor | None:
    return None if x is None else readable(x, planes)


def problem_of(planes: bool, *maps: Tensor | None) -> Problem:
    """Of the maps that are read or written, None for the others."""
    return problem(planes, [map_ for map_ in maps if map_ is not None])


def strides_or_zero(map_: Tensor | None, planes: bool) -> tuple[int, int]:
    return (0, 0) if map_ is None else strides_of(map_, planes)


def row_bytes(p: Problem) -> int:
    """Bytes of a row of ReLU's mask."""
    return ceil_div(p.shape.pixels if p.shape.planes else p.shape.channels, 8)


def mask_align(p: Problem) -> int:
    align = 16
    while row_bytes(p) % align != 0:
        align //= 2
    return align


def moments(x: Tensor, found: Tensor) -> None:
    """Write the means of the planes of x, and the sums of squared distances from them.

    Args:
        x: (N, C, *spatial).
        found: (2, N, C) in float64.
    """
    planes = in_planes(x)
    source = readable(x, planes)
    p = problem(planes, [source])
    s, pass_ = p.shape, plan.tail(p.shape)
    whole = pass_.splits == 1
    parts = found if whole else found.new_empty((*found.shape, pass_.splits))
    wrap_triton(plane_moments)[pass_grid(p, pass_)](
        source,
        parts,
        s.samples,
        s.channels,
        s.pixels,
        pass_.splits,
        *strides_of(source, planes),
        **pass_flags(p, pass_),
    )
    if whole:
        return
    channels = channels_with(power_of_two(pass_.splits))
    wrap_triton(merge_moments)[(p.tiles(channels),)](
        parts,
        found,
        s.samples,
        s.channels,
        s.pixels,
        pass_.splits,
        pass_.blocks * pass_.tile.pixels,
        WIDE=p.wide,
        SPLITS=power_of_two(pass_.splits),
        BLOCK_C=channels,
    )


def tail(
    x: Tensor,
    identity: Tensor | None,
    planes: Tensor,
    channels: Tensor,
    activation: int,
    y: Tensor,
    mask: Tensor | None,
) -> None:
    """Write y and ReLU's mask.

    Args:
        x, identity: (N, C, *spatial).
        planes: (2, N, C), p and q.
        channels: (3, C), centre, identity_scale and identity_centre.
        activation: a place in ACTIVATIONS.
        y: like x.
        mask: bytes; None if it is not needed.
    """
    in_rows = in_planes(x)
    source, other = readable(x, in_rows), readable_or_none(identity, in_rows)
    smooth = is_smooth(activation)
    p = problem_of(in_rows, source, other, y)
    s, pass_ = p.shape, plan.tail(p.shape, smooth)
    wrap_triton(tail_result)[pass_grid(p, pass_)](
        source,
        other,
        y,
        mask,
        planes,
        channels,
        s.samples,
        s.channels,
        s.pixels,
        row_bytes(p),
        *strides_of(source, in_rows),
        *strides_or_zero(other, in_rows),
        *strides_of(y, in_rows),
        ACTIVATION=activation,
        IDENTITY=other is not None,
        KEEP=mask is not None,
        MASK_ALIGN=mask_align(p),
        **pass_flags(p, pass_),
    )


def tail_sums(
    dy: Tensor,
    x: Tensor,
    identity: Tensor | None,
    mask: Tensor,
    planes: Tensor,
    channels: Tensor,
    activation: int,
    sums: Tensor,
) -> None:
    """Write the sums that the gradients of everything but the maps are made of.

    Args:
        dy, x, identity: (N, C, *spatial).
        mask: bytes, as tail() wrote them.
        planes, channels, activation: as for tail().
        sums: (2, N, C), or (3, N, C) with the identity's sum, in float64.
    """
    in_rows = in_planes(x)
    smooth, with_identity = is_smooth(activation), sums.shape[0] == 3
    gradient, source = readable(dy, in_rows), readable(x, in_rows)
    other = readable_or_none(identity, in_rows) if smooth or with_identity else None
    p = problem_of(in_rows, source, gradient, other)
    s, pass_ = p.shape, plan.tail(p.shape, smooth)
    whole = pass_.splits == 1
    partial = sums if whole else sums.new_empty((*sums.shape, pass_.splits))
    wrap_triton(gradient_sums)[pass_grid(p, pass_)](
        gradient,
        source,
        other,
        mask,
        planes,
        channels,
        partial,
        s.samples,
        s.channels,
        s.pixels,
        pass_.splits,
        row_bytes(p),
        *strides_of(gradient, in_rows),
        *strides_of(source, in_rows),
        *strides_or_zero(other, in_rows),
        ACTIVATION=activation,
        IDENTITY=smooth and other is not None,
        IDENTITY_SUM=with_identity,
        MASK_ALIGN=mask_align(p),
        **pass_flags(p, pass_),
    )
    if not whole:
        rows = replace(p, shape=replace(s, samples=sums.shape[0] * s.samples))
        finish_parts(rows, pass_, partial, sums, mean=False)


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
    dx: Tensor | None,
    d_identity: Tensor | None,
) -> None:
    """Write the gradients of the maps.

    Args:
        dy, x, identity: (N, C, *spatial).
        mask: bytes, as tail() wrote them.
        planes, channels, activation: as for tail().
        gradient_planes: (2, N, C), p and r.
        gradient_channels: (4, C), q, and p, q and r of the identity.
        by_x, by_identity: whether the gradients depend on x and the identity; if not, these q, and
            the identity's r, are not read.
        dx, d_identity: like x; None for those that are not needed.
    """
    in_rows = in_planes(x)
    smooth = is_smooth(activation)
    by_x, by_identity = by_x and dx is not None, by_identity and d_identity is not None
    gradient = readable(dy, in_rows)
    source = readable(x, in_rows) if smooth or by_x else None
    other = readable_or_none(identity, in_rows) if smooth or by_identity else None
    p = problem_of(in_rows, gradient, source, other, dx, d_identity)
    s, pass_ = p.shape, plan.tail(p.shape, smooth)
    wrap_triton(gradient_maps)[pass_grid(p, pass_)](
        gradient,
        source,
        other,
        mask,
        dx,
        d_identity,
        planes,
        channels,
        gradient_planes,
        gradient_channels,
        s.samples,
        s.channels,
        s.pixels,
        row_bytes(p),
        *strides_of(gradient, in_rows),
        *strides_or_zero(source, in_rows),
        *strides_or_zero(other, in_rows),
        *strides_or_zero(dx, in_rows),
        *strides_or_zero(d_identity, in_rows),
        ACTIVATION=activation,
        IDENTITY=smooth and other is not None,
        BY_X=by_x,
        BY_IDENTITY=by_identity,
        DX=dx is not None,
        D_IDENTITY=d_identity is not None,
        MASK_ALIGN=mask_align(p),
        **pass_flags(p, pass_),
    )
