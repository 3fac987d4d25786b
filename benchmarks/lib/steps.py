"""Cliffs: sizes at which the time per element grows, although the copy's does not.

A step to the next size is a cliff if it exceeds 15 %, the spreads of both sizes, and the copy's
step by 15 %. The copy has a step too where a cache ends. sizes.py measures both sizes again, side
by side. A step that is not there again was noise.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise

from lib import tables
from lib.tables import Result, Row

STEP = 1.15


@dataclass(frozen=True)
class Step:
    """Our time per element grows by more than 15 %, and by more than the spreads of both sizes."""

    name: str
    before: Row
    after: Row

    @property
    def first(self) -> tuple[float, float]:
        """Growth of ours and of the copy, in the rounds of all sizes."""
        own, copy = (growth(self.before, self.after, name) for name in (self.name, "copy"))
        return own, copy

    @property
    def again(self) -> tuple[float, float] | None:
        """Growth of ours and of the copy, both sizes side by side; None if not measured again."""
        found = self.after.get("again", {}).get(self.name)
        return found and (found["ours"]["median"], found["copy"]["median"])

    @property
    def is_cliff(self) -> bool:
        own, copy = self.again or self.first
        return own > STEP * max(1, copy)

    def __str__(self) -> str:
        row, sizes = self.after, [tables.layer_of(row) for row in (self.before, self.after)]
        times = [self.first] + ([self.again] if self.again else [])
        grown = ", again ".join(f"{own:.2f}x (the copy {copy:.2f}x)" for own, copy in times)
        where = f"{self.name}, {row['layout']}, {row['direction']}, {row['axis']} grows"
        return f"{where}, {' to '.join(sizes)}: {grown}"


def growth(before: Row, after: Row, name: str, low: str = "median", high: str = "median") -> float:
    """Time per element after, divided by that before, from these two statistics."""
    first, second = (
        one["contenders"][name]["us"][which] / one["ideal_bytes"]
        for one, which in ((before, low), (after, high))
    )
    return float(second / first)


def steps_of(rows: list[Row]) -> Iterator[Step]:
    """Our steps, also where the copy has one as large."""
    curves: dict[tuple[str, ...], list[Row]] = {}
    for row in rows:
        key = tuple(row[name] for name in ("layout", "axis", "direction"))
        curves.setdefault(key, []).append(row)
    for curve in curves.values():
        for before, after in pairwise(curve):
            for name in ("native", "triton"):
                both = before["contenders"].keys() & after["contenders"].keys()
                if not {name, "copy"} <= both or growth(before, after, name) <= STEP:
                    continue
                if growth(before, after, name, "p80", "p20") > 1:
                    yield Step(name, before, after)


def markdown(result: Result) -> str:
    """The cliffs, and how many other steps there are."""
    steps = list(steps_of(result["rows"]))
    cliffs = [f"- {step}" for step in steps if step.is_cliff]
    head = "Cliffs, where the time per element grows by 15 % more than the copy's"
    text = f"{head}:\n\n" + "\n".join(cliffs) if cliffs else f"{head}: none."
    others = len(steps) - len(cliffs)
    if others:
        text += f"\n\nOther steps beyond 15 %: {others}. The copy has them too, or a rerun has not."
    return text
