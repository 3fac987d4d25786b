"""eca() and eca_() for TorchScript, which compiles these in their place.

A scripted layer runs the compiled operator where no gradient is needed, so that a process which
loads it has to `import eca_fused` first. Scripted with backend="reference", it needs nothing.
"""

import torch
from torch import Tensor

from eca_fused import decomposed, native

__all__ = ["eca", "eca_"]

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


def eca(x: Tensor, weight: Tensor, padding_mode: str = "zeros", backend: str = "auto") -> Tensor:
    """eca() with a gradient from autograd, through plain operations.

    Args:
        x: (N, C, *spatial).
        weight: (1 or C, 1, k).
        padding_mode, backend: as of eca().
    """
    circular = _circular(padding_mode)
    if backend == "reference" or _needs_grad(x, weight) or not _has_kernels(x):
        return decomposed.eca(x, weight, circular)
    return _inference(x, weight, circular)


def eca_(x: Tensor, weight: Tensor, padding_mode: str = "zeros", backend: str = "auto") -> Tensor:
    """eca_(). Args as for eca()."""
    circular = _circular(padding_mode)
    if _needs_grad(x, weight):
        raise RuntimeError(
            "in-place ECA would overwrite the x that its gradient needs; "
            "use inplace=False, or torch.no_grad() for inference"
        )
    if backend == "reference" or not _has_kernels(x):
        return x.copy_(decomposed.eca(x, weight, circular))
    _inference_(x, weight, circular)
    return x
