"""Gradients of the taps, from the (N, C) arrays that the other kernels write; no atomics.

dw[c, j] = sum over n of dz[n, c] * mean[n, c + j - r]. Shared taps are summed over c too: in parts
of ROWS samples and BLOCK_C channels, which a second kernel adds in a fixed order.
"""

import triton
import triton.language as tl

from eca_fused.ops.triton.common import narrow, wide, wrapped


@triton.jit
def tap_gradients(
    dz,  # (N, C)
    mean,  # (N, C)
    out,  # (C, K) dweight if OWN_TAPS, else (K, parts) partial sums; written
    samples,
    channels,
    parts,
    K: tl.constexpr,
    OWN_TAPS: tl.constexpr,
    CIRCULAR: tl.constexpr,
    WIDE: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    tiles = tl.cdiv(channels, BLOCK_C)
    program = tl.program_id(0)
    j = program // parts
    part = program % parts
    c = wide(part % tiles, WIDE) * BLOCK_C + tl.arange(0, BLOCK_C)
    here = c < channels
    q, exists = wrapped(c + (j - K // 2), channels, CIRCULAR)
    begin = (part // tiles).to(tl.int64) * ROWS
    end = begin + ROWS
    if OWN_TAPS:
        end = tl.cast(samples, tl.int64)
    accumulator = tl.zeros([BLOCK_N, BLOCK_C], dz.dtype.element_ty)
    for start in range(begin, end, BLOCK_N):
        n = start + tl.arange(0, BLOCK_N)
        row = (n * channels)[:, None]
        rows = (n < samples)[:, None]
        g = tl.load(dz + row + c[None, :], mask=rows & here[None, :], other=0.0)
        m = tl.load(mean + row + q[None, :], mask=rows & (exists & here)[None, :], other=0.0)
        accumulator += g * m
    if OWN_TAPS:
        values = narrow(tl.sum(accumulator, 0), out.dtype.element_ty)
        tl.store(out + c.to(tl.int64) * K + j, values, mask=here)
    else:
        tl.store(out + j.to(tl.int64) * parts + part, tl.sum(tl.sum(accumulator, 1), 0))


@triton.jit
def tap_totals(
    partial,  # (K, parts)
    dweight,  # (K,), written
    parts,
    BLOCK: tl.constexpr,
):
    j = tl.program_id(0).to(tl.int64)
    accumulator = tl.zeros([BLOCK], partial.dtype.element_ty)
    for start in range(0, parts, BLOCK):
        part = start + tl.arange(0, BLOCK)
        accumulator += tl.load(partial + j * parts + part, mask=part < parts, other=0.0)
    tl.store(dweight + j, narrow(tl.sum(accumulator, 0), dweight.dtype.element_ty))
