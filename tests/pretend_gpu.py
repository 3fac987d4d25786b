"""A GPU for the benchmark scripts that is the CPU: their logic runs, their times mean nothing."""

import contextlib
import time
from collections.abc import Callable, Sequence
from typing import Any

import gpu_bench
import gpu_timing
import pytest
import torch


class Recording(gpu_timing.Recording):
    """Runs the calls again where a graph would replay them, into the outputs of the first run."""

    def __init__(
        self,
        calls: Sequence[gpu_timing.Call],
        stream: object,
        warm_up: Callable[[], object] | None = None,
    ) -> None:
        self.calls, self.functions, self.keep = len(calls), calls, None
        self.grad = torch.is_grad_enabled()
        (warm_up or calls[0])()
        self.outputs = [call() for call in calls]

    def replay(self) -> None:
        for outputs, function in zip(self.outputs, self.functions, strict=True):
            with torch.set_grad_enabled(self.grad):
                again = function()
            with torch.no_grad():
                for old, new in zip(outputs, again, strict=True):
                    old.copy_(new)


def sample(recording: Recording, replays: int) -> float:
    start = time.perf_counter()
    for _ in range(replays):
        recording.replay()
    return 1e3 * (time.perf_counter() - start) / replays


def install(monkeypatch: pytest.MonkeyPatch) -> None:
    nothing: Any = lambda *_, **__: None  # noqa: E731
    monkeypatch.setattr(gpu_bench, "DEVICE", "cpu")
    monkeypatch.setattr(gpu_bench, "new_stream", nothing)
    monkeypatch.setattr(gpu_timing, "Recording", Recording)
    monkeypatch.setattr(gpu_timing, "sample", sample)
    monkeypatch.setattr(gpu_timing, "profiled_us", nothing)
    monkeypatch.setattr(gpu_timing, "spin_up", nothing)
    monkeypatch.setattr(gpu_bench, "gpu", lambda: {"device": "cuda", "gpu": "none", "l2_bytes": 1})
    limits = gpu_bench.native_module().gpu_by_name("sm_90")
    monkeypatch.setattr(gpu_bench, "gpu_limits", lambda: limits)
    for name in ("synchronize", "empty_cache"):
        monkeypatch.setattr(torch.cuda, name, nothing)
    monkeypatch.setattr(torch.cuda, "stream", lambda _: contextlib.nullcontext())
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
