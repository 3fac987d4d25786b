"""Which kernels a forward and a backward pass launch, and with what.

Each launch is written out, with wrap_triton around the kernel's name: see operators.py.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import triton
from torch import Tensor

from eca_fused.ops.results import sums_dtype
from eca_fused.ops.triton import plan, tuning
from eca_fused.ops.triton.maps import in_planes, readable, rows
from eca_fused.ops.triton.passes import finish, gate_gradients, gates, scale, sums
from eca_fused.ops.triton.plan import Pass, Shape, Tile, ceil_div, power_of_two
from eca_fused.ops.triton.resident import backward_resident, forward_resident
from eca_fused.ops.triton.taps import tap_gradients, tap_totals


def as_it_is(kernel: Any) -> Any:
    return kernel


# The interpreter's kernels are not JITFunctions, and torch 2.11 and 2.12 refuse to wrap them.
interpreted: bool = triton.knobs.runtime.interpret
wrap_triton: Callable[[Any], Any] = as_it_is if interpreted else torch.library.wrap_triton

# For the kernels over (N, C): channels per program, samples per part of dweight, and samples that
# a program loads at once.
CHANNELS = 64
ROWS = 128
ROWS_AT_ONCE = 16

# Half of the int32 range, because indices in the last tile go beyond the end.
WIDE_FROM = 2**30


@dataclass(frozen=True)
class Problem:
    """Sizes, and the compile-time constants of the kernels; see common.py."""

    shape: Shape
    own_taps: bool
    circular: bool
    align: int
    wide: bool

    def map_flags(self) -> dict[str, Any]:
        return {"PLANES": self.shape.planes, "ALIGN": self.align, "WIDE": self.wide}

    def tap_flags(self) -> dict[str, Any]:
        return {"K": self.shape.k, "OWN_TAPS": self.own_taps, "CIRCULAR": self.circular}

    def halo(self, channels: int) -> int:
        """Halo places for a tile of this many channels; 0 if one program has all channels."""
        one = self.shape.channels <= channels and not self.circular
        return 0 if one else plan.halo_rows(self.shape.k)

    def tiles(self, channels: int) -> int:
        """The number of tiles of this many channels in all samples."""
        return self.shape.samples * ceil_div(self.shape.channels, channels)


def problem(
    planes: bool, maps: list[Tensor], weight: Tensor | None = None, circular: bool = False
) -> Problem:
    x = maps[0]
    samples, channels, pixels = x.shape[0], x.shape[1], math.prod(x.shape[2:])
    k = 1 if weight is None else weight.shape[2]
    length, count = (pixels, channels) if planes else (channels, pixels)  # of a row, and of rows
    strides = [strides_of(map_, planes) for map_ in maps]
    numbers = [length, *(stride for pair in strides for stride in pair)]
    far = any(count * row >= WIDE_FROM for _, row in strides)
    align = 16
    while align > 1 and any(number % align != 0 for number in numbers):
        align //= 2
    return Problem(
        Shape(samples, channels, pixels, k, planes, x.dtype.itemsize),
        own_taps=weight is not None and weight.shape[0] != 1,
        circular=circular,
        align=align,
        wide=bool(far or channels >= WIDE_FROM or pixels >= WIDE_FROM),
    )


def strides_of(x: Tensor, planes: bool) -> tuple[int, int]:
    strides = rows(x, planes)
    assert strides is not None, "copied before, where it cannot be read in place"
    return strides


def _channels(x: Tensor) -> Tensor:
    """A new tensor (N, C) in the dtype of sums."""
    return x.new_empty(x.shape[:2], dtype=sums_dtype(x))


def channels_with(parts: int) -> int:
    """Channels per program that adds up this many parts of each; more would spill registers."""
    return max(1, min(CHANNELS, 2048 // parts))


def pass_flags(p: Problem, pass_: Pass) -> dict[str, Any]:
    """The constants of a kernel whose programs have several tiles."""
    return {
        **p.map_flags(),
        "BLOCKS": pass_.blocks,
        "BLOCK_C": pass_.tile.channels,
        "BLOCK_S": pass_.tile.pixels,
        "num_warps": pass_.tile.warps,
    }


def pass_grid(p: Problem, pass_: Pass) -> tuple[int]:
    return (p.tiles(pass_.tile.channels) * pass_.splits,)


def forward(
    x: Tensor, weight: Tensor, circular: bool, y: Tensor, keep: bool
) -> tuple[Tensor, Tensor] | None:
    """Run the kernels of the forward pass.

    Args:
        x: (N, C, *spatial).
        weight: (1 or C, 1, k).
        circular: wrap around at the first and last channel.
        y: like x, written; may be x itself if its rows share no memory.
        keep: return mean and gate.

    Returns:
        mean and gate, (N, C) in float32, or float64 for float64 x; None unless keep.
    """
    # Maps without pixels may have more channels than there is memory for gates.
    if not keep and 0 in x.shape[2:]:
        return None
    planes = in_planes(x)
    source, taps = readable(x, planes), weight.contiguous()
    p = problem(planes, [source, y], taps, circular)
    mean, gate = (_channels(x), _channels(x)) if keep else (None, None)
    if x.shape[0] != 0 and x.shape[1] != 0:
        tile = plan.resident(p.shape, maps=1)
        # In place, a program would overwrite planes that its neighbours still have to sum.
        if tile is not None and (y is not x or p.shape.channels <= tile.channels):
            _forward_resident(p, tile, source, y, taps, mean, gate)
        else:
            _forward_in_passes(p, tile, source, y, taps, mean, gate)
    return (mean, gate) if mean is not None and gate is not None else None


def _forward_resident(
    p: Problem,
    tile: Tile,
    x: Tensor,
    y: Tensor,
    weight: Tensor,
    mean: Tensor | None,
    gate: Tensor | None,
) -> None:
    s = p.shape
    choice = tuning.resident(forward_resident, s, tile, p.halo, y is not x)
    kernel = choice[0]
    wrap_triton(kernel)[lambda meta: (p.tiles(meta["BLOCK_C"]),)](
        x,
        y,
        weight,
        mean,
        gate,
        s.channels,
        s.pixels,
        *strides_of(x, s.planes),
        *strides_of(y, s.planes),
        KEEP=mean is not None,
        BLOCK_S=tile.pixels,
        **p.tap_flags(),
        **p.map_flags(),
        **choice[1],
    )


def _forward_in_passes(
    p: Problem,
    tile: Tile | None,
    x: Tensor,
    y: Tensor,
    weight: Tensor,
    mean: Tensor | None,
    gate: Tensor | None,
) -> None:
    s, pass_ = p.shape, plan.two_passes(p.shape, tile)
    gate = _channels(x) if gate is None else gate
    partial = _sums(p, pass_, x, None)
    parts = power_of_two(pass_.splits)
    channels = channels_with(parts)
    wrap_triton(gates)[(p.tiles(channels),)](
        partial,
        weight,
        mean,
        gate,
        s.channels,
        s.pixels,
        pass_.splits,
        KEEP=mean is not None,
        WIDE=p.wide,
        SPLITS=parts,
        BLOCK_C=channels,
        **p.tap_flags(),
    )
    _scale(p, pass_, x, y, gate, None)


def _sums(p: Problem, pass_: Pass, x: Tensor, dy: Tensor | None) -> Tensor:
    """Sums of x, or of dy * x, in pass_.splits parts: (N, C, splits)."""
    s = p.shape
    partial = _channels(x).new_empty((s.samples, s.channels, pass_.splits))
    wrap_triton(sums)[pass_grid(p, pass_)](
        x,
        dy,
        partial,
        s.channels,
        s.pixels,
        pass_.splits,
        *strides_of(x, s.planes),
        *strides_of(x if dy is None else dy, s.planes),
        DOT=dy is not None,
        **pass_flags(p, pass_),
    )
    return partial


def _scale(
    p: Problem, pass_: Pass, x: Tensor, y: Tensor, gate: Tensor, shift: Tensor | None
) -> None:
    """y = gate * x, plus shift."""
    s = p.shape
    choice = tuning.scale(scale, pass_, y is not x)
    kernel = choice[0]

    def grid(meta: dict[str, int]) -> tuple[int]:
        return (p.tiles(meta["BLOCK_C"]) * ceil_div(s.pixels, meta["BLOCKS"] * meta["BLOCK_S"]),)

    wrap_triton(kernel)[grid](
        x,
        y,
        gate,
        shift,
        s.channels,
        s.pixels,
        *strides_of(x, s.planes),
        *strides_of(y, s.planes),
        SHIFT=shift is not None,
        BLOCK_C=pass_.tile.channels,
        BLOCK_S=pass_.tile.pixels,
        **p.map_flags(),
        **choice[1],
    )


def backward(
    dy: Tensor,
    x: Tensor,
    weight: Tensor,
    mean: Tensor,
    gate: Tensor,
    circular: bool,
    dx: Tensor | None,
    dweight: Tensor | None,
) -> None:
    """Run the kernels of the backward pass, for a map that has samples and channels.

    Args:
        dy, x: (N, C, *spatial).
        weight: (1 or C, 1, k).
        mean, gate: (N, C), from the forward pass.
        circular: wrap around at the first and last channel.
        dx: like x, written; None if it is not needed.
        dweight: contiguous (1 or C, 1, k), written; None if it is not needed.
    """
    planes = in_planes(x)
    maps = [readable(x, planes), readable(dy, planes)] + ([] if dx is None else [dx])
    source, gradient = maps[:2]
    taps, gate = weight.contiguous(), gate.contiguous()
    p = problem(planes, maps, taps, circular)
    dz = None if dweight is None else _channels(x)
    tile = plan.resident(p.shape, maps=2)
    if tile is None:
        _backward_in_passes(p, gradient, source, dx, taps, gate, dz)
    else:
        _backward_resident(p, tile, gradient, source, dx, taps, gate, dz)
    if dz is not None and dweight is not None:
        _tap_gradients(p, dz, mean.contiguous(), dweight)


def _backward_resident(
    p: Problem,
    tile: Tile,
    dy: Tensor,
    x: Tensor,
    dx: Tensor | None,
    weight: Tensor,
    gate: Tensor,
    dz: Tensor | None,
) -> None:
    s = p.shape
    choice = tuning.resident(backward_resident, s, tile, p.halo, True)
    kernel = choice[0]
    wrap_triton(kernel)[lambda meta: (p.tiles(meta["BLOCK_C"]),)](
        dy,
        x,
        dx,
        weight,
        gate,
        dz,
        s.channels,
        s.pixels,
        *strides_of(dy, s.planes),
        *strides_of(x, s.planes),
        *strides_of(x if dx is None else dx, s.planes),
        DX=dx is not None,
        DZ=dz is not None,
        BLOCK_S=tile.pixels,
        **p.tap_flags(),
        **p.map_flags(),
        **choice[1],
    )


def _backward_in_passes(
    p: Problem,
    dy: Tensor,
    x: Tensor,
    dx: Tensor | None,
    weight: Tensor,
    gate: Tensor,
    dz: Tensor | None,
) -> None:
    s, pass_ = p.shape, plan.two_passes(p.shape)
    partial = _sums(p, pass_, x, dy)
    shift = None if dx is None else _channels(x)
    parts = power_of_two(pass_.splits)
    channels = channels_with(parts)
    wrap_triton(gate_gradients)[(p.tiles(channels),)](
        partial,
        weight,
        gate,
        dz,
        shift,
        s.channels,
        s.pixels,
        pass_.splits,
        DX=dx is not None,
        DZ=dz is not None,
        WIDE=p.wide,
        SPLITS=parts,
        BLOCK_C=channels,
        **p.tap_flags(),
    )
    if dx is not None:
        _scale(p, pass_, dy, dx, gate, shift)


def _tap_gradients(p: Problem, dz: Tensor, mean: Tensor, dweight: Tensor) -> None:
    s = p.shape
    parts = ceil_div(s.channels, CHANNELS) * (1 if p.own_taps else ceil_div(s.samples, ROWS))
    partial = dweight if p.own_taps else dz.new_empty((s.k, parts))
    wrap_triton(tap_gradients)[(s.k * parts,)](
        dz,
        mean,
        partial,
        s.samples,
        s.channels,
        parts,
        WIDE=p.wide,
        ROWS=ROWS,
        BLOCK_N=ROWS_AT_ONCE,
        BLOCK_C=CHANNELS,
        **p.tap_flags(),
    )
    if not p.own_taps:
        wrap_triton(tap_totals)[(s.k,)](partial, dweight, parts, BLOCK=256)


# ---- separate pooling and rescaling ----


def pool(x: Tensor, mean: Tensor) -> None:
    """Write the means (N, C) of x (N, C, *spatial), which has samples and channels."""
    planes = in_planes(x)
    source = readable(x, planes)
    p = problem(planes, [source])
    pass_ = plan.two_passes(p.shape)
    finish_parts(p, pass_, _sums(p, pass_, source, None), mean, mean=True)


def rescale(x: Tensor, gate: Tensor, shift: Tensor | None, y: Tensor) -> None:
    """Write y = gate * x, plus shift, for x (N, C, *spatial) that has elements.

    Args:
        gate, shift: (N, C), of any floating dtype; None for no shift.
        y: like x.
    """
    planes = in_planes(x)
    source = readable(x, planes)
    p = problem(planes, [source, y])
    shift = None if shift is None else _for_sums(shift, x)
    _scale(p, plan.two_passes(p.shape), source, y, _for_sums(gate, x), shift)


def rescale_backward(dy: Tensor, x: Tensor, gate: Tensor, dx: Tensor | None, dgate: Tensor) -> None:
    """Write dgate = sum(dy * x) and dx = gate * dy, for a map that has elements.

    Args:
        dy, x: (N, C, *spatial).
        gate, dgate: (N, C), of any floating dtype.
        dx: like x; None if it is not needed.
    """
    planes = in_planes(x)
    maps = [readable(x, planes), readable(dy, planes)] + ([] if dx is None else [dx])
    p = problem(planes, maps)
    pass_ = plan.two_passes(p.shape)
    finish_parts(p, pass_, _sums(p, pass_, maps[0], maps[1]), dgate, mean=False)
    if dx is not None:
        _scale(p, pass_, maps[1], dx, _for_sums(gate, x), None)


def _for_sums(values: Tensor, x: Tensor) -> Tensor:
    """Values (N, C) in the dtype of sums, contiguous."""
    return values.to(sums_dtype(x)).contiguous()


def finish_parts(p: Problem, pass_: Pass, partial: Tensor, result: Tensor, mean: bool) -> None:
    """Write the sums or means of all parts."""
    parts = power_of_two(pass_.splits)
    channels = channels_with(parts)
    wrap_triton(finish)[(p.tiles(channels),)](
        partial,
        result,
        p.shape.channels,
        p.shape.pixels,
        pass_.splits,
        MEAN=mean,
        WIDE=p.wide,
        SPLITS=parts,
        BLOCK_C=channels,
    )
