"""eca(), pool() and rescale(): each chooses the way to compute its call, then takes it."""

from collections.abc import Callable
from inspect import signature
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.overrides import handle_torch_function, has_torch_function

from eca_fused.autograd.eca import ECAFunction
from eca_fused.functional import torchscript
from eca_fused.functional.choice import choose
from eca_fused.ops import graph
from eca_fused.ops.checks import (
    autocasts,
    check_activation,
    check_no_gradient,
    check_out,
    check_tensor,
    is_circular,
)
from eca_fused.ops.results import sums_dtype

__all__ = [
    "ECAFunction",
    "eca",
    "eca_",
    "linked_pool",
    "linked_rescale",
    "pool",
    "rescale",
    "residual_tail",
    "under_autocast",
]


T = TypeVar("T")


def _overridden(function: Callable[..., T], *args: Any, **options: Any) -> T:
    """Call a function through __torch_function__ of its arguments, such as proxies of torch.fx.

    For a subclass of Tensor, such as MONAI's MetaTensor, the result has that class. It is not a
    view of an autograd function's output, which PyTorch would not let be modified in place.

    Raises:
        TypeError: an argument is not a tensor and has no __torch_function__.
    """
    tensors = dict(zip(signature(function).parameters, args, strict=False))
    tensors.update({name: t for name, t in options.items() if isinstance(t, Tensor)})
    if options.get("out") is not None:
        tensors["out"] = options["out"]
    if has_torch_function(tuple(tensors.values())):
        found: T = handle_torch_function(function, tuple(tensors.values()), *args, **options)
        return found
    for name, t in tensors.items():
        check_tensor(name, t)
    raise AssertionError("one of them is no tensor")


