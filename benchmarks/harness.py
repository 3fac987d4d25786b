"""What the benchmark scripts share: interleaved rounds, statistics, the machine's description."""

import os
import platform
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch

import eca_fused
from eca_fused.demo.environment import commit, cpu_model
from eca_fused.demo.measure import Spread

# glibc gives a fresh large output new pages each time, whose faults cost more than the arithmetic.
# With these settings it recycles its heap instead, as a training run with steady shapes would want.
RECYCLED_HEAP = {
    "MALLOC_MMAP_MAX_": "0",
    "MALLOC_TRIM_THRESHOLD_": str(1 << 40),
    "MALLOC_TOP_PAD_": str(1 << 30),
}


def restart_with_malloc(setting: str) -> None:
    """Run this script again with malloc "default" or "recycled", if it has another setting."""
    wanted = RECYCLED_HEAP if setting == "recycled" else {}
    if all(os.environ.get(name) == wanted.get(name) for name in RECYCLED_HEAP):
        return
    env = {k: v for k, v in os.environ.items() if k not in RECYCLED_HEAP} | wanted
    os.execve(sys.executable, [sys.executable, *sys.argv], env)


def machine() -> dict[str, Any]:
    """What a result depends on, for the result file."""
    return {
        "device": "cpu",
        "cpu": cpu_model(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "kernels": eca_fused.backends()["native"].detail,
        "malloc": "recycled" if os.environ.get("MALLOC_MMAP_MAX_") == "0" else "default",
        "python": platform.python_version(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "eca_fused": eca_fused.__version__,
        # A copy of the source without its history can be told its commit.
        "commit": commit() or os.environ.get("ECA_FUSED_COMMIT") or "unknown",
        "date": time.strftime("%Y-%m-%d"),
    }


def gpu() -> dict[str, Any]:
    """What a result on the current GPU depends on beside machine()."""
    properties = torch.cuda.get_device_properties(torch.cuda.current_device())
    try:
        triton = version("triton")
    except PackageNotFoundError:
        triton = None
    return {
        "device": "cuda",
        "gpu": properties.name,
        "capability": f"{properties.major}.{properties.minor}",
        "multiprocessors": properties.multi_processor_count,
        "l2_bytes": properties.L2_cache_size,
        "memory_bytes": properties.total_memory,
        "triton": triton,
        **nvidia_smi(),
    }


def nvidia_smi() -> dict[str, str]:
    """Driver and state of GPU 0, only read; empty where nvidia-smi does not run."""
    fields = ["driver_version", "clocks.sm", "clocks.mem", "temperature.gpu", "power.draw"]
    command = ["nvidia-smi", "-i", "0", f"--query-gpu={','.join(fields)}", "--format=csv,noheader"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True)
    except (OSError, subprocess.SubprocessError):
        return {}
    values = [value.strip() for value in done.stdout.strip().split(",")]
    return dict(zip(("driver", *fields[1:]), values, strict=False))


def statistics_of(values: list[float]) -> dict[str, float]:
    return asdict(Spread.of(values))


Step = Callable[..., Any]


def interleaved(
    steps: dict[str, tuple[Step, Step]], rounds: int, repeat: int = 1
) -> dict[str, list[float]]:
    """Seconds of each step, one sample a round, all steps in turn in every round.

    Machines that others share drift: only what was measured side by side can be compared.

    Args:
        steps: for each name, what to do before (not timed; its result is kept alive), and the step,
            which gets that result.
        rounds: samples of each step, after two rounds that do not count.
        repeat: calls of a step in one sample, for steps too short for the clock.
    """
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    for round_ in range(rounds + 2):
        for name, (prepare, step) in steps.items():
            state = prepare()
            start = time.perf_counter()
            for _ in range(repeat):
                result = step(state)
            elapsed = (time.perf_counter() - start) / repeat
            del result, state
            if round_ >= 2:
                seconds[name].append(elapsed)
    return seconds


def summarise(seconds: dict[str, list[float]]) -> dict[str, Any]:
    """Statistics of every step in ms, and of the ratio of its time to ours, round by round."""
    return {
        name: {
            "ms": statistics_of([1e3 * s for s in values]),
            "times_ours": statistics_of(
                [s / o for s, o in zip(values, seconds["native"], strict=True)]
            ),
        }
        for name, values in seconds.items()
    }
