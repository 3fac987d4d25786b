"""A residual block's tail: its arguments, and what it computes besides the passes over maps.

    y = act(gate * scale * norm(x) + identity_norm(identity))

Batch norms, the gate and the factor of each sample become coefficients of x and the identity. The
gradients follow from sums over each plane. This file has the numbers of planes (N, C) and channels
(C,), and the whole tail in plain operations.

Names in formulas: norm(x) = u = alpha * (x - centre) + beta, with a centre near the mean; S is the
number of pixels of a plane.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from eca_fused.ops import graph
from eca_fused.ops.checks import ACTIVATIONS
from eca_fused.ops.results import sums_dtype

__all__ = [
    "WITH_GRADIENT",
    "Affine",
    "Coefficients",
    "Moments",
    "Norm",
    "TailOptions",
    "TailTensors",
    "activate",
    "centre_of",
    "coefficients",
    "distance",
    "factor_of",
    "given_mean",
    "mean_of_normed",
    "merged",
    "norm_gradients",
    "norms",
    "plain",
    "plain_mean",
]

WITH_GRADIENT = 9  # of TailTensors, the first that can have a gradient


class TailTensors(NamedTuple):
    """The tensors of a tail; None for those that it does not have."""

    x: Tensor  # (N, C, *spatial)
    identity: Tensor | None = None  # (N, C, *spatial)
    weight: Tensor | None = None  # taps (1 or C, 1, k)
    gate: Tensor | None = None  # (N, C); not with taps
    scale: Tensor | None = None  # (N,)
    gamma: Tensor | None = None  # (C,), weight of the norm
    beta: Tensor | None = None  # (C,), bias of the norm
    identity_gamma: Tensor | None = None  # (C,)
    identity_beta: Tensor | None = None  # (C,)
    mean: Tensor | None = None  # (C,), what the norm subtracts; None without a norm
    variance: Tensor | None = None  # (C,)
    identity_mean: Tensor | None = None  # (C,)
    identity_variance: Tensor | None = None  # (C,)
    distance: Tensor | None = None  # (N, C), means over the planes of x - centre


class TailOptions(NamedTuple):
    """What a tail has besides tensors."""

    activation: str = "none"
    circular: bool = False
    eps: float = 0.0
    identity_eps: float = 0.0
    # How many values of a channel the statistics of x are of; None for running statistics. A
    # tensor, if several processes have put theirs together.
    values: float | Tensor | None = None
    identity_values: float | Tensor | None = None
    group: Any = None  # these processes
    identity_group: Any = None

    @property
    def number(self) -> int:
        return ACTIVATIONS.index(self.activation)

    @property
    def reads_identity(self) -> bool:
        """Whether the gradients need the identity itself, whatever its norm needs."""
        return self.activation in ("silu", "gelu")


# ---- batch norm ----


class Moments(NamedTuple):
    """Statistics of a map (N, C, *spatial)."""

    planes: Tensor  # (N, C), the mean of each plane
    mean: Tensor  # (C,)
    variance: Tensor  # (C,), over all values: what batch norm divides by
    values: float | Tensor  # how many of a channel


def merged(planes: Tensor, squares: Tensor, pixels: int) -> Moments:
    """The moments of a batch, by the formula of Chan, Golub and LeVeque (1979).

    A sum of squares would lose digits where the mean is far from zero.

    Args:
        planes: (N, C), the mean of each plane.
        squares: (N, C), the sum of its values' squared distances from it.
        pixels: S.
    """
    mean = planes.mean(0)
    between = (planes - mean).square().sum(0) * pixels
    values = planes.shape[0] * pixels
    return Moments(planes, mean, (squares.sum(0) + between) / values, float(values))


class Norm(NamedTuple):
    """A batch norm in one call: its parameters, and the statistics that it normalises with."""

    weight: Tensor | None  # (C,)
    bias: Tensor | None  # (C,)
    mean: Tensor  # (C,), of the batch or running
    variance: Tensor  # (C,)
    eps: float
    values: float | Tensor | None = None  # see TailOptions
    group: Any = None
    planes: Tensor | None = None  # (N, C), the means of the planes, if they were computed


class Affine(NamedTuple):
    """norm(x) = alpha * (x - centre) + beta, each (C,)."""

    alpha: Tensor
    beta: Tensor
    centre: Tensor
    shift: Tensor  # mean - centre
    spread: Tensor  # 1 / sqrt(variance + eps)


def _affine(
    mean: Tensor,
    variance: Tensor,
    gamma: Tensor | None,
    beta: Tensor | None,
    eps: float,
    x: Tensor,
) -> Affine:
    """A batch norm as an affine function of x - centre.

    What rounding takes from the centre goes into beta.
    """
    spread = torch.rsqrt(variance + eps)
    alpha = spread if gamma is None else spread * gamma
    centre = centre_of(mean, x)
    shift = mean - centre
    offset = -alpha * shift
    return Affine(alpha, offset if beta is None else beta + offset, centre, shift, spread)


def norms(t: TailTensors, o: TailOptions) -> tuple[Affine | None, Affine | None]:
    """The norms of x and of the identity; None for one that is absent."""
    own = identity = None
    if t.mean is not None and t.variance is not None:
        own = _affine(t.mean, t.variance, t.gamma, t.beta, o.eps, t.x)
    if t.identity_mean is not None and t.identity_variance is not None:
        given = t.identity_mean, t.identity_variance, t.identity_gamma, t.identity_beta
        identity = _affine(*given, o.identity_eps, t.x)
    return own, identity


def centre_of(mean: Tensor, x: Tensor) -> Tensor:
    """The centre for a mean (C,): it has the dtype of the sums over x, so kernels take it as is."""
    return mean.to(sums_dtype(x)).to(mean.dtype)


def mean_of_normed(norm: Affine | None, distance: Tensor) -> Tensor:
    """The means of norm(x) over each plane, from those of x - centre: the norm is affine."""
    return distance if norm is None else norm.alpha * distance + norm.beta


def distance(planes: Tensor, mean: Tensor | None, x: Tensor) -> Tensor:
    """The means of x - centre over each plane, (N, C), in the dtype of sums over x.

    Args:
        planes: (N, C), the means of x.
        mean: (C,), what a norm of x subtracts; None without one.
    """
    found = planes if mean is None else planes - centre_of(mean, x)
    return found.to(sums_dtype(x))


def given_mean(t: TailTensors, o: TailOptions) -> Tensor:
    """The mean of norm(x) over each plane, (N, C) like x, from t.distance."""
    assert t.distance is not None, "the means that kernels have found"
    return mean_of_normed(norms(t, o)[0], t.distance).to(t.x.dtype)


class NormGradients(NamedTuple):
    weight: Tensor  # (C,)
    bias: Tensor  # (C,)
    # What the batch's statistics add to dx is slope * (x - centre) + offset.
    slope: Tensor | None  # (C,)
    offset: Tensor | None  # (C,)


def norm_gradients(
    norm: Affine, du: Tensor, by_distance: Tensor, values: float | Tensor | None
) -> NormGradients:
    """The gradients of a batch norm (Ioffe and Szegedy, "Batch Normalization", 2015, section 3).

    dbeta = sum(du), dgamma = spread * sum(du * (x - mean)), and the statistics of a batch of M
    values add -alpha * (dbeta + spread * (x - mean) * dgamma) / M to dx = alpha * du.

    Args:
        du: (C,), sums over a channel of the gradient of u.
        by_distance: (C,), the same of the gradient of u times x - centre.
        values: M, or None for running statistics, which add nothing.
    """
    weight = norm.spread * (by_distance - norm.shift * du)
    if values is None:
        return NormGradients(weight, du, None, None)
    slope = -norm.alpha * norm.spread * weight / values
    return NormGradients(weight, du, slope, -norm.alpha * du / values - slope * norm.shift)


# ---- coefficients ----


class Coefficients(NamedTuple):
    """v = p * (x - centre) + q + identity_scale * (identity - identity_centre)."""

    p: Tensor | float  # (N, C), or (N, 1) or (C,)
    q: Tensor | float  # likewise
    centre: Tensor | float  # (C,)
    identity_scale: Tensor | float  # (C,)
    identity_centre: Tensor | float  # (C,)


def factor_of(gate: Tensor | None, scale: Tensor | None) -> Tensor | float:
    """gate * scale, (N, C) or (N, 1), not in half precision."""
    if scale is None:
        return 1.0 if gate is None else graph.widened(gate)
    column = graph.widened(scale).unsqueeze(1)
    return column if gate is None else graph.widened(gate) * column


def coefficients(
    gate: Tensor | None, scale: Tensor | None, own: Affine | None, identity: Affine | None
) -> Coefficients:
    factor = factor_of(gate, scale)
    shift = 0.0 if identity is None else identity.beta
    scaling = (1.0, 0.0) if identity is None else (identity.alpha, identity.centre)
    if own is None:
        return Coefficients(factor, shift, 0.0, *scaling)
    return Coefficients(factor * own.alpha, factor * own.beta + shift, own.centre, *scaling)


# ---- plain operations ----


def activate(activation: str, v: Tensor) -> Tensor:
    """The activation, one of ACTIVATIONS."""
    if activation == "none":
        return v
    function = {"relu": torch.relu, "silu": torch.nn.functional.silu}
    return function.get(activation, torch.nn.functional.gelu)(v)


def _with_batch(t: TailTensors, o: TailOptions) -> TailTensors:
    """The same with the batch's statistics as functions of x and the identity."""

    def moments(x: Tensor) -> tuple[Tensor, Tensor]:
        spatial = [0, *range(2, x.dim())]
        variance, mean = torch.var_mean(graph.widened(x), spatial, correction=0)
        return mean, variance

    if o.values is not None:
        mean, variance = moments(t.x)
        t = t._replace(mean=mean, variance=variance)
    if o.identity_values is not None and t.identity is not None:
        mean, variance = moments(t.identity)
        t = t._replace(identity_mean=mean, identity_variance=variance)
    return t


