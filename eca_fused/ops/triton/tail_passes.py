"""The passes of a residual block's tail over its maps; csrc/eca.h says what they compute.

    y = act(v),  v = p * (x - centre) + q + identity_scale * (identity - identity_centre)

A program adds up its BLOCKS tiles in the dtype of sums, and programs meet in float64, in a fixed
order. As in passes.py, a pass that writes maps goes backwards, so that it finds what the pass
before read last in the L2 cache.

Bytes, for maps of B bytes (modelled, nothing found in a cache); ReLU's mask is B / 16 in half
precision. For SiLU and GELU there is none, and the last two passes read x and the identity instead.

    plane_moments   reads B
    tail_result     reads B, with an identity 2 B; writes B and the mask
    gradient_sums   reads 2 B and the mask; B more for the identity's sum
    gradient_maps   reads B and the mask, B more for each of x and the identity that the gradients
                    depend on; writes B for each gradient that is needed
"""

import triton
import triton.language as tl

from eca_fused.ops.triton.common import divide, inside, narrow, pointers, wide
from eca_fused.ops.triton.tail_element import (
    RELU,
    activated,
    column,
    load_bits,
    positive,
    slope,
    store_bits,
    tile_of,
)


@triton.jit
def plane_moments(
    x,  # (N, C, S)
    found,  # (2, N, C, splits) in float64, written: of BLOCKS * BLOCK_S pixels
    samples,
    channels,
    pixels,
    splits,
    x_sample,
    x_row,
    PLANES: tl.constexpr,
    ALIGN: tl.constexpr,
    WIDE: tl.constexpr,
    BLOCKS: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_S: tl.constexpr,
):
    """The mean of each plane, and the sum of the squared distances from it.

    Both follow from sums of d and d * d, with distances d from a pivot. It is the mean of the first
    of BLOCKS tiles, so no more than a factor of BLOCKS + 1 is lost to cancellation.
    """
    tiles = tl.cdiv(channels, BLOCK_C)
    program = tl.program_id(0)
    split = program % splits
    n = (program // splits // tiles).to(tl.int64)
    c = wide(program // splits % tiles, WIDE) * BLOCK_C + tl.arange(0, BLOCK_C)
    first = wide(split, WIDE) * BLOCKS * BLOCK_S

    s = first + tl.arange(0, BLOCK_S)
    here = inside(c, s, channels, pixels, PLANES, ALIGN)
    values = tile_of(x, n, c, s, here, x_sample, x_row, PLANES, ALIGN, WIDE)
    pivot = tl.sum(values, 1)
    pivot = divide(pivot, tl.minimum(pixels - first, BLOCK_S).to(pivot.dtype))
    # Distances from infinity would be NaN, and a mean of infinity become NaN.
    pivot = tl.where(tl.abs(pivot) < float("inf"), pivot, 0.0)
    d = tl.where(here, values - pivot[:, None], 0.0)
    distance = d
    square = d * d
    for block in range(1, BLOCKS):
        s = first + block * BLOCK_S + tl.arange(0, BLOCK_S)
        here = inside(c, s, channels, pixels, PLANES, ALIGN)
        values = tile_of(x, n, c, s, here, x_sample, x_row, PLANES, ALIGN, WIDE)
        d = tl.where(here, values - pivot[:, None], 0.0)
        distance += d
        square += d * d

    total = tl.sum(distance, 1).to(tl.float64)
    shift = total / tl.minimum(pixels - first, BLOCKS * BLOCK_S).to(tl.float64)
    squares = tl.sum(square, 1).to(tl.float64) - total * shift
    squares = tl.where(squares < 0, 0.0, squares)  # of a constant plane; keeps NaN
    at = found + (n * channels + c) * splits + split
    tl.store(at, pivot.to(tl.float64) + shift, mask=c < channels)
    tl.store(at + tl.cast(samples, tl.int64) * channels * splits, squares, mask=c < channels)


@triton.jit
def merge_moments(
    parts,  # (2, N, C, splits) in float64, each of `most` pixels, the last of what is left
    found,  # (2, N, C) in float64, written
    samples,
    channels,
    pixels,
    splits,
    most,
    WIDE: tl.constexpr,
    SPLITS: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """The moments of whole planes (Chan, Golub and LeVeque, 1979)."""
    tiles = tl.cdiv(channels, BLOCK_C)
    n = (tl.program_id(0) // tiles).to(tl.int64)
    c = wide(tl.program_id(0) % tiles, WIDE) * BLOCK_C + tl.arange(0, BLOCK_C)
    split = tl.arange(0, SPLITS)
    exists = (c < channels)[:, None] & (split < splits)[None, :]
    planes = tl.cast(samples, tl.int64) * channels
    at = parts + ((n * channels + c) * splits)[:, None] + split[None, :]
    means = tl.load(at, mask=exists, other=0.0)
    squares = tl.load(at + planes * splits, mask=exists, other=0.0)
    counts = tl.minimum(pixels - wide(split, WIDE) * most, most).to(tl.float64)[None, :]
    mean = tl.sum(tl.where(exists, means * counts, 0.0), 1) / tl.cast(pixels, tl.float64)
    between = means - mean[:, None]
    squares += tl.where(exists, between * between * counts, 0.0)
    tl.store(found + n * channels + c, mean, mask=c < channels)
    tl.store(found + planes + n * channels + c, tl.sum(squares, 1), mask=c < channels)


@triton.jit
def tail_result(
    x,  # (N, C, S)
    identity,  # (N, C, S), read if IDENTITY
    y,  # (N, C, S), written
    mask,  # bytes, written if KEEP
    planes,  # (2, N, C): p and q
    values,  # (3, C): centre, identity_scale and identity_centre
    samples,
    channels,
    pixels,
    row_bytes,
    x_sample,
    x_row,
    identity_sample,
    identity_row,
    y_sample,
    y_row,
    ACTIVATION: tl.constexpr,
    IDENTITY: tl.constexpr,
    KEEP: tl.constexpr,
    MASK_ALIGN: tl.constexpr,
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
    first_c = wide(program // splits % tiles, WIDE) * BLOCK_C
    c = first_c + tl.arange(0, BLOCK_C)
    exists = c < channels
    wide_channels = tl.cast(channels, tl.int64)
    p = column(planes, n * channels + c, exists)
    q = column(planes + samples * wide_channels, n * channels + c, exists)
    centre = column(values, c, exists)
    if IDENTITY:
        identity_scale = column(values + wide_channels, c, exists)
        identity_centre = column(values + 2 * wide_channels, c, exists)
    for back in range(BLOCKS):
        first_s = (wide(program % splits, WIDE) * BLOCKS + (BLOCKS - 1 - back)) * BLOCK_S
        s = first_s + tl.arange(0, BLOCK_S)
        here = inside(c, s, channels, pixels, PLANES, ALIGN)
        v = tile_of(x, n, c, s, here, x_sample, x_row, PLANES, ALIGN, WIDE)
        v = p * (v - centre) + q
        if IDENTITY:
            other = tile_of(
                identity, n, c, s, here, identity_sample, identity_row, PLANES, ALIGN, WIDE
            )
            v += identity_scale * (other - identity_centre)
        tl.store(
            pointers(y, n, c, s, y_sample, y_row, PLANES, ALIGN, WIDE),
            narrow(activated(v, ACTIVATION), y.dtype.element_ty),
            mask=here,
        )
        if KEEP:
            store_bits(
                mask,
                positive(v) & here,
                n,
                first_c,
                first_s,
                channels,
                pixels,
                row_bytes,
                PLANES,
                MASK_ALIGN,
                WIDE,
                BLOCK_C,
                BLOCK_S,
            )


@triton.jit
def gradient_sums(
    dy,  # (N, C, S)
    x,  # (N, C, S)
    identity,  # (N, C, S), read if IDENTITY, for v, or if IDENTITY_SUM
    mask,  # bytes, read for ReLU
    planes,  # (2, N, C): p and q, read for SiLU and GELU
    values,  # (3, C): centre, identity_scale and identity_centre
    sums,  # (2, or 3 if IDENTITY_SUM, N, C, splits) in float64, written
    samples,
    channels,
    pixels,
    splits,
    row_bytes,
    dy_sample,
    dy_row,
    x_sample,
    x_row,
    identity_sample,
    identity_row,
    ACTIVATION: tl.constexpr,
    IDENTITY: tl.constexpr,
    IDENTITY_SUM: tl.constexpr,
    MASK_ALIGN: tl.constexpr,
    PLANES: tl.constexpr,
    ALIGN: tl.constexpr,
    WIDE: tl.constexpr,
    BLOCKS: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_S: tl.constexpr,
):
    """Sums of g, g * (x - centre) and g * (identity - identity_centre), g = dy * act'(v)."""
    SMOOTH: tl.constexpr = ACTIVATION > RELU
    tiles = tl.cdiv(channels, BLOCK_C)
    program = tl.program_id(0)
    split = program % splits
    n = (program // splits // tiles).to(tl.int64)
    first_c = wide(program // splits % tiles, WIDE) * BLOCK_C
    c = first_c + tl.arange(0, BLOCK_C)
    exists = c < channels
    wide_channels = tl.cast(channels, tl.int64)
    all_planes = samples * wide_channels
    centre = column(values, c, exists)
    if IDENTITY or IDENTITY_SUM:
        identity_centre = column(values + 2 * wide_channels, c, exists)
    if SMOOTH:
        p = column(planes, n * channels + c, exists)
        q = column(planes + all_planes, n * channels + c, exists)
        if IDENTITY:
            identity_scale = column(values + wide_channels, c, exists)
    by_one = tl.zeros([BLOCK_C, BLOCK_S], planes.dtype.element_ty)
    by_x = by_one
    by_identity = by_one
    for block in range(BLOCKS):
        first_s = (wide(split, WIDE) * BLOCKS + block) * BLOCK_S
        s = first_s + tl.arange(0, BLOCK_S)
        here = inside(c, s, channels, pixels, PLANES, ALIGN)
        g = tile_of(dy, n, c, s, here, dy_sample, dy_row, PLANES, ALIGN, WIDE)
        # Outside of the map zero times an infinite coefficient would be NaN.
        distance = tile_of(x, n, c, s, here, x_sample, x_row, PLANES, ALIGN, WIDE)
        distance = tl.where(here, distance - centre, 0.0)
        if IDENTITY or IDENTITY_SUM:
            other = tile_of(
                identity, n, c, s, here, identity_sample, identity_row, PLANES, ALIGN, WIDE
            )
            other = tl.where(here, other - identity_centre, 0.0)
        if SMOOTH:
            v = p * distance + q
            if IDENTITY:
                v += identity_scale * other
            g = tl.where(here, g * slope(v, ACTIVATION), 0.0)
        elif ACTIVATION == RELU:
            bits = load_bits(
                mask,
                n,
                first_c,
                first_s,
                channels,
                pixels,
                row_bytes,
                PLANES,
                MASK_ALIGN,
                WIDE,
                BLOCK_C,
                BLOCK_S,
            )
            g = tl.where(bits, g, 0.0)
        by_one += g
        by_x += g * distance
        if IDENTITY_SUM:
            by_identity += g * other
    at = sums + (n * channels + c) * splits + split
    tl.store(at, tl.sum(by_one, 1), mask=exists)
    tl.store(at + all_planes * splits, tl.sum(by_x, 1), mask=exists)
    if IDENTITY_SUM:
        tl.store(at + 2 * all_planes * splits, tl.sum(by_identity, 1), mask=exists)


@triton.jit
def gradient_maps(
    dy,  # (N, C, S)
    x,  # (N, C, S), read for SiLU and GELU, or if BY_X
    identity,  # (N, C, S), read if IDENTITY, for v, or if BY_IDENTITY
    mask,  # bytes, read for ReLU
    dx,  # (N, C, S), written if DX
    d_identity,  # (N, C, S), written if D_IDENTITY
    planes,  # (2, N, C): p and q, read for SiLU and GELU
    values,  # (3, C): centre, identity_scale and identity_centre
    gradient_planes,  # (2, N, C): p and r
    gradient_values,  # (4, C): q, and p, q and r of the identity
    samples,
    channels,
    pixels,
    row_bytes,
    dy_sample,
    dy_row,
    x_sample,
    x_row,
    identity_sample,
    identity_row,
    dx_sample,
    dx_row,
    d_identity_sample,
    d_identity_row,
    ACTIVATION: tl.constexpr,
    IDENTITY: tl.constexpr,
    BY_X: tl.constexpr,
    BY_IDENTITY: tl.constexpr,
    DX: tl.constexpr,
    D_IDENTITY: tl.constexpr,
    MASK_ALIGN: tl.constexpr,
    PLANES: tl.constexpr,
    ALIGN: tl.constexpr,
    WIDE: tl.constexpr,
    BLOCKS: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_S: tl.constexpr,
):
    """dx = p * g + q * (x - centre) + r, and the same for the identity."""
    SMOOTH: tl.constexpr = ACTIVATION > RELU
    tiles = tl.cdiv(channels, BLOCK_C)
    splits = tl.cdiv(pixels, BLOCKS * BLOCK_S)
    program = tl.num_programs(0) - 1 - tl.program_id(0)
    n = (program // splits // tiles).to(tl.int64)
    first_c = wide(program // splits % tiles, WIDE) * BLOCK_C
    c = first_c + tl.arange(0, BLOCK_C)
    exists = c < channels
    wide_channels = tl.cast(channels, tl.int64)
    plane = n * channels + c
    all_planes = samples * wide_channels
    if SMOOTH or BY_X:
        centre = column(values, c, exists)
    if IDENTITY or BY_IDENTITY:
        identity_centre = column(values + 2 * wide_channels, c, exists)
    if SMOOTH:
        p = column(planes, plane, exists)
        q = column(planes + all_planes, plane, exists)
        if IDENTITY:
            identity_scale = column(values + wide_channels, c, exists)
    if DX:
        x_p = column(gradient_planes, plane, exists)
        x_r = column(gradient_planes + all_planes, plane, exists)
        if BY_X:
            x_q = column(gradient_values, c, exists)
    if D_IDENTITY:
        identity_p = column(gradient_values + wide_channels, c, exists)
        if BY_IDENTITY:
            identity_q = column(gradient_values + 2 * wide_channels, c, exists)
            identity_r = column(gradient_values + 3 * wide_channels, c, exists)
    for back in range(BLOCKS):
        first_s = (wide(program % splits, WIDE) * BLOCKS + (BLOCKS - 1 - back)) * BLOCK_S
        s = first_s + tl.arange(0, BLOCK_S)
        here = inside(c, s, channels, pixels, PLANES, ALIGN)
        g = tile_of(dy, n, c, s, here, dy_sample, dy_row, PLANES, ALIGN, WIDE)
        if SMOOTH or BY_X:
            distance = tile_of(x, n, c, s, here, x_sample, x_row, PLANES, ALIGN, WIDE) - centre
        if IDENTITY or BY_IDENTITY:
            other = tile_of(
                identity, n, c, s, here, identity_sample, identity_row, PLANES, ALIGN, WIDE
            )
            other -= identity_centre
        if SMOOTH:
            v = p * distance + q
            if IDENTITY:
                v += identity_scale * other
            g *= slope(v, ACTIVATION)
        elif ACTIVATION == RELU:
            bits = load_bits(
                mask,
                n,
                first_c,
                first_s,
                channels,
                pixels,
                row_bytes,
                PLANES,
                MASK_ALIGN,
                WIDE,
                BLOCK_C,
                BLOCK_S,
            )
            g = tl.where(bits, g, 0.0)
        if DX:
            d = x_p * g + x_r
            if BY_X:
                d += x_q * distance
            tl.store(
                pointers(dx, n, c, s, dx_sample, dx_row, PLANES, ALIGN, WIDE),
                narrow(d, dx.dtype.element_ty),
                mask=here,
            )
        if D_IDENTITY:
            d = identity_p * g
            if BY_IDENTITY:
                d += identity_q * other + identity_r
            tl.store(
                pointers(
                    d_identity, n, c, s, d_identity_sample, d_identity_row, PLANES, ALIGN, WIDE
                ),
                narrow(d, d_identity.dtype.element_ty),
                mask=here,
            )
