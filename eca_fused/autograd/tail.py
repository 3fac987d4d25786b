"""A residual block's tail as torch.autograd.Functions on a backend's kernels.

The passes over maps are described in csrc/eca.h, the rest of the arithmetic in ops/tail.py. Maps
read or written, modelled without caches, with batch norm, ECA and ReLU in half precision; 1/16 is
ReLU's mask:

| | forward | backward |
|---|---|---|
| plain PyTorch | 11 | 18 |
| Tail: statistics, result; sums, gradients | 4 1/16 | 6 1/8 |
| BlockTail, for running statistics or none | 3 1/16 | 4 1/16 |
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from eca_fused.autograd.derivatives import convolve, pixels_of, taps_gradient, transposed
from eca_fused.ops.kernels import TailKernels
from eca_fused.ops.results import sums_dtype
from eca_fused.ops.tail import (
    WITH_GRADIENT,
    Affine,
    TailOptions,
    TailTensors,
    coefficients,
    factor_of,
    given_mean,
    mean_of_normed,
    norm_gradients,
    norms,
    plain,
    plain_mean,
)
from eca_fused.torch_state import add_over_processes, batched_by_autograd, transformed

__all__ = [
    "BlockTail",
    "LinkedTail",
    "LinkedTailPool",
    "Tail",
    "block_tail_forward",
    "tail_forward",
]

X, IDENTITY, WEIGHT, GATE, SCALE, GAMMA, BETA, IDENTITY_GAMMA, IDENTITY_BETA = range(WITH_GRADIENT)


# ---- coefficients in memory, as the kernels take them ----


def _stacked(like: Tensor, *rows: Tensor | float) -> Tensor:
    """Coefficients in one tensor (rows, *like.shape), in the dtype of sums over `like`."""
    found = like.new_empty((len(rows), *like.shape), dtype=sums_dtype(like))
    for row, values in zip(found, rows, strict=True):
        if isinstance(values, Tensor):
            row.copy_(values.expand_as(row))
        else:
            row.fill_(values)
    return found


def _planes_of(x: Tensor) -> Tensor:
    return x.new_empty(x.shape[:2])


def _channels_of(x: Tensor) -> Tensor:
    return x.new_empty(x.shape[1])


class _Stored(NamedTuple):
    planes: Tensor  # (2, N, C): p and q
    channels: Tensor  # (3, C): centre, identity_scale and identity_centre


def _store(
    t: TailTensors, gate: Tensor | None, own: Affine | None, identity: Affine | None
) -> _Stored:
    k = coefficients(gate, t.scale, own, identity)
    return _Stored(
        _stacked(_planes_of(t.x), k.p, k.q),
        _stacked(_channels_of(t.x), k.centre, k.identity_scale, k.identity_centre),
    )


# ---- in plain PyTorch ----


def _plainly(dy: Tensor) -> bool:
    """Whether plain PyTorch must compute the gradients: create_graph, is_grads_batched, func."""
    if torch.is_grad_enabled():
        return True
    return not torch.compiler.is_compiling() and (transformed() or batched_by_autograd(dy))


def _plain_gradients(
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
        for view, need in zip(views, needed, strict=True):
            if view is not None and need and not view.requires_grad:
                view.requires_grad_()
        y = function(TailTensors(*views, *t[WITH_GRADIENT:]), o)  # type: ignore[arg-type]
        asked = [v for v, need in zip(views, needed, strict=True) if need and v is not None]
        found = iter(torch.autograd.grad(y, asked, dy, create_graph=again, materialize_grads=True))
    return tuple(next(found) if need else None for need in needed)


# ---- the backward pass after the gate's ----


class _Sums(NamedTuple):
    """What the sums over planes are, in float64: (N, C) each."""

    g: Tensor
    by_distance: Tensor  # g * (x - centre)
    by_identity: Tensor | None  # g * (identity - identity_centre)


def _slope_of_factor(sums: _Sums, own: Affine | None) -> Tensor:
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


def _gradient_coefficients(
    t: TailTensors,
    o: TailOptions,
    sums: _Sums | None,
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
        _stacked(_planes_of(t.x), factor * alpha, offset),
        _stacked(
            _channels_of(t.x),
            0.0 if slope is None else slope,
            1.0 if identity is None else identity.alpha,
            0.0 if identity_slope is None else identity_slope,
            identity_offset,
        ),
        slope is not None,
        identity_slope is not None,
    )


def _to(like: Tensor | None, gradient: Tensor | None, need: bool) -> Tensor | None:
    return gradient.to(like.dtype) if need and like is not None and gradient is not None else None


def _needs_identity(t: TailTensors, o: TailOptions, needed: tuple[bool, ...]) -> bool:
    """Whether the backward pass sums over the identity, for its norm's gradients."""
    if t.identity_mean is None:
        return False
    return o.identity_values is not None or needed[IDENTITY_GAMMA]


