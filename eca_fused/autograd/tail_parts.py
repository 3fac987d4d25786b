"""Parts of autograd/tail.py: coefficients in memory, passes over maps, gradients of norms."""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from eca_fused.autograd.derivatives import pixels_of
from eca_fused.ops.kernels import TailKernels
from eca_fused.ops.results import sums_dtype
from eca_fused.ops.tail import (
    WITH_GRADIENT,
    Affine,
    TailOptions,
    TailTensors,
    coefficients,
    factor_of,
    norm_gradients,
    plain,
)
from eca_fused.torch_state import add_over_processes

__all__ = [
    "GAMMA",
    "GATE",
    "IDENTITY",
    "SCALE",
    "WEIGHT",
    "Stored",
    "Sums",
    "X",
    "channels_of",
    "gate_and_scale",
    "gradient_coefficients",
    "kept",
    "needs_identity",
    "needs_sums",
    "plain_gradients",
    "plain_gradients_of_tail",
    "slope_of_factor",
    "stacked",
    "store",
    "sum_over_planes",
    "to_dtype",
    "write_gradients",
]

X, IDENTITY, WEIGHT, GATE, SCALE, GAMMA, BETA, IDENTITY_GAMMA, IDENTITY_BETA = range(WITH_GRADIENT)


# ---- coefficients in memory, as the kernels take them ----


def stacked(like: Tensor, *rows: Tensor | float) -> Tensor:
    """Coefficients in one tensor (rows, *like.shape), in the dtype of sums over `like`."""
    found = like.new_empty((len(rows), *like.shape), dtype=sums_dtype(like))
    for row, values in zip(found, rows, strict=True):
        if isinstance(values, Tensor):
            row.copy_(values.expand_as(row))
        else:
            row.fill_(values)
    return found


def planes_of(x: Tensor) -> Tensor:
    return x.new_empty(x.shape[:2])


def channels_of(x: Tensor) -> Tensor:
    return x.new_empty(x.shape[1])


class Stored(NamedTuple):
    planes: Tensor  # (2, N, C): p and q
    channels: Tensor  # (3, C): centre, identity_scale and identity_centre


def store(
    t: TailTensors, gate: Tensor | None, own: Affine | None, identity: Affine | None
) -> Stored:
    k = coefficients(gate, t.scale, own, identity)
    return Stored(
        stacked(planes_of(t.x), k.p, k.q),
        stacked(channels_of(t.x), k.centre, k.identity_scale, k.identity_centre),
    )


# ---- in plain PyTorch ----


def plain_gradients(
    function: Any, dy: Tensor, t: TailTensors, o: TailOptions, needed: tuple[bool, ...]
) -> tuple[Tensor | None, ...]:
    """The gradients of a function of ops/tail.py, by autograd.

    Raises:
        RuntimeError: the statistics are those of several processes.
    """
    if o.group is not None or o.identity_group is not None:
        raise RuntimeError(
            "gradients of gradients through the statistics of several processes are not "
            "implemented, as in torch.nn.SyncBatchNorm; call this without create_graph=True"
        )
    again = torch.is_grad_enabled()
    with torch.enable_grad():
        # Views: the gradient of x must not go on into the identity that x was computed from.
        views = [
            None if s is None else s.view_as(s) if again else s.detach() for s in t[:WITH_GRADIENT]
        ]
        if needed[IDENTITY] and views[IDENTITY] is None:  # not kept, as it is only added
            views[IDENTITY] = t.x.new_zeros(()).expand(t.x.shape)
        for view, need in zip(views, needed, strict=True):
            if view is not None and need and not view.requires_grad:
                view.requires_grad_()
        y = function(TailTensors(*views, *t[WITH_GRADIENT:]), o)  # type: ignore[arg-type]
        asked = [v for v, need in zip(views, needed, strict=True) if need and v is not None]
        found = iter(torch.autograd.grad(y, asked, dy, create_graph=again, materialize_grads=True))
    return tuple(next(found) if need else None for need in needed)


def plain_gradients_of_tail(
    dy: Tensor,
    t: TailTensors,
    o: TailOptions,
    needed: tuple[bool, ...],
    kernels: TailKernels,
    mask: Tensor,
) -> tuple[Tensor | None, ...]:
    """The gradients of y, differentiable again. Raises as plain_gradients()."""
    if o.activation != "relu":
        return plain_gradients(plain, dy, t, o, needed)
    # The mask says where v was positive. The identity, which v needs for that, may not be kept.
    none, ones = stacked(planes_of(t.x), 0.0, 0.0), stacked(channels_of(t.x), 0.0, 1.0, 0.0, 0.0)
    args = (torch.ones_like(t.x), t.x, None, mask, none, ones[:3])
    with torch.no_grad():
        flags = (False, False, False, True)
        _, kept_part = kernels.tail_gradients(*args, none, ones, o.number, *flags)

    def masked(views: TailTensors, options: TailOptions) -> Tensor:
        return plain(views, options._replace(activation="none")) * kept_part

    return plain_gradients(masked, dy, t, o, needed)


# ---- the backward pass after the gate's ----


class Sums(NamedTuple):
    """What the sums over planes are, in float64: (N, C) each."""

    g: Tensor
    by_distance: Tensor  # g * (x - centre)
    by_identity: Tensor | None  # g * (identity - identity_centre)


def slope_of_factor(sums: Sums, own: Affine | None) -> Tensor:
    """The gradient of gate * scale, (N, C): the sum of g * u."""
    if own is None:
        return sums.by_distance
    return own.alpha * sums.by_distance + own.beta * sums.g


