"""The ways to compute the tail of a residual block: what functional/ways.py inherits.

A way either has tails, or its callers call a block's modules one after the other.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.compiler import is_compiling

from eca_fused.autograd.tail import (
    BlockTail,
    LinkedTail,
    LinkedTailPool,
    Tail,
    given_mean,
    inference,
    inference_arguments,
)
from eca_fused.ops import graph
from eca_fused.ops.backend import kind_of, named
from eca_fused.ops.kernels import Kernels, TailKernels
from eca_fused.ops.tail import (
    WITH_GRADIENT,
    Moments,
    Running,
    TailOptions,
    TailTensors,
    plain,
    plain_mean,
)
from eca_fused.torch_state import is_tracing, transformed

__all__ = ["FusedTails", "GateOf", "InferenceCall", "PlainTails", "Tails", "needs_grad"]

GateOf = Callable[[Tensor], Tensor]  # from means (N, C) to gates (N, C)


def pixels_of(x: Tensor) -> int:
    """S, the number of spatial positions of x (N, C, *spatial)."""
    return x.shape[2:].numel()


class Tails:
    """How a way computes tails. Tensors and options as in ops/tail.py."""

    def has_tails(self, x: Tensor, network: bool) -> bool:
        """Whether it computes them for such maps.

        Args:
            x: (N, C, *spatial).
            network: a network makes the gates, such as that of squeeze and excitation.
        """
        return False

    def updates(self, x: Tensor) -> bool:
        """Whether moments(x) updates running statistics."""
        return False

    def moments(self, x: Tensor, running: Running | None = None) -> Moments:
        """The statistics of a batch.

        Args:
            x: (N, C, *spatial).
            running: updated with them, as torch.nn.BatchNorm2d does. Only where updates(x).
        """
        raise NotImplementedError

    def tail(self, t: TailTensors, o: TailOptions) -> Tensor:
        """y, like x."""
        raise NotImplementedError

    def inference_call(
        self, t: TailTensors, o: TailOptions, backend: str
    ) -> "InferenceCall | None":
        """tail(t, o) for other maps, without gradients; None if it needs more than the maps."""
        return None

    def gated_tail(self, t: TailTensors, o: TailOptions, gate_of: GateOf) -> Tensor:
        """y with the gates that a network makes from the means of norm(x)."""
        raise NotImplementedError


class InferenceCall:
    """The kernels' call for a tail without gradients, with all arguments but the maps.

    Args:
        t, o: of a call that the kernels have computed.
        backend: what the attention asks for.
        kernels: those that this backend gave.
    """

    def __init__(self, t: TailTensors, o: TailOptions, backend: str, kernels: TailKernels) -> None:
        self.dtype, self.dims, self.adds = t.x.dtype, t.x.dim(), t.identity is not None
        self.device = None if t.x.is_cpu else t.x.device  # to make one takes long
        self.backend, self.named = backend, named(backend)
        self.operator = kernels.tail_inference
        self.arguments = inference_arguments(t, o)[2:]

    def __call__(self, x: Tensor, identity: Tensor | None) -> Tensor | None:
        """y; None where something about the call is not as it was."""
        if (
            type(x) is not Tensor
            or (type(identity) is not Tensor if self.adds else identity is not None)
            or x.dtype is not self.dtype
            or x.dim() != self.dims
            or (not x.is_cpu if self.device is None else x.device != self.device)
            or named(self.backend) != self.named
            or is_tracing()
            or transformed()
        ):
            return None
        try:
            return self.operator(x, identity, *self.arguments)
        except RuntimeError:
            return None  # a slower way says why, or computes it


class PlainTails(Tails):
    """Plain operations for a compiler, which fuses them, and for torch.func's transforms."""

    def has_tails(self, x: Tensor, network: bool) -> bool:
        return True

    def moments(self, x: Tensor, running: Running | None = None) -> Moments:
        """The statistics, with their gradients."""
        wide = graph.widened(x)
        variance, mean = torch.var_mean(wide, [0, *range(2, x.dim())], correction=0)
        return Moments(graph.mean(wide), mean, variance, float(x.shape[0] * pixels_of(x)))

    def tail(self, t: TailTensors, o: TailOptions) -> Tensor:
        return plain(t, o, with_batch=False)

    def gated_tail(self, t: TailTensors, o: TailOptions, gate_of: GateOf) -> Tensor:
        gate = gate_of(plain_mean(t, o, with_batch=False))
        return plain(t._replace(gate=gate), o, with_batch=False)


