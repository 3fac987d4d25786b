"""The ways to compute attention after an activation: what functional/ways.py inherits.

A way either has it, or its callers call the modules one after the other. Tensors and options are
those of ops/gating.py; statistics of a batch come from the same way's moments().
"""

from typing import Any

import torch
from torch import Tensor

from eca_fused.autograd.gating import (
    Gated,
    LinkedGated,
    LinkedGatedPool,
    channels_of_norm,
    gated_forward,
    means_of,
)
from eca_fused.functional.tails import GateOf, needs_grad
from eca_fused.ops.backend import kind_of
from eca_fused.ops.gating import plain, plain_mean
from eca_fused.ops.kernels import GatingKernels, Kernels
from eca_fused.ops.tail import TailOptions, TailTensors

__all__ = ["FusedGating", "Gating", "PlainGating"]


class Gating:
    """How a way computes attention after an activation."""

    def has_gating(self, x: Tensor, network: bool) -> bool:
        """Whether it computes it for such maps; arguments as for has_tails()."""
        return False

    def gated(self, t: TailTensors, o: TailOptions) -> Tensor:
        """y with taps or given gates, like x."""
        raise NotImplementedError

    def gated_by(self, t: TailTensors, o: TailOptions, gate_of: GateOf) -> Tensor:
        """y with the gates that a network makes from the means of z."""
        raise NotImplementedError


class PlainGating(Gating):
    """Plain operations for a compiler, which fuses them, and for torch.func's transforms."""

    def has_gating(self, x: Tensor, network: bool) -> bool:
        return True

    def gated(self, t: TailTensors, o: TailOptions) -> Tensor:
        return plain(t, o, with_batch=False)

    def gated_by(self, t: TailTensors, o: TailOptions, gate_of: GateOf) -> Tensor:
        gate = gate_of(plain_mean(t, o, with_batch=False))
        return plain(t._replace(gate=gate), o, with_batch=False)


class FusedGating(Gating):
    """A backend's kernels, on the devices where it has them."""

    kernels: Kernels

    def has_gating(self, x: Tensor, network: bool) -> bool:
        return kind_of(x) in self.kernels.gating_devices

    def _gating(self) -> GatingKernels:
        kernels: Any = self.kernels  # it has them: has_gating() was asked
        return kernels  # type: ignore[no-any-return]

    def gated(self, t: TailTensors, o: TailOptions) -> Tensor:
        kernels = self._gating()
        if not needs_grad(t):
            return gated_forward(t, o, kernels, channels_of_norm(t, o, kernels))[0]
        y: Tensor = Gated.apply(o, kernels, *t)
        return y

    def gated_by(self, t: TailTensors, o: TailOptions, gate_of: GateOf) -> Tensor:
        kernels = self._gating()
        if not torch.is_grad_enabled():
            channels = channels_of_norm(t, o, kernels)
            gate = gate_of(means_of(t, o, kernels, channels).to(t.x.dtype))
            return gated_forward(t._replace(gate=gate), o, kernels, channels)[0]
        mean, token = LinkedGatedPool.apply(o, kernels, *t)
        y: Tensor = LinkedGated.apply(token, o, kernels, *t._replace(gate=gate_of(mean)))
        return y
