"""Times of contenders, interleaved round by round, and their statistics."""

import math
import os
import random
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

__all__ = ["Contender", "Spread", "interleave", "interleaved", "ratio", "reason", "rotation"]

SHORTEST_SAMPLE_S = 5e-3  # below this, the clock and the Python loop would show
WARM_UP_ROUNDS = 2


@dataclass(frozen=True)
class Spread:
    """Median and spread of samples."""

    median: float
    p20: float
    p80: float
    samples: int

    @staticmethod
    def of(values: Sequence[float]) -> "Spread":
        ordered = sorted(values)
        low, high = (ordered[round(q * (len(ordered) - 1))] for q in (0.2, 0.8))
        return Spread(statistics.median(ordered), low, high, len(ordered))


@dataclass
class Contender:
    """One way of computing something.

    Attributes:
        name: such as "plain".
        call: runs it once; None if it cannot run here.
        missing: why it cannot run.
        seconds: of one call, one sample per round.
    """

    name: str
    call: Callable[[], object] | None
    missing: str = ""
    seconds: list[float] = field(default_factory=list)

    @property
    def spread(self) -> Spread | None:
        return Spread.of(self.seconds) if self.seconds else None


def ratio(slower: Contender, faster: Contender) -> Spread | None:
    """How many times as fast `faster` is as `slower`, round by round; None without times."""
    if not slower.seconds or not faster.seconds:
        return None
    return Spread.of([a / b for a, b in zip(slower.seconds, faster.seconds, strict=True)])


def timed(call: Callable[[], object], calls: int, device: torch.device) -> float:
    """Seconds per call, over `calls` calls: by events on a GPU, by the clock on the CPU."""
    if device.type == "cuda":
        event: Any = torch.cuda.Event
        start, end = event(enable_timing=True), event(enable_timing=True)
        start.record()
        for _ in range(calls):
            call()
        end.record()
        end.synchronize()
        return float(start.elapsed_time(end)) / 1e3 / calls
    began = time.perf_counter()
    for _ in range(calls):
        call()
    return (time.perf_counter() - began) / calls


def rotation(call_bytes: int, cache_bytes: int, most: int) -> int:
    """How many inputs a GPU's calls use in turn, so that none finds its maps in the L2 cache.

    Together their maps are three times as large as the cache, unless that takes more than `most`.
    """
    return min(max(2, math.ceil(3 * cache_bytes / max(call_bytes, 1))), most)


def interleaved(
    sample: Callable[[str], float],
    names: Sequence[str],
    rounds: int,
    *,
    warm_up: int = WARM_UP_ROUNDS,
    fewest: int = 1,
    budget_s: float = math.inf,
) -> dict[str, list[float]]:
    """Samples of each name, one a round, all of them in every round.

    Machines drift, and other programs run: only what was measured side by side can be compared.
    Each round has another order, because who comes before leaves its data in the caches.

    Args:
        sample: measures a name once.
        names: what to measure.
        rounds: how many samples each name gets.
        warm_up: rounds before them that do not count.
        fewest: rounds that are measured whatever the budget.
        budget_s: seconds after which no new round starts.
    """
    found: dict[str, list[float]] = {name: [] for name in names}
    order, shuffle = list(names), random.Random(0).shuffle
    began = time.perf_counter()
    for round_ in range(-warm_up, rounds):
        if round_ >= fewest and time.perf_counter() - began > budget_s:
            break
        shuffle(order)
        for name in order:
            value = sample(name)
            if round_ >= 0:
                found[name].append(value)
    return found


def interleave(
    contenders: Sequence[Contender],
    device: torch.device,
    *,
    budget_s: float,
    rounds: tuple[int, int],
    multiple: int = 1,
) -> float | None:
    """Fill in the contenders' seconds by interleaved(): those that can run have the same rounds.

    A contender whose first call fails drops out with the reason.

    Args:
        contenders: those to compare.
        device: where they run.
        budget_s: no new round starts after this time, once there are rounds[0].
        rounds: the least and the largest number of rounds.
        multiple: calls in a sample are a multiple of this.

    Returns:
        The share of the machine's processors, 0 to 1, that other programs took during the rounds;
        None if the system does not report it.
    """
    longest = 0.0
    for contender in contenders:
        if contender.call is None:
            continue
        try:
            timed(contender.call, multiple, device)  # the first call also allocates and compiles
            longest = max(longest, timed(contender.call, multiple, device))
        except Exception as error:
            contender.call, contender.missing = None, reason(error)
    running = {contender.name: contender.call for contender in contenders if contender.call}
    if not running:
        return None
    calls = multiple * max(1, round(SHORTEST_SAMPLE_S / max(longest, 1e-9) / multiple))
    taken = processors_taken()
    began = time.perf_counter()
    found = interleaved(
        lambda name: timed(running[name], calls, device),
        list(running),
        rounds[1],
        warm_up=0,
        fewest=rounds[0],
        budget_s=budget_s,
    )
    elapsed = time.perf_counter() - began
    for contender in contenders:
        contender.seconds += found.get(contender.name, [])
    after = processors_taken()
    if taken is None or after is None:
        return None
    return min(max((after - taken) / (elapsed * (os.cpu_count() or 1)), 0.0), 1.0)


def processors_taken() -> float | None:
    """Processor seconds that other programs and other virtual machines have used since boot."""
    try:
        ticks = [int(n) for n in Path("/proc/stat").read_text().splitlines()[0].split()[1:9]]
    except OSError:
        return None
    idle, waiting = ticks[3:5]
    return (sum(ticks) - idle - waiting) / os.sysconf("SC_CLK_TCK") - time.process_time()


def reason(error: Exception) -> str:
    """The type and message of an error in one line."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    # torch.compile names the backend that failed first, and the reason on the next line.
    if len(lines) > 1 and lines[0].endswith("raised:"):
        return lines[1][:200]
    return f"{type(error).__name__}: {lines[0] if lines else ''}"[:200].rstrip(": ")
