"""ECA as a torch.autograd.Function on a backend's kernels, twice differentiable."""

from typing import Any

import torch
from torch import Tensor
from torch.compiler import is_compiling

from eca_fused.autograd.derivatives import double_backward, plain_backward
from eca_fused.autograd.transforms import transformed_backward
from eca_fused.ops.backend import warn_once
from eca_fused.ops.kernels import Kernels
from eca_fused.torch_state import batched_by_autograd, transformed

__all__ = ["ECAFunction"]


class ECAFunction(torch.autograd.Function):
    """y = sigmoid(conv(mean(x))) * x on a backend's kernels, twice differentiable.

    forward() takes the context, because a separate setup_context() costs 12 us a call, three times
    the forward pass of a small map (measured on 2 cores of an EPYC server, PyTorch 2.15).

    ECAFunction.apply(x, weight, circular, kernels) takes x (N, C, *spatial), weight (1 or C, 1, k),
    a bool and a backend's Kernels, and returns y like x. Call eca() instead.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, circular: bool, kernels: Kernels) -> Tensor:
        y, mean, gate = kernels.forward(x, weight, circular)
        ctx.save_for_backward(x, weight, mean, gate)
        ctx.circular, ctx.kernels = circular, kernels
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, mean, gate = ctx.saved_tensors
        need_dx, need_dweight = ctx.needs_input_grad[:2]
        if not is_compiling():
            if batched_by_autograd(dy):
                # Under is_grads_batched=True, a function inside this one would not be recorded.
                warn_once(
                    "eca_fused computes gradients with is_grads_batched in plain PyTorch: slower"
                )
                return *plain_backward(dy, x, weight, circular=ctx.circular), None, None
            if transformed():  # a transform around this backward pass alone: dual or batched dy
                return *transformed_backward(ctx, dy, x, weight, mean, gate), None, None
        args = (dy, x, weight, mean, gate, ctx.circular, need_dx, need_dweight)
        if torch.is_grad_enabled():  # create_graph=True: these gradients need gradients
            dx, dweight = ECABackward.apply(*args, ctx.kernels)
        else:
            dx, dweight = ctx.kernels.backward(*args)
        return dx if need_dx else None, dweight if need_dweight else None, None, None


class ECABackward(torch.autograd.Function):
    """The backward kernels as a function of dy, x and weight that is itself differentiable."""

    @staticmethod
    def forward(
        ctx: Any,
        dy: Tensor,
        x: Tensor,
        weight: Tensor,
        mean: Tensor,
        gate: Tensor,
        circular: bool,
        need_dx: bool,
        need_dweight: bool,
        kernels: Kernels,
    ) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(dy, x, weight)
        ctx.circular, ctx.needed = circular, (need_dx, need_dweight)
        ctx.set_materialize_grads(False)
        return kernels.backward(dy, x, weight, mean, gate, circular, need_dx, need_dweight)

    @staticmethod
    def backward(ctx: Any, ddx: Tensor | None, ddweight: Tensor | None) -> tuple[Any, ...]:
        need_dx, need_dweight = ctx.needed
        grads = double_backward(
            ddx if need_dx else None,
            ddweight if need_dweight else None,
            *ctx.saved_tensors,
            circular=ctx.circular,
        )
        return *grads, None, None, None, None, None, None
