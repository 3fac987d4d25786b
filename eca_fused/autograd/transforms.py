"""ECA inside torch.func's transforms and forward-mode AD: the same kernels, a rule for each.

The transforms need functions with a setup_context() and a rule per transform. These cost three
times the call of a small map, so ECAFunction in eca.py serves all other calls. vmap() folds its
batch into the samples, so it adds no kernel calls.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from eca_fused.autograd.derivatives import (
    backward_tangents,
    double_backward,
    forward_tangent,
)
from eca_fused.ops import graph
from eca_fused.ops.backend import warn_once
from eca_fused.ops.checks import check
from eca_fused.ops.convolution import taps_gradient
from eca_fused.ops.kernels import Kernels
from eca_fused.torch_state import batched, functionalized, primal, with_tangents

__all__ = ["transformed_backward", "transformed_eca"]


def transformed_eca(x: Tensor, weight: Tensor, circular: bool, kernels: Kernels) -> Tensor:
    """eca() inside transforms, on a backend's kernels. Arguments and errors as for eca().

    Taps batched by vmap() fall back to plain PyTorch, with a warning: the kernels take one set of
    taps for all samples. Samples could lie side by side as channels with separate taps, but 0 * inf
    would carry one sample's overflow into its neighbour. Room between the samples takes a copy of
    x, which is more traffic than plain PyTorch's forward pass.

    Calls under torch.compile() and func.functionalize() fall back without a warning, also with a
    backend asked for by name. Neither knows the rules of such functions, and their graphs go on to
    a compiler, which fuses plain operations.
    """
    check(x, weight, circular)
    if torch.compiler.is_compiling() or functionalized():
        return graph.eca(x, weight, circular)
    if batched(weight):
        warn_once("eca_fused runs in plain PyTorch for taps batched by vmap(), which is slower")
        return graph.eca(x, weight, circular)
    y: Tensor = TransformedECA.apply(x, weight, circular, kernels)[0]
    return y


def transformed_backward(
    ctx: Any, dy: Tensor, *saved: Tensor
) -> tuple[Tensor | None, Tensor | None]:
    """dx and dweight inside transforms, None if not needed; the forward pass may lie outside.

    Args:
        ctx: of ECAFunction or TransformedECA.
        dy: (N, C, *spatial).
        saved: x, weight, mean and gate. Checkpointing lets ctx.saved_tensors be read only once.
    """
    need_dx, need_dweight = ctx.needs_input_grad[:2]
    dx, dweight = _TransformedBackward.apply(
        dy, *saved, ctx.circular, need_dx, need_dweight, 1, ctx.kernels
    )
    return dx if need_dx else None, dweight[0] if need_dweight else None


@contextmanager
def _jvp_rule(saved: tuple[Tensor, ...]) -> Iterator[tuple[Tensor, ...]]:
    """Yield the saved tensors so that an enclosing jvp() differentiates what is computed from them.

    Torch switches forward mode off inside a rule, at all levels, so jvp(jvp()) would silently lack
    a part. This switches it on, and removes the innermost level's tangents, which the rule handles.
    """
    with with_tangents():
        yield tuple(primal(t) for t in saved)


class TransformedECA(torch.autograd.Function):
    """y, mean and gate of x (N, C, *spatial) and weight (1 or C, 1, k); y alone has derivatives."""

    @staticmethod
    def forward(
        x: Tensor, weight: Tensor, circular: bool, kernels: Kernels
    ) -> tuple[Tensor, Tensor, Tensor]:
        return kernels.forward(x, weight, circular)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        x, weight, ctx.circular, ctx.kernels = inputs
        _, mean, gate = output
        ctx.mark_non_differentiable(mean, gate)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(x, weight, mean, gate)
        ctx.save_for_forward(x, weight)

    @staticmethod
    def backward(ctx: Any, dy: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
        if dy is None:
            return None, None, None, None
        return *transformed_backward(ctx, dy, *ctx.saved_tensors), None, None

    @staticmethod
    def jvp(ctx: Any, tx: Tensor | None, tweight: Tensor | None, *_: None) -> tuple[Any, ...]:
        with _jvp_rule(ctx.saved_tensors) as (x, weight):
            return forward_tangent(tx, tweight, x, weight, circular=ctx.circular), None, None

    @staticmethod
    def vmap(
        info: Any,
        in_dims: tuple[int | None, ...],
        x: Tensor,
        weight: Tensor,
        circular: bool,
        kernels: Kernels,
    ) -> tuple[tuple[Tensor, ...], int]:
        size, samples = info.batch_size, _samples(in_dims[0], x)
        results = TransformedECA.apply(_fold(size, in_dims[0], x), weight, circular, kernels)
        return tuple(_split(size, t, samples) for t in results), 0


class _TransformedBackward(torch.autograd.Function):
    """The gradients of ECA as a function of dy, x and weight that is itself differentiable.

    dweight (groups, 1 or C, 1, k) has a gradient of the taps for each of `groups` equal runs of
    samples: vmap() folds its batch into the samples, and needs one gradient per batch element.
    """

    @staticmethod
    def forward(
        dy: Tensor,
        x: Tensor,
        weight: Tensor,
        mean: Tensor,
        gate: Tensor,
        circular: bool,
        need_dx: bool,
        need_dweight: bool,
        groups: int,
        kernels: Kernels,
    ) -> tuple[Tensor, Tensor]:
        together = need_dweight and groups == 1
        dx, dweight = kernels.backward(dy, x, weight, mean, gate, circular, need_dx, together)
        if not need_dweight or groups == 1:
            return dx, dweight.expand(groups, *dweight.shape)
        dz = _gradients_of_z(dy, x, gate, kernels)
        parts = _each(
            lambda dz, mean: taps_gradient(dz, mean, weight, circular),
            _split(groups, dz),
            _split(groups, mean),
        )
        return dx, parts.to(weight.dtype)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        dy, x, weight, _, _, ctx.circular, need_dx, need_dweight, ctx.groups, _ = inputs
        ctx.needed = need_dx, need_dweight
        ctx.mark_non_differentiable(*output[need_dx : 2 - need_dweight])  # those not needed
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(dy, x, weight)
        ctx.save_for_forward(dy, x, weight)

    @staticmethod
    def backward(ctx: Any, ddx: Tensor | None, ddweight: Tensor | None) -> tuple[Any, ...]:
        need_dx, need_dweight = ctx.needed
        dy, x, weight = ctx.saved_tensors
        d_dy, d_x, d_weight = _each(
            lambda ddx, ddw, dy, x: double_backward(ddx, ddw, dy, x, weight, circular=ctx.circular),
            _split(ctx.groups, ddx if need_dx else None),
            ddweight if need_dweight else None,
            _split(ctx.groups, dy),
            _split(ctx.groups, x),
        )
        return d_dy.flatten(0, 1), d_x.flatten(0, 1), d_weight.sum(0), *(None,) * 7

    @staticmethod
    def jvp(
        ctx: Any, tdy: Tensor | None, tx: Tensor | None, tweight: Tensor | None, *_: None
    ) -> tuple[Tensor | None, Tensor | None]:
        need_dx, need_dweight = ctx.needed
        with _jvp_rule(ctx.saved_tensors) as (dy, x, weight):
            tdx, tdweight = _each(
                lambda tdy, tx, dy, x: backward_tangents(
                    tdy, tx, tweight, dy, x, weight, circular=ctx.circular
                ),
                *(_split(ctx.groups, t) for t in (tdy, tx, dy, x)),
            )
        # flatten() has no rule for the batches of torch.autograd.functional.
        return tdx.reshape(x.shape) if need_dx else None, tdweight if need_dweight else None

    @staticmethod
    def vmap(
        info: Any,
        in_dims: tuple[int | None, ...],
        dy: Tensor,
        x: Tensor,
        weight: Tensor,
        mean: Tensor,
        gate: Tensor,
        circular: bool,
        need_dx: bool,
        need_dweight: bool,
        groups: int,
        kernels: Kernels,
    ) -> tuple[tuple[Tensor, Tensor], int]:
        size, samples = info.batch_size, _samples(in_dims[1], x)
        dy, x = _fold(size, in_dims[0], dy), _fold(size, in_dims[1], x)
        mean, gate = _fold(size, in_dims[3], mean), _fold(size, in_dims[4], gate)
        results = _TransformedBackward.apply(
            dy, x, weight, mean, gate, circular, need_dx, need_dweight, size * groups, kernels
        )
        dx, dweight = (_split(size, *r) for r in zip(results, (samples, groups), strict=True))
        return (dx, dweight), 0


def _samples(dim: int | None, t: Tensor) -> int:
    """n of a batch of tensors (n, ...) along this dimension; the batch may be empty."""
    return t.shape[1 if dim == 0 else 0]


def _split(parts: int, t: Tensor | None, n: int = 0) -> Any:
    """(parts * n, ...) to (parts, n, ...); None stays. The shape does not give n for no parts."""
    if t is None:
        return None
    return t.reshape(parts, t.shape[0] // parts if parts else n, *t.shape[1:])


def _each(function: Callable[..., Any], *groups: Tensor | None) -> Any:
    """Apply a function to each group's tensors and stack the results; None stays None."""
    return torch.vmap(function, tuple(None if t is None else 0 for t in groups))(*groups)


def _fold(size: int, dim: int | None, t: Tensor) -> Tensor:
    """A batch of `size` tensors (n, ...) along dim, all the same for None, to (size * n, ...)."""
    batch = t.expand(size, *t.shape) if dim is None else t.movedim(dim, 0)
    return batch.flatten(0, 1)


def _gradients_of_z(dy: Tensor, x: Tensor, gate: Tensor, kernels: Kernels) -> Tensor:
    """dz = gate (1 - gate) sum(dy x), (N, C), in one pass.

    No operator computes dz alone. With means of 1 and k = 1 it is the gradient of each channel's
    tap. A tap has one gradient for all samples, so the samples lie side by side as channels here.
    """
    n, c = x.shape[:2]
    dy, x, gate = (t.reshape(1, n * c, *t.shape[2:]) for t in (dy, x, gate))
    taps = gate.new_zeros(n * c, 1, 1)
    _, dz = kernels.backward(dy, x, taps, torch.ones_like(gate), gate, False, False, True)
    return dz.reshape(n, c)
