"""The numbers between the passes of a residual block's tail, in plain PyTorch operations.

They are (N, C) or (C,), so they move no bytes that count. As PyTorch has every operation of them,
they need no kernels, no operators and no fakes: a tracer sees through them, and a compiler fuses
them. With batch norm and ECA in training the price is some 50 small operations forward and 75
backward, where the native backend has two. csrc/coefficients.h says what they compute, and
ops/tail.py derives it.

All of it is in float64, and is rounded once to what a pass takes.
"""

import torch
from torch import Tensor

from eca_fused.ops.convolution import convolve, taps_gradient, transposed
from eca_fused.ops.results import sums_dtype
from eca_fused.ops.tail import (
    Affine,
    TailOptions,
    TailTensors,
    mean_of_normed,
    norm_gradients,
    norms,
)

__all__ = [
    "batch_statistics",
    "tail_coefficients",
    "tail_gradient_coefficients",
    "tail_totals",
]


def _pair(
    x: Tensor,
    mean: Tensor | None,
    variance: Tensor | None,
    gamma: Tensor | None,
    beta: Tensor | None,
    eps: float,
    identity_mean: Tensor | None = None,
    identity_variance: Tensor | None = None,
    identity_gamma: Tensor | None = None,
    identity_beta: Tensor | None = None,
    identity_eps: float = 0.0,
) -> tuple[Affine | None, Affine | None]:
    """The norms of x and of the identity; None for one that is absent."""
    t = TailTensors(
        x,
        gamma=gamma,
        beta=beta,
        identity_gamma=identity_gamma,
        identity_beta=identity_beta,
        mean=mean,
        variance=variance,
        identity_mean=identity_mean,
        identity_variance=identity_variance,
    )
    return norms(t, TailOptions(eps=eps, identity_eps=identity_eps))


def _wide(gate: Tensor | None, scale: Tensor | None) -> tuple[Tensor | float, Tensor | float]:
    """The gate (N, C) and the scale (N, 1) in float64; 1 for absent ones."""
    return (
        1.0 if gate is None else gate.double(),
        1.0 if scale is None else scale.double().unsqueeze(1),
    )


def _times(values: Tensor | float, factor: Tensor | float) -> Tensor | float:
    """values * factor, without an operation for a factor that is absent."""
    return values if isinstance(factor, float) and factor == 1.0 else values * factor


def _stacked(x: Tensor, shape: tuple[int, ...], *rows: Tensor | float) -> Tensor:
    """Coefficients as a pass takes them: (rows, *shape) in the dtype of sums."""
    found = [
        row.expand(shape)
        if isinstance(row, Tensor)
        else x.new_full(shape, row, dtype=torch.float64)
        for row in rows
    ]
    return torch.stack(found).to(sums_dtype(x))


def _like(parameter: Tensor | None, gradient: Tensor, needed: bool = True) -> Tensor:
    """A gradient in the dtype of its parameter; empty if it is not needed."""
    if parameter is None or not needed:
        return gradient.new_empty(0)
    return gradient.to(parameter.dtype)


def batch_statistics(planes: Tensor, pixels: int) -> tuple[Tensor, Tensor]:
    means, squares = planes.unbind()
    mean = means.mean(0)
    between = (means - mean).square().sum(0) * pixels
    return mean, (squares.sum(0) + between) / (means.shape[0] * pixels)


