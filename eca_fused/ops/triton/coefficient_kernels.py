"""Kernels for the numbers between the passes of a residual block's tail, planes (N, C) and (C,).

csrc/coefficients.h says what they compute, and ops/tail.py derives it. All of it is in float64, and
is rounded once to what a pass takes, or to the dtype of a parameter. Sums are in a fixed order.
They move no bytes that count: what costs is a launch, so there are few.

A program has a tile of samples n and channels c. A tensor that is absent is None. Names in capitals
are those of common.py, and
    EPS         of a batch norm; a number that Triton takes as an argument would be a float32
    DOUBLE      the dtype of sums is float64, else float32
    BLOCK_N     samples of a tile
"""

import triton
import triton.language as tl

from eca_fused.ops.triton.common import narrow, sigmoid, tap, widen, wrapped

# ---- small tensors of any dtype, and norms ----


@triton.jit
def number(values, at, exists, absent: tl.constexpr):
    """Elements in float64: `absent` of a tensor that is absent, and where they do not exist."""
    if values is None:
        result = tl.where(exists, tl.cast(absent, tl.float64), absent)
    else:
        result = widen(tl.load(values + at, mask=exists, other=absent)).to(tl.float64)
    return result


@triton.jit
def put(to, at, values, exists):
    tl.store(to + at, narrow(values, to.dtype.element_ty), mask=exists)


@triton.jit
def to_sums(values, DOUBLE: tl.constexpr):
    """Values rounded to the dtype of sums, in float64."""
    return values if DOUBLE else values.to(tl.float32).to(tl.float64)


@triton.jit
def norm_of(mean, variance, gamma, beta, c, exists, EPS: tl.constexpr, DOUBLE: tl.constexpr):
    """alpha, beta, centre, shift and spread of u = alpha * (x - centre) + beta.

    What rounding takes from the centre, the shift, goes into beta.
    """
    alpha = number(gamma, c, exists, 1.0)
    if mean is None:
        centre = tl.where(exists, tl.cast(0.0, tl.float64), 0.0)
        offset, shift, spread = centre, centre, centre
    else:
        average = number(mean, c, exists, 0.0)
        centre = to_sums(average, DOUBLE)
        shift = average - centre
        spread = tl.rsqrt(number(variance, c, exists, 1.0) + EPS)
        alpha = alpha * spread
        offset = number(beta, c, exists, 0.0) - alpha * shift
    return alpha, offset, centre, shift, spread


