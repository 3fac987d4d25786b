"""The ways to compute the tail of a residual block: what functional/ways.py inherits.

A way either has tails, or its callers call a block's modules one after the other.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.compiler import is_compiling

from eca_fused.autograd.tail import (
    BlockTail,
    LinkedTail,
    LinkedTailPool,
    Tail,
    given_mean,
    inference,
)
from eca_fused.ops import graph
from eca_fused.ops.backend import kind_of
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

__all__ = ["FusedTails", "GateOf", "PlainTails", "Tails", "needs_grad"]

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

    def gated_tail(self, t: TailTensors, o: TailOptions, gate_of: GateOf) -> Tensor:
        """y with the gates that a network makes from the means of norm(x)."""
        raise NotImplementedError


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
