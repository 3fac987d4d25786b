"""pool() and rescale(): the two ends of channel attention, for gates that are made in between.

rescale(x, gate(pool(x))) is squeeze and excitation, with any gate. Maps that are read or written,
modelled, with nothing found in a cache: forward 3, as a gate needs all of x before any of it is
rescaled. Backward, one pass over dy and x gives dgate and gate * dy, which is 3; the share of the
mean, dmean / S, is a view that autograd adds to it, 2 more. Layers link the two: rescaling gives
dgate alone, 2, and pooling, whose turn comes when dmean is known, gate * dy + dmean / S, 2. Plain
PyTorch takes 3 and 10.
"""

import functools
import math
from types import ModuleType
from typing import Any

import torch
from torch import Tensor
from torch.overrides import handle_torch_function, has_torch_function

from eca_fused import reference
from eca_fused.autograd.derivatives import spread, total
from eca_fused.functional import torchscript as scripting
from eca_fused.ops import graph as decomposed
from eca_fused.ops.backend import is_for_the_compiler, named, select
from eca_fused.ops.checks import check_gate, check_x
from eca_fused.torch_state import (
    batched_by_autograd,
    exporting_to_onnx,
    is_tracing,
    quietly,
    tracing_to_onnx,
    transformed,
)

__all__ = ["pool", "rescale"]


def _spread_evenly(dmean: Tensor, shape: tuple[int, ...]) -> Tensor:
    """The gradient of the mean over the spatial positions: a view, in which each value is once."""
    share = dmean / math.prod(shape[2:])
    return share.reshape(share.shape + (1,) * (len(shape) - 2)).expand(shape)


def _plain_backward(
    dy: Tensor, x: Tensor | None, gate: Tensor, need_dx: bool, need_dgate: bool
) -> tuple[Tensor | None, Tensor | None]:
    """The gradients of rescale() in differentiable operations; x is for dgate alone."""
    g = decomposed.widened(dy)
    dx = (spread(gate.to(g.dtype), g) * g).to(dy.dtype) if need_dx else None
    if not need_dgate:
        return dx, None
    assert x is not None, "kept where the gate needs a gradient"
    return dx, total(g * x.to(g.dtype)).to(gate.dtype)


def _plainly(dy: Tensor) -> bool:
    """Whether gradients are to be differentiable (create_graph) or batched (is_grads_batched).

    Or transforms are around this backward pass alone, with a dual or batched dy.
    """
    if torch.is_grad_enabled():
        return True
    return not torch.compiler.is_compiling() and (transformed() or batched_by_autograd(dy))


class _Pool(torch.autograd.Function):
    """mean (N, C) of x (N, C, *spatial) on a backend's kernels."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, kernels: ModuleType) -> Tensor:
        ctx.shape = x.shape
        return kernels.pool(x)  # type: ignore[no-any-return]

    @staticmethod
    def backward(ctx: Any, dmean: Tensor) -> tuple[Tensor, None]:
        return _spread_evenly(dmean, ctx.shape), None


class _Rescale(torch.autograd.Function):
    """y = gate * x of x (N, C, *spatial) and gate (N, C), which keeps x only for dgate."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, gate: Tensor, kernels: ModuleType) -> Tensor:
        ctx.save_for_backward(x if ctx.needs_input_grad[1] else None, gate)
        ctx.kernels = kernels
        return kernels.rescale(x, gate)  # type: ignore[no-any-return]

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, gate = ctx.saved_tensors
        need_dx, need_dgate = ctx.needs_input_grad[:2]
        if _plainly(dy):
            return *_plain_backward(dy, x, gate, need_dx, need_dgate), None
        if not need_dgate:
            return ctx.kernels.rescale(dy, gate), None, None
        dx, dgate = ctx.kernels.rescale_backward(dy, x, gate, need_dx)
        return dx if need_dx else None, dgate, None


def _kernels(x: Tensor, backend: str) -> ModuleType | None:
    """The module with the kernels for x, or None for plain PyTorch.

    Transforms differentiate that, and torch.compile merges it with its neighbours.
    """
    kernels = select(x, backend)
    if kernels is None or is_for_the_compiler(kernels) or transformed():
        return None
    return None if is_tracing() and tracing_to_onnx() else kernels


