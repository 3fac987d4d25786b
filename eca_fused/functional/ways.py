"""The ways to compute a call. Each has all the operations."""

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.compiler import is_compiling

from eca_fused import reference
from eca_fused.autograd.eca import ECAFunction
from eca_fused.autograd.pool_rescale import LinkedPool, LinkedRescale, Pool, Rescale
from eca_fused.autograd.transforms import transformed_eca
from eca_fused.functional import torchscript
from eca_fused.functional.gating import FusedGating, Gating, PlainGating
from eca_fused.functional.tails import FusedTails, PlainTails, Tails
from eca_fused.ops import graph
from eca_fused.ops.checks import (
    check,
    check_gate,
    check_no_gradient,
    check_out,
    check_overwrites,
    check_tail,
    check_writable,
    check_x,
    needs_grad,
)
from eca_fused.ops.kernels import Kernels
from eca_fused.ops.results import output_strides
from eca_fused.ops.tail import TailOptions, TailTensors, activate
from eca_fused.torch_state import quietly

__all__ = [
    "ForTheCompiler",
    "Graph",
    "Plain",
    "Scripted",
    "TracedPlain",
    "TracedToONNX",
    "Way",
    "Ways",
]


def _mode(circular: bool) -> str:
    return "circular" if circular else "zeros"


def _is_special(t: Tensor) -> bool:
    """Whether writing t needs extra steps: it is a negated view, or was made in inference mode."""
    # torch.compile cannot trace these calls.
    return not is_compiling() and (t.is_neg() or t.is_inference())


