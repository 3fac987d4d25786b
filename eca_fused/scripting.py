"""What functional.py has, for TorchScript, which compiles these in their place.

A scripted layer runs the compiled operator where no gradient is needed, so that a process which
loads it has to `import eca_fused` first. With fused=False it needs torch alone.
"""

import torch
from torch import Tensor

from eca_fused import decomposed, native

__all__ = ["eca", "eca_", "plain"]

if native.missing is None:

    def _inference(x: Tensor, weight: Tensor, circular: bool) -> Tensor:
        return torch.ops.eca_fused.inference(x, weight, circular)  # type: ignore[no-any-return]

    def _inference_(x: Tensor, weight: Tensor, circular: bool) -> None:
        torch.ops.eca_fused.inference_(x, weight, circular)

else:
    _inference = decomposed.eca

    def _inference_(x: Tensor, weight: Tensor, circular: bool) -> None:
        x.copy_(decomposed.eca(x, weight, circular))


if "cuda" in native.devices:

    def _has_kernels(x: Tensor) -> bool:
        return x.is_cpu or x.is_cuda

else:

    def _has_kernels(x: Tensor) -> bool:
        return x.is_cpu


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
