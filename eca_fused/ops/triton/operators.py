"""What the operators of the Triton backend share: how they are made, what they check, their device.

torch finds an operator's kernels by reading the source of its function, and of those that it calls
by a plain name: they are part of the keys of its caches of compiled graphs. So operators call
launches, and each other's functions, by such names.
"""

import contextlib
from typing import Any

import torch
import triton
from torch import Tensor

from eca_fused.ops.results import output_strides, sums_dtype

INTERPRETED = bool(triton.knobs.runtime.interpret)  # TRITON_INTERPRET=1: kernels run on the CPU

# torch.compile cannot trace into kernels that the interpreter runs.
operator: Any = torch.library.custom_op if INTERPRETED else torch.library.triton_op


def on_device(x: Tensor) -> contextlib.AbstractContextManager[object]:
    """Make the device of x the current one, because Triton launches there."""
    if x.is_cuda and torch.cuda.is_initialized():  # type: ignore[no-untyped-call]  # it is not while tracing without a GPU
        return torch.cuda.device(x.device)
    return contextlib.nullcontext()


def check_coefficients(
    x: Tensor,
    activation: int,
    activations: tuple[str, ...],
    coefficients: dict[str, tuple[Tensor, tuple[int, ...]]],
) -> None:
    """Raise ValueError for arguments that do not fit.

    Args:
        x: a map.
        activation: a place in activations.
        activations: their names.
        coefficients: by name, with the shapes that they must have.
    """
    if not 0 <= activation < len(activations):
        raise ValueError(
            f"expected activation from 0 to {len(activations) - 1} ({', '.join(activations)}), "
            f"got {activation}"
        )
    dtype = sums_dtype(x)
    for name, (t, shape) in coefficients.items():
        fits = t.shape == shape and t.dtype == dtype and t.device == x.device
        if not (fits and t.is_contiguous()):
            raise ValueError(
                f"expected {name} contiguous, of shape {tuple(shape)} and {dtype} on {x.device}, "
                f"got {tuple(t.shape)}, {t.dtype}, on {t.device}"
            )


def empty_like(x: Tensor) -> Tensor:
    return x.new_empty_strided(x.shape, output_strides(x))
