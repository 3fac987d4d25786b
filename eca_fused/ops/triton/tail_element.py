"""What the passes of a residual block's tail do with the elements of a tile; see tail_passes.py.

ReLU's mask has a bit for each element: 1 where v > 0 or v is NaN. A row begins with a new byte, and
bit j of byte i is for element 8 i + j of the row. So the bytes of a tile are a tile of a smaller
map, and are read and written as one.
"""

import triton
import triton.language as tl

from eca_fused.ops.triton.common import exponential, inside, pointers, sigmoid, widen

# Places in ops.checks.ACTIVATIONS.
RELU = tl.constexpr(1)
SILU = tl.constexpr(2)
GELU = tl.constexpr(3)

# ---- activations ----


@triton.jit
def normal_below(v):
    """The cumulative normal distribution."""
    return 0.5 + 0.5 * tl.erf(v * 0.70710678118654752)


@triton.jit
def activated(v, ACTIVATION: tl.constexpr):
    if ACTIVATION == RELU:
        result = tl.where(positive(v), v, 0.0)
    elif ACTIVATION == SILU:
        result = v * sigmoid(v)
    elif ACTIVATION == GELU:
        result = v * normal_below(v)
    else:
        result = v
    return result


@triton.jit
def slope(v, ACTIVATION: tl.constexpr):
    """The slope of SiLU or GELU at v."""
    if ACTIVATION == SILU:
        s = sigmoid(v)
        result = s * (1.0 + v * (1.0 - s))
    else:
        density = exponential(-0.5 * v * v) * 0.39894228040143268
        result = normal_below(v) + v * density
    return result


@triton.jit
def positive(v):
    """Where ReLU passes v on. PyTorch's keeps NaN."""
    return (v > 0) | (v != v)


# ---- tiles ----


@triton.jit
def tile_of(
    map_,
    n,
    c,
    s,
    here,
    sample_stride,
    row_stride,
    PLANES: tl.constexpr,
    ALIGN: tl.constexpr,
    WIDE: tl.constexpr,
):
    """A tile (channels, pixels) of sample n, in the dtype of sums; zero outside of the map."""
    at = pointers(map_, n, c, s, sample_stride, row_stride, PLANES, ALIGN, WIDE)
    return widen(tl.load(at, mask=here, other=0.0))


@triton.jit
def column(values, i, exists):
    """Coefficients of a tile's channels, beside its pixels."""
    return tl.load(values + i, mask=exists, other=0.0)[:, None]


@triton.jit
def places(first, LENGTH: tl.constexpr, PACKED: tl.constexpr):
    """Positions in the mask of a tile's channels or pixels; packed ones share a byte by eights."""
    EACH: tl.constexpr = 8 if PACKED else 1
    return first // EACH + tl.arange(0, LENGTH // EACH)


@triton.jit
def store_bits(
    mask,
    bits,
    n,
    first_c,
    first_s,
    channels,
    pixels,
    row_bytes,
    PLANES: tl.constexpr,
    ALIGN: tl.constexpr,
    WIDE: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_S: tl.constexpr,
):
    """Write the bits of a tile. ALIGN, here and in load_bits(), divides row_bytes."""
    c = places(first_c, BLOCK_C, not PLANES)
    s = places(first_s, BLOCK_S, PLANES)
    if PLANES:
        eights = tl.reshape(bits.to(tl.int32), [BLOCK_C, BLOCK_S // 8, 8])
        packed = tl.sum(eights << tl.arange(0, 8)[None, None, :], 2)
        sample = tl.cast(channels, tl.int64) * row_bytes
        here = inside(c, s, channels, row_bytes, PLANES, ALIGN)
    else:
        eights = tl.reshape(bits.to(tl.int32), [BLOCK_C // 8, 8, BLOCK_S])
        packed = tl.sum(eights << tl.arange(0, 8)[None, :, None], 1)
        sample = tl.cast(pixels, tl.int64) * row_bytes
        here = inside(c, s, row_bytes, pixels, PLANES, ALIGN)
    at = pointers(mask, n, c, s, sample, row_bytes, PLANES, ALIGN, WIDE)
    tl.store(at, packed.to(tl.uint8), mask=here)


@triton.jit
def load_bits(
    mask,
    n,
    first_c,
    first_s,
    channels,
    pixels,
    row_bytes,
    PLANES: tl.constexpr,
    ALIGN: tl.constexpr,
    WIDE: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_S: tl.constexpr,
):
    """The bits of a tile as store_bits() wrote them."""
    c = places(first_c, BLOCK_C, not PLANES)
    s = places(first_s, BLOCK_S, PLANES)
    if PLANES:
        sample = tl.cast(channels, tl.int64) * row_bytes
        here = inside(c, s, channels, row_bytes, PLANES, ALIGN)
    else:
        sample = tl.cast(pixels, tl.int64) * row_bytes
        here = inside(c, s, row_bytes, pixels, PLANES, ALIGN)
    at = pointers(mask, n, c, s, sample, row_bytes, PLANES, ALIGN, WIDE)
    packed = tl.load(at, mask=here, other=0).to(tl.int32)
    if PLANES:
        eights = packed[:, :, None] >> tl.arange(0, 8)[None, None, :]
    else:
        eights = packed[:, None, :] >> tl.arange(0, 8)[None, :, None]
    return tl.reshape(eights & 1, [BLOCK_C, BLOCK_S]) != 0


@triton.jit
def bits_of(mask, n, c, s, here, channels, pixels, row_bytes, PLANES: tl.constexpr):
    """The bits of any channels and pixels, each read by itself."""
    c, s = c.to(tl.int64), s.to(tl.int64)
    if PLANES:
        at = ((n * channels + c) * row_bytes)[:, None] + (s // 8)[None, :]
        place = (s & 7)[None, :]
    else:
        at = ((n * pixels + s) * row_bytes)[None, :] + (c // 8)[:, None]
        place = (c & 7)[:, None]
    packed = tl.load(mask + at, mask=here, other=0).to(tl.int32)
    return ((packed >> place.to(tl.int32)) & 1) != 0
