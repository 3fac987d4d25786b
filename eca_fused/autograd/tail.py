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

from eca_fused.autograd.derivatives import plainly
from eca_fused.autograd.tail_parts import (
    NOTHING,
    Stored,
    gradients_of_norms,
    kept,
    needs_sums,
    number_of,
    only,
    plain_gradients,
    plain_gradients_of_tail,
    sum_over_planes,
    sums_identity,
    write_gradients,
)
from eca_fused.ops.backend import kind_of
from eca_fused.ops.kernels import TailKernels
from eca_fused.ops.results import sums_dtype
from eca_fused.ops.tail import (
    GATE,
    IDENTITY,
    SCALE,
    WEIGHT,
    WITH_GRADIENT,
    TailOptions,
    TailTensors,
    X,
    plain_mean,
)

__all__ = [
    "BlockTail",
    "LinkedTail",
    "LinkedTailPool",
    "Saved",
    "Tail",
    "backward_in_steps",
    "given_mean",
    "inference",
    "inference_arguments",
]


def inference(t: TailTensors, o: TailOptions, kernels: TailKernels) -> Tensor:
    """y of a tail whose gradients nothing needs."""
    return kernels.tail_inference(*inference_arguments(t, o))


def inference_arguments(t: TailTensors, o: TailOptions) -> tuple[Any, ...]:
    """Those of TailKernels.tail_inference(); means go with taps and a batch's statistics."""
    norms = *t.own_norm(o), *t.identity_norm(o)
    scale, means = _scale(t), None if t.weight is None else t.means
    return t.x, t.identity, t.weight, means, t.gate, scale, *norms, o.circular, o.number


def _scale(t: TailTensors) -> Tensor | None:
    """The factor of each sample (N,) as the kernels take it."""
    return None if t.scale is None else t.scale.to(sums_dtype(t.x)).contiguous()


class Saved(NamedTuple):
    """What the forward pass has computed for the backward pass."""

    mask: Tensor
    planes: Tensor  # of Stored
    channels: Tensor  # likewise
    gate: Tensor | None  # (N, C)
    distance: Tensor  # (N, C), the means of x - centre; empty without taps

    @property
    def stored(self) -> Stored:
        return Stored(self.planes, self.channels)


def _tail_forward(t: TailTensors, o: TailOptions, kernels: TailKernels) -> tuple[Tensor, Saved]:
    """y, and what the backward pass needs."""
    y, mask, planes, channels, made, distance = kernels.tail_training(
        t.x,
        t.identity,
        t.weight,
        None if t.weight is None else t.means,
        t.gate,
        t.scale,
        *t.own_norm(o),
        *t.identity_norm(o),
        o.circular,
        o.number,
    )
    return y, Saved(mask, planes, channels, t.gate if t.weight is None else made, distance)


def _backward(
    dy: Tensor,
    t: TailTensors,
    o: TailOptions,
    kernels: TailKernels,
    s: Saved,
    needed: tuple[bool, ...],
) -> tuple[Tensor | None, ...]:
    """The gradients of those of TailTensors that can have one, in one call."""
    norms = *t.own_norm(o), *t.identity_norm(o)
    found = kernels.tail_backward(
        dy,
        t.x,
        t.identity,
        s.mask,
        s.planes,
        s.channels,
        t.weight,
        s.gate,
        t.scale,
        s.distance,
        *norms,
        number_of(o.values),
        number_of(o.identity_values),
        o.circular,
        o.number,
        sum(need << place for place, need in enumerate(needed)),
    )
    return tuple(only(d, need) for d, need in zip(found, needed, strict=True))


def backward_in_steps(
    dy: Tensor,
    t: TailTensors,
    o: TailOptions,
    kernels: TailKernels,
    s: Saved,
    needed: tuple[bool, ...],
) -> tuple[Tensor | None, ...]:
    """The same; processes exchange their sums in between."""
    totals = dgate = dscale = dmean = dweight = None
    if needs_sums(t, o, needed):
        sums = sum_over_planes(kernels, dy, t, o, s.mask, s.stored, needed)
        taps = t.weight is not None
        flags = o.circular, needed[GATE], needed[SCALE], needed[WEIGHT]
        totals, dgate, dscale, dmean, dweight = kernels.tail_totals(
            t.x,
            sums,
            t.weight,
            s.gate,
            t.scale,
            None,
            s.distance if taps else None,
            *t.own_norm(o),
            *flags,
        )
        dgate, dscale = only(dgate, needed[GATE]), only(dscale, needed[SCALE])
        dmean, dweight = only(dmean, taps), only(dweight, needed[WEIGHT])
    found = gradients_of_norms(kernels, t, o, totals, s.gate, dmean, needed)
    dx, d_identity = write_gradients(kernels, dy, t, o, s.mask, s.stored, found, needed)
    return dx, d_identity, dweight, dgate, dscale, *found.dnorms