@triton.jit
def tile_of_planes(samples, channels, BLOCK_N: tl.constexpr, BLOCK_C: tl.constexpr):
    """Samples and channels of a program, in int64, and whether it is the first of its channels."""
    tiles = tl.cdiv(channels, BLOCK_C)
    c = (tl.program_id(0) % tiles).to(tl.int64) * BLOCK_C + tl.arange(0, BLOCK_C)
    n = (tl.program_id(0) // tiles).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    return n, c, tl.program_id(0) < tiles


# ---- the statistics of a batch ----


@triton.jit
def statistics_of_batch(
    planes,  # (2, N, C): means, and sums of squared distances from them
    mean,  # (C,), written
    variance,  # (C,), written: what batch norm divides by
    samples,
    channels,
    pixels,
    BLOCK_N: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """All in float64 (Chan, Golub and LeVeque, 1979)."""
    c = tl.program_id(0).to(tl.int64) * BLOCK_C + tl.arange(0, BLOCK_C)
    here = c < channels
    count, size = tl.cast(samples, tl.float64), tl.cast(pixels, tl.float64)
    total = tl.zeros([BLOCK_N, BLOCK_C], tl.float64)
    for first in range(0, samples, BLOCK_N):
        n = first + tl.arange(0, BLOCK_N).to(tl.int64)
        exists = (n < samples)[:, None] & here[None, :]
        total += tl.load(planes + n[:, None] * channels + c[None, :], mask=exists, other=0.0)
    average = tl.sum(total, 0) / count
    total = tl.zeros([BLOCK_N, BLOCK_C], tl.float64)
    squares = planes + tl.cast(samples, tl.int64) * channels
    for first in range(0, samples, BLOCK_N):
        n = first + tl.arange(0, BLOCK_N).to(tl.int64)
        at = n[:, None] * channels + c[None, :]
        exists = (n < samples)[:, None] & here[None, :]
        between = tl.load(planes + at, mask=exists, other=0.0) - average[None, :]
        found = tl.load(squares + at, mask=exists, other=0.0) + between * between * size
        total += tl.where(exists, found, 0.0)
    tl.store(mean + c, average, mask=here)
    tl.store(variance + c, tl.sum(total, 0) / (count * size), mask=here)


# ---- before the pass that writes y ----


@triton.jit
def coefficients(
    weight,  # (1 or C, K), or None
    means,  # (N, C) of x, or None
    gate,  # (N, C), or None; not with taps
    scale,  # (N,), or None
    mean,  # (C,), or None; so are the next
    variance,
    gamma,
    beta,
    identity_mean,
    identity_variance,
    identity_gamma,
    identity_beta,
    planes,  # (2, N, C): p and q, written, or None
    rows,  # (6, C): shift, alpha, beta, centre, identity_scale and identity_centre, written
    made,  # (N, C), written with taps: their gates
    distance,  # (N, C), written with means: those of x - centre
    samples,
    channels,
    EPS: tl.constexpr,
    IDENTITY_EPS: tl.constexpr,
    K: tl.constexpr,
    OWN_TAPS: tl.constexpr,
    CIRCULAR: tl.constexpr,
    DOUBLE: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    n, c, first = tile_of_planes(samples, channels, BLOCK_N, BLOCK_C)
    here = c < channels
    own = norm_of(mean, variance, gamma, beta, c, here, EPS, DOUBLE)
    other = norm_of(
        identity_mean,
        identity_variance,
        identity_gamma,
        identity_beta,
        c,
        here,
        IDENTITY_EPS,
        DOUBLE,
    )
    alpha, offset, centre = own[0], own[1], own[2]
    shift = other[1]
    wide_channels = tl.cast(channels, tl.int64)
    put(rows, c, shift, here & first)
    put(rows, wide_channels + c, alpha, here & first)
    put(rows, 2 * wide_channels + c, offset, here & first)
    put(rows, 3 * wide_channels + c, centre, here & first)
    put(rows, 4 * wide_channels + c, other[0], here & first)
    put(rows, 5 * wide_channels + c, other[2], here & first)

    samples_here = (n < samples)[:, None]
    exists = samples_here & here[None, :]
    row = n[:, None] * channels
    if means is not None:
        put(
            distance,
            row + c[None, :],
            number(means, row + c[None, :], exists, 0.0) - centre,
            exists,
        )
    if planes is not None:
        if weight is None:
            factor = number(gate, row + c[None, :], exists, 1.0)
        else:
            z = tl.zeros([BLOCK_N, BLOCK_C], tl.float64)
            for j in range(K):
                q, real = wrapped(c + (j - K // 2), channels, CIRCULAR)
                real = real & here
                near = norm_of(mean, variance, gamma, beta, q, real, EPS, DOUBLE)
                both = samples_here & real[None, :]
                d = to_sums(number(means, row + q[None, :], both, 0.0) - near[2][None, :], DOUBLE)
                u = near[0][None, :] * d + near[1][None, :]
                w = tap(weight, c, j, here, K, OWN_TAPS).to(tl.float64)
                z += w[None, :] * tl.where(both, u, 0.0)
            a = sigmoid(narrow(z, made.dtype.element_ty))
            tl.store(made + row + c[None, :], a, mask=exists)
            factor = a.to(tl.float64)
        factor = factor * number(scale, n, n < samples, 1.0)[:, None]
        put(planes, row + c[None, :], factor * alpha[None, :], exists)
        q = factor * offset[None, :] + shift[None, :]
        put(planes, samples * wide_channels + row + c[None, :], q, exists)


# ---- after the sums ----


@triton.jit
def factor_gradient(sums, all_planes, at, exists, alpha, offset):
    """The gradient of gate * scale: sum(g * norm(x)) over a plane."""
    by_one = tl.load(sums + at, mask=exists, other=0.0)
    by_x = tl.load(sums + all_planes + at, mask=exists, other=0.0)
    # Without a norm, offset is zero, and an infinite sum of g must not become NaN.
    by_offset = tl.where(offset[None, :] == 0.0, 0.0, offset[None, :] * by_one)
    return alpha[None, :] * by_x + by_offset


@triton.jit
def plane_gradients(
    sums,  # (2 or 3, N, C), of g, g * (x - centre) and g * (identity - its centre)
    weight,  # (1 or C, K), or None
    gate,  # (N, C), or None
    scale,  # (N,), or None
    distance,  # (N, C), read with taps
    mean,  # (C,), or None; so are the next
    variance,
    gamma,
    beta,
    dgate,  # (N, C), written, or None
    dmean,  # (N, C), written with taps: the gradient of the means of norm(x)
    dz,  # (N, C), written, or None: the gradient of the sigmoid's input
    inputs,  # (N, C), written with dz: the means of norm(x)
    samples,
    channels,
    EPS: tl.constexpr,
    K: tl.constexpr,
    OWN_TAPS: tl.constexpr,
    CIRCULAR: tl.constexpr,
    DOUBLE: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    n, c, _ = tile_of_planes(samples, channels, BLOCK_N, BLOCK_C)
    here, samples_here = c < channels, (n < samples)[:, None]
    exists = samples_here & here[None, :]
    row = n[:, None] * channels
    at = row + c[None, :]
    all_planes = tl.cast(samples, tl.int64) * channels
    factor = number(scale, n, n < samples, 1.0)[:, None]
    if dgate is not None or dz is not None:
        norm = norm_of(mean, variance, gamma, beta, c, here, EPS, DOUBLE)
        da = factor_gradient(sums, all_planes, at, exists, norm[0], norm[1]) * factor
    if dgate is not None:
        put(dgate, at, da, exists)
    if dz is not None:
        a = number(gate, at, exists, 0.0)
        tl.store(dz + at, da * a * (1.0 - a), mask=exists)
        d = number(distance, at, exists, 0.0)
        tl.store(inputs + at, norm[0][None, :] * d + norm[1][None, :], mask=exists)
    if dmean is not None:
        total = tl.zeros([BLOCK_N, BLOCK_C], tl.float64)
        for j in range(K):
            q, real = wrapped(c + (K // 2 - j), channels, CIRCULAR)
            real = real & here
            both = samples_here & real[None, :]
            near = norm_of(mean, variance, gamma, beta, q, real, EPS, DOUBLE)
            a = number(gate, row + q[None, :], both, 0.0)
            there = row + q[None, :]
            da_near = factor_gradient(sums, all_planes, there, both, near[0], near[1]) * factor
            w = tap(weight, q, j, real, K, OWN_TAPS).to(tl.float64)
            # Outside the channels there is no term: an infinite tap times zero would be NaN.
            total += tl.where(both, w[None, :] * (da_near * a * (1.0 - a)), 0.0)
        put(dmean, at, total, exists)


@triton.jit
def scale_gradients(
    sums,  # (2 or 3, N, C)
    gate,  # (N, C), or None
    mean,  # (C,), or None; so are the next
    variance,
    gamma,
    beta,
    dscale,  # (N,), written
    samples,
    channels,
    EPS: tl.constexpr,
    DOUBLE: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    n = tl.program_id(0).to(tl.int64)
    all_planes = tl.cast(samples, tl.int64) * channels
    total = tl.zeros([1, BLOCK_C], tl.float64)
    for first in range(0, channels, BLOCK_C):
        c = first + tl.arange(0, BLOCK_C).to(tl.int64)
        here = c < channels
        norm = norm_of(mean, variance, gamma, beta, c, here, EPS, DOUBLE)
        at = (n * channels + c)[None, :]
        found = factor_gradient(sums, all_planes, at, here[None, :], norm[0], norm[1])
        found *= number(gate, at, here[None, :], 1.0)
        total += tl.where(here[None, :], found, 0.0)
    put(dscale, n, tl.sum(tl.sum(total, 1), 0), n < samples)


@triton.jit
def channel_totals(
    sums,  # (2, or 3 if IDENTITY_SUM, N, C)
    gate,  # (N, C), or None
    scale,  # (N,), or None
    dmean,  # (N, C), or None
    distance,  # (N, C), read with dmean
    totals,  # (4, C), written: sums of du, du * (x - centre), g and g * (identity - its centre)
    samples,
    channels,
    IDENTITY_SUM: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    c = tl.program_id(0).to(tl.int64) * BLOCK_C + tl.arange(0, BLOCK_C)
    here = c < channels
    wide_channels = tl.cast(channels, tl.int64)
    all_planes = samples * wide_channels
    du = tl.zeros([BLOCK_N, BLOCK_C], tl.float64)
    du_by_x = du
    by_one = du
    by_identity = du
    for first in range(0, samples, BLOCK_N):
        n = first + tl.arange(0, BLOCK_N).to(tl.int64)
        exists = (n < samples)[:, None] & here[None, :]
        at = n[:, None] * channels + c[None, :]
        g = tl.load(sums + at, mask=exists, other=0.0)
        g_by_x = tl.load(sums + all_planes + at, mask=exists, other=0.0)
        factor = number(gate, at, exists, 1.0) * number(scale, n, n < samples, 1.0)[:, None]
        by_one += g
        du += tl.where(exists, factor * g, 0.0)
        du_by_x += tl.where(exists, factor * g_by_x, 0.0)
        if dmean is not None:
            m = number(dmean, at, exists, 0.0)
            du += m
            du_by_x += m * number(distance, at, exists, 0.0)
        if IDENTITY_SUM:
            by_identity += tl.load(sums + 2 * all_planes + at, mask=exists, other=0.0)
    tl.store(totals + c, tl.sum(du, 0), mask=here)
    tl.store(totals + wide_channels + c, tl.sum(du_by_x, 0), mask=here)
    tl.store(totals + 2 * wide_channels + c, tl.sum(by_one, 0), mask=here)
    tl.store(totals + 3 * wide_channels + c, tl.sum(by_identity, 0), mask=here)


# ---- before the pass that writes the gradients ----


@triton.jit
def norm_gradient(norm, totals, shares, count, channels, c, exists):
    """The gradient of gamma, and the slope and offset by which the statistics add to dx.

    As norm_gradients() of ops/tail.py. shares are totals over all processes, divided by their
    values; without them, these are count. It is 0 for running statistics, which add nothing.
    """
    alpha, shift, spread = norm[0], norm[3], norm[4]
    du = number(totals, c, exists, 0.0)
    by_x = number(totals, channels + c, exists, 0.0)
    dgamma = spread * (by_x - shift * du)
    if shares is None:
        each = tl.where(count > 0, 1.0 / tl.cast(tl.maximum(count, 1), tl.float64), 0.0)
        du, by_x = du * each, by_x * each
    else:
        of_batch = exists & (count > 0)
        du = number(shares, c, of_batch, 0.0)
        by_x = number(shares, channels + c, of_batch, 0.0)
    slope = -alpha * spread * (spread * (by_x - shift * du))
    return dgamma, slope, -alpha * du - slope * shift


@triton.jit
def gradient_coefficients(
    totals,  # (4, C), or None
    shares,  # (4, C), or None
    gate,  # (N, C), or None
    scale,  # (N,), or None
    dmean,  # (N, C), or None
    mean,  # (C,), or None; so are the next
    variance,
    gamma,
    beta,
    identity_mean,
    identity_variance,
    identity_gamma,
    identity_beta,
    planes,  # (2, N, C): p and r, written, or None
    rows,  # (4, C): q, and p, q and r of the identity, written with planes
    dgamma,  # (C,), written, or None; so are the next
    dbeta,
    identity_dgamma,
    identity_dbeta,
    count,  # of a channel's values in the batch; 0 for running statistics
    identity_count,
    samples,
    channels,
    pixels,
    EPS: tl.constexpr,
    IDENTITY_EPS: tl.constexpr,
    DOUBLE: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    n, c, first = tile_of_planes(samples, channels, BLOCK_N, BLOCK_C)
    here = c < channels
    once = here & first
    wide_channels = tl.cast(channels, tl.int64)
    own = norm_of(mean, variance, gamma, beta, c, here, EPS, DOUBLE)
    other = norm_of(
        identity_mean,
        identity_variance,
        identity_gamma,
        identity_beta,
        c,
        here,
        IDENTITY_EPS,
        DOUBLE,
    )
    zero = tl.where(here, tl.cast(0.0, tl.float64), 0.0)
    slope, offset, identity_slope, identity_offset = zero, zero, zero, zero
    if totals is not None:
        its = totals + 2 * wide_channels
        if mean is not None:
            by_gamma, slope, offset = norm_gradient(
                own, totals, shares, count, wide_channels, c, here
            )
            if dgamma is not None:
                put(dgamma, c, by_gamma, once)
        if identity_mean is not None:
            its_shares = None if shares is None else shares + 2 * wide_channels
            by_gamma, identity_slope, identity_offset = norm_gradient(
                other, its, its_shares, identity_count, wide_channels, c, here
            )
            if identity_dgamma is not None:
                put(identity_dgamma, c, by_gamma, once)
        if dbeta is not None:
            put(dbeta, c, number(totals, c, here, 0.0), once)
        if identity_dbeta is not None:
            put(identity_dbeta, c, number(its, c, here, 0.0), once)
    if planes is not None:
        put(rows, c, slope, once)
        put(rows, wide_channels + c, other[0], once)
        put(rows, 2 * wide_channels + c, identity_slope, once)
        put(rows, 3 * wide_channels + c, identity_offset, once)
        exists = (n < samples)[:, None] & here[None, :]
        at = n[:, None] * channels + c[None, :]
        factor = number(gate, at, exists, 1.0) * number(scale, n, n < samples, 1.0)[:, None]
        put(planes, at, factor * own[0][None, :], exists)
        of_mean = own[0] * (1.0 / tl.cast(tl.maximum(pixels, 1), tl.float64))
        r = of_mean[None, :] * number(dmean, at, exists, 0.0) + offset[None, :]
        put(planes, samples * wide_channels + at, r, exists)
