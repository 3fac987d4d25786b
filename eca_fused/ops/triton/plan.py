"""How a map is split over programs: a rule that needs no tuning run. Pure Python, without Triton.

Sizes may be symbolic while torch.compile traces, so they are only compared and divided. A new batch
size compiles nothing again, except a small one that would leave processors idle.
"""

import os
from dataclasses import dataclass

# Elements of a tile that a program keeps, and the most to which it grows if it would have too few
# channels for its halo. Compiled for sm_80, sm_90 and sm_100, no registers spill; at twice the
# size they do.
TILE = 8192
TILE_MOST = 16384
CHANNELS_FEW = 8

# Programs that keep a large GPU busy. With fewer, smaller tiles are better than idle processors.
# The interpreter takes tens of milliseconds per program.
PROGRAMS = 8 if os.environ.get("TRITON_INTERPRET") == "1" else 128

# A row of a channels_last tile is at least a cache line long.
LINE_BYTES = 128

# For a pass: elements of a tile, the most of them in a row of planes, the usual limit of tiles per
# program, and the most parts of a sum.
STREAM = 4096
ROW_MOST = 1024
STREAM_BLOCKS = 8
SPLITS_MOST = 256

# Elements and warps of a tile in a pass of a residual block's tail, which has up to three maps and
# three sums at once. SiLU and GELU take registers too: a thread then has half as many elements.
TAIL = 2048
TAIL_WARPS = 4


def power_of_two(at_least: int) -> int:
    """The smallest power of two that is at least this; 1 for less than 1."""
    size = 1
    while size < at_least:
        size *= 2
    return size


def ceil_div(a: int, b: int) -> int:
    return (a + b - 1) // b


def halo_rows(k: int) -> int:
    """Places for the neighbours of a tile, 2r of them."""
    return power_of_two(k - 1) if k > 1 else 0


def warps(elements: int, channels: int, most: int = 16) -> int:
    """Warps for a tile: 32 elements and 4 channels per thread or fewer, up to `most` warps."""
    return max(1, min(power_of_two(max(elements // (32 * 32), channels // (32 * 4))), most))


@dataclass(frozen=True)
class Shape:
    """What a plan depends on: N, C, S, the number of taps, the layout, and bytes of an element."""

    samples: int
    channels: int
    pixels: int
    k: int
    planes: bool
    itemsize: int


@dataclass(frozen=True)
class Tile:
    """Channels and pixels that a program holds at once, and its warps."""

    channels: int
    pixels: int
    warps: int


def resident(shape: Shape, maps: int, elements: int = TILE, line: int = LINE_BYTES) -> Tile | None:
    """The tile of a program that keeps whole planes in registers, or None if they do not fit.

    Args:
        shape: of the map.
        maps: how many maps a program reads: 1 forward, 2 backward.
        elements: of the tile, or more for enough channels.
        line: least bytes of a row if the channels are innermost.
    """
    pixels = power_of_two(shape.pixels)
    most = TILE_MOST // (2 if shape.itemsize == 8 else 1)
    # At least the halo, and whole lines if the channels are innermost.
    least = max(halo_rows(shape.k), 4 if shape.planes else line // shape.itemsize)
    tile = min(power_of_two(shape.channels), max(elements // pixels, 1))
    while tile < max(CHANNELS_FEW, least) and tile < shape.channels and 2 * tile * pixels <= most:
        tile *= 2
    if tile * pixels > most or (tile < least and tile < shape.channels):
        return None
    while tile > least and shape.samples * ceil_div(shape.channels, tile) < PROGRAMS:
        tile //= 2
    # In the forward pass, fewer threads with more loads each let two programs share a processor.
    return Tile(tile, pixels, warps(tile * pixels, tile, most=8 * maps))


def resident_tail(shape: Shape, sloped: bool = False) -> Tile | None:
    """The same for a block's tail, whose mask has a byte for eight elements of a row.

    Up to three maps are in registers, so a tile is half as large, but for float64 with as many
    warps. With channels innermost, half a cache line is enough: two sectors.

    Args:
        shape: of the map.
        sloped: the program computes the slopes of SiLU or GELU, which take registers too.
    """
    half = shape.itemsize < 8
    tile = resident(shape, 2, TILE // 2 if half else TILE, LINE_BYTES // 2)
    if tile is None or (sloped and tile.channels * tile.pixels > TILE):
        return None
    warps = max(tile.warps, min(2 * tile.warps, 8)) if half else tile.warps
    if shape.planes:
        return Tile(tile.channels, max(tile.pixels, 8), warps)
    return Tile(max(tile.channels, 8), tile.pixels, warps)


@dataclass(frozen=True)
class Pass:
    """A pass over a map: its tile, tiles per program, and parts into which the pixels are split."""

    tile: Tile
    blocks: int
    splits: int


def two_passes(shape: Shape, tile: Tile | None = None) -> Pass:
    """The plan of the passes that sum and scale.

    Args:
        shape: of the map.
        tile: the tile of the one-pass kernel, to sum in the same order as that kernel.
    """
    if tile is not None:
        return Pass(tile, 1, 1)
    channels, pixels = _tile(shape, STREAM, 1)
    return _pass(shape, Tile(channels, pixels, warps(channels * pixels, 0)))


def tail(shape: Shape, smooth: bool = False) -> Pass:
    """The plan of the passes of a residual block's tail.

    Args:
        shape: of the map.
        smooth: the pass computes SiLU or GELU.
    """
    elements = TAIL // (2 if shape.itemsize == 8 else 1)
    # A byte of the mask is for eight elements of a row.
    channels, pixels = _tile(shape, elements, 8)
    return _pass(shape, Tile(channels, pixels, TAIL_WARPS * (2 if smooth else 1)))


def _tile(shape: Shape, elements: int, least: int) -> tuple[int, int]:
    """Channels and pixels of a tile with about so many elements, `least` or more along a row."""
    if shape.planes:
        pixels = max(min(power_of_two(shape.pixels), ROW_MOST), least)
        channels = min(power_of_two(shape.channels), max(elements // pixels, 1))
    else:
        channels = max(min(power_of_two(shape.channels), 2 * LINE_BYTES // shape.itemsize), least)
        pixels = min(power_of_two(shape.pixels), max(elements // channels, 1))
    return channels, pixels


def _pass(shape: Shape, tile: Tile) -> Pass:
    """How many tiles a program has, so that there are enough programs and not too many parts."""
    pixels = tile.pixels
    tiles = shape.samples * ceil_div(shape.channels, tile.channels)
    blocks = 1
    while blocks < STREAM_BLOCKS and blocks * pixels < shape.pixels:
        blocks *= 2
    while blocks > 1 and tiles * ceil_div(shape.pixels, blocks * pixels) < 2 * PROGRAMS:
        blocks //= 2
    while ceil_div(shape.pixels, blocks * pixels) > SPLITS_MOST:
        blocks *= 2
    return Pass(tile, blocks, max(1, ceil_div(shape.pixels, blocks * pixels)))
