"""Runs the CUDA kernels' own source on the CPU: builds gpu_host/simt and talks to its runner."""

import json
import os
import shutil
import struct
import subprocess
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from helpers.cases import assert_near
from helpers.processes import ROOT

COMPILER = os.environ.get("CXX", "g++")
missing = None if shutil.which(COMPILER) else f"needs a C++ compiler: {COMPILER}"

SANITIZED = "-O1 -g1 -fsanitize=address,undefined -fno-sanitize-recover=all"
FAST = "-O2"
DTYPES = [torch.float32, torch.float64, torch.float16, torch.bfloat16]  # as in csrc/eca.h

# As in csrc/plan.h. A test makes another GPU for a plan that needs one.
H200 = {
    "capability": 90,
    "multiprocessors": 132,
    "shared_per_block": 227 << 10,
    "shared_per_multiprocessor": 228 << 10,
    "l2": 50 << 20,
    "threads_per_multiprocessor": 2048,
}
A100 = H200 | {"capability": 80, "multiprocessors": 108}


class Fault(Exception):
    """The kernels did what a GPU would not forgive; the message says what."""


class Refused(Exception):
    """The kernels cannot run the forced plan."""


# The letters of csrc/plan.h, in which tests/gpu_host/simt/runner.cpp reads a forced plan.
LETTERS = {
    "rows": "R",
    "runs": "F",
    "columns": "P",
    "kept": "K",
    "stream": "S",
    "two_pass": "C",
}


@dataclass
class Forced:
    """A plan to make instead of the planner's choice, as in csrc/plan.h."""

    strategy: str
    tile: int = 0
    threads: int = 64
    depth: int = 0


@dataclass
class Outcome:
    """What a call returned, its plan, and the memory traffic of each launch if it was counted."""

    tensors: tuple[Tensor, ...]
    plan: dict[str, Any]
    traffic: list[dict[str, Any]] = field(default_factory=list)


@dataclass
class View:
    """A tensor as the kernels see it, in csrc/eca.h's terms: strides and offset in elements."""

    memory: Tensor  # what the buffer holds
    offset: int
    sample_stride: int
    row_stride: int

    def fields(self) -> tuple[int, ...]:
        return self.memory.numel(), self.offset, self.sample_stride, self.row_stride


def view(x: Tensor, channels_last: bool) -> View:
    """x (N, C, S) in place in its storage, up to the last element of x."""
    row = x.stride(2) if channels_last else x.stride(1)
    end = (
        x.storage_offset() + 1 + sum((d - 1) * t for d, t in zip(x.shape, x.stride(), strict=True))
    )
    whole = torch.empty(0, dtype=x.dtype).set_(x.untyped_storage())  # type: ignore[call-overload]
    return View(whole[: end if x.numel() else 0], x.storage_offset(), x.stride(0), row)


def like(x: Tensor, channels_last: bool) -> View:
    """A dense result of the shape and layout of x (N, C, S)."""
    n, c, s = x.shape
    return View(torch.empty(n * c * s, dtype=x.dtype), 0, c * s, c if channels_last else s)


def in_shape(memory: Tensor, v: View, x: Tensor, channels_last: bool) -> Tensor:
    """The map in memory, as (N, C, S)."""
    pixel, channel = (v.row_stride, 1) if channels_last else (1, v.row_stride)
    return memory.as_strided(x.shape, (v.sample_stride, channel, pixel), v.offset)


def raw(t: Tensor) -> bytes:
    return bytes(t.contiguous().view(torch.uint8).numpy().data) if t.numel() else b""


