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

from typing import Any

import torch
from torch import Tensor

from eca_fused.autograd.derivatives import convolve, plainly, taps_gradient, transposed
from eca_fused.autograd.tail_parts import (
    GAMMA,
    GATE,
    IDENTITY,
    SCALE,
    WEIGHT,
    Sums,
    X,
    channels_of,
    gate_and_scale,
    gradient_coefficients,
    kept,
    needs_identity,
    needs_sums,
    plain_gradients,
    plain_gradients_of_tail,
    slope_of_factor,
    stacked,
    store,
    sum_over_planes,
    to_dtype,
    write_gradients,
)
from eca_fused.ops.kernels import TailKernels
from eca_fused.ops.tail import (
    WITH_GRADIENT,
    Affine,
    TailOptions,
    TailTensors,
    given_mean,
    mean_of_normed,
    norms,
    plain_mean,
)

__all__ = [
    "BlockTail",
    "LinkedTail",
    "LinkedTailPool",
    "Tail",
    "block_tail_forward",
    "tail_forward",
]


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
    y, mask = kernels.tail(t.x, t.identity, *store(t, gate, own, identity), o.number, need_mask)
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
        ctx.save_for_backward(mask, gate, *kept(t, o, needed))
        ctx.options, ctx.kernels = o, kernels
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Any, ...]:
        mask, gate, *saved = ctx.saved_tensors
        t, o, kernels = TailTensors(*saved), ctx.options, ctx.kernels
        needed = tuple(ctx.needs_input_grad[2 : 2 + WITH_GRADIENT])
        if plainly(dy):
            gradients = plain_gradients_of_tail(dy, t, o, needed, kernels, mask)
            return None, None, *gradients, *(None,) * 5
        own, identity = norms(t, o)
        k = store(t, gate, own, identity)
        sums = None
        if needs_sums(t, o, needed):
            sums = sum_over_planes(kernels, dy, t, o, mask, k, needed)
        dmean = dweight = dgate = dscale = None
        if (sums is not None and any(needed[WEIGHT : SCALE + 1])) or t.weight is not None:
            assert sums is not None, "taps need them"
            dfactor = slope_of_factor(sums, own)
            dgate, dscale = gate_and_scale(t, gate, dfactor)
            if t.weight is not None:
                assert gate is not None, "made by the forward pass"
                assert t.distance is not None, "taken by it"
                w, a = t.weight.to(dfactor.dtype), gate.to(dfactor.dtype)
                dz = dgate * a * (1 - a)
                dmean = transposed(dz, w, o.circular)
                if needed[WEIGHT]:
                    mean = mean_of_normed(own, t.distance).to(dfactor.dtype)
                    dweight = taps_gradient(dz, mean, w, o.circular)
        found = gradient_coefficients(t, o, sums, gate, dmean, own, identity)
        dx, d_identity = write_gradients(kernels, dy, t, o, mask, k, found, needed)
        gradients = (dx, d_identity, dweight, dgate, dscale, *found.dnorms)
        given = zip(t[:WITH_GRADIENT], gradients, needed, strict=True)
        return None, None, dx, d_identity, *(to_dtype(*g) for g in list(given)[2:]), *(None,) * 5


# ---- with ECA's gate and without statistics of the batch ----


def _block_coefficients(
    t: TailTensors, own: Affine | None, identity: Affine | None
) -> tuple[Tensor, Tensor]:
    """scale (N,), and alpha, beta, shift, centre, identity_scale and identity_centre (6, C)."""
    scale = stacked(t.x.new_empty(t.x.shape[0]), 1.0 if t.scale is None else t.scale)[0]
    norm = (1.0, 0.0) if own is None else (own.alpha, own.beta)
    other = (1.0, 0.0) if identity is None else (identity.alpha, identity.centre)
    shift = 0.0 if identity is None else identity.beta
    centre = 0.0 if own is None else own.centre
    return scale, stacked(channels_of(t.x), *norm, shift, centre, *other)


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
        ctx.save_for_backward(mask, gate, *kept(t, o, needed)._replace(distance=distance))
        ctx.options, ctx.kernels = o, kernels
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Any, ...]:
        mask, gate, *saved = ctx.saved_tensors
        t, o, kernels = TailTensors(*saved), ctx.options, ctx.kernels
        needed = tuple(ctx.needs_input_grad[2 : 2 + WITH_GRADIENT])
        if plainly(dy):
            gradients = plain_gradients_of_tail(dy, t, o, needed, kernels, mask)
            return None, None, *gradients, *(None,) * 5
        own, identity = norms(t, o)
        scale, channels = _block_coefficients(t, own, identity)
        with_identity = needs_identity(t, o, needed)
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
            sums = Sums(found[0], found[1], found[2] if with_identity else None)
            if needed[SCALE]:
                _, dscale = gate_and_scale(t, gate, slope_of_factor(sums, own))
            rest = gradient_coefficients(t, o, sums, gate, dmean, own, identity).dnorms
        return (
            None,
            None,
            dx if needed[X] else None,
            d_identity if needed[IDENTITY] else None,
            dweight if needed[WEIGHT] else None,
            None,
            to_dtype(t.scale, dscale, needed[SCALE]),
            *(to_dtype(*g) for g in zip(t[GAMMA:WITH_GRADIENT], rest, needed[GAMMA:], strict=True)),
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
        ctx.save_for_backward(*kept(t, o, needed))
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
            gradients = plain_gradients(plain_mean, dmean, t, o, needed)
            return None, None, *gradients, *(None,) * 5
        dy, mask, gate, scale, sums, k = dtoken.left
        t = t._replace(scale=scale)
        own, identity = norms(t, o)
        wide = None if dmean is None else dmean.to(sums.g.dtype)
        found = gradient_coefficients(t, o, sums, gate, wide, own, identity)
        dx, d_identity = write_gradients(kernels, dy, t, o, mask, k, found, needed)
        rest = zip(t[GAMMA:WITH_GRADIENT], found.dnorms, needed[GAMMA:], strict=True)
        return (
            *(None, None, dx, d_identity, None, None, None),
            *(to_dtype(*g) for g in rest),
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
        k = store(t, t.gate, *norms(t, o))
        y, mask = kernels.tail(t.x, t.identity, *k, o.number, True)
        ctx.save_for_backward(mask, *kept(t, o, needed))
        ctx.options, ctx.kernels = o, kernels
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Any, ...]:
        mask, *saved = ctx.saved_tensors
        t, o, kernels = TailTensors(*saved), ctx.options, ctx.kernels
        needed = tuple(ctx.needs_input_grad[3 : 3 + WITH_GRADIENT])
        if torch.compiler.is_compiling() or plainly(dy):
            gradients = plain_gradients_of_tail(dy, t, o, needed, kernels, mask)
            return None, None, None, *gradients, *(None,) * 5
        own, identity = norms(t, o)
        k = store(t, t.gate, own, identity)
        sums = sum_over_planes(kernels, dy, t, o, mask, k, needed)
        dgate, dscale = gate_and_scale(t, t.gate, slope_of_factor(sums, own))
        dtoken: Any = torch.empty(0, dtype=dy.dtype, device=dy.device)
        dtoken.left = dy, mask, t.gate, t.scale, sums, k
        return (
            *(dtoken, None, None, None, None, None),
            to_dtype(t.gate, dgate, needed[GATE]),
            to_dtype(t.scale, dscale, needed[SCALE]),
            *(None,) * 9,
        )