def tail_coefficients(
    x: Tensor,
    weight: Tensor | None,
    means: Tensor | None,
    gate: Tensor | None,
    scale: Tensor | None,
    mean: Tensor | None,
    variance: Tensor | None,
    gamma: Tensor | None,
    beta: Tensor | None,
    eps: float,
    identity_mean: Tensor | None,
    identity_variance: Tensor | None,
    identity_gamma: Tensor | None,
    identity_beta: Tensor | None,
    identity_eps: float,
    circular: bool,
    need_planes: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    given = identity_mean, identity_variance, identity_gamma, identity_beta, identity_eps
    own, identity = _pair(x, mean, variance, gamma, beta, eps, *given)
    alpha, offset, centre = (1.0, 0.0, 0.0) if own is None else (own.alpha, own.beta, own.centre)
    shift = 0.0 if identity is None else identity.beta
    scaling = (1.0, 0.0) if identity is None else (identity.alpha, identity.centre)
    channels = _stacked(x, x.shape[1:2], shift, alpha, offset, centre, *scaling)

    planes, made, distance = (x.new_empty(0) for _ in range(3))
    if means is not None:
        distance = (means.double() - centre).to(sums_dtype(x))
    if not need_planes:
        return planes, channels, made, distance
    if weight is not None:
        assert means is not None, "taps take them"
        z = convolve(mean_of_normed(own, distance.double()), weight.double(), circular)
        gate = made = torch.sigmoid(z).to(sums_dtype(x))
    factor = _times(*_wide(gate, scale))
    planes = _stacked(x, x.shape[:2], _times(alpha, factor), _times(offset, factor) + shift)
    return planes, channels, made, distance


def tail_totals(
    x: Tensor,
    sums: Tensor,
    weight: Tensor | None,
    gate: Tensor | None,
    scale: Tensor | None,
    dmean: Tensor | None,
    distance: Tensor | None,
    mean: Tensor | None,
    variance: Tensor | None,
    gamma: Tensor | None,
    beta: Tensor | None,
    eps: float,
    circular: bool,
    need_dgate: bool,
    need_dscale: bool,
    need_dweight: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    own, _ = _pair(x, mean, variance, gamma, beta, eps)
    g, by_x = sums[0], sums[1]
    a, column = _wide(gate, scale)
    dfactor = by_x if own is None else own.alpha * by_x + own.beta * g
    dgate = dfactor if scale is None else dfactor * column

    made, dweight = x.new_empty(0), x.new_empty(0)
    if weight is not None:
        assert distance is not None, "the forward operator returned it"
        dz, taps = dgate * a * (1 - a), weight.double()
        dmean = made = transposed(dz, taps, circular).to(sums_dtype(x))
        if need_dweight:
            inputs = mean_of_normed(own, distance.double())
            dweight = taps_gradient(dz, inputs, taps, circular).to(weight.dtype)

    du = sums[:2] if gate is None and scale is None else sums[:2] * _times(a, column)
    if dmean is not None:
        assert distance is not None, "the forward operator returned it"
        wide = dmean.double()
        du = du + torch.stack([wide, wide * distance])
    # g and, where it was summed, g * (identity - its centre)
    others = [sums[::2]] if sums.shape[0] == 3 else [sums[:1], torch.zeros_like(sums[:1])]
    totals = torch.cat([du, *others]).sum(1)
    dscale = x.new_empty(0)
    if scale is not None and need_dscale:
        dscale = (dfactor if gate is None else dfactor * a).sum(1).to(scale.dtype)
    return totals, _like(gate, dgate, need_dgate), dscale, made, dweight


def _gradients(
    norm: Affine | None, totals: Tensor, shares: Tensor | None, values: float
) -> tuple[Tensor, Tensor | float, Tensor | float]:
    """The gradient of gamma, and the slope and offset by which the statistics add to dx.

    Args:
        norm: None for none.
        totals: (2, C), the sums of du and of du by the distance from the centre.
        shares: (2, C), the same over all processes and divided by their values, or None.
        values: of a channel in the batch; 0 for running statistics, which add nothing.
    """
    if norm is None:
        return totals[0], 0.0, 0.0
    own = norm_gradients(norm, totals[0], totals[1], values if values > 0 else None)
    if values <= 0:
        return own.weight, 0.0, 0.0
    found = own if shares is None else norm_gradients(norm, shares[0], shares[1], 1.0)
    assert found.slope is not None, "of a batch"
    assert found.offset is not None, "of a batch"
    return own.weight, found.slope, found.offset


def tail_gradient_coefficients(
    x: Tensor,
    totals: Tensor | None,
    shares: Tensor | None,
    values: float,
    identity_values: float,
    gate: Tensor | None,
    scale: Tensor | None,
    dmean: Tensor | None,
    mean: Tensor | None,
    variance: Tensor | None,
    gamma: Tensor | None,
    beta: Tensor | None,
    eps: float,
    identity_mean: Tensor | None,
    identity_variance: Tensor | None,
    identity_gamma: Tensor | None,
    identity_beta: Tensor | None,
    identity_eps: float,
    need_planes: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    given = identity_mean, identity_variance, identity_gamma, identity_beta, identity_eps
    own, identity = _pair(x, mean, variance, gamma, beta, eps, *given)
    slope: Tensor | float = 0.0
    offset: Tensor | float = 0.0
    identity_slope: Tensor | float = 0.0
    identity_offset: Tensor | float = 0.0
    dgamma, dbeta, identity_dgamma, identity_dbeta = (x.new_empty(0) for _ in range(4))
    if totals is not None:
        mine, its = (None, None) if shares is None else (shares[:2], shares[2:])
        found, slope, offset = _gradients(own, totals[:2], mine, values)
        other, identity_slope, identity_offset = _gradients(
            identity, totals[2:], its, identity_values
        )
        dgamma, dbeta = _like(gamma, found), _like(beta, totals[0])
        identity_dgamma = _like(identity_gamma, other)
        identity_dbeta = _like(identity_beta, totals[2])
    planes, channels = x.new_empty(0), x.new_empty(0)
    if need_planes:
        alpha: Tensor | float = 1.0 if own is None else own.alpha
        if dmean is not None:
            offset = dmean.double() * (alpha / x.shape[2:].numel()) + offset
        planes = _stacked(x, x.shape[:2], _times(alpha, _times(*_wide(gate, scale))), offset)
        identity_alpha = 1.0 if identity is None else identity.alpha
        rows = slope, identity_alpha, identity_slope, identity_offset
        channels = _stacked(x, x.shape[1:2], *rows)
    return planes, channels, dgamma, dbeta, identity_dgamma, identity_dbeta