def _sums_dtype(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32


class HostGpu:
    """A process with the kernels, started again after a fault."""

    def __init__(
        self,
        folder: Path,
        flags: str,
        sources: Path = ROOT,
        dtypes: Sequence[str] = ("float32", "float64", "float16", "bfloat16"),
        tails: bool = False,
    ) -> None:
        """With tails also the step of tail.h, for which the kernels are compiled once more."""
        self.folder, self.flags, self.sources, self.dtypes = folder, flags, sources, dtypes
        self.tails = tails
        self.process: subprocess.Popen[bytes] | None = None
        self.build()

    def build(self) -> None:
        common = ["-std=c++17", "-DECA_HOST_SIMT", f"-I{self.sources / 'tests/gpu_host/simt'}"]
        common += [*self.flags.split(), "-Wno-unknown-pragmas"]
        self.folder.mkdir(parents=True, exist_ok=True)
        sources = self.to_compile()

        def compile_one(source: Path) -> Path:
            target = self.folder / f"{source.stem}.o"
            command = [COMPILER, *common, "-x", "c++", "-c", str(source), "-o", str(target)]
            done = subprocess.run(command, capture_output=True, text=True)
            assert done.returncode == 0, done.stderr[-5000:]
            return target

        with ThreadPoolExecutor(os.cpu_count()) as pool:
            objects = list(pool.map(compile_one, sources))
        self.program = self.folder / "runner"
        subprocess.run([COMPILER, *common, *map(str, objects), "-o", self.program], check=True)

    def to_compile(self) -> list[Path]:
        names = [f"{dtype}.cu" for dtype in self.dtypes] + ["cuda.cu"]
        sources = [self.sources / "csrc/cuda" / name for name in names]
        sources += [self.sources / "csrc/plan.cpp"]
        host = self.sources / "tests/gpu_host/simt"
        sources += [host / "runtime.cpp", host / "runner.cpp"]
        sources += [host / "tail.cpp"] if self.tails else []
        return [*sources, self.absent()]

    def absent(self) -> Path:
        """A source with the functions of what is left out, which are never called."""
        names = ("float", "double", "half", "bfloat16")  # of DTYPES
        lines = [
            f'#include "{self.sources}/csrc/cuda/cuda.h"',
            f'#include "{self.sources}/csrc/cuda/device.h"',
            "namespace eca::cuda {",
            "template <class T> void run_forward(Forward, const Plan&, const Memory&) {}",
            "template <class T> void run_backward(const Backward&, const Plan&, const Memory&) {}",
            "template <class T> void run_reduce(const Reduce&, const Plan&, const Memory&) {}",
            "template <class T> void run_scale(const Scale&, const Plan&, const Memory&) {}",
        ]
        for dtype, name in zip(DTYPES, names, strict=True):
            if str(dtype).removeprefix("torch.") not in self.dtypes:
                call = "const Plan&, const Memory&"
                lines.append(f"template void run_forward<{name}>(Forward, {call});")
                lines.append(f"template void run_backward<{name}>(const Backward&, {call});")
                lines.append(f"template void run_reduce<{name}>(const Reduce&, {call});")
                lines.append(f"template void run_scale<{name}>(const Scale&, {call});")
        if not self.tails:
            lines += [
                "void tail_forward(const Forward&, const Map&, const Plan&, const Memory&) {}",
                "void tail_backward(const Backward&, const Map&, const Map&, const Plan&,",
                "                   const Memory&) {}",
                "void tail_sums(const Reduce&, const Map&, const Plan&, const Memory&) {}",
            ]
        path = self.folder / "absent.cpp"
        path.write_text("\n".join([*lines, "}", ""]))
        return path

    def close(self) -> None:
        if self.process is not None:
            self.process.stdin.close()  # type: ignore[union-attr]
            self.process.wait()
            self.process.stdout.close()  # type: ignore[union-attr]
            self.process = None

    def call(self, request: bytes) -> None:
        if self.process is None:
            self.errors = open(self.folder / "stderr", "w+b")  # noqa: SIM115
            self.process = subprocess.Popen(
                [self.program], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self.errors
            )
        try:
            self.process.stdin.write(request)  # type: ignore[union-attr]
            self.process.stdin.flush()  # type: ignore[union-attr]
        except BrokenPipeError:
            self._fail()

    def _fail(self) -> None:
        process, self.process = self.process, None
        assert process is not None
        status = process.wait()
        self.errors.seek(0)
        text = self.errors.read().decode(errors="replace")
        raise Fault(f"exit status {status}: {text[:3000]}")

    def _read(self, count: int) -> bytes:
        data = self.process.stdout.read(count)  # type: ignore[union-attr]
        if len(data) < count:
            self._fail()
        return data

    def text(self) -> str:
        (length,) = struct.unpack("q", self._read(8))
        return self._read(length).decode()

    def tensor(self, like: Tensor) -> Tensor:
        data = bytearray(self._read(like.numel() * like.element_size()))
        return torch.frombuffer(data, dtype=like.dtype) if data else like.new_empty(0)

    def _send(
        self,
        x: Tensor,
        weight: Tensor,
        circular: bool,
        channels_last: bool,
        maps: list[View],
        small: bytes,
        *,
        operation: int,
        wants: tuple[bool, bool, bool, bool],
        gpu: dict[str, int],
        forced: Forced | None,
        seed: int,
        resident: int,
        count: bool,
    ) -> tuple[dict[str, Any], list[dict[str, Any]]]:
        n, c, s = x.shape
        w = forced or Forced("two_pass")
        numbers = [
            operation, DTYPES.index(x.dtype), channels_last, n, c, s, DTYPES.index(weight.dtype),
            weight.shape[2], weight.shape[0] != 1, circular, *wants, seed, resident, count,
            *gpu.values(), forced is not None, ord(LETTERS[w.strategy]), w.tile, w.threads,
            w.depth,
        ]  # fmt: skip
        for v in maps:
            numbers += v.fields()
        self.call(
            struct.pack(f"{len(numbers)}q", *map(int, numbers))
            + raw(maps[0].memory)
            + raw(weight)
            + small
        )
        status = self.text()
        if "cannot run" in status:
            raise Refused(status)
        assert status == "ok", status
        return json.loads(self.text()), json.loads(self.text())

    def forward(
        self,
        x: Tensor,
        weight: Tensor,
        *,
        circular: bool = False,
        channels_last: bool = False,
        in_place: bool = False,
        into: Tensor | None = None,
        identity: Tensor | None = None,
        want_mean: bool = True,
        gpu: dict[str, int] = H200,
        forced: Forced | None = None,
        seed: int = 1,
        resident: int = 0,
        count: bool = False,
    ) -> Outcome:
        """y (N, C, S), mean and gate (N, C) of x (N, C, S) and weight (1 or C, 1, k).

        y lies in its memory as `into` does. The memory is NaN before. With identity (N, C, S), y is
        that of the tail of a block.
        """
        v, out, none = view(x, channels_last), like(x, channels_last), View(x[:0], 0, 0, 0)
        other = none if identity is None else view(identity, channels_last)
        if in_place:
            out = v
        elif into is not None:
            out = view(into, channels_last)
        plan, traffic = self._send(
            x, weight, circular, channels_last, [v, out, other, none], raw(other.memory),
            operation=0 if identity is None else 4,
            wants=(in_place, want_mean, False, False), gpu=gpu, forced=forced, seed=seed,
            resident=resident, count=count,
        )  # fmt: skip
        y = in_shape(self.tensor(out.memory), out, x, channels_last)
        small = torch.empty(x.shape[:2], dtype=_sums_dtype(x))
        mean, gate = (self.tensor(small).reshape(small.shape) for _ in range(2))
        return Outcome((y, mean, gate), plan, traffic)

    def backward(
        self,
        dy: Tensor,
        x: Tensor,
        weight: Tensor,
        mean: Tensor,
        gate: Tensor,
        *,
        result: Tensor | None = None,
        circular: bool = False,
        channels_last: bool = False,
        want_dx: bool = True,
        want_dweight: bool = True,
        gpu: dict[str, int] = H200,
        forced: Forced | None = None,
        seed: int = 1,
        resident: int = 0,
        count: bool = False,
    ) -> Outcome:
        """dx (N, C, S) and dweight (1 or C, 1, k); with the result of a tail d_identity, too."""
        v, g, out = view(x, channels_last), view(dy, channels_last), like(x, channels_last)
        y = View(x[:0], 0, 0, 0) if result is None else view(result, channels_last)
        plan, traffic = self._send(
            x, weight, circular, channels_last, [v, y, g, out],
            raw(mean) + raw(gate) + raw(g.memory) + raw(y.memory),
            operation=1 if result is None else 5,
            wants=(False, False, want_dx, want_dweight), gpu=gpu, forced=forced, seed=seed,
            resident=resident, count=count,
        )  # fmt: skip
        maps = [
            in_shape(self.tensor(out.memory), out, x, channels_last)
            for _ in range(1 if result is None else 2)
        ]  # d_identity comes first
        dweight = self.tensor(weight).reshape(weight.shape)
        return Outcome((maps[-1], dweight, *maps[:-1]), plan, traffic)

    def sums_of_gradient(
        self,
        x: Tensor,
        dy: Tensor,
        result: Tensor,
        *,
        channels_last: bool = False,
        gpu: dict[str, int] = H200,
    ) -> Tensor:
        """The sums (2, N, C) of a tail's gradient, and of its products with x (N, C, S)."""
        v, g, y = (view(t, channels_last) for t in (x, dy, result))
        self._send(
            x, x.new_ones(1, 1, 1), False, channels_last, [v, y, g, View(x[:0], 0, 0, 0)],
            raw(g.memory) + raw(y.memory), operation=6,
            wants=(False, True, False, False), gpu=gpu, forced=None, seed=1,
            resident=0, count=False,
        )  # fmt: skip
        small = torch.empty((2, *x.shape[:2]), dtype=torch.float32)
        return self.tensor(small).reshape(small.shape)

    def reduce(
        self,
        x: Tensor,
        dy: Tensor | None = None,
        gate: Tensor | None = None,
        *,
        channels_last: bool = False,
        gpu: dict[str, int] = H200,
        seed: int = 1,
    ) -> Outcome:
        """The means (N, C) of x (N, C, S); with dy the sums of dy * x, and with gate dx too."""
        v, out, none = view(x, channels_last), like(x, channels_last), View(x[:0], 0, 0, 0)
        g = none if dy is None else view(dy, channels_last)
        small = torch.empty(x.shape[:2], dtype=_sums_dtype(x))
        plan, _ = self._send(
            x, x.new_ones(1, 1, 1), False, channels_last, [v, none, g, out],
            raw(small if gate is None else gate) + raw(g.memory), operation=2,
            wants=(False, dy is not None, gate is not None, False), gpu=gpu, forced=None, seed=seed,
            resident=0, count=False,
        )  # fmt: skip
        result = self.tensor(small).reshape(small.shape)
        dx = in_shape(self.tensor(out.memory), out, x, channels_last)
        return Outcome((result, dx), plan)

    def scale(
        self,
        x: Tensor,
        gate: Tensor,
        shift: Tensor | None = None,
        *,
        channels_last: bool = False,
        gpu: dict[str, int] = H200,
        seed: int = 1,
    ) -> Outcome:
        """y = gate * x + shift, of x (N, C, S), gate and shift (N, C)."""
        v, out, none = view(x, channels_last), like(x, channels_last), View(x[:0], 0, 0, 0)
        plan, _ = self._send(
            x, x.new_ones(1, 1, 1), False, channels_last, [v, out, none, none],
            raw(gate) + raw(gate if shift is None else shift), operation=3,
            wants=(False, shift is not None, False, False), gpu=gpu, forced=None, seed=seed,
            resident=0, count=False,
        )  # fmt: skip
        return Outcome((in_shape(self.tensor(out.memory), out, x, channels_last),), plan)


def check_apart(gpu, x, dy, layout, of):
    accumulator = torch.float64 if x.dtype == torch.float64 else torch.float32
    generator = torch.Generator().manual_seed(3)
    gate, shift = (
        torch.randn(x.shape[:2], generator=generator, dtype=accumulator) for _ in range(2)
    )
    how = {"channels_last": layout != "contiguous", "gpu": of}
    v, g, a = x.double(), dy.double(), gate.double()[..., None]

    def near(name, got, want, terms, dtype):
        assert_near(name, got, want, terms, dtype, accumulator)

    mean, _ = gpu.reduce(x, **how).tensors
    near("mean", mean, v.mean(2), v.abs().mean(2), accumulator)
    products = (v * g).abs().sum(2)
    dgate, dx = gpu.reduce(x, dy, gate, **how).tensors
    near("dgate", dgate, (v * g).sum(2), products, accumulator)
    near("dx", dx, a * g, a * g, x.dtype)
    alone, unwritten = gpu.reduce(x, dy, **how).tensors
    near("dgate alone", alone, (v * g).sum(2), products, accumulator)
    assert unwritten.isnan().all()
    near("y", gpu.scale(x, gate, **how).tensors[0], a * v, a * v, x.dtype)
    b = shift.double()[..., None]
    terms = (a * v).abs() + b.abs()
    near("shifted", gpu.scale(x, gate, shift, **how).tensors[0], a * v + b, terms, x.dtype)
