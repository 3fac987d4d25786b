"""Two passes over a map: sums, gates, scale. For planes too large to keep on chip, and in place.

A program of a pass has BLOCKS tiles of BLOCK_C channels and BLOCK_S pixels, one after the other.
The second pass goes backwards, so that it finds the end of the map in the L2 cache.

Bytes, for maps of B bytes (modelled, nothing found in a cache): forward reads 2 B and writes B,
backward reads 3 B and writes B.
"""

import triton
import triton.language as tl

from eca_fused.ops.triton.common import (
    divide,
    inside,
    narrow,
    pointers,
    sigmoid,
    tap,
    wide,
    widen,
    wrapped,
)


@triton.jit
def sums(
    x,  # (N, C, S)
    dy,  # (N, C, S), read if DOT
    partial,  # (N, C, splits), written: sums of x, or of dy * x, over BLOCKS * BLOCK_S pixels
    channels,
    pixels,
    splits,
    x_sample,
    x_row,
    dy_sample,
    dy_row,
    DOT: tl.constexpr,
    PLANES: tl.constexpr,
    ALIGN: tl.constexpr,
    WIDE: tl.constexpr,
    BLOCKS: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_S: tl.constexpr,
):
    tiles = tl.cdiv(channels, BLOCK_C)
    program = tl.program_id(0)
    split = program % splits
    n = (program // splits // tiles).to(tl.int64)
    c = wide(program // splits % tiles, WIDE) * BLOCK_C + tl.arange(0, BLOCK_C)
    accumulator = tl.zeros([BLOCK_C, BLOCK_S], partial.dtype.element_ty)
    for block in range(BLOCKS):
        s = (wide(split, WIDE) * BLOCKS + block) * BLOCK_S + tl.arange(0, BLOCK_S)
        mask = inside(c, s, channels, pixels, PLANES, ALIGN)
        values = widen(
            tl.load(
                pointers(x, n, c, s, x_sample, x_row, PLANES, ALIGN, WIDE), mask=mask, other=0.0
            )
        )
        if DOT:
            g = tl.load(
                pointers(dy, n, c, s, dy_sample, dy_row, PLANES, ALIGN, WIDE), mask=mask, other=0.0
            )
            values = widen(g) * values
        accumulator += values
    tl.store(
        partial + (n * channels + c) * splits + split, tl.sum(accumulator, 1), mask=c < channels
    )


@triton.jit
def total(partial, n, c, exists, channels, splits, SPLITS: tl.constexpr):
    """The sums of channels c, from their parts, always in the same order."""
    split = tl.arange(0, SPLITS)
    parts = tl.load(
        partial + ((n * channels + c) * splits)[:, None] + split[None, :],
        mask=exists[:, None] & (split < splits)[None, :],
        other=0.0,
    )
    return tl.sum(parts, 1)


@triton.jit
def finish(
    partial,  # (N, C, splits)
    result,  # (N, C), written: the sums, or means, of all parts
    channels,
    pixels,
    splits,
    MEAN: tl.constexpr,
    WIDE: tl.constexpr,
    SPLITS: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    tiles = tl.cdiv(channels, BLOCK_C)
    n = (tl.program_id(0) // tiles).to(tl.int64)
    c = wide(tl.program_id(0) % tiles, WIDE) * BLOCK_C + tl.arange(0, BLOCK_C)
    here = c < channels
    values = total(partial, n, c, here, channels, splits, SPLITS)
    if MEAN:
        values = divide(values, tl.cast(pixels, values.dtype))
    tl.store(result + n * channels + c, narrow(values, result.dtype.element_ty), mask=here)


@triton.jit
def gates(
    partial,  # (N, C, splits)
    weight,  # (1 or C, K)
    mean,  # (N, C), written if KEEP
    gate,  # (N, C), written
    channels,
    pixels,
    splits,
    K: tl.constexpr,
    OWN_TAPS: tl.constexpr,
    CIRCULAR: tl.constexpr,
    KEEP: tl.constexpr,
    WIDE: tl.constexpr,
    SPLITS: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    tiles = tl.cdiv(channels, BLOCK_C)
    n = (tl.program_id(0) // tiles).to(tl.int64)
    c = wide(tl.program_id(0) % tiles, WIDE) * BLOCK_C + tl.arange(0, BLOCK_C)
    here = c < channels
    z = tl.zeros([BLOCK_C], gate.dtype.element_ty)
    count = tl.cast(pixels, z.dtype)
    for j in range(K):
        q, exists = wrapped(c + (j - K // 2), channels, CIRCULAR)
        exists = exists & here
        near = divide(total(partial, n, q, exists, channels, splits, SPLITS), count)
        near = tl.where(exists, near, 0.0)
        z += tap(weight, c, j, here, K, OWN_TAPS) * near
    tl.store(gate + n * channels + c, sigmoid(z), mask=here)
    if KEEP:
        own = divide(total(partial, n, c, here, channels, splits, SPLITS), count)
        tl.store(mean + n * channels + c, own, mask=here)


@triton.jit
def gate_gradients(
    partial,  # (N, C, splits)
    weight,  # (1 or C, K)
    gate,  # (N, C)
    dz,  # (N, C), written if DZ: the gradient of the sigmoid's input
    shift,  # (N, C), written if DX: the part of every pixel's gradient that comes through the mean
    channels,
    pixels,
    splits,
    K: tl.constexpr,
    OWN_TAPS: tl.constexpr,
    CIRCULAR: tl.constexpr,
    DX: tl.constexpr,
    DZ: tl.constexpr,
    WIDE: tl.constexpr,
    SPLITS: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    tiles = tl.cdiv(channels, BLOCK_C)
    n = (tl.program_id(0) // tiles).to(tl.int64)
    c = wide(tl.program_id(0) % tiles, WIDE) * BLOCK_C + tl.arange(0, BLOCK_C)
    here = c < channels
    if DZ:
        a = tl.load(gate + n * channels + c, mask=here, other=0.0)
        own = total(partial, n, c, here, channels, splits, SPLITS) * a * (1.0 - a)
        tl.store(dz + n * channels + c, own, mask=here)
    if DX:
        dm = tl.zeros([BLOCK_C], gate.dtype.element_ty)
        for j in range(K):
            q, exists = wrapped(c + (K // 2 - j), channels, CIRCULAR)
            exists = exists & here
            a = tl.load(gate + n * channels + q, mask=exists, other=0.0)
            near = total(partial, n, q, exists, channels, splits, SPLITS) * a * (1.0 - a)
            term = tap(weight, q, j, exists, K, OWN_TAPS) * near
            # Outside the channels there is no term: an infinite tap times zero would be NaN.
            dm += tl.where(exists, term, 0.0)
        tl.store(shift + n * channels + c, divide(dm, tl.cast(pixels, dm.dtype)), mask=here)


@triton.jit
def scale(
    x,  # (N, C, S)
    y,  # (N, C, S), written: gate * x, or gate * x + shift; may be x
    gate,  # (N, C)
    shift,  # (N, C), read if SHIFT
    channels,
    pixels,
    x_sample,
    x_row,
    y_sample,
    y_row,
    SHIFT: tl.constexpr,
    PLANES: tl.constexpr,
    ALIGN: tl.constexpr,
    WIDE: tl.constexpr,
    BLOCKS: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_S: tl.constexpr,
):
    tiles = tl.cdiv(channels, BLOCK_C)
    splits = tl.cdiv(pixels, BLOCKS * BLOCK_S)
    program = tl.num_programs(0) - 1 - tl.program_id(0)
    n = (program // splits // tiles).to(tl.int64)
    c = wide(program // splits % tiles, WIDE) * BLOCK_C + tl.arange(0, BLOCK_C)
    here = c < channels
    a = tl.load(gate + n * channels + c, mask=here, other=0.0)
    for back in range(BLOCKS):
        block = wide(program % splits, WIDE) * BLOCKS + (BLOCKS - 1 - back)
        s = block * BLOCK_S + tl.arange(0, BLOCK_S)
        mask = inside(c, s, channels, pixels, PLANES, ALIGN)
        values = widen(
            tl.load(
                pointers(x, n, c, s, x_sample, x_row, PLANES, ALIGN, WIDE), mask=mask, other=0.0
            )
        )
        values = values * a[:, None]
        if SHIFT:
            values += tl.load(shift + n * channels + c, mask=here, other=0.0)[:, None]
        tl.store(
            pointers(y, n, c, s, y_sample, y_row, PLANES, ALIGN, WIDE),
            narrow(values, y.dtype.element_ty),
            mask=mask,
        )