@functools.cache
def _scripted(name: str) -> Any:
    """What a trace records: whether a gradient is needed is known when the trace runs."""
    return torch.jit.script(getattr(scripting, name))


def pool(x: Tensor, *, backend: str = "auto") -> Tensor:
    """Means over the spatial positions, the global average pooling of channel attention.

    Summed in float32 (float64 for float64 x) and rounded once, to the dtype of x, which a network
    of this dtype takes. x is read as by eca(), slices in place. The gradient is a view of N C
    numbers. Plain PyTorch computes inside torch.func's transforms and in forward mode, and on the
    CPU torch.compile gets plain operations to merge with their neighbours.

    Args:
        x: (N, C, *spatial) with 0 to 3 spatial dimensions, float32, float64, float16 or bfloat16.
        backend: "native", "triton", "reference", or "auto" for the best of them that works here.

    Returns:
        (N, C), in the dtype of x.

    Raises:
        TypeError: x is no tensor or has an unsupported dtype.
        ValueError: the shape or the backend does not fit.
        RuntimeError: the backend that was asked for cannot be used here.
    """
    if not isinstance(x, Tensor) and has_torch_function((x,)):  # such as a proxy of torch.fx
        return handle_torch_function(pool, (x,), x, backend=backend)
    kernels = _kernels(x, backend) if isinstance(x, Tensor) else None
    if kernels is None:
        quietly(check_x, x)
        return reference.pool(x)
    if is_tracing():
        return _scripted("pool")(x, named(backend))  # type: ignore[no-any-return]
    to_onnx = exporting_to_onnx()
    if to_onnx or torch.compiler.is_compiling():
        # Before the call: up to torch 2.13 an operator's error has another type there.
        check_x(x)
    if to_onnx:
        return decomposed.pool(x)
    try:
        if torch.is_grad_enabled() and x.requires_grad:
            return _Pool.apply(x, kernels)  # type: ignore[no-any-return]
        return kernels.pool(x)  # type: ignore[no-any-return]
    except (RuntimeError, AttributeError):
        check_x(x)  # the operators validate too, so a good call pays for one validation only
        raise


def rescale(x: Tensor, gate: Tensor, *, backend: str = "auto") -> Tensor:
    """Every channel of x by its gate, y[n, c, s] = gate[n, c] * x[n, c, s].

    Computed in float32 (float64 for float64 x) and rounded once. The gradients for x and the gate
    come from one pass over dy and x, which is kept only where the gate needs a gradient. Gradients
    that are to be differentiated (create_graph=True) are plain PyTorch's; else as for pool().

    Args:
        x: (N, C, *spatial) with 0 to 3 spatial dimensions, float32, float64, float16 or bfloat16.
        gate: (N, C), of any of these dtypes, whatever that of x.
        backend: "native", "triton", "reference", or "auto" for the best of them that works here.

    Returns:
        y of the shape, dtype and memory format of x.

    Raises:
        TypeError: x or gate is no tensor or has an unsupported dtype.
        ValueError: a shape, device or the backend does not fit.
        RuntimeError: the backend that was asked for cannot be used here.
    """
    tensors = isinstance(x, Tensor) and isinstance(gate, Tensor)
    if not tensors and has_torch_function((x, gate)):
        return handle_torch_function(rescale, (x, gate), x, gate, backend=backend)
    kernels = _kernels(x, backend) if tensors else None
    if kernels is None:
        quietly(check_gate, x, gate)
        return reference.rescale(x, gate)
    if is_tracing():
        return _scripted("rescale")(x, gate, named(backend))  # type: ignore[no-any-return]
    to_onnx = exporting_to_onnx()
    if to_onnx or torch.compiler.is_compiling():
        check_gate(x, gate)
    if to_onnx:
        return decomposed.rescale(x, gate)
    try:
        if torch.is_grad_enabled() and (x.requires_grad or gate.requires_grad):
            return _Rescale.apply(x, gate, kernels)  # type: ignore[no-any-return]
        return kernels.rescale(x, gate)  # type: ignore[no-any-return]
    except (RuntimeError, AttributeError, TypeError):
        check_gate(x, gate)
        raise


