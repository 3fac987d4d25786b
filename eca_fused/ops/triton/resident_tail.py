"""One-pass kernels of a block's tail with ECA's gate and without statistics of the batch.

As in resident.py, each program keeps a tile of channels, with whole planes, in registers, and also
sums the planes of the r channels on each side, which it finds in the L2 cache. What is computed is
in csrc/eca.h: with rows of a channel from tail_coefficients(),

    u = alpha * (x - centre) + beta,  gate = sigmoid(taps over the channels' means of u)
    v = gate * scale * u + identity_scale * (identity - identity_centre) + shift,  y = act(v)

Bytes, for maps of B bytes (modelled); ReLU's mask is B / 16 in half precision. Forward reads B,
with an identity 2 B, and writes B and the mask. Backward reads 2 B and the mask, B more for the
identity's sum or for SiLU and GELU, and writes B for each gradient. The halos read 2r / BLOCK_C as
much again, from the cache.
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
    wrapped,
)
from eca_fused.ops.triton.tail_element import (
    RELU,
    activated,
    bits_of,
    load_bits,
    positive,
    slope,
    store_bits,
    tile_of,
)

# The rows of a channel.
SHIFT, ALPHA, BETA, CENTRE, IDENTITY_SCALE, IDENTITY_CENTRE = map(tl.constexpr, range(6))


@triton.jit
def row_of(rows, ROW: tl.constexpr, c, exists, channels):
    """A row's values of channels c."""
    return tl.load(rows + tl.cast(channels, tl.int64) * ROW + c, mask=exists, other=0.0)


@triton.jit
def distances(
    map_,
    rows,
    ROW: tl.constexpr,  # of the centre
    n,
    c,
    s,
    exists,
    here,
    channels,
    sample_stride,
    row_stride,
    PLANES: tl.constexpr,
    ALIGN: tl.constexpr,
    WIDE: tl.constexpr,
):
    """A tile (channels, pixels) of a map less its centre; zero outside of the map."""
    values = tile_of(map_, n, c, s, here, sample_stride, row_stride, PLANES, ALIGN, WIDE)
    return tl.where(here, values - row_of(rows, ROW, c, exists, channels)[:, None], 0.0)


@triton.jit
def normed(distance, rows, c, exists, channels):
    """The means of u from those of x - centre."""
    beta = row_of(rows, BETA, c, exists, channels)
    return row_of(rows, ALPHA, c, exists, channels) * distance + beta


@triton.jit
def factor_of(scale, n, like):
    """The factor of sample n, 1 without one."""
    return tl.cast(1.0, like) if scale is None else tl.load(scale + n)


