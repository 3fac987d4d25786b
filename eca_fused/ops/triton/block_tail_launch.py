"""Which kernels a block's tail with ECA's gate launches where whole planes fit into a program.

As in launch.py. The maps have elements, and the other tensors are contiguous.
"""

from typing import Any

from torch import Tensor

from eca_fused.ops.triton import plan
from eca_fused.ops.triton.coefficient_launch import taps_flags, taps_gradient
from eca_fused.ops.triton.launch import Problem, problem, wrap_triton
from eca_fused.ops.triton.maps import in_planes, readable
from eca_fused.ops.triton.plan import Tile
from eca_fused.ops.triton.resident_tail import block_tail_gradients, block_tail_result
from eca_fused.ops.triton.tail_launch import (
    is_smooth,
    mask_align,
    readable_or_none,
    row_bytes,
    strides_or_zero,
)

__all__ = ["block_tail", "block_tail_backward"]


def _tile(
    in_rows: bool, maps: list[Tensor | None], weight: Tensor, circular: bool, sloped: bool = False
) -> tuple[Problem, Tile | None]:
    """The problem, and its tile; None if a program cannot keep whole planes."""
    p = problem(in_rows, [map_ for map_ in maps if map_ is not None], weight, circular)
    return p, plan.resident_tail(p.shape, sloped)


def _flags(p: Problem, tile: Tile) -> dict[str, Any]:
    return {
        **p.map_flags(),
        **p.tap_flags(),
        "HALO": p.halo(tile.channels),
        "BLOCK_C": tile.channels,
        "BLOCK_S": tile.pixels,
        "MASK_ALIGN": mask_align(p),
        "num_warps": tile.warps,
    }


def block_tail(
    x: Tensor,
    identity: Tensor | None,
    weight: Tensor,
    scale: Tensor | None,
    rows: Tensor,
    circular: bool,
    activation: int,
    y: Tensor,
    mask: Tensor | None,
    distance: Tensor,
    gate: Tensor,
) -> bool:
    """Write y, ReLU's mask, distance and gate (N, C), or return False: planes are too large.

    Args:
        x, identity: (N, C, *spatial).
        weight: (1 or C, 1, k).
        scale: (N,), or None.
        rows: (6, C), of tail_coefficients().
        circular: wrap around at the first and last channel.
        activation: a place in ACTIVATIONS.
        y: like x.
        mask: bytes; None if it is not needed.
        distance, gate: (N, C) in the dtype of sums.
    """
    in_rows = in_planes(x)
    source, other = readable(x, in_rows), readable_or_none(identity, in_rows)
    p, tile = _tile(in_rows, [source, other, y], weight, circular)
    if tile is None:
        return False
    s = p.shape
    wrap_triton(block_tail_result)[(p.tiles(tile.channels),)](
        source,
        other,
        y,
        mask,
        weight,
        scale,
        rows,
        distance,
        gate,
        s.channels,
        s.pixels,
        row_bytes(p),
        *strides_or_zero(source, in_rows),
        *strides_or_zero(other, in_rows),
        *strides_or_zero(y, in_rows),
        ACTIVATION=activation,
        IDENTITY=other is not None,
        KEEP_MASK=mask is not None,
        **_flags(p, tile),
    )
    return True


def block_tail_backward(
    dy: Tensor,
    x: Tensor,
    identity: Tensor | None,
    mask: Tensor,
    weight: Tensor,
    scale: Tensor | None,
    rows: Tensor,
    distance: Tensor,
    gate: Tensor,
    circular: bool,
    activation: int,
    sums: Tensor,
    dmean: Tensor,
    dx: Tensor | None,
    d_identity: Tensor | None,
    dweight: Tensor | None,
) -> bool:
    """Write the sums, dmean and the gradients, or return False: planes are too large.

    Args:
        dy, x, identity: (N, C, *spatial).
        mask, distance, gate: as block_tail() wrote them.
        weight, scale, rows, circular, activation: as for block_tail().
        sums: (2, N, C), or (3, N, C) with the identity's sum, in float64.
        dmean: (N, C) in the dtype of sums.
        dx, d_identity: like x; None for those that are not needed.
        dweight: contiguous (1 or C, 1, k); None if it is not needed.
    """
    in_rows = in_planes(x)
    smooth, with_identity = is_smooth(activation), sums.shape[0] == 3
    gradient, source = readable(dy, in_rows), readable(x, in_rows)
    other = readable_or_none(identity, in_rows) if smooth or with_identity else None
    p, tile = _tile(in_rows, [source, gradient, other, dx, d_identity], weight, circular, smooth)
    if tile is None:
        return False
    s = p.shape
    dz, inputs = (None if dweight is None else gate.new_empty(gate.shape) for _ in range(2))
    wrap_triton(block_tail_gradients)[(p.tiles(tile.channels),)](
        gradient,
        source,
        other,
        mask,
        dx,
        d_identity,
        weight,
        scale,
        rows,
        distance,
        gate,
        sums,
        dmean,
        dz,
        inputs,
        s.samples,
        s.channels,
        s.pixels,
        row_bytes(p),
        *strides_or_zero(gradient, in_rows),
        *strides_or_zero(source, in_rows),
        *strides_or_zero(other, in_rows),
        *strides_or_zero(dx, in_rows),
        *strides_or_zero(d_identity, in_rows),
        ACTIVATION=activation,
        IDENTITY=other is not None,
        IDENTITY_SUM=with_identity,
        DX=dx is not None,
        D_IDENTITY=d_identity is not None,
        DZ=dz is not None,
        **_flags(p, tile),
    )
    if dz is not None and inputs is not None and dweight is not None:
        taps_gradient(dz, inputs, dweight, taps_flags(weight, circular))
    return True