# ---- both ends of one layer ----


class _LinkedPool(torch.autograd.Function):
    """mean of x, and a token for _LinkedRescale, whose backward leaves gate * dy to this one.

    Between the two comes that of the gate's network: dmean is known only after dgate is. dy and
    gate arrive as an attribute of the token's gradient, so that each backward pass brings its own,
    however many there are, and none leaves anything behind.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, kernels: ModuleType) -> tuple[Tensor, Tensor]:
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
        return ctx.kernels.rescale(
            dy, gate, decomposed.widened(dmean) / math.prod(ctx.shape[2:])
        ), None


class _LinkedRescale(torch.autograd.Function):
    """y = gate * x, whose gradient for x _LinkedPool computes, or this one in plain PyTorch."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, gate: Tensor, token: Tensor, kernels: ModuleType) -> Tensor:
        ctx.save_for_backward(x if ctx.needs_input_grad[1] else None, gate)
        ctx.kernels = kernels
        return kernels.rescale(x, gate)  # type: ignore[no-any-return]

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, gate = ctx.saved_tensors
        need_dgate = ctx.needs_input_grad[1]
        # Compiled autograd traces this, and knows no attributes of tensors.
        if torch.compiler.is_compiling() or _plainly(dy):
            return *_plain_backward(dy, x, gate, True, need_dgate), None, None
        dgate = ctx.kernels.rescale_backward(dy, x, gate, False)[1] if need_dgate else None
        dtoken: Any = torch.empty(0, dtype=dy.dtype, device=dy.device)
        dtoken.left = dy, gate
        return None, dgate, dtoken, None


def linked_pool(x: Tensor, backend: str) -> tuple[Tensor, Tensor | None]:
    """pool(x), and a token for the linked_rescale() of the same x, where that saves memory traffic.

    The token is for one call. Args and errors as for pool().
    """
    if not isinstance(x, Tensor) and has_torch_function((x,)):
        return handle_torch_function(linked_pool, (x,), x, backend)
    if not isinstance(x, Tensor) or not (torch.is_grad_enabled() and x.requires_grad):
        return pool(x, backend=backend), None
    kernels = None if is_tracing() or torch.compiler.is_compiling() else _kernels(x, backend)
    if kernels is None:
        return pool(x, backend=backend), None
    try:
        return _LinkedPool.apply(x, kernels)  # type: ignore[no-any-return]
    except RuntimeError:
        check_x(x)
        raise


def linked_rescale(x: Tensor, gate: Tensor, token: Tensor | None, backend: str) -> Tensor:
    """rescale(x, gate) with the token that linked_pool() gave. Args and errors as for rescale()."""
    if not isinstance(x, Tensor) and has_torch_function((x,)):
        return handle_torch_function(linked_rescale, (x,), x, gate, token, backend)
    kernels = None if token is None else _kernels(x, backend)
    if token is None or kernels is None:
        return rescale(x, gate, backend=backend)
    try:
        return _LinkedRescale.apply(x, gate, token, kernels)  # type: ignore[no-any-return]
    except (RuntimeError, AttributeError, TypeError):
        check_gate(x, gate)
        raise


def plain_pool(x: Tensor) -> Tensor:
    """pool() of the backend "reference"."""
    return pool(x, backend="reference")


def plain_rescale(x: Tensor, gate: Tensor) -> Tensor:
    """rescale() of the backend "reference"."""
    return rescale(x, gate, backend="reference")


# What torch.jit.script compiles in their place.
pool.__prepare_scriptable__ = lambda: scripting.pool  # type: ignore[attr-defined]
rescale.__prepare_scriptable__ = lambda: scripting.rescale  # type: ignore[attr-defined]
plain_pool.__prepare_scriptable__ = lambda: decomposed.pool  # type: ignore[attr-defined]
plain_rescale.__prepare_scriptable__ = lambda: decomposed.rescale  # type: ignore[attr-defined]
linked_pool.__prepare_scriptable__ = lambda: scripting.linked_pool  # type: ignore[attr-defined]
linked_rescale.__prepare_scriptable__ = lambda: scripting.linked_rescale  # type: ignore[attr-defined]
