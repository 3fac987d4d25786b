"""What the Triton kernels share: numbers, positions in a map, the convolution over channels.

A Triton function may return only one type, so each has a single return.

Names: i, c and s are vectors of positions in a tile, channels and pixels; q is the neighbour of c
that a tap reads. Names in capitals are compile-time constants:
    PLANES    a map's rows are planes (contiguous), else pixels (channels_last)
    ALIGN     1 to 16, a power of two that divides every stride and the length of the rows
    WIDE      positions in a sample may overflow int32: it has 2^30 elements or more
    HALO      places for the 2r neighbours outside a tile, a power of two; 0 if there are none
    BLOCK_C, BLOCK_S   channels and pixels of a tile
"""

import triton
import triton.language as tl

# Triton's interpreter truncates conversions to bfloat16 and is wrong for subnormal numbers, so
# there both conversions use integer operations.
BY_HAND = tl.constexpr(triton.knobs.runtime.interpret)


@triton.jit
def widen(values):
    """Values in the dtype of sums: float64 for float64, else float32."""
    if BY_HAND and values.dtype == tl.bfloat16:
        bits = values.to(tl.uint16, bitcast=True).to(tl.uint32) << 16
        result = bits.to(tl.float32, bitcast=True)
    elif values.dtype == tl.float64:
        result = values
    else:
        result = values.to(tl.float32)
    return result


@triton.jit
def narrow(values, dtype: tl.constexpr):
    """Values rounded to dtype, to the nearest even; float64 to half precision by float32."""
    if values.dtype == tl.float64 and dtype != tl.float64:
        values = values.to(tl.float32)
    if BY_HAND and dtype == tl.bfloat16:
        bits = values.to(tl.uint32, bitcast=True)
        rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
        rounded = tl.where(values == values, rounded, 0x7FC0)
        result = rounded.to(tl.uint16).to(tl.bfloat16, bitcast=True)
    else:
        result = values.to(dtype)
    return result


@triton.jit
def divide(a, b):
    """a / b, correctly rounded; Triton's operator is not, in float32."""
    return a / b if a.dtype == tl.float64 else tl.div_rn(a, b)


@triton.jit
def exponential_in_float32(a):
    """exponential() in float32. tl.exp is 2 ** (a * log2(e)) there; its error grows with |a|."""
    a = tl.where(a < -150.0, -150.0, a)  # keeps NaN
    n = tl.floor(a * 1.4426950408889634 + 0.5)
    # ln 2 in two parts: the first has so few digits that its product with n is exact.
    f = a - n * 0.693359375 + n * 2.12194440e-4
    p = 1.0 / 720 + f * (1.0 / 5040)
    p = 1.0 / 120 + f * p
    p = 1.0 / 24 + f * p
    p = 1.0 / 6 + f * p
    p = 0.5 + f * p
    p = 1.0 + f * (1.0 + f * p)
    # In two steps, because 2 ** n alone may be subnormal.
    whole = n.to(tl.int32)
    half = whole >> 1
    p = p * ((half + 127) << 23).to(tl.float32, bitcast=True)
    return p * ((whole - half + 127) << 23).to(tl.float32, bitcast=True)


@triton.jit
def exponential(a):
    """exp(a) for a <= 0, within about a unit in the last place, down to the smallest subnormal."""
    return tl.exp(a) if a.dtype == tl.float64 else exponential_in_float32(a)


@triton.jit
def sigmoid(z):
    """1 / (1 + exp(-z)), without overflow."""
    t = exponential(-tl.abs(z))
    return divide(tl.where(z >= 0, 1.0, t), 1.0 + t)


@triton.jit
def wide(index, WIDE: tl.constexpr):
    """An index in int64 where int32 could overflow."""
    return index.to(tl.int64) if WIDE else index


@triton.jit
def pointers(
    map_,
    n,
    c,
    s,
    sample_stride,
    row_stride,
    PLANES: tl.constexpr,
    ALIGN: tl.constexpr,
    WIDE: tl.constexpr,
):
    """Pointers to the elements of a tile (channels, pixels) of sample n, an int64.

    Dividing and multiplying by ALIGN tells the compiler how much it may load at once. Within a
    sample, positions of 32 bits take fewer instructions.
    """
    row = row_stride // ALIGN * ALIGN
    sample = map_ + n * (sample_stride // ALIGN * ALIGN)
    if WIDE:
        c = c.to(tl.int64)
        s = s.to(tl.int64)
    if PLANES:
        result = sample + (c[:, None] * row + s[None, :])
    else:
        result = sample + (s[None, :] * row + c[:, None])
    return result


@triton.jit
def inside(c, s, channels, pixels, PLANES: tl.constexpr, ALIGN: tl.constexpr):
    """Which elements of a tile (channels, pixels) are in the map."""
    if PLANES:
        pixels = pixels // ALIGN * ALIGN
    else:
        channels = channels // ALIGN * ALIGN
    return (c < channels)[:, None] & (s < pixels)[None, :]


@triton.jit
def wrapped(q, channels, CIRCULAR: tl.constexpr):
    """Channel q of the padded channels: its number, and whether it exists."""
    if CIRCULAR:
        q = tl.where(q < 0, q + channels, q)
        q = tl.where(q >= channels, q - channels, q)
    return q, (q >= 0) & (q < channels)


@triton.jit
def halo(first, length, channels, R: tl.constexpr, HALO: tl.constexpr, CIRCULAR: tl.constexpr):
    """The channels beside a tile, R before its first and R after its last; which of them exist."""
    h = tl.arange(0, HALO)
    q, exists = wrapped(tl.where(h < R, first - R + h, first + length - R + h), channels, CIRCULAR)
    return q, exists & (h < 2 * R)


@triton.jit
def neighbour(own, outer, p, length, R: tl.constexpr, HALO: tl.constexpr):
    """The values at positions p of a tile, from -R to length + R: its own and those beside it."""
    here = (p >= 0) & (p < length)
    values = tl.where(here, tl.gather(own, tl.where(here, p, 0), 0), 0.0)
    if HALO > 0:
        slot = tl.where(p < 0, p + R, p - length + R)
        beside = (slot >= 0) & (slot < 2 * R) & (here == 0)
        values = tl.where(beside, tl.gather(outer, tl.where(beside, slot, 0), 0), values)
    return values


@triton.jit
def tap(weight, c, j, exists, K: tl.constexpr, OWN_TAPS: tl.constexpr):
    """Tap j of channels c, where they exist."""
    if OWN_TAPS:
        result = widen(tl.load(weight + c.to(tl.int64) * K + j, mask=exists, other=0.0))
    else:
        result = widen(tl.load(weight + j))
    return result
