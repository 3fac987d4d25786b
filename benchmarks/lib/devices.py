"""Where contenders run and how they are timed: on a CPU, on a GPU, or in a dry run of a GPU.

triton.testing.do_bench and torch.utils.benchmark do not fit: they measure one contender after the
other, on one input, and machines drift. do_bench also empties the L2 cache by a memset between
calls; a CUDA graph over rotating maps needs none.
"""

import contextlib
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Any, Protocol

import torch

from eca_fused.cli.common.measure import rotation
from lib import gpu_timing
from lib.gpu_timing import LONGEST_ROTATION, Call


class Recording(Protocol):
    """Calls that can be run again, and what the last run returned."""

    calls: int
    outputs: Any  # of each call, a tuple of tensors

    def replay(self) -> None: ...
    def poison(self) -> None: ...
    def forget(self) -> None: ...


class Direct:
    """Calls that are simply made again.

    Args:
        calls: each returns the tensors that it made.
        before: what to do before each call, not timed.
        warm_up: runs before all, in place of the first call.
    """

    def __init__(
        self,
        calls: Sequence[Call],
        before: Callable[[], object] | None = None,
        warm_up: Callable[[], object] | None = None,
    ) -> None:
        self.calls, self.functions, self.before = len(calls), calls, before
        self.grad = torch.is_grad_enabled()
        (warm_up or calls[0])()
        self.outputs: Any = ()
        self.replay()

    def replay(self) -> None:
        self.outputs = ()  # freed first: the calls get this memory again, with its content
        self.outputs = [self.once(function)[0] for function in self.functions]

    def once(self, function: Call) -> tuple[Any, float]:
        """What a call returns, and its seconds."""
        if self.before:
            self.before()
        with torch.set_grad_enabled(self.grad):
            start = time.perf_counter()
            result = function()
            return result, time.perf_counter() - start

    def poison(self) -> None:
        gpu_timing.fill_with_nan(self.outputs)

    def forget(self) -> None:
        self.outputs = ()

    def sample(self, replays: int) -> float:
        """Milliseconds of a replay.

        Calls short enough to be repeated may fit the caches, so an untimed replay first replaces
        what another contender left there. A call's result is kept until the next call returns, as
        in a network. Otherwise a heap with several holes of this size decides what the caches hold:
        it gave one contender the same place each time, and another contender two in turn.
        """
        if replays > 1:
            self.replay()
            self.forget()
        kept: Any = None
        elapsed = 0.0
        for _ in range(replays):
            for function in self.functions:
                kept, seconds = self.once(function)
                elapsed += seconds
        del kept
        return 1e3 * elapsed / replays


class Cpu:
    """Runs calls one after the other, on one input, which is rewritten before each.

    In a network the previous layer has just written this map, and the cache holds what fits of it.
    If nothing rewrote a map that barely fits beside the output, the cache would keep what each call
    reads twice, and drop what it reads once.
    """

    kind, tensors = "cpu", "cpu"
    shortest_ms, budget_ms, fewest_rounds = 1.0, 1500.0, 7
    recording = Direct

    def start(self) -> None:
        pass

    def full_precision(self) -> None:
        """Switch TF32 off: plain PyTorch's convolution in it is too inexact to judge errors by."""

    def distinct(self, call_bytes: int) -> int:
        return 1

    def writer(self, map_: torch.Tensor) -> Callable[[], object] | None:
        """What rewrites a map with the same values; None where calls rotate among many."""
        own = map_.detach()
        return lambda: own.mul_(1)

    def cold(self, calls: int, call_bytes: int) -> bool:
        """Whether the maps of all calls together are too large for a call to find its own in L2."""
        return False

    def streaming(self) -> AbstractContextManager[object]:
        return contextlib.nullcontext()

    def record(
        self,
        calls: Sequence[Call],
        warm_up: Callable[[], object] | None = None,
        before: Callable[[], object] | None = None,
    ) -> Any:
        return self.recording(calls, before, warm_up)

    def sample(self, recording: Any, replays: int) -> float:
        return float(recording.sample(replays))

    def profiled_us(self, recording: Any) -> float | None:
        return None

    def host_seconds(self) -> float:
        return time.perf_counter()

    def synchronize(self) -> None:
        pass

    def free(self) -> None:
        pass


