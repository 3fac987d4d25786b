"""Pooling and rescaling, the two ends of channel attention, as torch.autograd.Functions.

rescale(x, gate(pool(x))) is squeeze and excitation with any gate. Maps read or written, modelled
without caches:

| | forward | backward |
|---|---|---|
| plain PyTorch | 3 | 10 |
| Pool, Rescale: dgate and gate * dy in one pass; autograd adds dmean / S, a view | 3 | 5 |
| LinkedPool, LinkedRescale: dgate, then gate * dy + dmean / S in a second pass | 3 | 4 |

Forward is 3, because a gate needs all of x before any of it is rescaled.
"""

import math
from typing import Any

import torch
from torch import Tensor

from eca_fused.autograd.derivatives import plainly, total
from eca_fused.ops.graph import spread, widened
from eca_fused.ops.kernels import Kernels

__all__ = ["LinkedPool", "LinkedRescale", "Pool", "Rescale"]


def _spread_evenly(dmean: Tensor, shape: tuple[int, ...]) -> Tensor:
    """The gradient of the mean over the spatial positions: a view that holds each value once."""
    share = dmean / math.prod(shape[2:])
    return share.reshape(share.shape + (1,) * (len(shape) - 2)).expand(shape)


def _plain_backward(
    dy: Tensor, x: Tensor | None, gate: Tensor, need_dx: bool, need_dgate: bool
) -> tuple[Tensor | None, Tensor | None]:
    """The gradients of rescale() in differentiable operations; only dgate needs x."""
    g = widened(dy)
    dx = (spread(gate.to(g.dtype), g) * g).to(dy.dtype) if need_dx else None
    if not need_dgate:
        return dx, None
    assert x is not None, "kept where the gate needs a gradient"
    return dx, total(g * x.to(g.dtype)).to(gate.dtype)


class Pool(torch.autograd.Function):
    """mean (N, C) of x (N, C, *spatial) on a backend's kernels."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, kernels: Kernels) -> Tensor:
        ctx.shape = x.shape
        return kernels.pool(x)

    @staticmethod
    def backward(ctx: Any, dmean: Tensor) -> tuple[Tensor, None]:
        return _spread_evenly(dmean, ctx.shape), None


class Rescale(torch.autograd.Function):
    """y = gate * x of x (N, C, *spatial) and gate (N, C). It saves x only for dgate."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, gate: Tensor, kernels: Kernels) -> Tensor:
        ctx.save_for_backward(x if ctx.needs_input_grad[1] else None, gate)
        ctx.kernels = kernels
        return kernels.rescale(x, gate)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, gate = ctx.saved_tensors
        need_dx, need_dgate = ctx.needs_input_grad[:2]
        if plainly(dy):
            return *_plain_backward(dy, x, gate, need_dx, need_dgate), None
        if not need_dgate:
            return ctx.kernels.rescale(dy, gate), None, None
        dx, dgate = ctx.kernels.rescale_backward(dy, x, gate, need_dx)
        return dx if need_dx else None, dgate, None


# ---- both ends of one layer ----


class LinkedPool(torch.autograd.Function):
    """mean of x, and a token for LinkedRescale, whose backward leaves gate * dy to this one.

    The gate network's backward runs between these two, because dmean depends on dgate. dy and gate
    arrive as an attribute of the token's gradient. So each backward pass brings its own, however
    many there are, and none leaves anything behind.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, kernels: Kernels) -> tuple[Tensor, Tensor]:
        ctx.shape, ctx.kernels = x.shape, kernels
        ctx.set_materialize_grads(False)
        return kernels.pool(x), x.new_empty(0)

    @staticmethod
    def backward(ctx: Any, dmean: Tensor | None, dtoken: Any) -> tuple[Tensor | None, None]:
        if dtoken is None:
            return None if dmean is None else _spread_evenly(dmean, ctx.shape), None
        dy, gate = dtoken.left
        if dmean is None:
            return ctx.kernels.rescale(dy, gate), None
        return ctx.kernels.rescale(dy, gate, widened(dmean) / math.prod(ctx.shape[2:])), None


class LinkedRescale(torch.autograd.Function):
    """y = gate * x. LinkedPool computes the gradient of x, or else this one in plain PyTorch."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, gate: Tensor, token: Tensor, kernels: Kernels) -> Tensor:
        ctx.save_for_backward(x if ctx.needs_input_grad[1] else None, gate)
        ctx.kernels = kernels
        return kernels.rescale(x, gate)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, gate = ctx.saved_tensors
        need_dgate = ctx.needs_input_grad[1]
        # Compiled autograd traces this, and does not know attributes of tensors.
        if torch.compiler.is_compiling() or plainly(dy):
            return *_plain_backward(dy, x, gate, True, need_dgate), None, None
        dgate = ctx.kernels.rescale_backward(dy, x, gate, False)[1] if need_dgate else None
        dtoken: Any = torch.empty(0, dtype=dy.dtype, device=dy.device)
        dtoken.left = dy, gate
        return None, dgate, dtoken, None