class Way(Tails, Gating):
    """One way to compute. Maps are x (N, C, *spatial), taps weight (1 or C, 1, k), gates (N, C).

    Each method checks its tensors, and raises the errors of the function with the same name.
    """

    def eca(self, x: Tensor, weight: Tensor, circular: bool) -> Tensor:
        raise NotImplementedError

    def eca_into(self, x: Tensor, weight: Tensor, circular: bool, out: Tensor) -> Tensor:
        """Write y into out."""
        check(x, weight, circular)
        check_out(x, out)  # copy_() would broadcast
        check_no_gradient(x, weight, out)
        if _is_special(out):
            check_writable("out", out)
        return out.copy_(self.eca(x, weight, circular))

    def eca_(self, x: Tensor, weight: Tensor, circular: bool) -> Tensor:
        """Write y over x."""
        check(x, weight, circular)
        check_overwrites(x, weight)
        if _is_special(x):
            check_writable("x", x)
        return x.copy_(self.eca(x, weight, circular))

    def pool(self, x: Tensor) -> Tensor:
        raise NotImplementedError

    def rescale(self, x: Tensor, gate: Tensor) -> Tensor:
        raise NotImplementedError

    def linked_pool(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        """pool(), and a token for linked_rescale() if that saves memory traffic."""
        return self.pool(x), None

    def linked_rescale(self, x: Tensor, gate: Tensor, token: Tensor | None) -> Tensor:
        return self.rescale(x, gate)

    def residual_tail(
        self,
        x: Tensor,
        identity: Tensor | None,
        weight: Tensor | None,
        gate: Tensor | None,
        scale: Tensor | None,
        activation: str,
        circular: bool,
    ) -> Tensor:
        """y = activation(gate * scale * x + identity), with taps or a gate (N, C), scale (N,)."""
        quietly(check_tail, x, identity, weight, gate, scale, circular)
        if self.has_tails(x, network=False) and x.numel() > 0:
            t = TailTensors(x, identity, weight, gate, scale)
            return self.tail(t, TailOptions(activation, circular))
        y = x
        if weight is not None:
            y = self.eca(x, weight, circular)
        elif gate is not None:
            y = self.rescale(x, gate)
        if scale is not None:
            y = y * graph.spread(scale.to(y.dtype).unsqueeze(1), y)
        return activate(activation, y if identity is None else y + identity)


# ---- plain PyTorch ----


class Plain(Way):
    """The definition, for backend="reference" and for calls without kernels."""

    def eca(self, x: Tensor, weight: Tensor, circular: bool) -> Tensor:
        check(x, weight, circular)
        return reference.eca(x, weight, padding_mode=_mode(circular))

    def pool(self, x: Tensor) -> Tensor:
        check_x(x)
        return reference.pool(x)

    def rescale(self, x: Tensor, gate: Tensor) -> Tensor:
        check_gate(x, gate)
        return reference.rescale(x, gate)


class Graph(PlainTails, PlainGating, Way):
    """Plain operations that round once, for compilers and exporters that build a graph."""

    def eca(self, x: Tensor, weight: Tensor, circular: bool) -> Tensor:
        check(x, weight, circular)
        return graph.eca(x, weight, circular)

    def pool(self, x: Tensor) -> Tensor:
        check_x(x)
        return graph.pool(x)

    def rescale(self, x: Tensor, gate: Tensor) -> Tensor:
        check_gate(x, gate)
        return graph.rescale(x, gate)


@functools.cache
def _compiled(function: Callable[..., Any]) -> Any:
    return torch.jit.script(function)


class Scripted(Way):
    """For torch.jit.trace. Scripted functions ask at run time whether a gradient is needed."""

    def __init__(self, backend: str) -> None:
        self.backend = backend

    def eca(self, x: Tensor, weight: Tensor, circular: bool) -> Tensor:
        quietly(check, x, weight, circular)
        y: Tensor = _compiled(torchscript.eca)(x, weight, _mode(circular), self.backend)
        return y

    def eca_into(self, x: Tensor, weight: Tensor, circular: bool, out: Tensor) -> Tensor:
        quietly(check, x, weight, circular)
        quietly(check_out, x, out)
        y: Tensor = _compiled(torchscript.eca)(x, weight, _mode(circular), self.backend, out)
        return y

    def eca_(self, x: Tensor, weight: Tensor, circular: bool) -> Tensor:
        quietly(check, x, weight, circular)
        y: Tensor = _compiled(torchscript.eca_)(x, weight, _mode(circular), self.backend)
        return y

    def pool(self, x: Tensor) -> Tensor:
        quietly(check_x, x)
        y: Tensor = _compiled(torchscript.pool)(x, self.backend)
        return y

    def rescale(self, x: Tensor, gate: Tensor) -> Tensor:
        quietly(check_gate, x, gate)
        y: Tensor = _compiled(torchscript.rescale)(x, gate, self.backend)
        return y


class Traced(Way):
    """Another way for torch.jit.trace, which would warn about the checks."""

    def __init__(self, inner: Way) -> None:
        self.inner = inner

    def eca(self, x: Tensor, weight: Tensor, circular: bool) -> Tensor:
        return quietly(self.inner.eca, x, weight, circular)

    def pool(self, x: Tensor) -> Tensor:
        return quietly(self.inner.pool, x)

    def rescale(self, x: Tensor, gate: Tensor) -> Tensor:
        return quietly(self.inner.rescale, x, gate)


class TracedPlain(Traced):
    """The definition. Writes in place are scripted, which keeps the checks."""

    def __init__(self) -> None:
        super().__init__(Plain())
        self.scripted = Scripted("reference")

    def eca_into(self, x: Tensor, weight: Tensor, circular: bool, out: Tensor) -> Tensor:
        return self.scripted.eca_into(x, weight, circular, out)

    def eca_(self, x: Tensor, weight: Tensor, circular: bool) -> Tensor:
        return self.scripted.eca_(x, weight, circular)


class TracedToONNX(Traced):
    """Operations that ONNX has. Its exporter knows writes to a slice, but not to a whole map."""

    def __init__(self) -> None:
        super().__init__(Graph())

    def eca_into(self, x: Tensor, weight: Tensor, circular: bool, out: Tensor) -> Tensor:
        quietly(check_out, x, out)
        out[:] = self.eca(x, weight, circular)
        return out

    def eca_(self, x: Tensor, weight: Tensor, circular: bool) -> Tensor:
        x[:] = self.eca(x, weight, circular)
        return x


# ---- kernels ----


class Fused(FusedTails, FusedGating, Way):
    """A backend's kernels. Its operators check the arguments, so a valid call is checked once."""

    def __init__(self, kernels: Kernels) -> None:
        self.kernels = kernels

    def eca(self, x: Tensor, weight: Tensor, circular: bool) -> Tensor:
        try:
            if needs_grad(x, weight):
                y: Tensor = ECAFunction.apply(x, weight, circular, self.kernels)
                return y
            return self.kernels.inference(x, weight, circular)
        except (RuntimeError, AttributeError):
            check(x, weight, circular)
            raise

    def eca_into(self, x: Tensor, weight: Tensor, circular: bool, out: Tensor) -> Tensor:
        check_no_gradient(x, weight, out)
        if _is_special(out):
            check_writable("out", out)
            if out.is_neg():
                return super().eca_into(x, weight, circular, out)
        try:
            self.kernels.inference_into(x, weight, out, circular)
        except (RuntimeError, AttributeError):
            check(x, weight, circular)
            check_out(x, out)
            raise
        torch.autograd.graph.increment_version(out)
        return out

    def eca_(self, x: Tensor, weight: Tensor, circular: bool) -> Tensor:
        check_overwrites(x, weight)
        if _is_special(x):
            check_writable("x", x)
            if x.is_neg():
                return super().eca_(x, weight, circular)
        try:
            self.kernels.inference_(x, weight, circular)
        except (RuntimeError, AttributeError):
            check(x, weight, circular)
            raise
        torch.autograd.graph.increment_version(x)
        return x

    def pool(self, x: Tensor) -> Tensor:
        try:
            if needs_grad(x, x):
                y: Tensor = Pool.apply(x, self.kernels)
                return y
            return self.kernels.pool(x)
        except (RuntimeError, AttributeError):
            check_x(x)
            raise

    def rescale(self, x: Tensor, gate: Tensor) -> Tensor:
        try:
            if needs_grad(x, gate):
                y: Tensor = Rescale.apply(x, gate, self.kernels)
                return y
            return self.kernels.rescale(x, gate)
        except (RuntimeError, AttributeError, TypeError):
            check_gate(x, gate)
            raise

    def linked_pool(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        if not needs_grad(x, x):
            return self.pool(x), None
        try:
            linked: tuple[Tensor, Tensor] = LinkedPool.apply(x, self.kernels)
            return linked
        except RuntimeError:
            check_x(x)
            raise

    def linked_rescale(self, x: Tensor, gate: Tensor, token: Tensor | None) -> Tensor:
        if token is None:
            return self.rescale(x, gate)
        try:
            y: Tensor = LinkedRescale.apply(x, gate, token, self.kernels)
            return y
        except (RuntimeError, AttributeError, TypeError):
            check_gate(x, gate)
            raise


class Compiling(Fused):
    """Kernels inside a graph of torch.compile or torch.export.

    It checks before the call, because up to torch 2.13 an operator's error has another type there.
    """

    # Functions around a network pass on an attribute of a tensor, which a graph cannot have.
    def has_tails(self, x: Tensor, network: bool) -> bool:
        return not network and super().has_tails(x, network)

    def has_gating(self, x: Tensor, network: bool) -> bool:
        return not network and super().has_gating(x, network)

    def eca(self, x: Tensor, weight: Tensor, circular: bool) -> Tensor:
        check(x, weight, circular)
        return super().eca(x, weight, circular)

    def eca_into(self, x: Tensor, weight: Tensor, circular: bool, out: Tensor) -> Tensor:
        check(x, weight, circular)
        check_out(x, out)
        return super().eca_into(x, weight, circular, out)

    def eca_(self, x: Tensor, weight: Tensor, circular: bool) -> Tensor:
        check(x, weight, circular)
        return super().eca_(x, weight, circular)

    def pool(self, x: Tensor) -> Tensor:
        check_x(x)
        return super().pool(x)

    def rescale(self, x: Tensor, gate: Tensor) -> Tensor:
        check_gate(x, gate)
        return super().rescale(x, gate)

    def linked_pool(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        return self.pool(x), None  # the link is an attribute of a tensor, which a graph cannot have


class ForTheCompiler(FusedTails, Graph):
    """The way of backend="auto" on the CPU under torch.compile.

    If the channels are innermost, the kernels compute tails that need gradients, and the gradients
    of attention alone. All other attention is plain operations, and the modules of all other tails
    are called: the compiler fuses them with their neighbours. It runs convolutions with channels
    innermost, so an operator that wants contiguous maps costs copies. Time of a whole compiled
    network over its time without attention (batch 4, float32, networks with ECA in
    benchmarks/results/cpu-networks.json; tails in ResNet-50):

    | | this way | with the kernels |
    |---|---|---|
    | inference | 1.01 to 1.04 | 1.03 to 1.10 |
    | training step, contiguous | 1.00 to 1.06 | 1.00 to 1.06 |
    | training step, channels_last | 1.01 to 1.02 | - (plain ECA 0.98 to 1.04) |
    | tails, training step, contiguous | 1.01 | 1.05 (commit 523a9ae) |
    | tails, training step, channels_last | 0.95 | 0.95 |

    A layer compiled alone has nothing to fuse with, and is faster with backend="native".
    """

    def __init__(self, kernels: Kernels) -> None:
        self.kernels = kernels

    def has_tails(self, x: Tensor, network: bool) -> bool:
        innermost = x.stride(1) == 1
        return (
            torch.is_grad_enabled() and innermost and not network and super().has_tails(x, network)
        )

    def has_gating(self, x: Tensor, network: bool) -> bool:
        return False

    def eca(self, x: Tensor, weight: Tensor, circular: bool) -> Tensor:
        """y in the memory format that the kernels give it."""
        check(x, weight, circular)  # plain operations would broadcast
        if needs_grad(x, weight) and x.stride(1) == 1:
            y: Tensor = ECAFunction.apply(x, weight, circular, self.kernels)
            return y
        y = graph.eca(x, weight, circular)
        strides = output_strides(x)
        return y if y.stride() == strides else x.new_empty_strided(x.shape, strides).copy_(y)


class Transformed(Graph):
    """For torch.func's transforms and forward-mode AD, with rules for the kernels."""

    def __init__(self, kernels: Kernels) -> None:
        self.kernels = kernels

    def eca(self, x: Tensor, weight: Tensor, circular: bool) -> Tensor:
        return transformed_eca(x, weight, circular, self.kernels)


class Ways:
    """The ways on one backend's kernels."""

    def __init__(self, kernels: Kernels) -> None:
        self.kernels = kernels
        self.fused = Fused(kernels)
        self.compiling = Compiling(kernels)
        self.transformed = Transformed(kernels)
