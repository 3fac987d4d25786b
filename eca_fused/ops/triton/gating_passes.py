"""The passes of attention after an activation over its maps; csrc/eca.h says what they compute.

    y = gate * z,  z = act(v),  v = p * (x - centre) + q

A program adds up its BLOCKS tiles in the dtype of sums, and programs meet in float64, in a fixed
order. A pass that writes goes backwards, as in tail_passes.py.

Bytes, for maps of B bytes (modelled, nothing found in a cache):

    activated_parts   reads B, or 2 B with dy
    gated_result      reads B, writes B
    gated_gradient    reads 2 B, writes B
"""

import triton
import triton.language as tl

from eca_fused.ops.triton.common import inside, narrow, pointers, wide
from eca_fused.ops.triton.tail_element import (
    GELU,
    RELU,
    SILU,
    activated,
    column,
    positive,
    slope,
    tile_of,
)

HARDSWISH = tl.constexpr(4)  # its place in ops.gating.ACTIVATIONS, the others' are in tail_element

# ---- activations ----


@triton.jit
def value_at(v, ACTIVATION: tl.constexpr):
    """act(v)."""
    if ACTIVATION == HARDSWISH:
        result = v * tl.minimum(tl.maximum(v + 3.0, 0.0), 6.0) * (1.0 / 6)
    else:
        result = activated(v, ACTIVATION)
    return result


@triton.jit
def slope_at(v, ACTIVATION: tl.constexpr):
    """act'(v)."""
    if ACTIVATION == HARDSWISH:
        result = tl.where(v < 3.0, v * (1.0 / 3) + 0.5, 1.0)
        result = tl.where(v <= -3.0, 0.0, result)
    elif ACTIVATION > RELU:
        result = slope(v, ACTIVATION)
    elif ACTIVATION == RELU:
        result = positive(v).to(v.dtype)
    else:
        result = tl.full(v.shape, 1.0, v.dtype)
    return result


@triton.jit
def sloped(dz, slopes, ACTIVATION: tl.constexpr):
    """dz * act'(v). Where an activation is flat, an infinite dz must not become NaN."""
    result = dz * slopes
    if ACTIVATION != SILU and ACTIVATION != GELU:  # these are nowhere flat
        result = tl.where(slopes == 0.0, 0.0, result)
    return result


# ---- passes ----


