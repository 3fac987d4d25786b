"""Steps in the time per element from a size to the next, by what is known of them.

A step of ours that the copy has too is where a cache ends; one that is not there when it is
measured again was noise. What is left are cliffs of the kernels.
"""

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise

import tables
from tables import Result, Row

STEP = 1.15  # time per element in units of that of the size before; of the copy's step, too

CLIFF, UNMEASURED = "seen again", "not measured again"
WITH_COPY, GONE, NOISE = f"within {STEP} times the copy's", "not seen again", "within the noise"
OTHERS = (WITH_COPY, GONE, NOISE)


@dataclass(frozen=True)
class Step:
    """Growth of the time per element of one of ours by more than 15 %."""

    name: str
    before: Row
    after: Row

    @property
    def first(self) -> tuple[float, float]:
        """Of ours and of the copy, as all sizes were measured."""
        own, copy = (growth(self.before, self.after, name) for name in (self.name, "copy"))
        return own, copy

    @property
    def again(self) -> tuple[float, float] | None:
        """Of ours and of the copy, these two sizes side by side, if they were measured again."""
        found = self.after.get("again", {}).get(self.name)
        return found and (found["ours"]["median"], found["copy"]["median"])

    @property
    def within_noise(self) -> bool:
        return growth(self.before, self.after, self.name, "p80", "p20") <= 1

    @property
    def kind(self) -> str:
        # Where there are both, the sizes side by side say more about the copy: it is noisy too.
        step, copy = self.again or self.first
        if self.within_noise:
            return NOISE
        if step <= STEP:
            return GONE
        if step <= STEP * copy:
            return WITH_COPY
        return CLIFF if self.again else UNMEASURED

    def __str__(self) -> str:
        step, copy = self.first
        row, sizes = self.after, [tables.layer_of(row) for row in (self.before, self.after)]
        line = (
            f"{self.name}, {row['layout']}, {row['direction']}, {row['axis']} grows: {step:.2f}x "
            f"per element from {' to '.join(sizes)} (the copy {copy:.2f}x)"
        )
        if self.again:
            step, copy = self.again
            line += f", again {step:.2f}x (the copy {copy:.2f}x)"
        return line + (f", {self.kind}" if self.kind in OTHERS else "")


def growth(before: Row, after: Row, name: str, low: str = "median", high: str = "median") -> float:
    """Time per element after, in units of that before, by these two statistics."""
    first, second = (
        one["contenders"][name]["us"][which] / one["ideal_bytes"]
        for one, which in ((before, low), (after, high))
    )
    return float(second / first)


def steps_of(rows: list[Row]) -> Iterator[Step]:
    """Where the time per element of one of ours grows by more than 15 % to the next size."""
    curves: dict[tuple[str, ...], list[Row]] = {}
    for row in rows:
        key = tuple(row[name] for name in ("layout", "axis", "direction"))
        curves.setdefault(key, []).append(row)
    for curve in curves.values():
        for before, after in pairwise(curve):
            for name in ("native", "triton"):
                both = before["contenders"].keys() & after["contenders"].keys()
                if {name, "copy"} <= both and growth(before, after, name) > STEP:
                    yield Step(name, before, after)


def markdown(result: Result) -> str:
    """The cliffs by name, and how many steps there are of the other kinds."""
    steps = list(steps_of(result["rows"]))
    what = f"Cliffs (steps beyond 15 % and beyond {STEP} times the copy's own, seen again)"
    lists = {
        kind: "\n".join(f"- {step}" for step in steps if step.kind == kind)
        for kind in (CLIFF, UNMEASURED)
    }
    parts = [f"{what}:\n\n{lists[CLIFF]}" if lists[CLIFF] else f"{what}: none."]
    if lists[UNMEASURED]:
        parts.append(f"As large, but {UNMEASURED}:\n\n{lists[UNMEASURED]}")
    counts = Counter(step.kind for step in steps)
    others = [f"{counts[kind]} {kind}" for kind in OTHERS if counts[kind]]
    if others:
        parts.append(f"Other steps beyond 15 %, which the result file lists: {', '.join(others)}.")
    return "\n\n".join(parts)


def remarks(result: Result) -> list[str]:
    """The remarks of a result beside its steps, which older ones had among them."""
    return [
        line
        for line in result["remarks"]
        if line.startswith("FAILED") or "x per element from " not in line
    ]
