"""What functional.py has, for TorchScript, which compiles these in their place.

A scripted layer runs the compiled operator where no gradient is needed, so that a process which
loads it has to `import eca_fused` first. With fused=False it needs torch alone.

A script cannot see Python's state: use_backend() and ECA_FUSED_BACKEND do nothing for it. What is
traced keeps what "auto" meant in the meantime. Neither has Triton kernels, and says so.
"""

import torch
from torch import Tensor

from eca_fused.ops import graph as decomposed
from eca_fused.ops import native

__all__ = [
    "check_map",
    "check_no_gradient",
    "eca",
    "eca_",
    "linked_pool",
    "linked_rescale",
    "plain",
    "pool",
    "rescale",
]

if native.missing is None:

    def _inference(x: Tensor, weight: Tensor, circular: bool) -> Tensor:
        return torch.ops.eca_fused.inference(x, weight, circular)  # type: ignore[no-any-return]

    def _inference_(x: Tensor, weight: Tensor, circular: bool) -> None:
        torch.ops.eca_fused.inference_(x, weight, circular)

    def _pool(x: Tensor) -> Tensor:
        return torch.ops.eca_fused.pool(x)  # type: ignore[no-any-return]

    def _rescale(x: Tensor, gate: Tensor) -> Tensor:
        return torch.ops.eca_fused.rescale(x, gate)  # type: ignore[no-any-return]

else:
    _pool, _rescale = decomposed.pool, decomposed.rescale
    _inference = decomposed.eca

    def _inference_(x: Tensor, weight: Tensor, circular: bool) -> None:
        x.copy_(decomposed.eca(x, weight, circular))


if "cuda" in native.devices:

    def _has_kernels(x: Tensor) -> bool:
        return x.is_cpu or x.is_cuda

elif native.missing is None:

    def _has_kernels(x: Tensor) -> bool:
        return x.is_cpu

else:

    def _has_kernels(x: Tensor) -> bool:
        return False


def check_map(x: Tensor, channels: int, spatial: int | None = None) -> None:
    """As in checks.py."""
    least, most = 0, 3
    if spatial is not None:
        least, most = spatial, spatial
    if x.dim() - 2 < least or x.dim() - 2 > most or x.shape[1] != channels:
        raise ValueError(
            f"expected x of shape (N, {channels}, *spatial) with {least} to {most} spatial "
            f"dimensions, got {x.shape}; build the layer for the channels of x, or reshape x"
        )


def _circular(padding_mode: str) -> bool:
    if padding_mode not in ["zeros", "circular"]:
        raise ValueError(f"expected padding_mode 'zeros' or 'circular', got '{padding_mode}'")
    return padding_mode == "circular"


def _check(x: Tensor, weight: Tensor, padding_mode: str) -> None:
    """Raise where checks.check() does, which TorchScript cannot compile.

    For plain operations, which would broadcast; the compiled operators check by themselves.
    """
    if x.dim() < 2 or x.dim() > 5:
        raise ValueError(
            f"expected x of shape (N, C, *spatial) with 0 to 3 spatial dimensions, got {x.shape}; "
            "add or merge dimensions with reshape()"
        )
    if x.dtype not in [torch.float32, torch.float64, torch.float16, torch.bfloat16]:
        raise TypeError(
            "expected x of dtype float32, float64, float16 or bfloat16; "
            "convert it, for example with x.float()"
        )
    channels = x.shape[1]
    if weight.dim() != 3 or weight.shape[1] != 1 or weight.shape[0] not in [1, channels]:
        raise ValueError(
            f"expected taps of shape (1, 1, k), or (C, 1, k) = ({channels}, 1, k) for taps of each "
            f"channel's own, got {weight.shape}; bring them to one of these with reshape()"
        )
    k = weight.shape[2]
    if k % 2 == 0:
        raise ValueError(
            f"expected an odd number of taps k, got {k}: the kernel is centred on its channel; "
            f"use {k + 1}"
        )
    if weight.dtype not in [torch.float32, x.dtype]:
        raise TypeError(
            "expected taps of dtype float32, or of the dtype of x; "
            "convert them, for example with layer.to(x.dtype)"
        )
    if weight.device != x.device:
        raise ValueError(
            f"expected the taps on the device of x, {x.device}, got {weight.device}; "
            "move them, for example with layer.to(x.device)"
        )
    if padding_mode == "circular" and k // 2 > channels:
        raise ValueError(
            f"circular padding would wrap around more than once: k = {k} needs {k // 2} channels "
            f"or more, x has {channels}; use fewer taps or padding_mode='zeros'"
        )