@triton.jit
def block_tail_result(
    x,  # (N, C, S)
    identity,  # (N, C, S), read if IDENTITY
    y,  # (N, C, S), written
    mask,  # bytes, written if KEEP_MASK
    weight,  # (1 or C, K)
    scale,  # (N,), or None
    rows,  # (6, C)
    distance,  # (N, C), written: the means of x - centre
    gate,  # (N, C), written
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
    KEEP_MASK: tl.constexpr,
    MASK_ALIGN: tl.constexpr,
    K: tl.constexpr,
    OWN_TAPS: tl.constexpr,
    CIRCULAR: tl.constexpr,
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
    exists = c < channels
    here = inside(c, s, channels, pixels, PLANES, ALIGN)
    d = distances(
        x, rows, CENTRE, n, c, s, exists, here, channels, x_sample, x_row, PLANES, ALIGN, WIDE
    )
    count = tl.cast(pixels, d.dtype)
    own = divide(tl.sum(d, 1), count)
    u = normed(own, rows, c, exists, channels)
    outer = u
    if HALO > 0:
        h, there = halo(first, length, channels, R, HALO, CIRCULAR)
        around = there[:, None] & (s < pixels)[None, :]
        beside = distances(
            x, rows, CENTRE, n, h, s, there, around, channels, x_sample, x_row, PLANES, 1, WIDE
        )
        outer = normed(divide(tl.sum(beside, 1), count), rows, h, there, channels)
    z = tl.zeros([BLOCK_C], own.dtype)
    for j in range(K):
        near = neighbour(u, outer, i + (j - R), length, R, HALO)
        z += tap(weight, c, j, exists, K, OWN_TAPS) * near
    a = sigmoid(z)
    tl.store(distance + n * channels + c, own, mask=exists)
    tl.store(gate + n * channels + c, a, mask=exists)

    factor = a * factor_of(scale, n, own.dtype)
    q = factor * row_of(rows, BETA, c, exists, channels)
    q += row_of(rows, SHIFT, c, exists, channels)
    v = (factor * row_of(rows, ALPHA, c, exists, channels))[:, None] * d + q[:, None]
    if IDENTITY:
        other = distances(
            identity,
            rows,
            IDENTITY_CENTRE,
            n,
            c,
            s,
            exists,
            here,
            channels,
            identity_sample,
            identity_row,
            PLANES,
            ALIGN,
            WIDE,
        )
        v += row_of(rows, IDENTITY_SCALE, c, exists, channels)[:, None] * other
    tl.store(
        pointers(y, n, c, s, y_sample, y_row, PLANES, ALIGN, WIDE),
        narrow(activated(v, ACTIVATION), y.dtype.element_ty),
        mask=here,
    )
    if KEEP_MASK:
        store_bits(
            mask,
            positive(v) & here,
            n,
            first,
            0,
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
def gradient_tile(
    dy,
    x,
    identity,
    passed,  # a tile: the bits of ReLU's mask; not read for others
    rows,
    gate,
    factor,
    n,
    c,
    s,
    exists,
    here,
    channels,
    dy_sample,
    dy_row,
    x_sample,
    x_row,
    identity_sample,
    identity_row,
    ACTIVATION: tl.constexpr,
    IDENTITY: tl.constexpr,
    IDENTITY_SUM: tl.constexpr,
    PLANES: tl.constexpr,
    ALIGN: tl.constexpr,
    WIDE: tl.constexpr,
):
    """g = dy * act'(v) of a tile, and the sums of g, g * (x - centre) and g * (identity - its)."""
    SMOOTH: tl.constexpr = ACTIVATION > RELU
    g = tile_of(dy, n, c, s, here, dy_sample, dy_row, PLANES, ALIGN, WIDE)
    d = distances(
        x, rows, CENTRE, n, c, s, exists, here, channels, x_sample, x_row, PLANES, ALIGN, WIDE
    )
    other = d
    if IDENTITY:
        other = distances(
            identity,
            rows,
            IDENTITY_CENTRE,
            n,
            c,
            s,
            exists,
            here,
            channels,
            identity_sample,
            identity_row,
            PLANES,
            ALIGN,
            WIDE,
        )
    if SMOOTH:
        a = tl.load(gate + n * channels + c, mask=exists, other=0.0) * factor
        q = a * row_of(rows, BETA, c, exists, channels) + row_of(rows, SHIFT, c, exists, channels)
        v = (a * row_of(rows, ALPHA, c, exists, channels))[:, None] * d + q[:, None]
        if IDENTITY:
            v += row_of(rows, IDENTITY_SCALE, c, exists, channels)[:, None] * other
        g = tl.where(here, g * slope(v, ACTIVATION), 0.0)
    elif ACTIVATION == RELU:
        g = tl.where(passed, g, 0.0)
    by_one = tl.sum(g, 1)
    by_x = tl.sum(g * d, 1)
    by_identity = by_one
    if IDENTITY_SUM:
        by_identity = tl.sum(g * other, 1)
    return g, by_one, by_x, by_identity


@triton.jit
def sigmoid_gradient(by_one, by_x, rows, gate, factor, n, c, exists, channels):
    """dz: the gradient of the sigmoid's input."""
    beta = row_of(rows, BETA, c, exists, channels)
    # Without a norm, beta is zero, and an infinite sum of g must not become NaN.
    dfactor = row_of(rows, ALPHA, c, exists, channels) * by_x
    dfactor += tl.where(beta == 0.0, 0.0, beta * by_one)
    a = tl.load(gate + n * channels + c, mask=exists, other=0.0)
    return dfactor * factor * a * (1.0 - a)


@triton.jit
def block_tail_gradients(
    dy,  # (N, C, S)
    x,  # (N, C, S)
    identity,  # (N, C, S), read if IDENTITY
    mask,  # bytes, read for ReLU
    dx,  # (N, C, S), written if DX
    d_identity,  # (N, C, S), written if D_IDENTITY
    weight,  # (1 or C, K)
    scale,  # (N,), or None
    rows,  # (6, C)
    distance,  # (N, C), read for DZ
    gate,  # (N, C)
    sums,  # (2, or 3 if IDENTITY_SUM, N, C) in float64, written
    dmean,  # (N, C), written: the gradient of the means of u
    dz,  # (N, C), written if DZ
    inputs,  # (N, C), written if DZ: the means of u
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
    IDENTITY_SUM: tl.constexpr,
    DX: tl.constexpr,
    D_IDENTITY: tl.constexpr,
    DZ: tl.constexpr,
    MASK_ALIGN: tl.constexpr,
    K: tl.constexpr,
    OWN_TAPS: tl.constexpr,
    CIRCULAR: tl.constexpr,
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
    exists = c < channels
    here = inside(c, s, channels, pixels, PLANES, ALIGN)
    factor = factor_of(scale, n, rows.dtype.element_ty)
    passed = here
    if ACTIVATION == RELU:
        passed = load_bits(
            mask,
            n,
            first,
            0,
            channels,
            pixels,
            row_bytes,
            PLANES,
            MASK_ALIGN,
            WIDE,
            BLOCK_C,
            BLOCK_S,
        )
    g, by_one, by_x, by_identity = gradient_tile(
        dy,
        x,
        identity,
        passed,
        rows,
        gate,
        factor,
        n,
        c,
        s,
        exists,
        here,
        channels,
        dy_sample,
        dy_row,
        x_sample,
        x_row,
        identity_sample,
        identity_row,
        ACTIVATION,
        IDENTITY,
        IDENTITY_SUM,
        PLANES,
        ALIGN,
        WIDE,
    )
    plane = n * channels + c
    all_planes = tl.cast(samples, tl.int64) * channels
    tl.store(sums + plane, by_one.to(tl.float64), mask=exists)
    tl.store(sums + all_planes + plane, by_x.to(tl.float64), mask=exists)
    if IDENTITY_SUM:
        tl.store(sums + 2 * all_planes + plane, by_identity.to(tl.float64), mask=exists)
    own = sigmoid_gradient(by_one, by_x, rows, gate, factor, n, c, exists, channels)
    if DZ:
        tl.store(dz + plane, own, mask=exists)
        mean = tl.load(distance + plane, mask=exists, other=0.0)
        tl.store(inputs + plane, normed(mean, rows, c, exists, channels), mask=exists)
    outer = own
    if HALO > 0:
        h, there = halo(first, length, channels, R, HALO, CIRCULAR)
        around = there[:, None] & (s < pixels)[None, :]
        passed = around
        if ACTIVATION == RELU:
            passed = bits_of(mask, n, h, s, around, channels, pixels, row_bytes, PLANES)
        _, one_beside, x_beside, _ = gradient_tile(
            dy,
            x,
            identity,
            passed,
            rows,
            gate,
            factor,
            n,
            h,
            s,
            there,
            around,
            channels,
            dy_sample,
            dy_row,
            x_sample,
            x_row,
            identity_sample,
            identity_row,
            ACTIVATION,
            IDENTITY and ACTIVATION > RELU,
            False,
            PLANES,
            1,
            WIDE,
        )
        outer = sigmoid_gradient(one_beside, x_beside, rows, gate, factor, n, h, there, channels)
    dm = tl.zeros([BLOCK_C], own.dtype)
    for j in range(K):
        p = i + (R - j)
        q, real = wrapped(first + p, channels, CIRCULAR)
        real = real & exists
        term = tap(weight, q, j, real, K, OWN_TAPS) * neighbour(own, outer, p, length, R, HALO)
        # Outside the channels there is no term: an infinite tap times zero would be NaN.
        dm += tl.where(real, term, 0.0)
    tl.store(dmean + plane, dm, mask=exists)
    if DX:
        alpha = row_of(rows, ALPHA, c, exists, channels)
        a = tl.load(gate + plane, mask=exists, other=0.0) * factor * alpha
        r = divide(alpha * dm, tl.cast(pixels, dm.dtype))
        tl.store(
            pointers(dx, n, c, s, dx_sample, dx_row, PLANES, ALIGN, WIDE),
            narrow(a[:, None] * g + r[:, None], dx.dtype.element_ty),
            mask=here,
        )
    if D_IDENTITY:
        identity_p = row_of(rows, IDENTITY_SCALE, c, exists, channels)[:, None]
        tl.store(
            pointers(d_identity, n, c, s, d_identity_sample, d_identity_row, PLANES, ALIGN, WIDE),
            narrow(identity_p * g, d_identity.dtype.element_ty),
            mask=here,
        )
