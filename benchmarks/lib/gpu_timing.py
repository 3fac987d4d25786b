"""GPU time of calls that find nothing in the L2 cache: CUDA graphs over rotating maps.

One CUDA graph captures a contender's calls: one for each of several distinct inputs, each with its
own output. Together the maps are several times as large as the L2 cache, so a call finds nothing
there that an earlier one left. Events time the replays; the host's work does not count.
"""

import gc
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

Call = Callable[[], tuple[Tensor, ...]]

LONGEST_ROTATION = 768  # calls in a graph; capturing one takes the host some 50 us


@contextmanager
def no_collection() -> Iterator[None]:
    """Without Python's collector, which could free GPU memory while a graph is being captured."""
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


class Recording:
    """Calls in one CUDA graph, and the outputs that each replay writes.

    Args:
        calls: what to capture; each returns the tensors that it made.
        stream: where to capture. Autograd runs a backward pass on the stream of the forward pass,
            so a graph of backward passes must be captured on the stream of its forward passes.
        warm_up: runs on that stream before the capture, which allows no compilation, loading of
            kernels or first allocations. By default the first call.
    """

    def __init__(
        self, calls: Sequence[Call], stream: Any, warm_up: Callable[[], object] | None = None
    ) -> None:
        self.calls = len(calls)
        self.functions = calls  # they hold what a replay reads
        self.graph: Any = torch.cuda.CUDAGraph()
        torch.cuda.synchronize()
        with torch.cuda.stream(stream):
            for _ in range(2):
                (warm_up or calls[0])()
            torch.cuda.synchronize()
            torch.cuda.empty_cache()  # during a capture the allocator cannot give anything back
            self.graph.capture_begin()
            try:
                self.outputs = [call() for call in calls]
            except BaseException:
                self.abandon()
                raise
            self.graph.capture_end()
        torch.cuda.synchronize()

    def abandon(self) -> None:
        """End a capture that failed, so that the reason is what the caller sees."""
        try:
            self.graph.capture_end()
        except Exception:  # it says that the capture failed, which is known
            torch.cuda.synchronize()

    def replay(self) -> None:
        self.graph.replay()

    def poison(self) -> None:
        fill_with_nan(self.outputs)

    def forget(self) -> None:
        """The outputs are the graph's: they stay."""


def fill_with_nan(outputs: Sequence[tuple[Tensor, ...]]) -> None:
    """Fill the outputs, so that whatever a call does not write is found."""
    with torch.no_grad():
        for tensors in outputs:
            for tensor in tensors:
                tensor.fill_(float("nan"))


def sample(recording: Recording, replays: int) -> float:
    """Milliseconds of a replay, the mean of several.

    A first replay does not count: while it runs, the host submits the others, so the GPU never
    waits for the host between the two events.
    """
    event: Any = torch.cuda.Event
    start, end = event(enable_timing=True), event(enable_timing=True)
    recording.replay()
    start.record()
    for _ in range(replays):
        recording.replay()
    end.record()
    end.synchronize()
    return float(start.elapsed_time(end)) / replays


def profiled_us(recording: Recording, replays: int = 3) -> float | None:
    """Microseconds of a call as the profiler sees it: its kernels and copies, not the gaps between.

    None where the profiler sees nothing.
    """
    from torch.profiler import ProfilerActivity, profile

    recording.replay()
    torch.cuda.synchronize()
    try:
        with profile(activities=[ProfilerActivity.CUDA]) as trace:
            for _ in range(replays):
                recording.replay()
            torch.cuda.synchronize()
    except RuntimeError as reason:
        print(f"the profiler does not run here: {reason}")
        return None
    events: Any = trace.events() or []
    total = sum(e.time_range.elapsed_us() for e in events if str(e.device_type).endswith("CUDA"))
    return float(total) / replays / recording.calls if total else None


def spin_up(seconds: float = 0.3) -> None:
    """Keep the GPU busy until its clocks are up: an idle GPU runs at a fraction of them."""
    a = torch.randn(4096, 4096, device="cuda", dtype=torch.bfloat16)
    event: Any = torch.cuda.Event
    start, end = event(enable_timing=True), event(enable_timing=True)
    start.record()
    elapsed = 0.0
    while elapsed < 1e3 * seconds:
        for _ in range(20):
            a @ a
        end.record()
        end.synchronize()
        elapsed = start.elapsed_time(end)