def _over_processes(group: Any, sums: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    if group is None:
        return sums
    first, second = add_over_processes(torch.stack(sums), group)
    return first, second


class _Coefficients(NamedTuple):
    """The gradients of parameters, and what the pass that writes dx and d_identity needs."""

    dnorms: tuple[Tensor | None, ...]  # of gamma, beta, identity_gamma and identity_beta
    planes: Tensor  # (2, N, C)
    channels: Tensor  # (4, C)
    by_x: bool
    by_identity: bool


def gradient_coefficients(
    t: TailTensors,
    o: TailOptions,
    sums: Sums | None,
    gate: Tensor | None,
    dmean: Tensor | None,  # (N, C), the gradient of the mean of u
    own: Affine | None,
    identity: Affine | None,
) -> _Coefficients:
    factor = factor_of(gate, t.scale)
    alpha: Tensor | float = 1.0 if own is None else own.alpha
    offset: Tensor | float = 0.0
    slope = identity_slope = None
    dgamma = dbeta = identity_dgamma = identity_dbeta = None
    identity_offset: Tensor | float = 0.0
    if own is not None and sums is not None:
        du, by_distance = factor * sums.g, factor * sums.by_distance
        if dmean is not None:
            assert t.distance is not None, "the means that dmean is the gradient of"
            du = du + dmean
            by_distance = by_distance + dmean * t.distance
        local = (du.sum(0), by_distance.sum(0))
        found = norm_gradients(own, local[0], local[1], None)
        dgamma, dbeta = found.weight, found.bias
        if o.values is not None:
            found = norm_gradients(own, *_over_processes(o.group, local), o.values)
            assert found.offset is not None, "of a batch"
            slope, offset = found.slope, found.offset
    if identity is not None and sums is not None:
        # Without the sum by the identity only beta has a gradient.
        by_distance = sums.g if sums.by_identity is None else sums.by_identity
        local = (sums.g.sum(0), by_distance.sum(0))
        found = norm_gradients(identity, local[0], local[1], None)
        identity_dgamma, identity_dbeta = found.weight, found.bias
        if o.identity_values is not None:
            shared = _over_processes(o.identity_group, local)
            found = norm_gradients(identity, *shared, o.identity_values)
            assert found.offset is not None, "of a batch"
            identity_slope, identity_offset = found.slope, found.offset
    if dmean is not None:
        offset = alpha * dmean / pixels_of(t.x) + offset
    return _Coefficients(
        (dgamma, dbeta, identity_dgamma, identity_dbeta),
        stacked(planes_of(t.x), factor * alpha, offset),
        stacked(
            channels_of(t.x),
            0.0 if slope is None else slope,
            1.0 if identity is None else identity.alpha,
            0.0 if identity_slope is None else identity_slope,
            identity_offset,
        ),
        slope is not None,
        identity_slope is not None,
    )


def to_dtype(like: Tensor | None, gradient: Tensor | None, need: bool) -> Tensor | None:
    return gradient.to(like.dtype) if need and like is not None and gradient is not None else None


def needs_identity(t: TailTensors, o: TailOptions, needed: tuple[bool, ...]) -> bool:
    """Whether the backward pass sums over the identity, for its norm's gradients."""
    if t.identity_mean is None:
        return False
    return o.identity_values is not None or needed[IDENTITY_GAMMA]


def kept(t: TailTensors, o: TailOptions, needed: tuple[bool, ...]) -> TailTensors:
    """What the backward pass needs; the identity only if it is read."""
    if o.reads_identity or needs_identity(t, o, needed):
        return t
    return t._replace(identity=None)


def needs_sums(t: TailTensors, o: TailOptions, needed: tuple[bool, ...]) -> bool:
    batch = o.values is not None or o.identity_values is not None
    return batch or t.weight is not None or any(needed[GATE:])


# ---- the passes ----


def sum_over_planes(
    kernels: TailKernels,
    dy: Tensor,
    t: TailTensors,
    o: TailOptions,
    mask: Tensor,
    k: Stored,
    needed: tuple[bool, ...],
) -> Sums:
    with_identity = needs_identity(t, o, needed)
    sums = kernels.tail_sums(dy, t.x, t.identity, mask, *k, o.number, with_identity)
    return Sums(sums[0], sums[1], sums[2] if with_identity else None)


def write_gradients(
    kernels: TailKernels,
    dy: Tensor,
    t: TailTensors,
    o: TailOptions,
    mask: Tensor,
    k: Stored,
    c: _Coefficients,
    needed: tuple[bool, ...],
) -> tuple[Tensor | None, Tensor | None]:
    dx, d_identity = kernels.tail_gradients(
        dy,
        t.x,
        t.identity,
        mask,
        *k,
        c.planes,
        c.channels,
        o.number,
        c.by_x,
        c.by_identity,
        needed[X],
        needed[IDENTITY],
    )
    return dx if needed[X] else None, d_identity if needed[IDENTITY] else None


def gate_and_scale(
    t: TailTensors, gate: Tensor | None, dfactor: Tensor
) -> tuple[Tensor, Tensor | None]:
    """The gradients of gate (N, C) and scale (N,) from that of their product."""
    if t.scale is None:
        return dfactor, None
    by_gate = dfactor if gate is None else dfactor * gate
    return dfactor * t.scale.unsqueeze(1), by_gate.sum(1)
