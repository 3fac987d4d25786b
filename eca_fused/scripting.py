"""What functional.py has, for TorchScript, which compiles these in their place.

A scripted layer runs the compiled operator where no gradient is needed, so that a process which
loads it has to `import eca_fused` first. With fused=False it needs torch alone.
"""

import torch
from torch import Tensor

from eca_fused import decomposed, native

__all__ = ["check_map", "eca", "eca_", "linked_pool", "linked_rescale", "plain", "pool", "rescale"]

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

else:

    def _has_kernels(x: Tensor) -> bool:
        return x.is_cpu


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
    if inplace:
        _check_not_needed(x, weight)
    y = decomposed.eca(x, weight, _circular(padding_mode))
    return x.copy_(y) if inplace else y


def eca(x: Tensor, weight: Tensor, padding_mode: str = "zeros", backend: str = "auto") -> Tensor:
    """eca() with a gradient from autograd, through plain operations.

    Args:
        x: (N, C, *spatial).
        weight: (1 or C, 1, k).
        padding_mode, backend: as of eca().
    """
    if backend == "reference" or _needs_grad(x, weight) or not _has_kernels(x):
        return plain(x, weight, padding_mode, False)
    return _inference(x, weight, _circular(padding_mode))


def eca_(x: Tensor, weight: Tensor, padding_mode: str = "zeros", backend: str = "auto") -> Tensor:
    """eca_(). Args as for eca()."""
    _check_not_needed(x, weight)
    if backend == "reference" or not _has_kernels(x):
        return plain(x, weight, padding_mode, True)
    _inference_(x, weight, _circular(padding_mode))
    return x


def pool(x: Tensor, backend: str = "auto") -> Tensor:
    """pool() with a gradient from autograd. Args as for pool()."""
    if backend == "reference" or not _has_kernels(x):
        return decomposed.pool(x)
    if torch.is_grad_enabled() and x.requires_grad:
        return decomposed.pool(x)
    return _pool(x)


def rescale(x: Tensor, gate: Tensor, backend: str = "auto") -> Tensor:
    """rescale() with a gradient from autograd. Args as for rescale()."""
    if backend == "reference" or _needs_grad(x, gate) or not _has_kernels(x):
        return decomposed.rescale(x, gate)
    return _rescale(x, gate)


def linked_pool(x: Tensor, backend: str) -> tuple[Tensor, Tensor | None]:
    return pool(x, backend), None


def linked_rescale(x: Tensor, gate: Tensor, token: Tensor | None, backend: str) -> Tensor:
    return rescale(x, gate, backend)
