"""The functions that TorchScript compiles in place of this package's own.

A scripted layer runs the compiled operator if no gradient is needed, so a process that loads it
must `import eca_fused` first. With fused=False it needs torch alone.

A script cannot see Python's state, so use_backend() and ECA_FUSED_BACKEND do not affect it. A trace
keeps what "auto" meant while it was made. Neither has Triton kernels: asking for them is an error.
"""

import torch
from torch import Tensor

from eca_fused.ops import graph, native
from eca_fused.ops.checks import (
    check,
    check_no_gradient,
    check_out,
    check_overwrites,
    is_circular,
    needs_grad,
)
from eca_fused.ops.library import operators

__all__ = [
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
        return operators.inference(x, weight, circular)  # type: ignore[no-any-return]

    def _inference_(x: Tensor, weight: Tensor, circular: bool) -> None:
        operators.inference_(x, weight, circular)

    def _pool(x: Tensor) -> Tensor:
        return operators.pool(x)  # type: ignore[no-any-return]

    def _rescale(x: Tensor, gate: Tensor) -> Tensor:
        return operators.rescale(x, gate)  # type: ignore[no-any-return]

else:
    _pool, _rescale = graph.pool, graph.rescale
    _inference = graph.eca

    def _inference_(x: Tensor, weight: Tensor, circular: bool) -> None:
        x.copy_(graph.eca(x, weight, circular))


if "cuda" in native.devices:

    def _has_kernels(x: Tensor) -> bool:
        return x.is_cpu or x.is_cuda

elif native.missing is None:

    def _has_kernels(x: Tensor) -> bool:
        return x.is_cpu

else:

    def _has_kernels(x: Tensor) -> bool:
        return False


def _without_kernels(x: Tensor, backend: str) -> bool:
    """Whether plain operations are asked for, or are all that is available."""
    if backend == "triton":
        raise RuntimeError(
            "backend 'triton' cannot be used in TorchScript, which has no Triton kernels; "
            "set it to 'auto' before the model is scripted or traced"
        )
    if backend not in ["auto", "native", "reference"]:
        raise ValueError(f"expected backend as one of auto, native, reference, got '{backend}'")
    if backend == "native" and not _has_kernels(x):
        raise RuntimeError(
            f"backend 'native' cannot be used: there are no compiled kernels for {x.device} here; "
            "set it to 'auto' before the model is scripted or traced"
        )
    return backend == "reference" or not _has_kernels(x)


def plain(x: Tensor, weight: Tensor, padding_mode: str, inplace: bool) -> Tensor:
    """y, without the compiled operators. Args as for eca()."""
    circular = is_circular(padding_mode)
    check(x, weight, circular)
    if inplace:
        check_overwrites(x, weight)
    y = graph.eca(x, weight, circular)
    return x.copy_(y) if inplace else y


def _eca(x: Tensor, weight: Tensor, padding_mode: str, backend: str) -> Tensor:
    if _without_kernels(x, backend) or needs_grad(x, weight):
        return plain(x, weight, padding_mode, False)
    return _inference(x, weight, is_circular(padding_mode))


def eca(
    x: Tensor,
    weight: Tensor,
    padding_mode: str = "zeros",
    backend: str = "auto",
    out: Tensor | None = None,
) -> Tensor:
    """eca() whose gradient comes from autograd through plain operations, whatever the backend.

    Args:
        x: (N, C, *spatial).
        weight: (1 or C, 1, k).
        padding_mode: as for eca().
        backend: "auto", "native" or "reference".
        out: as for eca(), but y is copied to it.

    Raises:
        torch.jit.Error: if eca() would raise, and for the backend "triton".
    """
    if out is None:
        return _eca(x, weight, padding_mode, backend)
    check_out(x, out)
    check_no_gradient(x, weight, out)
    return out.copy_(_eca(x, weight, padding_mode, backend))


def eca_(x: Tensor, weight: Tensor, padding_mode: str = "zeros", backend: str = "auto") -> Tensor:
    """eca_(). Args and errors as for eca()."""
    if _without_kernels(x, backend):
        return plain(x, weight, padding_mode, True)
    check_overwrites(x, weight)
    _inference_(x, weight, is_circular(padding_mode))
    return x


def pool(x: Tensor, backend: str = "auto") -> Tensor:
    """pool() with a gradient from autograd. Args as for pool()."""
    if _without_kernels(x, backend) or (torch.is_grad_enabled() and x.requires_grad):
        return graph.pool(x)
    return _pool(x)


def rescale(x: Tensor, gate: Tensor, backend: str = "auto") -> Tensor:
    """rescale() with a gradient from autograd. Args as for rescale()."""
    if _without_kernels(x, backend) or needs_grad(x, gate):
        return graph.rescale(x, gate)
    return _rescale(x, gate)


def linked_pool(x: Tensor, backend: str) -> tuple[Tensor, Tensor | None]:
    return pool(x, backend), None


def linked_rescale(x: Tensor, gate: Tensor, token: Tensor | None, backend: str) -> Tensor:
    return rescale(x, gate, backend)
