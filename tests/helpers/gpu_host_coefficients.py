"""The CUDA kernels of the arithmetic between a tail's passes, run on the host."""

import struct
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from helpers.gpu_host import DTYPES, HostGpu

OPERATIONS = (
    "batch_statistics",
    "tail_coefficients",
    "tail_totals",
    "tail_gradient_coefficients",
)
SIZES = {torch.float64: 8, torch.float32: 4, torch.float16: 2, torch.bfloat16: 2}


class CoefficientGpu(HostGpu):
    """A process with the kernels. run() takes what the operators of these names take."""

    def to_compile(self) -> list[Path]:
        host = self.sources / "tests/gpu_host/simt"
        kernels = self.sources / "csrc/cuda/coefficients.cu"
        return [kernels, host / "runtime.cpp", host / "coefficients_runner.cpp"]

    def run(self, operation: str, *arguments: Any, seed: int = 1) -> tuple[Tensor, ...]:
        """The results of the operator, by the kernels; empty where it returns an empty tensor."""
        native: Any = getattr(torch.ops.eca_fused, operation)
        tensors, others, x = _split(operation, arguments)
        like = native(*arguments)  # for its dtypes and shapes
        weight = tensors[0] if operation == "tail_coefficients" else None
        if operation == "tail_totals":
            weight = tensors[1]
        taps = torch.ones(1, 1, 1) if weight is None else weight
        pixels = others["pixels"] if operation == "batch_statistics" else x[0, 0].numel()
        sums = operation == "tail_totals" and tensors[0].shape[0] == 3  # type: ignore[union-attr]
        n, c = x.shape[-2:] if operation == "batch_statistics" else x.shape[:2]
        dtype = torch.float32 if operation == "batch_statistics" else x.dtype
        numbers = (
            OPERATIONS.index(operation), DTYPES.index(dtype), n, c, pixels,
            DTYPES.index(taps.dtype), taps.shape[2], taps.shape[0] != 1,
            others.get("circular", False), sums, seed,
        )  # fmt: skip
        floats = [others.get(k, 0.0) for k in ("eps", "identity_eps", "values", "identity_values")]
        return self._ask(numbers, floats, tensors, like)

    def update(
        self, planes: Tensor, pixels: int, running: Sequence[Tensor], factor: float
    ) -> tuple[Tensor, ...]:
        """Mean and variance of a batch, and what its running mean and variance become.

        Args:
            planes: (2, N, C), as the operator moments() returns them.
            pixels: of a plane.
            running: the running mean and variance (C,).
            factor: by which they follow the batch.
        """
        numbers = (0, 0, *planes.shape[1:], pixels, 0, 1, False, False, False, 1)
        own = torch.empty(planes.shape[2], dtype=torch.float64)
        given = [planes, *running]
        return self._ask(numbers, [0.0, 0.0, factor, 0.0], given, [own, own, *running])

    def _ask(
        self,
        numbers: Sequence[int],
        floats: Sequence[float],
        tensors: Sequence[Tensor | None],
        like: Sequence[Tensor],
    ) -> tuple[Tensor, ...]:
        request = struct.pack("13q4d", *map(int, numbers), len(tensors), len(like), *floats)
        for t in tensors:
            request += _head(t) + (b"" if t is None else _bytes(t))
        request += b"".join(_head(t if t.numel() else None) for t in like)
        self.call(request)
        status = self.text()
        assert status == "ok", status
        return tuple(self.tensor(t).reshape(t.shape) for t in like)


def _head(t: Tensor | None) -> bytes:
    if t is None:
        return struct.pack("2q", 0, 0)
    return struct.pack("2q", DTYPES.index(t.dtype), t.numel() * SIZES[t.dtype])


def _bytes(t: Tensor) -> bytes:
    return bytes(t.contiguous().reshape(-1).view(torch.uint8).numpy())


def _split(
    operation: str, arguments: Sequence[Any]
) -> tuple[list[Tensor | None], dict[str, Any], Tensor]:
    """The tensors after x, the other arguments by name, and x (or the moments)."""
    schema = getattr(torch.ops.eca_fused, operation).default._schema
    tensors: list[Tensor | None] = []
    others = {}
    for argument, value in zip(schema.arguments, arguments, strict=True):
        if argument.name == "x":
            continue
        if "Tensor" in str(argument.type):
            tensors.append(value)
        else:
            others[argument.name] = value
    first = arguments[0]
    return tensors, others, first
