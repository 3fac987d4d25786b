"""Runs the CUDA kernels of tails with ECA's gate on the CPU: see gpu_host.py."""

import json
import struct
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from helpers.gpu_host import (
    DTYPES,
    H200,
    LETTERS,
    Forced,
    Outcome,
    Refused,
    View,
    in_shape,
    like,
    raw,
    view,
)
from helpers.gpu_host_tails import ACTIVATIONS, TailGpu


class BlockTailGpu(TailGpu):
    """A process with the kernels. Maps are (N, C, S), other arguments as in csrc/tail_ops.cpp."""

    def to_compile(self) -> list[Path]:
        cuda, host = self.sources / "csrc/cuda", self.sources / "tests/gpu_host/simt"
        found = [path for path in super().to_compile() if path.stem != "tail_runner"]
        found += [cuda / f"block_tail_{d}.cu" for d in self.dtypes if d != "float64"]
        found += [cuda / "block_tail.cu", cuda / "coefficients.cu"]
        return [*found, host / "block_tail_runner.cpp"]

    def absent(self) -> Path:
        path = super().absent()
        names = {"float32": "float", "float16": "half", "bfloat16": "bfloat16"}
        lines = ["namespace eca::cuda {"]
        for call, argument in (
            ("run_block_tail", "BlockTail"),
            ("run_block_tail_backward", "BlockTailBackward"),
        ):
            arguments = f"const {argument}&, const Plan&, const Memory&"
            lines.append(f"template <class T> void {call}({arguments}) {{}}")
            lines += [
                f"template void {call}<{name}>({arguments});"
                for dtype, name in names.items()
                if dtype not in self.dtypes
            ]
        lines.append("}")
        path.write_text(path.read_text() + "\n".join([*lines, ""]))
        return path

    def run_block(
        self,
        x: Tensor,
        identity: Tensor | None,
        weight: Tensor,
        scale: Tensor,
        channels: Tensor,
        layout: str,
        *,
        circular: bool = False,
        activation: str = "relu",
        want_mask: bool = True,
        dy: Tensor | None = None,
        saved: tuple[Tensor, Tensor, Tensor] | None = None,
        identity_sum: bool = False,
        wants: tuple[bool, bool, bool] = (True, True, True),
        into: Tensor | None = None,
        gpu: dict[str, int] = H200,
        forced: Forced | None = None,
        seed: int = 1,
        resident: int = 0,
        count: bool = False,
    ) -> Outcome:
        """Forward y, mask, distance and gate; with dy dx, d_identity, sums, dmean and dweight.

        saved are mask, distance and gate of the forward pass. y lies in its memory as `into` does.
        What was not written is NaN or 255.
        """
        last = layout != "contiguous"
        n, c, s = x.shape
        none = View(x[:0], 0, 0, 0)
        out = like(x, last) if into is None else view(into, last)
        maps = [view(x, last), *(none if t is None else view(t, last) for t in (identity, dy)), out]
        f = forced or Forced("two_pass")
        numbers: list[Any] = [
            dy is not None, DTYPES.index(x.dtype), last, n, c, s, DTYPES.index(weight.dtype),
            weight.shape[2], weight.shape[0] != 1, circular, ACTIVATIONS.index(activation),
            identity is not None, want_mask, identity_sum, *wants, seed, resident, count,
            *gpu.values(), forced is not None, ord(LETTERS[f.strategy]), f.tile, f.threads, f.depth,
        ]  # fmt: skip
        for v in maps:
            numbers += v.fields()
        rows, length = (n * s, c) if last else (n * c, s)
        bits = torch.full((rows * ((length + 7) // 8),), 255, dtype=torch.uint8)
        request = struct.pack(f"{len(numbers)}q", *map(int, numbers))
        request += b"".join(raw(v.memory) for v in maps[:3])
        request += raw(weight) + raw(scale) + raw(channels)
        if dy is not None:
            assert saved is not None
            request += b"".join(map(raw, saved))
        self.call(request)
        status = self.text()
        if "cannot run" in status:
            raise Refused(status)
        assert status == "ok", status
        plan, traffic = json.loads(self.text()), json.loads(self.text())
        first, second = (in_shape(self.tensor(out.memory), out, x, last) for _ in range(2))
        mask = self.tensor(bits)
        small = torch.empty((n, c), dtype=scale.dtype)
        distance, gate = (self.tensor(small).reshape(n, c) for _ in range(2))
        sums = self.tensor(torch.empty(3 * n * c, dtype=torch.float64)).reshape(3, n, c)
        dmean = self.tensor(small).reshape(n, c)
        dweight = self.tensor(weight).reshape(weight.shape)
        if dy is None:
            return Outcome((first, mask, distance, gate), plan, traffic)
        return Outcome((first, second, sums, dmean, dweight), plan, traffic)
