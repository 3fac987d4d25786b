"""One-pass kernels: each program keeps a tile of channels, with whole planes, in registers.

A tile's gates also need the means of r channels on each side, so a program sums these planes too.
Its neighbours read them at about the same time, so they are in the L2 cache.

Bytes, for maps of B bytes (modelled): forward reads and writes B, backward reads 2 B and writes B.
The halos read 2r / BLOCK_C as much again, from the cache.
"""

import triton
import triton.language as tl

from eca_fused.ops.triton.common import (
    divide,
    halo,
    inside,
    narrow,
    neighbour,
    pointers,
    sigmoid,
    tap,
    wide,
    widen,
    wrapped,
)


@triton.jit
def forward_resident(
    x,  # (N, C, S)
    y,  # (N, C, S), written; may be x if one tile has all channels
    weight,  # (1 or C, K)
    mean,  # (N, C), written if KEEP
    gate,  # (N, C), written if KEEP
    channels,
    pixels,
    x_sample,
    x_row,
    y_sample,
    y_row,
    K: tl.constexpr,
    OWN_TAPS: tl.constexpr,
    CIRCULAR: tl.constexpr,
    KEEP: tl.constexpr,
    PLANES: tl.constexpr,
    ALIGN: tl.constexpr,
    WIDE: tl.constexpr,
    HALO: tl.constexpr,
    BLOCK_S: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    R: tl.constexpr = K // 2
    tiles = tl.cdiv(channels, BLOCK_C)
    n = (tl.program_id(0) // tiles).to(tl.int64)
    first = wide(tl.program_id(0) % tiles, WIDE) * BLOCK_C
    length = tl.minimum(channels - first, BLOCK_C)
    i = tl.arange(0, BLOCK_C)
    c = first + i
    s = tl.arange(0, BLOCK_S)

    mask = inside(c, s, channels, pixels, PLANES, ALIGN)
    tile = tl.load(
        pointers(x, n, c, s, x_sample, x_row, PLANES, ALIGN, WIDE), mask=mask, other=0.0
    )  # (C, S)
    total = tl.sum(widen(tile), 1)
    count = tl.cast(pixels, total.dtype)
    own = divide(total, count)
    outer = own
    if HALO > 0:
        h, there = halo(first, length, channels, R, HALO, CIRCULAR)
        beside = tl.load(
            pointers(x, n, h, s, x_sample, x_row, PLANES, 1, WIDE),
            mask=there[:, None] & (s < pixels)[None, :],
            other=0.0,
        )
        outer = divide(tl.sum(widen(beside), 1), count)

    here = c < channels
    z = tl.zeros([BLOCK_C], total.dtype)
    for j in range(K):
        z += tap(weight, c, j, here, K, OWN_TAPS) * neighbour(
            own, outer, i + (j - R), length, R, HALO
        )
    a = sigmoid(z)
    if KEEP:
        tl.store(mean + n * channels + c, own, mask=here)
        tl.store(gate + n * channels + c, a, mask=here)
    tl.store(
        pointers(y, n, c, s, y_sample, y_row, PLANES, ALIGN, WIDE),
        narrow(widen(tile) * a[:, None], y.dtype.element_ty),
        mask=mask,
    )


@triton.jit
def backward_resident(
    dy,  # (N, C, S)
    x,  # (N, C, S)
    dx,  # (N, C, S), written if DX
    weight,  # (1 or C, K)
    gate,  # (N, C)
    dz,  # (N, C), written if DZ: the gradient of the sigmoid's input
    channels,
    pixels,
    dy_sample,
    dy_row,
    x_sample,
    x_row,
    dx_sample,
    dx_row,
    K: tl.constexpr,
    OWN_TAPS: tl.constexpr,
    CIRCULAR: tl.constexpr,
    DX: tl.constexpr,
    DZ: tl.constexpr,
    PLANES: tl.constexpr,
    ALIGN: tl.constexpr,
    WIDE: tl.constexpr,
    HALO: tl.constexpr,
    BLOCK_S: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    R: tl.constexpr = K // 2
    tiles = tl.cdiv(channels, BLOCK_C)
    n = (tl.program_id(0) // tiles).to(tl.int64)
    first = wide(tl.program_id(0) % tiles, WIDE) * BLOCK_C
    length = tl.minimum(channels - first, BLOCK_C)
    i = tl.arange(0, BLOCK_C)
    c = first + i
    s = tl.arange(0, BLOCK_S)

    mask = inside(c, s, channels, pixels, PLANES, ALIGN)
    tile = tl.load(
        pointers(dy, n, c, s, dy_sample, dy_row, PLANES, ALIGN, WIDE), mask=mask, other=0.0
    )  # (C, S)
    other = tl.load(
        pointers(x, n, c, s, x_sample, x_row, PLANES, ALIGN, WIDE), mask=mask, other=0.0
    )
    total = tl.sum(widen(tile) * widen(other), 1)
    here = c < channels
    a = tl.load(gate + n * channels + c, mask=here, other=0.0)
    own = total * a * (1.0 - a)
    if DZ:
        tl.store(dz + n * channels + c, own, mask=here)
    if DX:
        outer = own
        if HALO > 0:
            h, there = halo(first, length, channels, R, HALO, CIRCULAR)
            around = there[:, None] & (s < pixels)[None, :]
            g = tl.load(
                pointers(dy, n, h, s, dy_sample, dy_row, PLANES, 1, WIDE), mask=around, other=0.0
            )
            v = tl.load(
                pointers(x, n, h, s, x_sample, x_row, PLANES, 1, WIDE), mask=around, other=0.0
            )
            b = tl.load(gate + n * channels + h, mask=there, other=0.0)
            outer = tl.sum(widen(g) * widen(v), 1) * b * (1.0 - b)

        dm = tl.zeros([BLOCK_C], total.dtype)
        for j in range(K):
            p = i + (R - j)
            q, exists = wrapped(first + p, channels, CIRCULAR)
            exists = exists & here
            term = tap(weight, q, j, exists, K, OWN_TAPS) * neighbour(
                own, outer, p, length, R, HALO
            )
            # Outside the channels there is no term: an infinite tap times zero would be NaN.
            dm += tl.where(exists, term, 0.0)
        shift = divide(dm, tl.cast(pixels, dm.dtype))
        tl.store(
            pointers(dx, n, c, s, dx_sample, dx_row, PLANES, ALIGN, WIDE),
            narrow(widen(tile) * a[:, None] + shift[:, None], dx.dtype.element_ty),
            mask=mask,
        )