def _gate_of(t: TailTensors, o: TailOptions, own: Affine | None, wide: Tensor) -> Tensor | None:
    if t.weight is None:
        return None if t.gate is None else t.gate.to(wide.dtype)
    return graph.gate(_mean_of(own, wide), t.weight, o.circular)


def _mean_of(own: Affine | None, wide: Tensor) -> Tensor:
    distance = graph.mean(wide) if own is None else graph.mean(wide) - own.centre
    return mean_of_normed(own, distance).to(wide.dtype)


def plain(t: TailTensors, o: TailOptions, with_batch: bool = True) -> Tensor:
    """The tail in differentiable operations that round once, like x.

    Args:
        with_batch: differentiate the statistics of the batch too; False if they are given with
            their gradients.
    """
    t = _with_batch(t, o) if with_batch else t
    own, identity = norms(t, o)
    wide = graph.widened(t.x)
    k = coefficients(_gate_of(t, o, own, wide), t.scale, own, identity)

    def spread(values: Tensor | float) -> Tensor | float:
        if not isinstance(values, Tensor):
            return values
        values = values.to(wide.dtype)
        return graph.spread(values if values.dim() == 2 else values.unsqueeze(0), wide)

    v = wide if own is None else wide - spread(k.centre)
    if isinstance(k.p, Tensor):
        v = v * spread(k.p)
    if isinstance(k.q, Tensor):
        v = v + spread(k.q)
    if t.identity is not None:
        other = t.identity.to(wide.dtype)
        if identity is not None:
            other = (other - spread(k.identity_centre)) * spread(k.identity_scale)
        v = v + other
    return activate(o.activation, v).to(t.x.dtype)


def plain_mean(t: TailTensors, o: TailOptions, with_batch: bool = True) -> Tensor:
    """The mean of norm(x) over each plane, (N, C) like x, in differentiable operations.

    Args as for plain().
    """
    own, _ = norms(_with_batch(t, o) if with_batch else t, o)
    return _mean_of(own, graph.widened(t.x)).to(t.x.dtype)