class Tail(torch.autograd.Function):
    """y of a tail: one pass, after the statistics; two passes backward.

    Tail.apply(options, kernels, *TailTensors) returns y like x. ReLU's mask is kept for backward,
    and the identity only where its norm or the activation needs it.
    """

    @staticmethod
    def forward(ctx: Any, o: TailOptions, kernels: TailKernels, *tensors: Tensor | None) -> Tensor:
        t = TailTensors(*tensors)  # type: ignore[arg-type]
        needed = tuple(ctx.needs_input_grad[2 : 2 + WITH_GRADIENT])
        y, saved = _tail_forward(t, o, kernels)
        ctx.save_for_backward(*saved, *kept(t, o, needed))
        ctx.options, ctx.kernels = o, kernels
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Any, ...]:
        mask, planes, channels, gate, distance, *rest = ctx.saved_tensors
        s, t = Saved(mask, planes, channels, gate, distance), TailTensors(*rest)
        o, kernels = ctx.options, ctx.kernels
        needed = tuple(ctx.needs_input_grad[2 : 2 + WITH_GRADIENT])
        if plainly(dy):
            gradients = plain_gradients_of_tail(dy, t, o, needed, kernels, s.mask)
            return None, None, *gradients, *NOTHING
        whole = kind_of(t.x) in kernels.whole_tail_devices and not o.has_tensors
        compute = _backward if whole else backward_in_steps
        gradients = compute(dy, t, o, kernels, s, needed)
        return None, None, *gradients, *NOTHING


# ---- with ECA's gate and without statistics of the batch ----


def _block_coefficients(t: TailTensors, o: TailOptions, kernels: TailKernels) -> Tensor:
    """shift, alpha, beta, centre, identity_scale and identity_centre (6, C)."""
    norms = *t.own_norm(o), *t.identity_norm(o)
    return kernels.tail_coefficients(t.x, None, None, None, None, *norms, False, False)[1]


class BlockTail(torch.autograd.Function):
    """y of a tail with ECA's gate and no statistics of the batch: one pass a direction.

    Args and result as for Tail.
    """

    @staticmethod
    def forward(ctx: Any, o: TailOptions, kernels: TailKernels, *tensors: Tensor | None) -> Tensor:
        t = TailTensors(*tensors)  # type: ignore[arg-type]
        needed = tuple(ctx.needs_input_grad[2 : 2 + WITH_GRADIENT])
        assert t.weight is not None, "ECA's taps"
        y, mask, distance, gate = kernels.block_tail(
            t.x,
            t.identity,
            t.weight,
            _scale(t),
            _block_coefficients(t, o, kernels),
            o.circular,
            o.number,
            True,
        )
        ctx.save_for_backward(mask, gate, distance, *kept(t, o, needed))
        ctx.options, ctx.kernels = o, kernels
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Any, ...]:
        mask, gate, distance, *saved = ctx.saved_tensors
        t, o, kernels = TailTensors(*saved), ctx.options, ctx.kernels
        needed = tuple(ctx.needs_input_grad[2 : 2 + WITH_GRADIENT])
        if plainly(dy):
            gradients = plain_gradients_of_tail(dy, t, o, needed, kernels, mask)
            return None, None, *gradients, *NOTHING
        dx, d_identity, sums, dmean, dweight = kernels.block_tail_backward(
            dy,
            t.x,
            t.identity,
            mask,
            t.weight,
            _scale(t),
            _block_coefficients(t, o, kernels),
            distance,
            gate,
            o.circular,
            o.number,
            sums_identity(t, o, needed),
            needed[X],
            needed[IDENTITY],
            needed[WEIGHT],
        )
        dnorms: tuple[Tensor | None, ...] = (None,) * 4
        dscale = None
        if any(needed[SCALE:]):
            totals, _, dscale, _, _ = kernels.tail_totals(
                t.x,
                sums,
                None,
                gate,
                t.scale,
                dmean,
                distance,
                *t.own_norm(o),
                *(False, False, needed[SCALE], False),
            )
            dnorms = gradients_of_norms(kernels, t, o, totals, gate, None, needed, False).dnorms
        return (
            *(None, None, only(dx, needed[X]), only(d_identity, needed[IDENTITY])),
            *(only(dweight, needed[WEIGHT]), None, dscale if needed[SCALE] else None),
            *dnorms,
            *NOTHING,
        )


