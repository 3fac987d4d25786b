"""Attention after an activation as torch.autograd.Functions on a backend's kernels.

    y = gate * z,  z = act(norm(x))

z is never stored: each pass computes it again. The passes over maps are described in csrc/eca.h.
Maps read or written, modelled without caches, with batch norm, ReLU and ECA or a gate network:

| | forward | backward |
|---|---|---|
| plain PyTorch: norm 3, activation 2, mean 1, product 2 | 8 | 14 |
| network: statistics, means of z, result; sums, gradient | 4 | 5 |
| ECA on the CPU: statistics, means and result in one pass; likewise | 3 | 5 |
| the same without statistics of the batch | 3, 2 | 5 |

With u = norm(x) and S the pixels of a plane, the gradient of u is
(gate * dy + dmean / S) * act'(u), where dmean is that of the mean of z.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from eca_fused.autograd.derivatives import pixels_of, plainly
from eca_fused.autograd.tail_parts import (
    NOTHING,
    gradients_of_norms,
    only,
    plain_gradients,
)
from eca_fused.ops.backend import kind_of
from eca_fused.ops.gating import activation_number, plain, plain_mean
from eca_fused.ops.kernels import GatingKernels
from eca_fused.ops.results import sums_dtype
from eca_fused.ops.tail import (
    BETA,
    GAMMA,
    GATE,
    NO_NORM,
    WEIGHT,
    WITH_GRADIENT,
    TailOptions,
    TailTensors,
    X,
)

__all__ = [
    "Gated",
    "LinkedGated",
    "LinkedGatedPool",
    "channels_of_norm",
    "gated_forward",
    "means_of",
]


def channels_of_norm(t: TailTensors, o: TailOptions, kernels: GatingKernels) -> Tensor:
    """p, q and centre, (3, C), as the passes take them."""
    _, channels, _, _ = kernels.tail_coefficients(
        t.x, None, None, None, None, *t.own_norm(o), *NO_NORM, False, False
    )
    return channels[1:4]


def means_of(t: TailTensors, o: TailOptions, kernels: GatingKernels, channels: Tensor) -> Tensor:
    """The mean of z over each plane, (N, C) in float64."""
    sums = kernels.activated_sums(None, t.x, channels, activation_number(o), False)
    return sums[0] / pixels_of(t.x)


def gated_forward(
    t: TailTensors, o: TailOptions, kernels: GatingKernels, channels: Tensor
) -> tuple[Tensor, Tensor | None, Tensor]:
    """y, the means of z (N, C) if there are taps, and the gates (N, C)."""
    number = activation_number(o)
    if t.weight is None:
        assert t.gate is not None, "taps or gates"
        gate = t.gate.to(sums_dtype(t.x)).contiguous()
        return kernels.gated(t.x, gate, channels, number), None, gate
    if kind_of(t.x) in kernels.one_pass_gating_devices:
        return kernels.gated_block(t.x, t.weight, channels, o.circular, number)
    found = means_of(t, o, kernels, channels)  # as those of a tail without norms
    _, _, gate, means = kernels.tail_coefficients(
        t.x, t.weight, found, None, None, *NO_NORM, *NO_NORM, o.circular, True
    )
    return kernels.gated(t.x, gate, channels, number), means, gate


# ---- backward ----


class _Passed(NamedTuple):
    """What the backward pass has found before the gradients of the means."""

    dy: Tensor  # (N, C, *spatial)
    channels: Tensor  # (3, C)
    sums: Tensor  # of ActivatedSums, see csrc/eca.h
    gate: Tensor  # (N, C)


def _summed(
    kernels: GatingKernels,
    dy: Tensor,
    t: TailTensors,
    o: TailOptions,
    needed: tuple[bool, ...],
    channels: Tensor,
    gate: Tensor,
) -> _Passed:
    of_batch, of_norm = o.values is not None, any(needed[GAMMA : BETA + 1])
    for_norm = t.mean is not None and (of_batch or of_norm)
    sums = kernels.activated_sums(dy, t.x, channels, activation_number(o), for_norm)
    return _Passed(dy, channels, sums, gate)


def _dgate(t: TailTensors, sums: Tensor, needed: tuple[bool, ...]) -> Tensor | None:
    return sums[0].to(t.gate.dtype) if needed[GATE] and t.gate is not None else None


def _through_taps(
    kernels: GatingKernels,
    t: TailTensors,
    o: TailOptions,
    found: _Passed,
    means: Tensor,
    need_dweight: bool,
) -> tuple[Tensor, Tensor | None]:
    """The gradients of the means of z (N, C) and of the taps.

    As in a tail without a norm, where that of the gate is the second sum.
    """
    sums = torch.nn.functional.pad(found.sums[:1], (0, 0, 0, 0, 1, 0))
    given = (t.weight, found.gate, None, None, means, *NO_NORM)
    flags = (o.circular, False, False, need_dweight)
    _, _, _, dmean, dweight = kernels.tail_totals(t.x, sums, *given, *flags)
    return dmean, only(dweight, need_dweight)


def _gradients(
    kernels: GatingKernels,
    t: TailTensors,
    o: TailOptions,
    needed: tuple[bool, ...],
    found: _Passed,
    dmean: Tensor | None,  # (N, C)
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """The gradients of x, gamma and beta.

    Those of the norm are made as those of a tail's identity norm, which no gate multiplies.
    """
    sums = found.sums
    totals = None
    if len(sums) > 1:
        du = found.gate * sums[1:3]
        if dmean is not None:
            du += dmean.to(sums.dtype) / pixels_of(t.x) * sums[3:]
        totals = torch.nn.functional.pad(du.sum(1), (0, 0, 2, 0))  # behind those of x
    as_identity = TailTensors(
        t.x,
        identity_mean=t.mean,
        identity_variance=t.variance,
        identity_gamma=t.gamma,
        identity_beta=t.beta,
    )
    its = TailOptions(identity_eps=o.eps, identity_values=o.values, identity_group=o.group)
    wanted = (False, needed[X], *needed[WEIGHT:GAMMA], False, False, *needed[GAMMA : BETA + 1])
    norms = gradients_of_norms(
        kernels, as_identity, its, totals, found.gate, dmean, wanted, needed[X]
    )
    dx = None
    if needed[X]:
        given = (norms.planes, found.channels, norms.channels[2:], activation_number(o))
        dx = kernels.gated_gradients(found.dy, t.x, *given, o.values is not None)
    return dx, norms.dnorms[2], norms.dnorms[3]


class Gated(torch.autograd.Function):
    """y with taps or given gates. Nothing but x and numbers per plane is kept.

    Gated.apply(options, kernels, *TailTensors) returns y like x.
    """

    @staticmethod
    def forward(
        ctx: Any, o: TailOptions, kernels: GatingKernels, *tensors: Tensor | None
    ) -> Tensor:
        t = TailTensors(*tensors)  # type: ignore[arg-type]
        channels = channels_of_norm(t, o, kernels)
        y, means, gate = gated_forward(t, o, kernels, channels)
        ctx.save_for_backward(channels, means, gate, *t)
        ctx.options, ctx.kernels = o, kernels
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Any, ...]:
        channels, means, gate, *saved = ctx.saved_tensors
        t, o, kernels = TailTensors(*saved), ctx.options, ctx.kernels
        needed = tuple(ctx.needs_input_grad[2 : 2 + WITH_GRADIENT])
        if plainly(dy):
            return None, None, *plain_gradients(plain, dy, t, o, needed), *NOTHING
        found = _summed(kernels, dy, t, o, needed, channels, gate)
        dmean = dweight = None
        if t.weight is not None:
            dmean, dweight = _through_taps(kernels, t, o, found, means, needed[WEIGHT])
        dx, dgamma, dbeta = _gradients(kernels, t, o, needed, found, dmean)
        return (
            *(None, None, dx, None, dweight, _dgate(t, found.sums, needed)),
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
        means = means_of(t, o, kernels, channels_of_norm(t, o, kernels))
        return means.to(t.x.dtype), t.x.new_empty(0)

    @staticmethod
    def backward(ctx: Any, dmean: Tensor | None, dtoken: Any) -> tuple[Any, ...]:
        t, o, kernels = TailTensors(*ctx.saved_tensors), ctx.options, ctx.kernels
        needed = tuple(ctx.needs_input_grad[2 : 2 + WITH_GRADIENT])
        if dtoken is None:  # the gradients of LinkedGated were not asked for, or were plain
            if dmean is None:
                return (None,) * (2 + len(t))
            return None, None, *plain_gradients(plain_mean, dmean, t, o, needed), *NOTHING
        dx, dgamma, dbeta = _gradients(kernels, t, o, needed, dtoken.left, dmean)
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
        channels = channels_of_norm(t, o, kernels)
        y, _, gate = gated_forward(t, o, kernels, channels)
        ctx.save_for_backward(channels, gate, *t)
        ctx.options, ctx.kernels = o, kernels
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Any, ...]:
        channels, gate, *saved = ctx.saved_tensors
        t, o, kernels = TailTensors(*saved), ctx.options, ctx.kernels
        needed = tuple(ctx.needs_input_grad[3 : 3 + WITH_GRADIENT])
        if torch.compiler.is_compiling() or plainly(dy):
            return None, None, None, *plain_gradients(plain, dy, t, o, needed), *NOTHING
        found = _summed(kernels, dy, t, o, needed, channels, gate)
        dtoken: Any = torch.empty(0, dtype=dy.dtype, device=dy.device)
        dtoken.left = found
        dgate = _dgate(t, found.sums, needed)
        return (
            *(dtoken, None, None, None, None, None, dgate, None, None, None, None, None),
            *NOTHING,
        )
