"""Compares two results of the same script: which rows are slower or faster by more than the noise.

Two processes of the same code differ by more than the rounds of one of them do: memory lies
elsewhere, other programs run. On a machine that others share, half of the rows of two such results
of layers differ by less than 1.05x, and some by 1.7x. A row counts where all of this says so:

- Its change is beyond the spreads, p20 to p80, of both results.
- It is so beside each reference: the copy, eager, timm, torch.compile's forms. Each was timed in
  the same rounds, so if ours has changed it has beside all of them. If one of them was off in one
  process, only the ratio to this one has.
- It is beyond the noise between processes. Most rows do not change between two versions, so the
  noise is estimated from the two results themselves: the median distance of all rows from the
  median change. A row counts from MADS times that, measured from the median change.

A median change of all rows is what they have in common, and hides nothing: it is said, and counts
like a row from SHIFT. Where half of the rows or more have changed by different factors, no noise
can be told from the change; then a second result of the old code helps, from which the noise is
measured instead. The new one must differ from both by more than that, and by more than they do.
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass
from statistics import median
from typing import Any

import tables
from tables import Result, Row

Key = tuple[str, ...]

OURS = ("native", "triton", "fused ECA", "native ECA")
REFERENCES = ("copy", "eager", "timm", "sigmoid")

FEW = 10  # rows, from which the noise can be estimated
FLOOR = 1.25  # what counts of fewer rows
SHIFT = 1.05  # what counts of the median of all
# Of the distance that half of the rows keep. Between three results of the full grid on a CPU, all
# of the same kernels, these name at most one row of 700 beside all references, five beside two of
# them and two beside the copy alone, where a row has nothing else to be judged by. Rows made 1.5x
# slower are found in 6 to 9 of 10 cases, 2x in 19 of 20; beside the copy alone 2x is often missed.
MADS = 6
MADS_OF_ONE_REFERENCE = 10


@dataclass(frozen=True)
class Time:
    """Of ours, in units of a reference's: the median of the rounds, and p20 and p80."""

    median: float
    low: float
    high: float


Times = dict[str, Time]  # by reference


def inverse(ratio: dict[str, float]) -> Time:
    return Time(1 / ratio["median"], 1 / ratio["p80"], 1 / ratio["p20"])


def is_reference(name: str) -> bool:
    """Whether it is none of ours, and measured in the same way."""
    return name in REFERENCES or (name.startswith("compile") and not name.endswith(", graph"))


def times_of(name: str, contenders: dict[str, Any]) -> Times:
    """One of ours beside each reference of its row."""
    own = contenders[name]
    if "times_none" in own:
        share = own["times_none"]
        return {"none": Time(share["median"], share["p20"], share["p80"])}
    if name == tables.ours({"contenders": contenders}):
        return {
            other: inverse(entry["times_ours"])
            for other, entry in contenders.items()
            if is_reference(other) and "times_ours" in entry
        }
    return {"copy": inverse(own["of_copy"])} if "of_copy" in own else {}


def place(row: Row) -> Key:
    """What was measured, the direction last."""
    if "network" in row:
        images = f"{row['batch']}x3x{row['size']}x{row['size']}"
        head = (row["network"], images, row["precision"], row["layout"], row["mode"], row["pass"])
    else:
        head = (row.get("axis", ""), "x".join(map(str, row["shape"])), str(row.get("k", "")))
        head += (row["dtype"], row.get("layout", ""), row["direction"])
    return tuple(filter(None, head))


def relative_times(result: Result) -> dict[Key, Times]:
    """Every one of ours on every row."""
    found = {}
    for row in result["rows"]:
        head = place(row)
        for name in OURS:
            if name in row["contenders"]:
                found[(*head, name)] = times_of(name, row["contenders"])
    return {key: times for key, times in found.items() if times}


# ---- changes ----