class Gpu(Cpu):
    """CUDA graphs over rotating inputs and outputs: see gpu_timing.py."""

    kind, tensors = "cuda", "cuda"
    shortest_ms, budget_ms, fewest_rounds = 0.3, 800.0, 7

    def start(self) -> None:
        gpu_timing.spin_up()
        stream: Any = torch.cuda.Stream
        self.stream = stream()
        self.l2 = torch.cuda.get_device_properties(torch.cuda.current_device()).L2_cache_size

    def full_precision(self) -> None:
        torch.backends.cudnn.allow_tf32 = False

    def distinct(self, call_bytes: int) -> int:
        return rotation(call_bytes, self.l2, LONGEST_ROTATION)

    def writer(self, map_: torch.Tensor) -> Callable[[], object] | None:
        return None

    def cold(self, calls: int, call_bytes: int) -> bool:
        return calls * call_bytes >= 3 * self.l2

    def streaming(self) -> AbstractContextManager[object]:
        torch.cuda.synchronize()
        return torch.cuda.stream(self.stream)

    def record(
        self,
        calls: Sequence[Call],
        warm_up: Callable[[], object] | None = None,
        before: Callable[[], object] | None = None,
    ) -> Any:
        if before:
            raise ValueError("a CUDA graph times all of its calls: nothing can come before each")
        return gpu_timing.Recording(calls, self.stream, warm_up)

    def sample(self, recording: Any, replays: int) -> float:
        return gpu_timing.sample(recording, replays)

    def profiled_us(self, recording: Any) -> float | None:
        return gpu_timing.profiled_us(recording)

    def synchronize(self) -> None:
        torch.cuda.synchronize()

    def free(self) -> None:
        torch.cuda.empty_cache()


class Rerun(Direct):
    """Writes into the outputs of the first run again, as a replayed graph does."""

    def replay(self) -> None:
        again = [self.once(function)[0] for function in self.functions]
        if not self.outputs:
            self.outputs = again
            return
        with torch.no_grad():
            for old, new in zip(self.outputs, again, strict=True):
                for into, tensor in zip(old, new, strict=True):
                    into.copy_(tensor)

    def forget(self) -> None:
        pass


class DryRun(Gpu):
    """Measures as on a GPU, with tensors on the CPU and a made-up clock: for tests."""

    tensors = "cpu"
    recording = Rerun
    record, streaming = Cpu.record, Cpu.streaming
    synchronize, free = Cpu.synchronize, Cpu.free

    def start(self) -> None:
        self.l2, self.ticks = 1 << 10, 0

    def sample(self, recording: Any, replays: int) -> float:
        recording.replay()
        self.ticks += 1
        return 1e-3 * recording.calls * (10 + self.ticks % 3)

    def host_seconds(self) -> float:
        self.ticks += 1
        return 1e-3 * self.ticks

    def profiled_us(self, recording: Any) -> float | None:
        return 10.0


Device = Cpu
DEVICES = {"cpu": Cpu, "cuda": Gpu, "dry-run": DryRun}


def device_named(name: str | None) -> Device:
    """The device to measure on: the GPU where there is one, if none is named.

    Raises:
        SystemExit: a GPU was asked for, and there is none that torch can use.
    """
    chosen = name or ("cuda" if torch.cuda.is_available() else "cpu")
    if chosen == "cuda" and not torch.cuda.is_available():
        raise SystemExit("there is no GPU that torch can use; --device cpu measures here")
    device = DEVICES[chosen]()
    device.start()
    return device
