"""eca(): checks, choice of the backend, and the autograd function around the kernels."""

import functools
from types import ModuleType
from typing import Any

import torch
from torch import Tensor
from torch.compiler import is_compiling
from torch.overrides import handle_torch_function, has_torch_function

from eca_fused import reference
from eca_fused.autograd.derivatives import double_backward, plain_backward
from eca_fused.autograd.transforms import transformed_backward, transformed_eca
from eca_fused.functional import torchscript as scripting
from eca_fused.ops import graph as decomposed
from eca_fused.ops.backend import is_for_the_compiler, named, select, warn_once
from eca_fused.ops.checks import PADDING_MODES, check, check_out, check_padding_mode
from eca_fused.torch_state import (
    batched_by_autograd,
    exporting_to_onnx,
    is_tracing,
    quietly,
    tracing_to_onnx,
    transformed,
)

__all__ = ["ECAFunction", "eca", "eca_"]


class ECAFunction(torch.autograd.Function):
    """y = sigmoid(conv(mean(x))) * x on a backend's kernels, twice differentiable.

    Written with the context in forward(): a separate setup_context() costs 12 us a call, three
    times the forward pass of a small map (measured on 2 cores of an EPYC server, PyTorch 2.15).

    ECAFunction.apply(x, weight, circular, kernels) takes x (N, C, *spatial), weight (1 or C, 1, k),
    a bool and a backend's module, and returns y like x. eca() is the way to call it.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, circular: bool, kernels: ModuleType) -> Tensor:
        y, mean, gate = kernels.forward(x, weight, circular)
        ctx.save_for_backward(x, weight, mean, gate)
        ctx.circular, ctx.kernels = circular, kernels
        return y  # type: ignore[no-any-return]

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
                mode = "circular" if ctx.circular else "zeros"
                return *plain_backward(dy, x, weight, padding_mode=mode), None, None
            if transformed():  # around this backward pass alone, with a dual or batched dy
                return *transformed_backward(ctx, dy, x, weight, mean, gate), None, None
        # Gradients of these gradients are asked for only under create_graph=True.
        run = _ECABackward.apply if torch.is_grad_enabled() else ctx.kernels.backward
        extra = (ctx.kernels,) if torch.is_grad_enabled() else ()
        dx, dweight = run(dy, x, weight, mean, gate, ctx.circular, need_dx, need_dweight, *extra)
        return dx if need_dx else None, dweight if need_dweight else None, None, None


class _ECABackward(torch.autograd.Function):
    """The backward kernels as a function of dy, x and weight that has a gradient of its own."""

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
        kernels: ModuleType,
    ) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(dy, x, weight)
        ctx.circular, ctx.needed = circular, (need_dx, need_dweight)
        ctx.set_materialize_grads(False)
        return kernels.backward(dy, x, weight, mean, gate, circular, need_dx, need_dweight)  # type: ignore[no-any-return]

    @staticmethod
    def backward(ctx: Any, ddx: Tensor | None, ddweight: Tensor | None) -> tuple[Any, ...]:
        need_dx, need_dweight = ctx.needed
        grads = double_backward(
            ddx if need_dx else None,
            ddweight if need_dweight else None,
            *ctx.saved_tensors,
            padding_mode="circular" if ctx.circular else "zeros",
        )
        return *grads, None, None, None, None, None, None


def _needs_grad(x: Tensor, weight: Tensor) -> bool:
    return torch.is_grad_enabled() and (x.requires_grad or weight.requires_grad)


def _needs_kernels_gradient(x: Tensor, weight: Tensor, kernels: ModuleType) -> bool:
    """Not where the compiler gets plain operations, which have a gradient of their own."""
    if not _needs_grad(x, weight):
        return False
    return not is_for_the_compiler(kernels) or kernels.trains_in_kernels(x)


def _in_reference(x: Tensor, weight: Tensor, padding_mode: str) -> Tensor:
    check(x, weight, padding_mode)
    return reference.eca(x, weight, padding_mode=padding_mode)


def _in_operations(x: Tensor, weight: Tensor, padding_mode: str) -> Tensor:
    """For ONNX, in whose graphs nothing is written in place."""
    check(x, weight, padding_mode)
    return decomposed.eca(x, weight, padding_mode == "circular")


@functools.cache
def _scripted(inplace: bool) -> Any:
    """What a trace records: whether a gradient is needed is known when the trace runs."""
    return torch.jit.script(scripting.eca_ if inplace else scripting.eca)


def _under_autocast(x: Tensor, weight: Tensor) -> Tensor:
    """The taps; under autocast, which a convolution obeys, in a dtype that x takes."""
    half = weight.dtype in (torch.float16, torch.bfloat16)
    if not half or x.dtype == torch.float64 or not torch.is_autocast_enabled(x.device.type):
        return weight
    return weight.to(x.dtype)


def _check_writable(name: str, t: Tensor) -> None:
    # torch.compile cannot trace this question.
    if not is_compiling() and t.is_inference() and not torch.is_inference_mode_enabled():
        raise RuntimeError(
            f"{name} was made in inference mode and cannot be written in place outside of it; "
            f"call this in torch.inference_mode(), or on {name}.clone()"
        )


def _is_negated(t: Tensor) -> bool:
    """Whether its numbers count with the other sign: torch gives no operator such to write."""
    # torch.compile cannot trace this question.
    return not is_compiling() and t.is_neg()


def _check_all(x: Tensor, weight: Tensor, out: Tensor, padding_mode: str) -> None:
    check(x, weight, padding_mode)
    check_out(x, out)


def _written(out: Tensor, x: Tensor, weight: Tensor, padding_mode: str, backend: str) -> Tensor:
    """eca() written into out, and out."""
    if not (isinstance(x, Tensor) and isinstance(weight, Tensor) and isinstance(out, Tensor)):
        if has_torch_function((x, weight, out)):
            modes: dict[str, Any] = {"padding_mode": padding_mode, "backend": backend, "out": out}
            return handle_torch_function(eca, (x, weight, out), x, weight, **modes)
        _check_all(x, weight, out, padding_mode)
    if weight.dtype != x.dtype:
        weight = _under_autocast(x, weight)
    kernels = select(x, backend)
    if is_tracing():
        quietly(_check_all, x, weight, out, padding_mode)
        if tracing_to_onnx():
            return quietly(_in_operations, x, weight, padding_mode)  # type: ignore[no-any-return]
        name = "reference" if kernels is None else named(backend)
        return _scripted(False)(x, weight, padding_mode, name, out)  # type: ignore[no-any-return]
    scripting.check_no_gradient(x, weight, out)
    _check_writable("out", out)
    plain = _is_negated(out) or transformed() or exporting_to_onnx()
    if kernels is None or plain or is_for_the_compiler(kernels):
        _check_all(x, weight, out, padding_mode)  # copy_() would broadcast
        return out.copy_(eca(x, weight, padding_mode=padding_mode, backend=backend))
    check_padding_mode(padding_mode)
    try:
        kernels.inference_into(x, weight, out, padding_mode == "circular")
    except (RuntimeError, AttributeError):
        _check_all(x, weight, out, padding_mode)
        raise
    torch.autograd.graph.increment_version(out)
    return out


def eca(
    x: Tensor,
    weight: Tensor,
    *,
    padding_mode: str = "zeros",
    backend: str = "auto",
    out: Tensor | None = None,
) -> Tensor:
    """Efficient channel attention, y = sigmoid(conv1d over channels of mean(x)) * x, fused.

    Wang et al., "ECA-Net" (CVPR 2020). Sums, taps and gates are in float32 (float64 for float64 x),
    and y is rounded once. Slices of a batch or of the channels are read in place, as is
    channels_last; anything else that is not contiguous is copied first.

    Differentiable any number of times, by torch.func's transforms and in forward mode too. The
    kernels compute y and its gradients, but for what "auto" leaves to torch.compile on the CPU;
    plain PyTorch computes gradients of gradients, tangents, everything for taps that vmap()
    batches, and transforms inside torch.compile() or functionalize(), whatever the backend.

    Args:
        x: (N, C, *spatial) with 0 to 3 spatial dimensions, float32, float64, float16 or bfloat16.
        weight: taps (1, 1, k), or (C, 1, k) for taps of each channel's own (ECA-NS), k odd, in
            float32 or the dtype of x; under autocast in any, as for a convolution.
        padding_mode: "zeros", or "circular" to wrap around at the first and last channel.
        backend: "native", "triton", "reference", or "auto" for the best of them that works here.
        out: memory for y, for inference: like x, of any memory format, such as a slice of a larger
            map. x itself is overwritten; what shares part of its memory with x gets a copy of y.

    Returns:
        y of the shape, dtype and memory format of x; or out.

    Raises:
        TypeError: x, weight or out is no tensor or has an unsupported dtype.
        ValueError: a shape, device, the padding mode or the backend does not fit.
        RuntimeError: the backend that was asked for cannot be used here; or y shall be written into
            out where a gradient is needed, where out was made in torch.inference_mode() and this is
            outside of it, or where elements of out share memory, as after expand().
    """
    if out is not None:
        return _written(out, x, weight, padding_mode, backend)
    tensors = isinstance(x, Tensor) and isinstance(weight, Tensor)
    if tensors and weight.dtype != x.dtype:
        weight = _under_autocast(x, weight)
    kernels = select(x, backend) if tensors else None
    if kernels is None:
        if not tensors and has_torch_function((x, weight)):  # such as a proxy of torch.fx
            modes: dict[str, Any] = {"padding_mode": padding_mode, "backend": backend}
            return handle_torch_function(eca, (x, weight), x, weight, **modes)
        return quietly(_in_reference, x, weight, padding_mode)  # type: ignore[no-any-return]
    if transformed():
        return transformed_eca(x, weight, padding_mode, kernels)
    if padding_mode not in PADDING_MODES:
        check_padding_mode(padding_mode)
    if is_tracing():
        if tracing_to_onnx():
            return quietly(_in_operations, x, weight, padding_mode)  # type: ignore[no-any-return]
        return _scripted(False)(x, weight, padding_mode, named(backend))  # type: ignore[no-any-return]
    circular = padding_mode == "circular"
    to_onnx = exporting_to_onnx()
    if to_onnx or is_compiling():
        # Before the call: up to torch 2.13 an operator's error has another type there.
        check(x, weight, padding_mode)
    if to_onnx:
        return decomposed.eca(x, weight, circular)
    try:
        if _needs_kernels_gradient(x, weight, kernels):
            return ECAFunction.apply(x, weight, circular, kernels)  # type: ignore[no-any-return]
        return kernels.inference(x, weight, circular)  # type: ignore[no-any-return]
    except (RuntimeError, AttributeError):
        # The operators validate too, so a good call pays for one validation only.
        check(x, weight, padding_mode)
        raise


def eca_(
    x: Tensor, weight: Tensor, *, padding_mode: str = "zeros", backend: str = "auto"
) -> Tensor:
    """eca() written over x, for inference: a new output of 100 MB costs more than the arithmetic.

    Args and errors as for eca().

    Returns:
        x.

    Raises:
        RuntimeError: also where a gradient would need the x that is overwritten.
    """
    tensors = isinstance(x, Tensor) and isinstance(weight, Tensor)
    if not tensors and has_torch_function((x, weight)):
        modes: dict[str, Any] = {"padding_mode": padding_mode, "backend": backend}
        return handle_torch_function(eca_, (x, weight), x, weight, **modes)
    if tensors and weight.dtype != x.dtype:
        weight = _under_autocast(x, weight)
    kernels = select(x, backend) if tensors else None
    if is_tracing():
        quietly(check, x, weight, padding_mode)
        if tracing_to_onnx():
            return quietly(_in_operations, x, weight, padding_mode)  # type: ignore[no-any-return]
        name = "reference" if kernels is None else named(backend)
        return _scripted(True)(x, weight, padding_mode, name)  # type: ignore[no-any-return]
    check(x, weight, padding_mode)
    if _needs_grad(x, weight):
        what = "x" if x.requires_grad else "the taps"
        raise RuntimeError(
            f"in-place ECA would overwrite the x that the gradient of {what} needs; "
            "use inplace=False, or torch.no_grad() for inference"
        )
    _check_writable("x", x)
    if kernels is None or transformed() or _is_negated(x):
        gate = reference.gate(x, weight, padding_mode)
        return x.mul_(gate.reshape(gate.shape + (1,) * (x.dim() - 2)))
    if exporting_to_onnx():
        return x.copy_(decomposed.eca(x, weight, padding_mode == "circular"))
    kernels.inference_(x, weight, padding_mode == "circular")
    torch.autograd.graph.increment_version(x)
    return x


def plain(x: Tensor, weight: Tensor, padding_mode: str, inplace: bool) -> Tensor:
    """eca(), or eca_(), of the backend "reference". Args as for eca()."""
    run = eca_ if inplace else eca
    return run(x, weight, padding_mode=padding_mode, backend="reference")


# What torch.jit.script compiles in their place; a branch inside them would cost every call.
eca.__prepare_scriptable__ = lambda: scripting.eca  # type: ignore[attr-defined]
eca_.__prepare_scriptable__ = lambda: scripting.eca_  # type: ignore[attr-defined]
plain.__prepare_scriptable__ = lambda: scripting.plain  # type: ignore[attr-defined]