@dataclass(frozen=True)
class Change:
    """Logarithms of the new time over the old, one for each reference."""

    each: tuple[float, ...]
    beyond_spread: int  # 1 slower beside each reference, -1 faster, else 0

    @property
    def median(self) -> float:
        return median(self.each)

    def least(self, shift: float) -> float:
        """The smallest distance from a shift; 0 if the references do not agree on its side."""
        away = [value - shift for value in self.each]
        return 0.0 if min(away) < 0 < max(away) else min(away, key=abs)


def side(old: Time, new: Time) -> int:
    """1 if the new spread lies above the old one, -1 if below, 0 if they overlap."""
    return int(new.low > old.high) - int(new.high < old.low)


def change_of(old: Times, new: Times) -> Change | None:
    """None if nothing was measured beside both."""
    names = [name for name in old if name in new]
    if not names:
        return None
    sides = {side(old[name], new[name]) for name in names}
    each = tuple(math.log(new[name].median / old[name].median) for name in names)
    return Change(each, sides.pop() if len(sides) == 1 else 0)


Changes = dict[Key, Change]


def changes(old: dict[Key, Times], new: dict[Key, Times]) -> Changes:
    """Of what is in both."""
    found = ((key, change_of(old[key], new[key])) for key in sorted(old.keys() & new.keys()))
    return {key: change for key, change in found if change}


def groups(keys: Iterable[Key]) -> dict[str, list[Key]]:
    """Rows that may change together: of one of ours, and of one direction if there are enough."""
    kinds: dict[str, dict[str, list[Key]]] = {}
    for key in keys:
        kinds.setdefault(key[-1], {}).setdefault(f"{key[-2]} {key[-1]}", []).append(key)
    found: dict[str, list[Key]] = {}
    for kind, parts in kinds.items():
        enough = all(len(part) >= FEW for part in parts.values())
        found |= parts if enough else {kind: [key for part in parts.values() for key in part]}
    return found


# ---- noise ----


@dataclass(frozen=True)
class Noise:
    """Of a group of rows, as logarithms."""

    shift: float  # the median change
    mad: float | None  # the median distance from it; None of few rows
    rows: int

    @classmethod
    def of(cls, found: list[Change]) -> "Noise":
        if len(found) < FEW:
            return cls(0.0, None, len(found))
        shift = median(change.median for change in found)
        return cls(shift, median(abs(change.median - shift) for change in found), len(found))

    def limit(self, references: int) -> float:
        """What a row's change must be beyond."""
        if self.mad is None:
            return math.log(FLOOR)
        return self.mad * (MADS if references > 1 else MADS_OF_ONE_REFERENCE)

    @property
    def shift_limit(self) -> float:
        """What the median change must be beyond: it is less noisy than a row."""
        return max(math.log(SHIFT), self.limit(2) / math.sqrt(max(self.rows, 1)))


def verdict(seen: list[tuple[Change, float]], limit: float) -> int:
    """1 slower, -1 faster, 0 neither: of changes from one old result or two, with their shifts."""
    sides = {change.beyond_spread for change, _ in seen}
    least = [change.least(shift) for change, shift in seen]
    for sign in (1, -1):
        if sides == {sign} and all(sign * value > limit for value in least):
            return sign
    return 0


@dataclass(frozen=True)
class Runs:
    """Changes of all rows between the results; the last two with a second one of the old code."""

    new: Changes  # from the old result
    again: Changes | None = None  # from the old result to the second one
    since: Changes | None = None  # from the second one to the new result

    @classmethod
    def of(cls, old: Result, new: Result, again: Result | None) -> "Runs":
        a, b = relative_times(old), relative_times(new)
        if again is None:
            return cls(changes(a, b))
        c = relative_times(again)
        return cls(changes(a, b), changes(a, c), changes(c, b))


WORDS = {1: "SLOWER", -1: "faster"}


