"""What is going on around a call of the fused functions: transforms, tracing, exports."""

import torch
from torch.autograd import forward_ad
from torch.compiler import is_exporting

__all__ = ["exporting_to_onnx", "is_tracing", "transformed"]


def is_tracing() -> bool:
    """By torch.jit.trace; torch.jit.is_tracing() takes longer."""
    return torch._C._is_tracing()


# torch.compile cannot trace the question, and breaks the graph at it without a word.
is_tracing._dynamo_marked_constant = True  # type: ignore[attr-defined]


def transformed() -> bool:
    """Inside torch.func's transforms or forward-mode AD, which have rules of their own."""
    return torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0


def exporting_to_onnx() -> bool:
    """ONNX knows standard operators only; any other export keeps ours."""
    return is_exporting() and torch.onnx.is_in_onnx_export()