def under_autocast(x: Tensor, weight: Tensor) -> Tensor:
    """The taps; half precision taps under autocast in the dtype of x, as a convolution casts."""
    half = weight.dtype in (torch.float16, torch.bfloat16)
    if not half or x.dtype == torch.float64 or not autocasts(x):
        return weight
    return weight.to(x.dtype)


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
    and y is rounded once. channels_last and slices of the batch or of the channels are read in
    place. Any other x that is not contiguous is copied first.

    Differentiable any number of times, also by torch.func's transforms and in forward mode. The
    kernels compute y and its gradients, except where "auto" leaves them to torch.compile on the
    CPU. With every backend, plain PyTorch computes gradients of gradients, tangents, everything for
    taps batched by vmap(), and transforms inside torch.compile() or functionalize().

    Args:
        x: (N, C, *spatial) with 0 to 3 spatial dimensions, float32, float64, float16 or bfloat16.
        weight: taps (1, 1, k), or (C, 1, k) for separate taps per channel (ECA-NS), k odd, in
            float32 or the dtype of x; under autocast also in float16 or bfloat16.
        padding_mode: "zeros", or "circular" to wrap around at the first and last channel.
        backend: "native", "triton", "reference", or "auto" for the best of them that works here.
        out: a preallocated output for inference: like x, in any memory format, for example a slice
            of a larger tensor. out=x overwrites x. If out and x share only part of their memory, y
            is copied to out.

    Returns:
        y of the shape, dtype and memory format of x; or out.

    Raises:
        TypeError: x, weight or out is not a tensor or has an unsupported dtype.
        ValueError: a shape, device, the padding mode or the backend does not fit.
        RuntimeError: the requested backend cannot be used here. With out: a gradient is needed; out
            was made in torch.inference_mode() and the call is outside of it; or elements of out
            share memory, as after expand().
    """
    if not (
        isinstance(x, Tensor)
        and isinstance(weight, Tensor)
        and (out is None or isinstance(out, Tensor))
    ) or has_torch_function((x, weight)):
        return _overridden(eca, x, weight, padding_mode=padding_mode, backend=backend, out=out)
    way = choose(x, backend)
    if weight.dtype != x.dtype:
        weight = under_autocast(x, weight)
    if out is None:
        return way.eca(x, weight, is_circular(padding_mode))
    return way.eca_into(x, weight, is_circular(padding_mode), out)


def eca_(
    x: Tensor, weight: Tensor, *, padding_mode: str = "zeros", backend: str = "auto"
) -> Tensor:
    """eca() written over x, for inference. A new output of 100 MB costs more than the arithmetic.

    Args and errors as for eca().

    Returns:
        x.

    Raises:
        RuntimeError: also if a gradient would need the overwritten x.
    """
    if not (isinstance(x, Tensor) and isinstance(weight, Tensor)) or has_torch_function(
        (x, weight)
    ):
        return _overridden(eca_, x, weight, padding_mode=padding_mode, backend=backend)
    way = choose(x, backend)
    if weight.dtype != x.dtype:
        weight = under_autocast(x, weight)
    return way.eca_(x, weight, is_circular(padding_mode))


def pool(x: Tensor, *, backend: str = "auto") -> Tensor:
    """Means over the spatial positions, the global average pooling of channel attention.

    Sums are in float32 (float64 for float64 x). The means are rounded once, to the dtype of x, so
    that layers of that dtype can take them. Slices are read in place, as by eca(). The gradient is
    a view of N C numbers. Plain PyTorch computes inside torch.func's transforms and in forward
    mode. With "auto" on the CPU, torch.compile gets plain operations, which it fuses with their
    neighbours.

    Args:
        x: (N, C, *spatial) with 0 to 3 spatial dimensions, float32, float64, float16 or bfloat16.
        backend: "native", "triton", "reference", or "auto" for the best of them that works here.

    Returns:
        (N, C), in the dtype of x.

    Raises:
        TypeError: x is not a tensor or has an unsupported dtype.
        ValueError: the shape or the backend does not fit.
        RuntimeError: the requested backend cannot be used here.
    """
    if not isinstance(x, Tensor) or has_torch_function((x,)):
        return _overridden(pool, x, backend=backend)
    return choose(x, backend).pool(x)


def rescale(x: Tensor, gate: Tensor, *, backend: str = "auto") -> Tensor:
    """Every channel of x times its gate, y[n, c, s] = gate[n, c] * x[n, c, s].

    Computed in float32 (float64 for float64 x) and rounded once. One pass over dy and x gives the
    gradients of x and the gate; x is kept only if the gate needs a gradient. Plain PyTorch computes
    gradients that need gradients (create_graph=True). torch.func and torch.compile get what pool()
    gives them.

    Args:
        x: (N, C, *spatial) with 0 to 3 spatial dimensions, float32, float64, float16 or bfloat16.
        gate: (N, C), of any of these dtypes, also another than that of x.
        backend: "native", "triton", "reference", or "auto" for the best of them that works here.

    Returns:
        y of the shape, dtype and memory format of x.

    Raises:
        TypeError: x or gate is not a tensor or has an unsupported dtype.
        ValueError: a shape, device or the backend does not fit.
        RuntimeError: the requested backend cannot be used here.
    """
    if not (isinstance(x, Tensor) and isinstance(gate, Tensor)) or has_torch_function((x, gate)):
        return _overridden(rescale, x, gate, backend=backend)
    return choose(x, backend).rescale(x, gate)


def residual_tail(
    x: Tensor,
    identity: Tensor | None,
    weight: Tensor | None,
    *,
    gate: Tensor | None = None,
    scale: Tensor | float | None = None,
    activation: str = "relu",
    padding_mode: str = "zeros",
    backend: str = "auto",
    out: Tensor | None = None,
) -> Tensor:
    """The end of a residual block in one operation, y = act(gate * scale * x + identity).

    The gate is ECA's, sigmoid(conv1d over channels of mean(x)), or is given, or is 1. Sums and
    everything else are in float32 (float64 for float64 x), and y is rounded once. The kernels read
    x and the identity once and write y once, or read x twice where it does not fit on chip;
    backward keeps one bit for each element of y instead of y itself for ReLU. For blocks with batch
    norm see ResidualTail.

    Plain operations compute it inside torch.func's transforms and for gradients of gradients. With
    backend="auto" on the CPU, so do they in torch.compile without gradients or with contiguous x.

    Args:
        x: (N, C, *spatial) with 0 to 3 spatial dimensions, float32, float64, float16 or bfloat16.
        identity: what the block adds, of the shape and dtype of x; None for nothing.
        weight: taps (1, 1, k) or (C, 1, k) of ECA's gate, as for eca(); None for another gate.
        gate: (N, C), instead of taps; None for 1.
        scale: a factor of each sample (N,), such as drop path's, or one number; None for 1.
        activation: "relu", "silu", "gelu" (the exact one) or "none".
        padding_mode: "zeros", or "circular" to wrap around at the first and last channel.
        backend: "native", "triton", "reference", or "auto" for the best of them that works here.
        out: a preallocated output for inference, like x.

    Returns:
        y of the shape, dtype and memory format of x; or out.

    Raises:
        TypeError: an argument is not a tensor or has an unsupported dtype.
        ValueError: a shape, device, the activation, the padding mode or the backend does not fit,
            or there are both taps and gates.
        RuntimeError: the requested backend cannot be used here; or, with out, a gradient is needed.
    """
    given = (x, identity, weight, gate, scale, out)
    if not isinstance(x, Tensor) or has_torch_function(
        tuple(t for t in given if isinstance(t, Tensor))
    ):
        return _overridden(
            residual_tail,
            x,
            identity,
            weight,
            gate=gate,
            scale=scale,
            activation=activation,
            padding_mode=padding_mode,
            backend=backend,
            out=out,
        )
    check_activation(activation)
    way = choose(x, backend)
    if weight is not None and isinstance(weight, Tensor) and weight.dtype != x.dtype:
        weight = under_autocast(x, weight)
    if scale is not None and not isinstance(scale, Tensor):
        scale = x.new_full(x.shape[:1], float(scale), dtype=sums_dtype(x))
    circular = is_circular(padding_mode)
    if out is None:
        return way.residual_tail(x, identity, weight, gate, scale, activation, circular)
    check_out(x, out)
    for t in (identity, weight, gate, scale):
        check_no_gradient(x, x if t is None else t, out)
    return out.copy_(way.residual_tail(x, identity, weight, gate, scale, activation, circular))


# ---- for layers ----


def linked_pool(x: Tensor, backend: str) -> tuple[Tensor, Tensor | None]:
    """pool(x), and a token for linked_rescale() of the same x if that saves memory traffic.

    A token is for one call. Args and errors as for pool().
    """
    if not isinstance(x, Tensor) or has_torch_function((x,)):
        return _overridden(linked_pool, x, backend=backend)
    return choose(x, backend).linked_pool(x)


def linked_rescale(x: Tensor, gate: Tensor, token: Tensor | None, backend: str) -> Tensor:
    """rescale(x, gate) with the token that linked_pool() gave. Args and errors as for rescale()."""
    if not (isinstance(x, Tensor) and isinstance(gate, Tensor)) or has_torch_function((x, gate)):
        return _overridden(linked_rescale, x, gate, token=token, backend=backend)
    return choose(x, backend).linked_rescale(x, gate, token)


def plain(x: Tensor, weight: Tensor, padding_mode: str, inplace: bool) -> Tensor:
    """eca(), or eca_() if inplace, with the backend "reference". Args as for eca()."""
    run = eca_ if inplace else eca
    return run(x, weight, padding_mode=padding_mode, backend="reference")


def plain_pool(x: Tensor) -> Tensor:
    """pool() with the backend "reference"."""
    return pool(x, backend="reference")


def plain_rescale(x: Tensor, gate: Tensor) -> Tensor:
    """rescale() with the backend "reference"."""
    return rescale(x, gate, backend="reference")


# torch.jit.script compiles the twins instead. A branch inside the functions would cost every call.
_twins: tuple[tuple[Any, Any], ...] = (
    (eca, torchscript.eca),
    (eca_, torchscript.eca_),
    (pool, torchscript.pool),
    (rescale, torchscript.rescale),
    (linked_pool, torchscript.linked_pool),
    (linked_rescale, torchscript.linked_rescale),
    (plain, torchscript.plain),
    (plain_pool, graph.pool),
    (plain_rescale, graph.rescale),
)
for _function, _twin in _twins:
    _function.__prepare_scriptable__ = lambda twin=_twin: twin
