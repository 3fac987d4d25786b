"""The ways to compute the tail of a residual block: what functional/ways.py inherits.

A way either has tails, or its callers call a block's modules one after the other.
"""

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.compiler import is_compiling

from eca_fused.autograd.gating import channels_of_norm, means_of
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
from eca_fused.ops.checks import alike
from eca_fused.ops.kernels import Kernels, TailKernels
from eca_fused.ops.tail import (
    IDENTITY,
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
    return math.prod(x.shape[2:])  # numel() would fix sizes that a tracer leaves open


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
        self, t: TailTensors, o: TailOptions, backend: str, gate_of: GateOf | None = None
    ) -> "InferenceCall | None":
        """tail() or gated_tail() for other maps, without gradients.

        Returns None if it needs more than the maps.
        """
        return None

    def gated_tail(self, t: TailTensors, o: TailOptions, gate_of: GateOf) -> Tensor:
        """y with the gates that a network makes from the means of norm(x)."""
        raise NotImplementedError


class InferenceCall:
    """The kernels' call for a tail without gradients, with all arguments but the maps.

    Args:
        t: of a call that the kernels have computed.
        backend: what the attention asks for.
    """

    def __init__(self, t: TailTensors, backend: str) -> None:
        self.dtype, self.dims, self.channels = t.x.dtype, t.x.dim(), t.x.shape[1]
        self.adds = t.identity is not None
        self.device = None if t.x.is_cpu else t.x.device  # to make one takes long
        self.backend, self.named = backend, named(backend)

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
            or x.shape[1] != self.channels  # in a trace it is a tensor
        ):
            return None
        return self._compute(x, identity)

    def _compute(self, x: Tensor, identity: Tensor | None) -> Tensor | None:
        raise NotImplementedError


class _OperatorCall(InferenceCall):
    """One operator, with all its arguments but the maps."""

    def __init__(self, t: TailTensors, o: TailOptions, backend: str, kernels: TailKernels) -> None:
        super().__init__(t, backend)
        self.operator = kernels.tail_inference
        self.arguments = inference_arguments(t, o)[2:]

    def _compute(self, x: Tensor, identity: Tensor | None) -> Tensor | None:
        try:
            return self.operator(x, identity, *self.arguments)
        except RuntimeError:
            return None  # a slower way says why, or computes it


class _GatedCall(InferenceCall):
    """A pass for the means, a network that makes the gates, and the operator."""

    def __init__(
        self, t: TailTensors, o: TailOptions, backend: str, way: "FusedTails", gate_of: GateOf
    ) -> None:
        super().__init__(t, backend)
        self.way, self.options, self.gate_of = way, o, gate_of
        self.rest = t[IDENTITY + 1 :]

    def _compute(self, x: Tensor, identity: Tensor | None) -> Tensor | None:
        if identity is not None and not alike(identity, x):
            return None
        t = TailTensors(x, identity, *self.rest)
        try:
            pooled = self.way.pooled(t, self.options)
        except RuntimeError:
            return None
        # Not tried: a hook in the network must not run twice.
        return self.way.tail_by(t, self.options, self.gate_of(pooled))


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

    def tail_kernels(self) -> TailKernels:
        kernels: Any = self.kernels  # it has them: has_tails() was asked
        return kernels  # type: ignore[no-any-return]

    def updates(self, x: Tensor) -> bool:
        # A compiler fuses an update in plain operations.
        return kind_of(x) in self.tail_kernels().whole_tail_devices and not is_compiling()

    def moments(self, x: Tensor, running: Running | None = None) -> Moments:
        """The statistics, as constants: the functions of autograd/tail.py differentiate them."""
        with torch.no_grad():
            planes, mean, variance = self.tail_kernels().batch_moments(x.detach(), *(running or ()))
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
            return t._replace(means=self.tail_kernels().moments(t.x.detach())[0])

    def tail(self, t: TailTensors, o: TailOptions) -> Tensor:
        if not needs_grad(t):
            return inference(t, o, self.tail_kernels())
        of_batch = o.values is not None or o.identity_values is not None
        one_pass_devices = self.kernels.one_pass_tail_devices
        in_one_pass = t.weight is not None and not of_batch and kind_of(t.x) in one_pass_devices
        if t.weight is not None and not in_one_pass:
            t = self._with_means(t)
        function: Any = BlockTail if in_one_pass else Tail
        y: Tensor = function.apply(o, self.tail_kernels(), *t)
        return y

    def inference_call(
        self, t: TailTensors, o: TailOptions, backend: str, gate_of: GateOf | None = None
    ) -> InferenceCall | None:
        of_batch = o.values is not None or o.identity_values is not None
        if torch.is_grad_enabled() or is_compiling() or of_batch:
            return None
        if t.scale is not None or t.gate is not None:
            return None
        # A tensor that was made for this call may be another one in the next.
        fixed = t.weight, t.gamma, t.beta, t.identity_gamma, t.identity_beta
        if not all(s is None or type(s) is nn.Parameter for s in fixed):
            return None
        if gate_of is not None:
            return _GatedCall(t, o, backend, self, gate_of)
        return _OperatorCall(t, o, backend, self.tail_kernels())

    def pooled(self, t: TailTensors, o: TailOptions) -> Tensor:
        """The mean of norm(x) over each plane, (N, C) like x, without gradients."""
        kernels: Any = self.kernels
        if t.means is None and kind_of(t.x) in self.kernels.gating_devices:
            # One sum for each plane; moments() has two.
            channels = channels_of_norm(t, o, kernels)
            return means_of(t, o._replace(activation="none"), kernels, channels).to(t.x.dtype)
        return given_mean(self._with_means(t), o, kernels)[0]

    def tail_by(self, t: TailTensors, o: TailOptions, gate: Tensor) -> Tensor:
        """y with gates (N, C) that were made from pooled(), without gradients."""
        return inference(t._replace(gate=gate), o, self.tail_kernels())

    def gated_tail(self, t: TailTensors, o: TailOptions, gate_of: GateOf) -> Tensor:
        if not torch.is_grad_enabled():
            return self.tail_by(t, o, gate_of(self.pooled(t, o)))
        t, kernels = self._with_means(t), self.tail_kernels()
        mean, token = LinkedTailPool.apply(o, kernels, *t._replace(scale=None))
        y: Tensor = LinkedTail.apply(token, o, kernels, *t._replace(gate=gate_of(mean)))
        return y


def needs_grad(t: TailTensors) -> bool:
    """Whether autograd records an operation on these tensors."""
    return torch.is_grad_enabled() and any(
        s is not None and s.requires_grad for s in t[:WITH_GRADIENT]
    )
