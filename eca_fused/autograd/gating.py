"""Attention after an activation as torch.autograd.Functions on a backend's kernels.

    y = gate * z,  z = act(norm(x))

z is never stored: each pass computes it again. The passes over maps are described in csrc/eca.h.
Maps read or written, modelled without caches, with batch norm, ReLU and ECA or a gate network:

| | forward | backward |
|---|---|---|
| plain PyTorch: norm 3, activation 2, mean 1, product 2 | 8 | 14 |
| network: statistics, means of z, result; sums, gradient | 4 | 5 |
| ECA: statistics, means and result in one pass; likewise | 3 | 5 |
| the same without statistics of the batch | 3, 2 | 5 |

With u = norm(x) and S the pixels of a plane, the gradient of u is
(gate * dy + dmean / S) * act'(u), where dmean is that of the mean of z.
"""

from typing import Any

import torch
from torch import Tensor

from eca_fused.autograd.derivatives import pixels_of, plainly, taps_gradient, transposed
from eca_fused.autograd.tail_parts import (
    GAMMA,
    GATE,
    NOTHING,
    WEIGHT,
    X,
    plain_gradients,
)
from eca_fused.ops.gating import activation_number, coefficients, plain, plain_mean
from eca_fused.ops.kernels import GatingKernels
from eca_fused.ops.results import sums_dtype
from eca_fused.ops.tail import (
    WITH_GRADIENT,
    Affine,
    TailOptions,
    TailTensors,
    norm_gradients,
    norms,
)
from eca_fused.torch_state import add_over_processes

__all__ = [
    "Gated",
    "LinkedGated",
    "LinkedGatedPool",
    "channels_of_norm",
    "gated_forward",
    "means_of",
]


def _stacked(like: Tensor, *rows: Tensor | float) -> Tensor:
    """Coefficients in one tensor (rows, *like.shape), in the dtype of sums over `like`."""
    found = like.new_empty((len(rows), *like.shape), dtype=sums_dtype(like))
    for row, values in zip(found, rows, strict=True):
        if isinstance(values, Tensor):
            row.copy_(values.expand_as(row))
        else:
            row.fill_(values)
    return found


def _channels_of(x: Tensor) -> Tensor:
    return x.new_empty(x.shape[1])


def _to_dtype(like: Tensor | None, gradient: Tensor | None, need: bool) -> Tensor | None:
    return gradient.to(like.dtype) if need and like is not None and gradient is not None else None


def _channels(t: TailTensors, own: Affine | None) -> Tensor:
    return _stacked(_channels_of(t.x), *coefficients(own))


def channels_of_norm(t: TailTensors, o: TailOptions) -> Tensor:
    """p, q and centre, (3, C), as the kernels take them."""
    return _channels(t, norms(t, o)[0])


def means_of(t: TailTensors, o: TailOptions, kernels: GatingKernels, channels: Tensor) -> Tensor:
    """The mean of z over each plane, (N, C) like x."""
    sums = kernels.activated_sums(None, t.x, channels, activation_number(o), False)
    return (sums[0] / pixels_of(t.x)).to(t.x.dtype)


def gated_forward(
    t: TailTensors, o: TailOptions, kernels: GatingKernels, channels: Tensor | None = None
) -> tuple[Tensor, Tensor | None, Tensor]:
    """y, the means of z (N, C) if there are taps, and the gates (N, C)."""
    if channels is None:
        channels = channels_of_norm(t, o)
    number = activation_number(o)
    if t.weight is not None:
        return kernels.gated_block(t.x, t.weight, channels, o.circular, number)
    assert t.gate is not None, "taps or gates"
    gate = t.gate.to(sums_dtype(t.x)).contiguous()
    return kernels.gated(t.x, gate, channels, number), None, gate


def _needs_norm_sums(t: TailTensors, o: TailOptions, needed: tuple[bool, ...]) -> bool:
    return t.mean is not None and (o.values is not None or any(needed[GAMMA : GAMMA + 2]))


