"""Times of calls in interleaved rounds, and their statistics."""

import math
from dataclasses import asdict
from typing import Any

from eca_fused.cli.common.measure import Spread, interleaved
from lib.devices import Device, Recording


def statistics_of(values: list[float]) -> dict[str, float]:
    return asdict(Spread.of(values))


def call_times(
    device: Device,
    recordings: dict[str, Recording],
    rounds: int,
    budget_ms: float | None = None,
) -> dict[str, list[float]]:
    """Microseconds of a call of each recording, interleaved.

    A sample lasts device.shortest_ms or longer. Rounds beyond budget_ms (by default
    device.budget_ms) are left out, but device.fewest_rounds stay. A repeated call finds its maps in
    the caches, so either all contenders' calls are repeated or none.
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
