"""What the benchmark scripts share: interleaved rounds, statistics, machine, progress."""

import json
import math
import os
import platform
import random
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, TypeVar

import torch
from devices import Device, DryRun, Recording
from options import recycles_heap

import eca_fused
from eca_fused.cli.common.environment import commit, cpu_model
from eca_fused.cli.common.measure import Spread

WARM_UP_ROUNDS = 2
T = TypeVar("T")

# ---- the machine ----


def machine(device: Device) -> dict[str, Any]:
    """What a result depends on, for the result file."""
    found = {
        "device": device.kind,
        "dry_run": isinstance(device, DryRun),
        "cpu": cpu_model(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "kernels": eca_fused.backends()["native"].detail,
        "malloc": "recycled" if recycles_heap() else "default",
        "python": platform.python_version(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "eca_fused": eca_fused.__version__,
        # A copy of the source with no history, or with an older one, can be told its commit.
        "commit": os.environ.get("ECA_FUSED_COMMIT") or commit() or "unknown",
        "date": time.strftime("%Y-%m-%d"),
    }
    return found | gpu() if device.kind == "cuda" and not found["dry_run"] else found


def gpu() -> dict[str, Any]:
    """What a result on the current GPU depends on beside machine()."""
    properties = torch.cuda.get_device_properties(torch.cuda.current_device())
    try:
        triton = version("triton")
    except PackageNotFoundError:
        triton = None
    return {
        "gpu": properties.name,
        "capability": f"{properties.major}.{properties.minor}",
        "multiprocessors": properties.multi_processor_count,
        "l2_bytes": properties.L2_cache_size,
        "memory_bytes": properties.total_memory,
        "triton": triton,
        "tf32": torch.backends.cudnn.allow_tf32,
        **gpu_state(),
    }


def gpu_state() -> dict[str, str]:
    """Driver, clocks, temperature and power, only read; empty where nvidia-smi does not run."""
    fields = ["driver_version", "clocks.sm", "clocks.mem", "temperature.gpu", "power.draw"]
    command = [
        "nvidia-smi",
        "-i",
        f"GPU-{torch.cuda.get_device_properties(torch.cuda.current_device()).uuid}",
        f"--query-gpu={','.join(fields)}",
        "--format=csv,noheader",
    ]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True)
    except (OSError, subprocess.SubprocessError):
        return {}
    values = [value.strip() for value in done.stdout.strip().split(",")]
    return dict(zip(("driver", *fields[1:]), values, strict=False))


# ---- times ----


def statistics_of(values: list[float]) -> dict[str, float]:
    return asdict(Spread.of(values))


def interleaved(
    sample: Callable[[str], float], names: list[str], rounds: int
) -> dict[str, list[float]]:
    """Samples of each name, one a round, all of them in every round.

    Machines that others share drift: only what was measured side by side can be compared. Each
    round has another order, as who comes before leaves its data in the caches, and the first rounds
    do not count.
    """
    found: dict[str, list[float]] = {name: [] for name in names}
    order, shuffle = list(names), random.Random(0).shuffle
    for round_ in range(rounds + WARM_UP_ROUNDS):
        shuffle(order)
        for name in order:
            value = sample(name)
            if round_ >= WARM_UP_ROUNDS:
                found[name].append(value)
    return found


def call_times(
    device: Device,
    recordings: dict[str, Recording],
    rounds: int,
    budget_ms: float | None = None,
) -> dict[str, list[float]]:
    """Microseconds of a call of each recording, interleaved.

    A sample lasts device.shortest_ms or longer. Rounds that would together take longer than
    budget_ms (device.budget_ms if it is not given) are left out, down to the fewest. A call that is
    repeated finds its maps in the caches, so if one contender's is, then all are.
    """
    ms = {name: device.sample(recording, 1) for name, recording in recordings.items()}
    least = 2 if min(ms.values()) < device.shortest_ms else 1
    replays = {name: max(least, math.ceil(device.shortest_ms / max(ms[name], 1e-3))) for name in ms}
    round_ms = sum((replays[name] + 1) * ms[name] for name in ms)
    rounds = min(
        rounds,
        max(device.fewest_rounds, int((budget_ms or device.budget_ms) / max(round_ms, 1e-3))),
    )

    def sample(name: str) -> float:
        recording = recordings[name]
        return 1e3 * device.sample(recording, replays[name]) / recording.calls

    return interleaved(sample, list(recordings), rounds)


def summarise(samples: dict[str, list[float]], ideal_bytes: int | None = None) -> dict[str, Any]:
    """Statistics of every contender: us of a call, GB/s of ideal bytes, ratios round by round.

    of_copy is the copy's time over the contender's, its share of the copy's speed; times_ours is
    the contender's time over that of our native kernels (Triton's, where there are no native ones).
    """
    ours = "native" if "native" in samples else "triton"
    found: dict[str, Any] = {}
    for name, values in samples.items():
        us = statistics_of(values)
        entry: dict[str, Any] = {"us": us}
        if ideal_bytes is not None:
            entry["gbps"] = ideal_bytes / us["median"] / 1e3
        for ratio, other, inverse in (("of_copy", "copy", True), ("times_ours", ours, False)):
            if other in samples:
                pairs = zip(samples[other], values, strict=True)
                entry[ratio] = statistics_of([o / v if inverse else v / o for o, v in pairs])
        found[name] = entry
    return found


# ---- scripts ----


def reason_of(error: BaseException) -> str:
    return f"{type(error).__name__}: {error}"[:300]


@contextmanager
def until_interrupted(result: dict[str, Any]) -> Iterator[None]:
    """Ctrl-C ends the block, and what was measured before it is shown."""
    try:
        yield
    except KeyboardInterrupt:
        result["interrupted"] = True
        result["remarks"].append("interrupted: what follows was not measured")


def progress(items: Iterable[T], total: int) -> Iterator[T]:
    """The items, with a progress bar on stderr where there is a terminal and tqdm."""
    try:
        from tqdm import tqdm
    except ImportError:
        yield from items
        return
    yield from tqdm(items, total=total, file=sys.stderr, disable=None, leave=False)


def write(path: Path | None, result: dict[str, Any]) -> None:
    """Write a result, by way of another file: whoever reads it finds a whole one."""
    if path:
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_suffix(".partial")
        partial.write_text(json.dumps(result, indent=1) + "\n")
        partial.replace(path)