# ---- with a gate that a network makes from the means, such as squeeze and excitation ----


def given_mean(t: TailTensors, o: TailOptions, kernels: TailKernels) -> tuple[Tensor, Tensor]:
    """The mean of norm(x) over each plane, (N, C) like x, and that of x - centre, from t.means."""
    assert t.means is not None, "the means that kernels have found"
    _, channels, _, distance = kernels.tail_coefficients(
        t.x, None, t.means, None, None, *t.own_norm(o), *t.identity_norm(o), False, False
    )
    mean = distance if t.mean is None else channels[1] * distance + channels[2]
    return mean.to(t.x.dtype), distance


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
        mean, distance = given_mean(t, o, kernels)
        ctx.save_for_backward(distance, *kept(t, o, needed))
        ctx.options, ctx.kernels = o, kernels
        ctx.set_materialize_grads(False)
        return mean, t.x.new_empty(0)

    @staticmethod
    def backward(ctx: Any, dmean: Tensor | None, dtoken: Any) -> tuple[Any, ...]:
        distance, *saved = ctx.saved_tensors
        t, o, kernels = TailTensors(*saved), ctx.options, ctx.kernels
        needed = tuple(ctx.needs_input_grad[2 : 2 + WITH_GRADIENT])
        if dtoken is None:  # the gradients of LinkedTail were not asked for, or were plain
            if dmean is None:
                return (None,) * (2 + len(t))
            gradients = plain_gradients(plain_mean, dmean, t, o, needed)
            return None, None, *gradients, *NOTHING
        dy, mask, gate, scale, sums, k = dtoken.left
        t = t._replace(scale=scale)
        norm, flags = t.own_norm(o), (False,) * 4
        totals = kernels.tail_totals(t.x, sums, None, gate, scale, dmean, distance, *norm, *flags)[
            0
        ]
        found = gradients_of_norms(kernels, t, o, totals, gate, dmean, needed)
        dx, d_identity = write_gradients(kernels, dy, t, o, mask, k, found, needed)
        return None, None, dx, d_identity, None, None, None, *found.dnorms, *NOTHING


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
        y, s = _tail_forward(t, o, kernels)
        ctx.save_for_backward(s.mask, *s.stored, *kept(t, o, needed))
        ctx.options, ctx.kernels = o, kernels
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Any, ...]:
        mask, planes, channels, *saved = ctx.saved_tensors
        t, o, kernels = TailTensors(*saved), ctx.options, ctx.kernels
        needed = tuple(ctx.needs_input_grad[3 : 3 + WITH_GRADIENT])
        if torch.compiler.is_compiling() or plainly(dy):
            gradients = plain_gradients_of_tail(dy, t, o, needed, kernels, mask)
            return None, None, None, *gradients, *NOTHING
        k = Stored(planes, channels)
        sums = sum_over_planes(kernels, dy, t, o, mask, k, needed)
        flags = False, needed[GATE], needed[SCALE], False
        _, dgate, dscale, _, _ = kernels.tail_totals(
            t.x, sums, None, t.gate, t.scale, None, None, *t.own_norm(o), *flags
        )
        dtoken: Any = torch.empty(0, dtype=dy.dtype, device=dy.device)
        dtoken.left = dy, mask, t.gate, t.scale, sums, k
        return (
            *(dtoken, None, None, None, None, None),
            only(dgate, needed[GATE]),
            only(dscale, needed[SCALE]),
            *(None,) * 4,
            *NOTHING,
        )