def _kept(t: TailTensors, o: TailOptions, needed: tuple[bool, ...]) -> TailTensors:
    """What the backward pass needs; the identity only if it is read."""
    if o.reads_identity or _needs_identity(t, o, needed):
        return t
    return t._replace(identity=None)


def _needs_sums(t: TailTensors, o: TailOptions, needed: tuple[bool, ...]) -> bool:
    batch = o.values is not None or o.identity_values is not None
    return batch or t.weight is not None or any(needed[GATE:])


def tail_forward(
    t: TailTensors, o: TailOptions, kernels: TailKernels, need_mask: bool
) -> tuple[Tensor, Tensor, Tensor | None]:
    """y, the mask, and the gates (N, C) if there are any."""
    own, identity = norms(t, o)
    gate = t.gate
    if t.weight is not None:
        assert t.distance is not None, "the means that taps take"
        mean = mean_of_normed(own, t.distance)
        gate = torch.sigmoid(convolve(mean, t.weight.to(mean.dtype), o.circular))
    y, mask = kernels.tail(t.x, t.identity, *_store(t, gate, own, identity), o.number, need_mask)
    return y, mask, gate


class Tail(torch.autograd.Function):
    """y of a tail: one pass, after the statistics; two passes backward.

    Tail.apply(options, kernels, *TailTensors) returns y like x. ReLU's mask is kept for backward,
    and the identity only where its norm or the activation needs it.
    """

    @staticmethod
    def forward(ctx: Any, o: TailOptions, kernels: TailKernels, *tensors: Tensor | None) -> Tensor:
        t = TailTensors(*tensors)  # type: ignore[arg-type]
        needed = tuple(ctx.needs_input_grad[2 : 2 + WITH_GRADIENT])
        y, mask, gate = tail_forward(t, o, kernels, True)
        ctx.save_for_backward(mask, gate, *_kept(t, o, needed))
        ctx.options, ctx.kernels = o, kernels
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Any, ...]:
        mask, gate, *saved = ctx.saved_tensors
        t, o, kernels = TailTensors(*saved), ctx.options, ctx.kernels
        needed = tuple(ctx.needs_input_grad[2 : 2 + WITH_GRADIENT])
        if _plainly(dy):
            return None, None, *_plain_gradients(plain, dy, t, o, needed), *(None,) * 5
        own, identity = norms(t, o)
        k = _store(t, gate, own, identity)
        sums = None
        if _needs_sums(t, o, needed):
            sums = _sum(kernels, dy, t, o, mask, k, needed)
        dmean = dweight = dgate = dscale = None
        if (sums is not None and any(needed[WEIGHT : SCALE + 1])) or t.weight is not None:
            assert sums is not None, "taps need them"
            dfactor = _slope_of_factor(sums, own)
            dgate, dscale = _gate_and_scale(t, gate, dfactor)
            if t.weight is not None:
                assert gate is not None, "made by the forward pass"
                assert t.distance is not None, "taken by it"
                w, a = t.weight.to(dfactor.dtype), gate.to(dfactor.dtype)
                dz = dgate * a * (1 - a)
                dmean = transposed(dz, w, o.circular)
                if needed[WEIGHT]:
                    mean = mean_of_normed(own, t.distance).to(dfactor.dtype)
                    dweight = taps_gradient(dz, mean, w, o.circular)
        found = _gradient_coefficients(t, o, sums, gate, dmean, own, identity)
        dx, d_identity = _write(kernels, dy, t, o, mask, k, found, needed)
        gradients = (dx, d_identity, dweight, dgate, dscale, *found.dnorms)
        given = zip(t[:WITH_GRADIENT], gradients, needed, strict=True)
        return None, None, dx, d_identity, *(_to(*g) for g in list(given)[2:]), *(None,) * 5