@dataclass
class Group:
    """Rows that may change together, and their noise."""

    name: str
    keys: list[Key]
    own: Noise  # from the old result to the new one
    noise: Noise  # between two results of the old code, or the same

    @classmethod
    def of(cls, name: str, keys: list[Key], runs: Runs) -> "Group":
        own = Noise.of([runs.new[key] for key in keys])
        if runs.again is None:
            return cls(name, keys, own, own)
        return cls(name, keys, own, Noise.of([runs.again[k] for k in keys if k in runs.again]))

    def verdict(self, key: Key, runs: Runs) -> int:
        """Of a row: 1 slower, -1 faster, 0 neither."""
        seen = [(runs.new[key], self.own.shift)]
        limit = self.noise.limit(len(runs.new[key].each))
        if runs.again and runs.since and key in runs.again and key in runs.since:
            limit = max(limit, abs(runs.again[key].median))
            seen.append((runs.since[key], self.own.shift - self.noise.shift))
        return verdict(seen, limit)

    def shifted(self) -> int:
        """Of the median of all rows: 1 slower, -1 faster, 0 neither."""
        limit = self.noise.shift_limit
        if self.noise is not self.own:
            limit = max(limit, abs(self.noise.shift))
        if self.own.mad is None or abs(self.own.shift) <= limit:
            return 0
        return 1 if self.own.shift > 0 else -1

    def __str__(self) -> str:
        """The noise, and what counts."""
        text = f"{self.name}, {self.own.rows} rows: "
        if self.own.mad is not None:
            text += f"median {factor(self.own.shift)} the time, "
        if self.noise.mad is None:
            return f"{text}too few to estimate the noise: a row counts beyond {FLOOR}x"
        return (
            f"{text}noise of half of the rows within {factor(self.noise.mad)}; a row counts beyond "
            f"{factor(self.noise.limit(2))}, beside one reference {factor(self.noise.limit(1))}"
        )


def factor(logarithm: float) -> str:
    return f"{math.exp(logarithm):.2f}x"


# ---- text ----


def other_conditions(before: Result, after: Result) -> list[str]:
    """What of the machines differs."""
    pairs = (
        (what, before["machine"].get(what), after["machine"].get(what))
        for what in ("device", "gpu", "cpu", "threads", "malloc", "torch")
    )
    return [f"measured with another {what}: {a} and {b}" for what, a, b in pairs if a != b]


def compare(before: Result, after: Result, again: Result | None = None) -> tuple[str, int]:
    """Text and exit status: 0 if nothing became slower or is missing, 2 if nothing is in both.

    Args:
        before: the old result.
        after: the new one, of the same script.
        again: a second result of the old code.
    """
    runs = Runs.of(before, after, again)
    parts = [Group.of(name, keys, runs) for name, keys in groups(runs.new).items()]
    found: dict[int, list[str]] = {sign: [] for sign in WORDS}
    shifts: dict[int, list[str]] = {sign: [] for sign in WORDS}
    for part in parts:
        if sign := part.shifted():
            text = f"all {part.own.rows} rows of {part.name}: median {factor(part.own.shift)}"
            shifts[sign].append(f"{WORDS[sign]} {text} the time")
        for key in part.keys:
            if sign := part.verdict(key, runs):
                change = factor(runs.new[key].median)
                found[sign].append(f"{WORDS[sign]} {' '.join(key)}: {change} the time")
    gone = sorted(relative_times(before).keys() - runs.new.keys())
    missing = [f"MISSING {' '.join(key)}" for key in gone]
    lines = [f"before: {tables.where(before['machine'])}"]
    if again is not None:
        lines += [f"same code: {tables.where(again['machine'])}", *other_conditions(before, again)]
    lines += [f"after: {tables.where(after['machine'])}", *other_conditions(before, after)]
    how = "estimated from these two results, of which most rows are taken to be unchanged"
    if again is not None:
        how = "measured, from the first result and the second one of its code"
    lines += [f"noise: {how}", *(f"  {part}" for part in parts)]
    lines.append(
        f"{len(runs.new)} in both, {len(found[1])} slower, {len(found[-1])} faster, "
        f"{len(missing)} missing"
    )
    status = 2 if not runs.new else int(bool(found[1] or shifts[1] or missing))
    lines += [*shifts[1], *found[1], *missing, *shifts[-1], *found[-1]]
    return "\n".join(lines), status