def _without_kernels(x: Tensor, backend: str) -> bool:
    """Whether plain operations are asked for, or all that there is."""
    if backend == "triton":
        raise RuntimeError(
            "backend 'triton' cannot be used in TorchScript, which has no Triton kernels; "
            "let it be 'auto' before the model is scripted or traced"
        )
    if backend not in ["auto", "native", "reference"]:
        raise ValueError(f"expected backend as one of auto, native, reference, got '{backend}'")
    if backend == "native" and not _has_kernels(x):
        raise RuntimeError(
            f"backend 'native' cannot be used: there are no compiled kernels for {x.device} here; "
            "let it be 'auto' before the model is scripted or traced"
        )
    return backend == "reference" or not _has_kernels(x)


def _needs_grad(x: Tensor, weight: Tensor) -> bool:
    return torch.is_grad_enabled() and (x.requires_grad or weight.requires_grad)


def _check_not_needed(x: Tensor, weight: Tensor) -> None:
    if _needs_grad(x, weight):
        raise RuntimeError(
            "in-place ECA would overwrite the x that its gradient needs; "
            "use inplace=False, or torch.no_grad() for inference"
        )


def plain(x: Tensor, weight: Tensor, padding_mode: str, inplace: bool) -> Tensor:
    """y, without the compiled operators. Args as for eca()."""
    circular = _circular(padding_mode)
    _check(x, weight, padding_mode)
    if inplace:
        _check_not_needed(x, weight)
    y = decomposed.eca(x, weight, circular)
    return x.copy_(y) if inplace else y


def _eca(x: Tensor, weight: Tensor, padding_mode: str, backend: str) -> Tensor:
    if _without_kernels(x, backend) or _needs_grad(x, weight):
        return plain(x, weight, padding_mode, False)
    return _inference(x, weight, _circular(padding_mode))


def check_no_gradient(x: Tensor, weight: Tensor, out: Tensor) -> None:
    """Raise RuntimeError where a gradient of what is written into out would be needed."""
    if _needs_grad(x, weight) or (torch.is_grad_enabled() and out.requires_grad):
        raise RuntimeError(
            "what eca() writes into out= has no gradient; leave out= away, or call this in "
            "torch.no_grad()"
        )


def _check_out(x: Tensor, weight: Tensor, out: Tensor) -> None:
    if out.shape != x.shape or out.dtype != x.dtype or out.device != x.device:
        raise ValueError(
            f"expected out of the shape and dtype and on the device of x, {x.shape} on {x.device}, "
            f"got {out.shape} on {out.device}; make it with torch.empty_like(x)"
        )
    check_no_gradient(x, weight, out)


def eca(
    x: Tensor,
    weight: Tensor,
    padding_mode: str = "zeros",
    backend: str = "auto",
    out: Tensor | None = None,
) -> Tensor:
    """eca() with a gradient from autograd, through plain operations whatever the backend.

    Args:
        x: (N, C, *spatial).
        weight: (1 or C, 1, k).
        padding_mode: as of eca().
        backend: "auto", "native" or "reference".
        out: as of eca(), but y is copied to it.

    Raises:
        torch.jit.Error: where eca() raises, and for the backend "triton".
    """
    if out is None:
        return _eca(x, weight, padding_mode, backend)
    _check_out(x, weight, out)
    return out.copy_(_eca(x, weight, padding_mode, backend))


def eca_(x: Tensor, weight: Tensor, padding_mode: str = "zeros", backend: str = "auto") -> Tensor:
    """eca_(). Args and errors as for eca()."""
    if _without_kernels(x, backend):
        return plain(x, weight, padding_mode, True)
    _check_not_needed(x, weight)
    _inference_(x, weight, _circular(padding_mode))
    return x


def pool(x: Tensor, backend: str = "auto") -> Tensor:
    """pool() with a gradient from autograd. Args as for pool()."""
    if _without_kernels(x, backend) or (torch.is_grad_enabled() and x.requires_grad):
        return decomposed.pool(x)
    return _pool(x)


def rescale(x: Tensor, gate: Tensor, backend: str = "auto") -> Tensor:
    """rescale() with a gradient from autograd. Args as for rescale()."""
    if _without_kernels(x, backend) or _needs_grad(x, gate):
        return decomposed.rescale(x, gate)
    return _rescale(x, gate)


def linked_pool(x: Tensor, backend: str) -> tuple[Tensor, Tensor | None]:
    return pool(x, backend), None


def linked_rescale(x: Tensor, gate: Tensor, token: Tensor | None, backend: str) -> Tensor:
    return rescale(x, gate, backend)