def _finished(
    kernels: GatingKernels,
    dy: Tensor,
    t: TailTensors,
    o: TailOptions,
    needed: tuple[bool, ...],
    own: Affine | None,
    channels: Tensor,  # (3, C)
    sums: Tensor,  # of ActivatedSums, see csrc/eca.h
    gate: Tensor,  # (N, C)
    dmean: Tensor | None,  # (N, C)
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """The gradients of x, gamma and beta."""
    shift: Tensor | float = 0.0 if dmean is None else dmean / pixels_of(t.x)
    dgamma = dbeta = slope = offset = None
    if own is not None and len(sums) > 1:
        du, by_distance = (
            (gate * of_g + shift * of_slope).sum(0)
            for of_g, of_slope in ((sums[1], sums[3]), (sums[2], sums[4]))
        )
        found = norm_gradients(own, du, by_distance, None)
        dgamma, dbeta = found.weight, found.bias
        if o.values is not None:
            if o.group is not None:
                du, by_distance = add_over_processes(torch.stack([du, by_distance]), o.group)
            found = norm_gradients(own, du, by_distance, o.values)
            slope, offset = found.slope, found.offset
    dx = None
    if needed[X]:
        by_x = slope is not None and offset is not None
        given = (slope, offset) if slope is not None and offset is not None else (0.0, 0.0)
        dx = kernels.gated_gradients(
            dy,
            t.x,
            _stacked(t.x.new_empty(t.x.shape[:2]), gate, shift),
            channels,
            _stacked(_channels_of(t.x), *given),
            activation_number(o),
            by_x,
        )
    return (
        dx,
        _to_dtype(t.gamma, dgamma, needed[GAMMA]),
        _to_dtype(t.beta, dbeta, needed[GAMMA + 1]),
    )


class Gated(torch.autograd.Function):
    """y with taps or given gates. Nothing but x and numbers per plane is kept.

    Gated.apply(options, kernels, *TailTensors) returns y like x.
    """

    @staticmethod
    def forward(
        ctx: Any, o: TailOptions, kernels: GatingKernels, *tensors: Tensor | None
    ) -> Tensor:
        t = TailTensors(*tensors)  # type: ignore[arg-type]
        y, means, gate = gated_forward(t, o, kernels)
        ctx.save_for_backward(means, gate, *t)
        ctx.options, ctx.kernels = o, kernels
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Any, ...]:
        means, gate, *saved = ctx.saved_tensors
        t, o, kernels = TailTensors(*saved), ctx.options, ctx.kernels
        needed = tuple(ctx.needs_input_grad[2 : 2 + WITH_GRADIENT])
        if plainly(dy):
            return None, None, *plain_gradients(plain, dy, t, o, needed), *NOTHING
        own, _ = norms(t, o)
        channels, for_norm = _channels(t, own), _needs_norm_sums(t, o, needed)
        sums = kernels.activated_sums(dy, t.x, channels, activation_number(o), for_norm)
        dgate, wide = sums[0], gate.to(sums.dtype)
        dmean = dweight = None
        if t.weight is not None:
            w, dz = t.weight.to(sums.dtype), dgate * wide * (1 - wide)
            dmean = transposed(dz, w, o.circular)
            if needed[WEIGHT]:
                dweight = taps_gradient(dz, means.to(sums.dtype), w, o.circular)
        dx, dgamma, dbeta = _finished(kernels, dy, t, o, needed, own, channels, sums, wide, dmean)
        return (
            *(None, None, dx, None),
            _to_dtype(t.weight, dweight, needed[WEIGHT]),
            _to_dtype(t.gate, dgate, needed[GATE]),
            *(None, dgamma, dbeta, None, None),
            *NOTHING,
        )


class LinkedGatedPool(torch.autograd.Function):
    """The mean of z over each plane, and a token for LinkedGated of the same call.

    LinkedGated's backward leaves the gradients of x and the norm to this one, because the gate
    network's backward runs in between, as LinkedTailPool does.

    Args as for Gated, without taps or gates. Returns the mean (N, C), like x, and the token.
    """

    @staticmethod
    def forward(
        ctx: Any, o: TailOptions, kernels: GatingKernels, *tensors: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        t = TailTensors(*tensors)  # type: ignore[arg-type]
        ctx.save_for_backward(*t)
        ctx.options, ctx.kernels = o, kernels
        ctx.set_materialize_grads(False)
        return means_of(t, o, kernels, channels_of_norm(t, o)), t.x.new_empty(0)

    @staticmethod
    def backward(ctx: Any, dmean: Tensor | None, dtoken: Any) -> tuple[Any, ...]:
        t, o, kernels = TailTensors(*ctx.saved_tensors), ctx.options, ctx.kernels
        needed = tuple(ctx.needs_input_grad[2 : 2 + WITH_GRADIENT])
        if dtoken is None:  # the gradients of LinkedGated were not asked for, or were plain
            if dmean is None:
                return (None,) * (2 + len(t))
            return None, None, *plain_gradients(plain_mean, dmean, t, o, needed), *NOTHING
        dy, gate, channels, sums = dtoken.left
        own, _ = norms(t, o)
        wide = None if dmean is None else dmean.to(sums.dtype)
        given = (channels, sums, gate.to(sums.dtype), wide)
        dx, dgamma, dbeta = _finished(kernels, dy, t, o, needed, own, *given)
        return (
            *(None, None, dx, None, None, None, None, dgamma, dbeta, None, None),
            *NOTHING,
        )


class LinkedGated(torch.autograd.Function):
    """y with the gates that a network has made of the means that LinkedGatedPool gave.

    Args: the token, then as for Gated. Only the gate and the token have gradients here, unless
    plain PyTorch must compute them.
    """

    @staticmethod
    def forward(
        ctx: Any, token: Tensor, o: TailOptions, kernels: GatingKernels, *tensors: Tensor | None
    ) -> Tensor:
        t = TailTensors(*tensors)  # type: ignore[arg-type]
        y, _, gate = gated_forward(t, o, kernels)
        ctx.save_for_backward(gate, *t)
        ctx.options, ctx.kernels = o, kernels
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Any, ...]:
        gate, *saved = ctx.saved_tensors
        t, o, kernels = TailTensors(*saved), ctx.options, ctx.kernels
        needed = tuple(ctx.needs_input_grad[3 : 3 + WITH_GRADIENT])
        if torch.compiler.is_compiling() or plainly(dy):
            return None, None, None, *plain_gradients(plain, dy, t, o, needed), *NOTHING
        channels, for_norm = channels_of_norm(t, o), _needs_norm_sums(t, o, needed)
        sums = kernels.activated_sums(dy, t.x, channels, activation_number(o), for_norm)
        dtoken: Any = torch.empty(0, dtype=dy.dtype, device=dy.device)
        dtoken.left = dy, gate, channels, sums
        dgate = _to_dtype(t.gate, sums[0], needed[GATE])
        return (
            *(dtoken, None, None, None, None, None, dgate, None, None, None, None, None),
            *NOTHING,
        )