class FusedTails(Tails):
    """A backend's kernels, on the devices where it has them."""

    kernels: Kernels

    def has_tails(self, x: Tensor, network: bool) -> bool:
        return kind_of(x) in self.kernels.tail_devices

    def _kernels(self) -> TailKernels:
        kernels: Any = self.kernels  # it has them: has_tails() was asked
        return kernels  # type: ignore[no-any-return]

    def updates(self, x: Tensor) -> bool:
        # A compiler fuses an update in plain operations.
        return kind_of(x) in self._kernels().whole_tail_devices and not is_compiling()

    def moments(self, x: Tensor, running: Running | None = None) -> Moments:
        """The statistics, as constants: the functions of autograd/tail.py differentiate them."""
        with torch.no_grad():
            planes, mean, variance = self._kernels().batch_moments(x.detach(), *(running or ()))
            if running is not None:
                torch.autograd.graph.increment_version(running[:2])
            values: Any = x.shape[0] * pixels_of(x)
            if is_compiling():
                # Not a float: operators that take one would fix the size of the batch.
                values = mean.new_full((), values, dtype=torch.float64)
            else:
                values = float(values)
            return Moments(planes[0], mean, variance, values)

    def _with_means(self, t: TailTensors) -> TailTensors:
        if t.means is not None:
            return t
        with torch.no_grad():
            return t._replace(means=self._kernels().moments(t.x.detach())[0])

    def tail(self, t: TailTensors, o: TailOptions) -> Tensor:
        if not needs_grad(t):
            return inference(t, o, self._kernels())
        of_batch = o.values is not None or o.identity_values is not None
        one_pass_devices = self.kernels.one_pass_tail_devices
        in_one_pass = t.weight is not None and not of_batch and kind_of(t.x) in one_pass_devices
        if t.weight is not None and not in_one_pass:
            t = self._with_means(t)
        function: Any = BlockTail if in_one_pass else Tail
        y: Tensor = function.apply(o, self._kernels(), *t)
        return y

    def inference_call(self, t: TailTensors, o: TailOptions, backend: str) -> InferenceCall | None:
        of_batch = o.values is not None or o.identity_values is not None
        if torch.is_grad_enabled() or is_compiling() or of_batch:
            return None
        if t.scale is not None or t.gate is not None:
            return None
        # A tensor that was made for this call may be another one in the next.
        fixed = t.weight, t.gamma, t.beta, t.identity_gamma, t.identity_beta
        if not all(s is None or type(s) is nn.Parameter for s in fixed):
            return None
        return InferenceCall(t, o, backend, self._kernels())

    def gated_tail(self, t: TailTensors, o: TailOptions, gate_of: GateOf) -> Tensor:
        t, kernels = self._with_means(t), self._kernels()
        if not torch.is_grad_enabled():
            gate = gate_of(given_mean(t, o, kernels)[0])
            return inference(t._replace(gate=gate), o, kernels)
        mean, token = LinkedTailPool.apply(o, kernels, *t._replace(scale=None))
        y: Tensor = LinkedTail.apply(token, o, kernels, *t._replace(gate=gate_of(mean)))
        return y


def needs_grad(t: TailTensors) -> bool:
    """Whether autograd records an operation on these tensors."""
    return torch.is_grad_enabled() and any(
        s is not None and s.requires_grad for s in t[:WITH_GRADIENT]
    )
