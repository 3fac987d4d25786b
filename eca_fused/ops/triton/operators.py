"""What the operators of the Triton backend share: how they are made, where they run."""

import contextlib
from typing import Any

import torch
import triton
from torch import Tensor

from eca_fused.ops.results import output_strides

INTERPRETED = bool(triton.knobs.runtime.interpret)  # TRITON_INTERPRET=1: kernels run on the CPU

# torch.compile cannot trace into kernels that the interpreter runs.
operator: Any = torch.library.custom_op if INTERPRETED else torch.library.triton_op


def on_device(x: Tensor) -> contextlib.AbstractContextManager[object]:
    """Make the device of x the current one, because Triton launches there."""
    if x.is_cuda and torch.cuda.is_initialized():  # type: ignore[no-untyped-call]  # it is not while tracing without a GPU
        return torch.cuda.device(x.device)
    return contextlib.nullcontext()


def empty_like(x: Tensor) -> Tensor:
    return x.new_empty_strided(x.shape, output_strides(x))