@triton.jit
def activated_parts(
    dy,  # (N, C, S), read if GRADIENT
    x,  # (N, C, S)
    values,  # (3, C): p, q and centre
    sums,  # (5 if FOR_NORM, else 1, N, C, splits) in float64, written
    samples,
    channels,
    pixels,
    splits,
    dy_sample,
    dy_row,
    x_sample,
    x_row,
    ACTIVATION: tl.constexpr,
    GRADIENT: tl.constexpr,
    FOR_NORM: tl.constexpr,
    PLANES: tl.constexpr,
    ALIGN: tl.constexpr,
    WIDE: tl.constexpr,
    BLOCKS: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_S: tl.constexpr,
):
    """Sums of z, or of dy * z with GRADIENT.

    With FOR_NORM also those of g = dy * act'(v), g * (x - centre), act'(v), act'(v) * (x - centre).
    """
    tiles = tl.cdiv(channels, BLOCK_C)
    program = tl.program_id(0)
    split = program % splits
    n = (program // splits // tiles).to(tl.int64)
    c = wide(program // splits % tiles, WIDE) * BLOCK_C + tl.arange(0, BLOCK_C)
    exists = c < channels
    wide_channels = tl.cast(channels, tl.int64)
    p = column(values, c, exists)
    q = column(values + wide_channels, c, exists)
    centre = column(values + 2 * wide_channels, c, exists)
    by_z = tl.zeros([BLOCK_C, BLOCK_S], values.dtype.element_ty)
    by_g = by_z
    by_g_x = by_z
    by_slope = by_z
    by_slope_x = by_z
    for block in range(BLOCKS):
        s = (wide(split, WIDE) * BLOCKS + block) * BLOCK_S + tl.arange(0, BLOCK_S)
        here = inside(c, s, channels, pixels, PLANES, ALIGN)
        distance = tile_of(x, n, c, s, here, x_sample, x_row, PLANES, ALIGN, WIDE) - centre
        v = p * distance + q
        z = value_at(v, ACTIVATION)
        if GRADIENT:
            dz = tile_of(dy, n, c, s, here, dy_sample, dy_row, PLANES, ALIGN, WIDE)
            z *= dz
        # Outside of the map act(v) is not zero, and zero times it may be NaN.
        by_z += tl.where(here, z, 0.0)
        if FOR_NORM:
            slopes = slope_at(v, ACTIVATION)
            g = sloped(dz, slopes, ACTIVATION)
            by_g += tl.where(here, g, 0.0)
            by_g_x += tl.where(here, g * distance, 0.0)
            by_slope += tl.where(here, slopes, 0.0)
            by_slope_x += tl.where(here, slopes * distance, 0.0)
    at = sums + (n * channels + c) * splits + split
    tl.store(at, tl.sum(by_z, 1), mask=exists)
    if FOR_NORM:
        kind = samples * wide_channels * splits
        tl.store(at + kind, tl.sum(by_g, 1), mask=exists)
        tl.store(at + 2 * kind, tl.sum(by_g_x, 1), mask=exists)
        tl.store(at + 3 * kind, tl.sum(by_slope, 1), mask=exists)
        tl.store(at + 4 * kind, tl.sum(by_slope_x, 1), mask=exists)


@triton.jit
def gated_result(
    x,  # (N, C, S)
    y,  # (N, C, S), written
    gate,  # (N, C)
    values,  # (3, C): p, q and centre
    channels,
    pixels,
    x_sample,
    x_row,
    y_sample,
    y_row,
    ACTIVATION: tl.constexpr,
    PLANES: tl.constexpr,
    ALIGN: tl.constexpr,
    WIDE: tl.constexpr,
    BLOCKS: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_S: tl.constexpr,
):
    """y = gate * z."""
    tiles = tl.cdiv(channels, BLOCK_C)
    splits = tl.cdiv(pixels, BLOCKS * BLOCK_S)
    program = tl.num_programs(0) - 1 - tl.program_id(0)
    n = (program // splits // tiles).to(tl.int64)
    c = wide(program // splits % tiles, WIDE) * BLOCK_C + tl.arange(0, BLOCK_C)
    exists = c < channels
    wide_channels = tl.cast(channels, tl.int64)
    a = column(gate, n * channels + c, exists)
    p = column(values, c, exists)
    q = column(values + wide_channels, c, exists)
    centre = column(values + 2 * wide_channels, c, exists)
    for back in range(BLOCKS):
        block = wide(program % splits, WIDE) * BLOCKS + (BLOCKS - 1 - back)
        s = block * BLOCK_S + tl.arange(0, BLOCK_S)
        here = inside(c, s, channels, pixels, PLANES, ALIGN)
        v = tile_of(x, n, c, s, here, x_sample, x_row, PLANES, ALIGN, WIDE)
        v = p * (v - centre) + q
        tl.store(
            pointers(y, n, c, s, y_sample, y_row, PLANES, ALIGN, WIDE),
            narrow(a * value_at(v, ACTIVATION), y.dtype.element_ty),
            mask=here,
        )


@triton.jit
def gated_gradient(
    dy,  # (N, C, S)
    x,  # (N, C, S)
    dx,  # (N, C, S), written
    planes,  # (2, N, C): gate and shift
    values,  # (3, C): p, q and centre
    gradient_values,  # (2, C): slope and offset, read if BY_X
    samples,
    channels,
    pixels,
    dy_sample,
    dy_row,
    x_sample,
    x_row,
    dx_sample,
    dx_row,
    ACTIVATION: tl.constexpr,
    BY_X: tl.constexpr,
    PLANES: tl.constexpr,
    ALIGN: tl.constexpr,
    WIDE: tl.constexpr,
    BLOCKS: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_S: tl.constexpr,
):
    """dx = p * (gate * dy + shift) * act'(v) + slope * (x - centre) + offset."""
    tiles = tl.cdiv(channels, BLOCK_C)
    splits = tl.cdiv(pixels, BLOCKS * BLOCK_S)
    program = tl.num_programs(0) - 1 - tl.program_id(0)
    n = (program // splits // tiles).to(tl.int64)
    c = wide(program // splits % tiles, WIDE) * BLOCK_C + tl.arange(0, BLOCK_C)
    exists = c < channels
    wide_channels = tl.cast(channels, tl.int64)
    plane = n * channels + c
    gate = column(planes, plane, exists)
    shift = column(planes + samples * wide_channels, plane, exists)
    p = column(values, c, exists)
    q = column(values + wide_channels, c, exists)
    centre = column(values + 2 * wide_channels, c, exists)
    if BY_X:
        by_x = column(gradient_values, c, exists)
        offset = column(gradient_values + wide_channels, c, exists)
    for back in range(BLOCKS):
        block = wide(program % splits, WIDE) * BLOCKS + (BLOCKS - 1 - back)
        s = block * BLOCK_S + tl.arange(0, BLOCK_S)
        here = inside(c, s, channels, pixels, PLANES, ALIGN)
        dz = tile_of(dy, n, c, s, here, dy_sample, dy_row, PLANES, ALIGN, WIDE)
        dz = gate * dz + shift
        distance = tile_of(x, n, c, s, here, x_sample, x_row, PLANES, ALIGN, WIDE) - centre
        d = p * sloped(dz, slope_at(p * distance + q, ACTIVATION), ACTIVATION)
        if BY_X:
            d += by_x * distance + offset
        tl.store(
            pointers(dx, n, c, s, dx_sample, dx_row, PLANES, ALIGN, WIDE),
            narrow(d, dx.dtype.element_ty),
            mask=here,
        )
