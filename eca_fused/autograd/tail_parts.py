"""Parts of autograd/tail.py: what is kept, passes over maps, plain gradients, several processes."""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from eca_fused.ops.kernels import TailKernels
from eca_fused.ops.results import sums_dtype
from eca_fused.ops.tail import (
    GAMMA,
    GATE,
    IDENTITY,
    IDENTITY_GAMMA,
    WITH_GRADIENT,
    TailOptions,
    TailTensors,
    X,
    plain,
)
from eca_fused.torch_state import add_over_processes

__all__ = [
    "NOTHING",
    "Norms",
    "Stored",
    "gradients_of_norms",
    "kept",
    "needs_sums",
    "number_of",
    "only",
    "plain_gradients",
    "plain_gradients_of_tail",
    "sum_over_planes",
    "sums_identity",
    "write_gradients",
]

NOTHING = (None,) * 5  # for those of TailTensors that have no gradient


class Stored(NamedTuple):
    """The coefficients of a pass over the maps, from TailKernels.tail_coefficients()."""

    planes: Tensor  # (2, N, C): p and q
    channels: Tensor  # (3, C): centre, identity_scale and identity_centre


def only(gradient: Tensor, need: bool) -> Tensor | None:
    """A gradient that an operator returned, which is empty if it was not needed."""
    return gradient if need else None


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
    with torch.no_grad():
        none = t.x.new_zeros((2, *t.x.shape[:2]), dtype=sums_dtype(t.x))
        ones = t.x.new_zeros((4, t.x.shape[1]), dtype=none.dtype)
        ones[1] = 1
        args = (torch.ones_like(t.x), t.x, None, mask, none, ones[:3])
        flags = (False, False, False, True)
        _, kept_part = kernels.tail_gradients(*args, none, ones, o.number, *flags)

    def masked(views: TailTensors, options: TailOptions) -> Tensor:
        return plain(views, options._replace(activation="none")) * kept_part

    return plain_gradients(masked, dy, t, o, needed)


# ---- what is kept and summed ----


def sums_identity(t: TailTensors, o: TailOptions, needed: tuple[bool, ...]) -> bool:
    """Whether the backward pass sums over the identity, for its norm's gradients."""
    if t.identity_mean is None:
        return False
    return o.identity_values is not None or needed[IDENTITY_GAMMA]


def kept(t: TailTensors, o: TailOptions, needed: tuple[bool, ...]) -> TailTensors:
    """What the backward pass needs; the identity only if it is read."""
    t = t._replace(means=None)
    if o.reads_identity or sums_identity(t, o, needed):
        return t
    return t._replace(identity=None)


def needs_sums(t: TailTensors, o: TailOptions, needed: tuple[bool, ...]) -> bool:
    batch = o.values is not None or o.identity_values is not None
    return batch or t.weight is not None or any(needed[GATE:])


# ---- the backward pass ----


def sum_over_planes(
    kernels: TailKernels,
    dy: Tensor,
    t: TailTensors,
    o: TailOptions,
    mask: Tensor,
    k: Stored,
    needed: tuple[bool, ...],
) -> Tensor:
    with_identity = sums_identity(t, o, needed)
    return kernels.tail_sums(dy, t.x, t.identity, mask, *k, o.number, with_identity)


def _shares(
    o: TailOptions, totals: Tensor, dtype: torch.dtype, needed: tuple[bool, ...]
) -> Tensor | None:
    """The totals (4, C) of all processes, divided by their values, where these are tensors.

    What is exchanged, when, and in which order, is as for modules of torch.nn.SyncBatchNorm that
    are called one after the other, because another process may call them.
    """
    if not o.has_tensors:
        return None
    shares = totals.clone()
    parts = (
        (shares[:2], o.group, o.values, needed[X]),
        (shares[2:], o.identity_group, o.identity_values, needed[IDENTITY]),
    )
    for part, group, values, read in parts:
        if group is not None and read:
            part.copy_(add_over_processes(part.to(dtype).flatten(), group).view_as(part))
        if values is not None:
            part.div_(values)
    return shares


def number_of(values: float | Tensor | None) -> float:
    """As the operator takes them; a tensor has gone into the shares."""
    if values is None:
        return 0.0
    return 1.0 if isinstance(values, Tensor) else values


class Norms(NamedTuple):
    """The gradients of the norms' parameters, and what the pass that writes dx needs."""

    planes: Tensor  # (2, N, C)
    channels: Tensor  # (4, C)
    dnorms: tuple[Tensor | None, ...]  # of gamma, beta, identity_gamma and identity_beta


def gradients_of_norms(
    kernels: TailKernels,
    t: TailTensors,
    o: TailOptions,
    totals: Tensor | None,
    gate: Tensor | None,
    dmean: Tensor | None,
    needed: tuple[bool, ...],
    need_planes: bool = True,
) -> Norms:
    """From the totals that tail_totals() gives; None if there are no sums."""
    planes, channels, *found = kernels.tail_gradient_coefficients(
        t.x,
        totals,
        None if totals is None else _shares(o, totals, sums_dtype(t.x), needed),
        number_of(o.values),
        number_of(o.identity_values),
        gate,
        t.scale,
        dmean,
        *t.own_norm(o),
        *t.identity_norm(o),
        need_planes,
    )
    dnorms = tuple(only(d, need) for d, need in zip(found, needed[GAMMA:], strict=True))
    return Norms(planes, channels, dnorms)


def write_gradients(
    kernels: TailKernels,
    dy: Tensor,
    t: TailTensors,
    o: TailOptions,
    mask: Tensor,
    k: Stored,
    c: Norms,
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
        o.values is not None,
        o.identity_values is not None,
        needed[X],
        needed[IDENTITY],
    )
    return only(dx, needed[X]), only(d_identity, needed[IDENTITY])
