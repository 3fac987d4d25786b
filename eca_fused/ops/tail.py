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
    "NO_NORM",
    "WITH_GRADIENT",
    "Moments",
    "Norm",
    "Running",
    "TailOptions",
    "TailTensors",
    "activate",
    "norm_gradients",
    "norms",
    "plain",
    "plain_mean",
]

# mean, variance, gamma, beta and eps
NormArguments = tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None, float]
NO_NORM: NormArguments = (None, None, None, None, 0.0)
WITH_GRADIENT = 9  # of TailTensors, the first that can have a gradient; their places:
X, IDENTITY, WEIGHT, GATE, SCALE, GAMMA, BETA, IDENTITY_GAMMA, IDENTITY_BETA = range(WITH_GRADIENT)


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
    means: Tensor | None = None  # (N, C), of the planes of x, if they were computed

    def own_norm(self, o: "TailOptions") -> NormArguments:
        """The norm of x as TailKernels take it."""
        return self.mean, self.variance, self.gamma, self.beta, o.eps

    def identity_norm(self, o: "TailOptions") -> NormArguments:
        """The norm of the identity, likewise."""
        found = self.identity_mean, self.identity_variance, self.identity_gamma, self.identity_beta
        return *found, o.identity_eps


class TailOptions(NamedTuple):
    """What a tail has besides tensors."""

    activation: str = "none"
    circular: bool = False
    eps: float = 0.0
    identity_eps: float = 0.0
    # How many values of a channel the statistics of x are of; None for running statistics. A
    # tensor, if several processes have put theirs together, or where a compiler calls.
    values: float | Tensor | None = None
    identity_values: float | Tensor | None = None
    group: Any = None  # these processes
    identity_group: Any = None

    @property
    def has_tensors(self) -> bool:
        """Whether values are tensors, which only steps of a backward pass take."""
        return isinstance(self.values, Tensor) or isinstance(self.identity_values, Tensor)

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


class Running(NamedTuple):
    """Running statistics of a batch norm, and by what factor a batch changes them."""

    mean: Tensor  # (C,)
    variance: Tensor  # (C,)
    factor: float


class Norm(NamedTuple):
    """A batch norm in one call: its parameters, and the statistics that it normalises with.

    Without statistics there is no norm.
    """

    weight: Tensor | None  # (C,)
    bias: Tensor | None  # (C,)
    mean: Tensor | None  # (C,), of the batch or running
    variance: Tensor | None  # (C,)
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
    # Float64 where the device has it: float32 would round alpha, and the distance of the mean.
    wide = torch.float64 if x.is_cpu or x.is_cuda else torch.float32
    mean, variance = mean.to(wide), variance.to(wide)
    spread = torch.rsqrt(variance + eps)
    alpha = spread if gamma is None else spread * gamma
    centre = mean.to(sums_dtype(x)).to(wide)
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


def mean_of_normed(norm: Affine | None, distance: Tensor) -> Tensor:
    """The means of norm(x) over each plane, from those of x - centre: the norm is affine."""
    return distance if norm is None else norm.alpha * distance + norm.beta


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
    """The activation, one of those of csrc/eca.h."""
    if activation == "none":
        return v
    of = torch.nn.functional
    function = {"relu": torch.relu, "silu": of.silu, "hardswish": of.hardswish}
    return function.get(activation, of.gelu)(v)


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
