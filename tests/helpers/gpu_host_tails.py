"""Runs the CUDA kernels of a residual block's tail on the CPU: see gpu_host.py."""

import json
import struct
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from helpers.gpu_host import DTYPES, HostGpu, Outcome, View, in_shape, like, raw, view

ACTIVATIONS = ["none", "relu", "silu", "gelu"]  # as in csrc/eca.h
OPERATIONS = ["moments", "tail", "tail_sums", "tail_gradients"]


class PassGpu(HostGpu):
    """A process with the kernels of some passes over maps, in csrc/cuda/FAMILY*.cu."""

    family = ""
    calls: tuple[tuple[str, str], ...] = ()  # what the files of the dtypes have, its arguments

    def to_compile(self) -> list[Path]:
        cuda, host = self.sources / "csrc/cuda", self.sources / "tests/gpu_host/simt"
        found = [cuda / f"{self.family}_{dtype}.cu" for dtype in self.dtypes]
        found += [
            cuda / f"{self.family}.cu",
            cuda / "tail_plan.cpp",
            self.sources / "csrc/plan.cpp",
        ]
        return [*found, host / "runtime.cpp", host / f"{self.family}_runner.cpp", self.absent()]

    def absent(self) -> Path:
        types = {"float32": "float", "float64": "double", "float16": "half"}
        lines = [
            f'#include "{self.sources}/csrc/cuda/cuda.h"',
            f'#include "{self.sources}/csrc/cuda/device.h"',
            "namespace eca::cuda {",
        ]
        for name, arguments in self.calls:
            lines.append(f"template <class T> void {name}({arguments}, const Memory&) {{}}")
            lines += [
                f"template void {name}<{types.get(dtype, dtype)}>({arguments}, const Memory&);"
                for dtype in ("float32", "float64", "float16", "bfloat16")
                if dtype not in self.dtypes
            ]
        path = self.folder / "absent.cpp"
        path.write_text("\n".join([*lines, "}", ""]))
        return path


class TailGpu(PassGpu):
    """Maps are (N, C, S), coefficients as in csrc/tail_ops.cpp."""

    family = "tail"
    calls = (
        ("run_tail", "const eca::Tail&, const TailPlan&"),
        ("run_tail_gradients", "const TailGradients&, const TailPlan&"),
        ("run_moments", "const eca::Moments&, const TailSumPlan&"),
        ("run_tail_sums", "const TailSums&, const TailSumPlan&"),
    )

    def run(
        self,
        operation: str,
        x: Tensor,
        layout: str,
        *,
        identity: Tensor | None = None,
        dy: Tensor | None = None,
        mask: Tensor | None = None,
        planes: Tensor | None = None,
        channels: Tensor | None = None,
        gradient_planes: Tensor | None = None,
        gradient_channels: Tensor | None = None,
        activation: str = "none",
        want_mask: bool = False,
        identity_sum: bool = False,
        by: tuple[bool, bool] = (False, False),
        wants: tuple[bool, bool] = (True, True),
        seed: int = 1,
        count: bool = False,
        multiprocessors: int = 132,
        misplaced: int = 0,
    ) -> Outcome:
        """(first map, second map, mask, sums (3, N, C)): what was not written is NaN or 255."""
        last = layout != "contiguous"
        n, c, s = x.shape
        none = View(x[:0], 0, 0, 0)
        out = like(x, last)
        maps = [view(x, last), *(none if t is None else view(t, last) for t in (identity, dy)), out]
        numbers: list[Any] = [
            OPERATIONS.index(operation), DTYPES.index(x.dtype), last, n, c, s,
            ACTIVATIONS.index(activation), identity is not None, want_mask, identity_sum, *by,
            *wants, seed, count, multiprocessors, misplaced,
        ]  # fmt: skip
        for v in maps:
            numbers += v.fields()
        rows, length = (n * s, c) if last else (n * c, s)
        bits = torch.full((rows * ((length + 7) // 8),), 255, dtype=torch.uint8)
        request = struct.pack(f"{len(numbers)}q", *map(int, numbers))
        request += b"".join(raw(v.memory) for v in maps[:3])
        if operation in OPERATIONS[2:]:
            request += raw(bits if mask is None else mask)
        wide = torch.float64 if x.dtype == torch.float64 else torch.float32
        for t, shape in (
            (planes, (2, n, c)),
            (channels, (3, c)),
            (gradient_planes, (2, n, c)),
            (gradient_channels, (4, c)),
        ):
            given = torch.zeros(shape, dtype=wide) if t is None else t
            assert given.shape == shape
            assert given.dtype == wide
            request += raw(torch.zeros(misplaced, dtype=wide)) + raw(given)
        self.call(request)
        status = self.text()
        assert status == "ok", status
        plan, traffic = json.loads(self.text()), json.loads(self.text())
        results = [in_shape(self.tensor(out.memory), out, x, last) for _ in range(2)]
        written = self.tensor(bits)
        sums = self.tensor(torch.empty(3 * n * c, dtype=torch.float64)).reshape(3, n, c)
        return Outcome((*results, written, sums), plan, traffic)