def _sum(
    kernels: TailKernels,
    dy: Tensor,
    t: TailTensors,
    o: TailOptions,
    mask: Tensor,
    k: _Stored,
    needed: tuple[bool, ...],
) -> _Sums:
    with_identity = _needs_identity(t, o, needed)
    sums = kernels.tail_sums(dy, t.x, t.identity, mask, *k, o.number, with_identity)
    return _Sums(sums[0], sums[1], sums[2] if with_identity else None)


def _write(
    kernels: TailKernels,
    dy: Tensor,
    t: TailTensors,
    o: TailOptions,
    mask: Tensor,
    k: _Stored,
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


def _gate_and_scale(
    t: TailTensors, gate: Tensor | None, dfactor: Tensor
) -> tuple[Tensor, Tensor | None]:
    """The gradients of gate (N, C) and scale (N,) from that of their product."""
    if t.scale is None:
        return dfactor, None
    by_gate = dfactor if gate is None else dfactor * gate
    return dfactor * t.scale.unsqueeze(1), by_gate.sum(1)


# ---- with ECA's gate and without statistics of the batch ----


def _block_coefficients(
    t: TailTensors, own: Affine | None, identity: Affine | None
) -> tuple[Tensor, Tensor]:
    """scale (N,), and alpha, beta, shift, centre, identity_scale and identity_centre (6, C)."""
    scale = _stacked(t.x.new_empty(t.x.shape[0]), 1.0 if t.scale is None else t.scale)[0]
    norm = (1.0, 0.0) if own is None else (own.alpha, own.beta)
    other = (1.0, 0.0) if identity is None else (identity.alpha, identity.centre)
    shift = 0.0 if identity is None else identity.beta
    centre = 0.0 if own is None else own.centre
    return scale, _stacked(_channels_of(t.x), *norm, shift, centre, *other)


def block_tail_forward(
    t: TailTensors, o: TailOptions, kernels: TailKernels, need_mask: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """y, the mask, the means of x - centre (N, C) and the gates (N, C)."""
    scale, channels = _block_coefficients(t, *norms(t, o))
    assert t.weight is not None, "ECA's taps"
    return kernels.block_tail(
        t.x, t.identity, t.weight, scale, channels, o.circular, o.number, need_mask
    )


class BlockTail(torch.autograd.Function):
    """y of a tail with ECA's gate and no statistics of the batch: one pass a direction.

    Args and result as for Tail.
    """

    @staticmethod
    def forward(ctx: Any, o: TailOptions, kernels: TailKernels, *tensors: Tensor | None) -> Tensor:
        t = TailTensors(*tensors)  # type: ignore[arg-type]
        needed = tuple(ctx.needs_input_grad[2 : 2 + WITH_GRADIENT])
        y, mask, distance, gate = block_tail_forward(t, o, kernels, True)
        ctx.save_for_backward(mask, gate, *_kept(t, o, needed)._replace(distance=distance))
        ctx.options, ctx.kernels = o, kernels
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Any, ...]:
        mask, gate, *saved = ctx.saved_tensors
        t, o, kernels = TailTensors(*saved), ctx.options, ctx.kernels
        needed = tuple(ctx.needs_input_grad[2 : 2 + WITH_GRADIENT])
        if _plainly(dy):
            return None, None, *_plain_gradients(plain, dy, t, o, needed), *(None,) * 5
        own, identity = norms(t, o)
        scale, channels = _block_coefficients(t, own, identity)
        with_identity = _needs_identity(t, o, needed)
        dx, d_identity, found, dmean, dweight = kernels.block_tail_backward(
            dy,
            t.x,
            t.identity,
            mask,
            t.weight,
            scale,
            channels,
            t.distance,
            gate,
            o.circular,
            o.number,
            with_identity,
            needed[X],
            needed[IDENTITY],
            needed[WEIGHT],
        )
        rest: tuple[Tensor | None, ...] = (None,) * 4
        dscale = None
        if any(needed[SCALE:]):
            sums = _Sums(found[0], found[1], found[2] if with_identity else None)
            if needed[SCALE]:
                _, dscale = _gate_and_scale(t, gate, _slope_of_factor(sums, own))
            rest = _gradient_coefficients(t, o, sums, gate, dmean, own, identity).dnorms
        return (
            None,
            None,
            dx if needed[X] else None,
            d_identity if needed[IDENTITY] else None,
            dweight if needed[WEIGHT] else None,
            None,
            _to(t.scale, dscale, needed[SCALE]),
            *(_to(*g) for g in zip(t[GAMMA:WITH_GRADIENT], rest, needed[GAMMA:], strict=True)),
            *(None,) * 5,
        )


# ---- with a gate that a network makes from the means, such as squeeze and excitation ----


class LinkedTailPool(torch.autograd.Function):
    """The mean of norm(x) over each plane, and a token for LinkedTail of the same tail.

    LinkedTail's backward leaves the gradients of the maps and the norms to this one, because the
    gate network's backward runs in between. It passes on what it has as an attribute of the
    token's gradient, as LinkedRescale does.

    Args as for Tail, without a gate and a scale. Returns the mean (N, C), in the dtype of x, and
    the token.
    """

    @staticmethod
    def forward(
        ctx: Any, o: TailOptions, kernels: TailKernels, *tensors: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        t = TailTensors(*tensors)  # type: ignore[arg-type]
        needed = tuple(ctx.needs_input_grad[2 : 2 + WITH_GRADIENT])
        ctx.save_for_backward(*_kept(t, o, needed))
        ctx.options, ctx.kernels = o, kernels
        ctx.set_materialize_grads(False)
        return given_mean(t, o), t.x.new_empty(0)

    @staticmethod
    def backward(ctx: Any, dmean: Tensor | None, dtoken: Any) -> tuple[Any, ...]:
        t, o, kernels = TailTensors(*ctx.saved_tensors), ctx.options, ctx.kernels
        needed = tuple(ctx.needs_input_grad[2 : 2 + WITH_GRADIENT])
        if dtoken is None:  # the gradients of LinkedTail were not asked for, or were plain
            if dmean is None:
                return (None,) * (2 + len(t))
            gradients = _plain_gradients(plain_mean, dmean, t, o, needed)
            return None, None, *gradients, *(None,) * 5
        dy, mask, gate, scale, sums, k = dtoken.left
        t = t._replace(scale=scale)
        own, identity = norms(t, o)
        wide = None if dmean is None else dmean.to(sums.g.dtype)
        found = _gradient_coefficients(t, o, sums, gate, wide, own, identity)
        dx, d_identity = _write(kernels, dy, t, o, mask, k, found, needed)
        rest = zip(t[GAMMA:WITH_GRADIENT], found.dnorms, needed[GAMMA:], strict=True)
        return (
            *(None, None, dx, d_identity, None, None, None),
            *(_to(*g) for g in rest),
            *(None,) * 5,
        )


class LinkedTail(torch.autograd.Function):
    """y of a tail whose means LinkedTailPool gave.

    Args: the token, then as for Tail. Only gate, scale and the token have gradients here, unless
    plain PyTorch must compute them.
    """

    @staticmethod
    def forward(
        ctx: Any, token: Tensor, o: TailOptions, kernels: TailKernels, *tensors: Tensor | None
    ) -> Tensor:
        t = TailTensors(*tensors)  # type: ignore[arg-type]
        needed = tuple(ctx.needs_input_grad[3 : 3 + WITH_GRADIENT])
        k = _store(t, t.gate, *norms(t, o))
        y, mask = kernels.tail(t.x, t.identity, *k, o.number, True)
        ctx.save_for_backward(mask, *_kept(t, o, needed))
        ctx.options, ctx.kernels = o, kernels
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Any, ...]:
        mask, *saved = ctx.saved_tensors
        t, o, kernels = TailTensors(*saved), ctx.options, ctx.kernels
        needed = tuple(ctx.needs_input_grad[3 : 3 + WITH_GRADIENT])
        if torch.compiler.is_compiling() or _plainly(dy):
            return None, None, None, *_plain_gradients(plain, dy, t, o, needed), *(None,) * 5
        own, identity = norms(t, o)
        k = _store(t, t.gate, own, identity)
        sums = _sum(kernels, dy, t, o, mask, k, needed)
        dgate, dscale = _gate_and_scale(t, t.gate, _slope_of_factor(sums, own))
        dtoken: Any = torch.empty(0, dtype=dy.dtype, device=dy.device)
        dtoken.left = dy, mask, t.gate, t.scale, sums, k
        return (
            *(dtoken, None, None, None, None, None),
            _to(t.gate, dgate, needed[GATE]),
            _to(t.scale, dscale, needed[SCALE]),
            *(None,) * 9,
        )
