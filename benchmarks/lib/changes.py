"""Compares two results of the same script: which of our times changed by more than their spread.

Our time is divided by each reference's in the same rounds: the copy, eager, timm and the forms of
torch.compile. A row changed if, by every reference, its new spread, p20 to p80, lies outside the
old one. Two processes of the same code differ too, as memory lies elsewhere and other programs run.
So a change counts if a rerun of the new code shows it again.
"""

from dataclasses import dataclass
from statistics import median
from typing import Any

from lib import tables
from lib.tables import Result, Row

Key = tuple[str, ...]

OURS = (
    *("native", "triton", "fused ECA", "native ECA", "fused SE", "native SE"),
    *("tails", "native tails"),
)
REFERENCES = ("copy", "eager", "timm", "sigmoid")


@dataclass(frozen=True)
class Time:
    """Our time divided by a reference's: the median of the rounds, and p20 and p80."""

    median: float
    low: float
    high: float


Times = dict[str, Time]  # by reference


def inverse(ratio: dict[str, float]) -> Time:
    return Time(1 / ratio["median"], 1 / ratio["p80"], 1 / ratio["p20"])


def is_reference(name: str) -> bool:
    """Whether another contender was measured in the same way as ours."""
    return name in REFERENCES or (name.startswith("compile") and not name.endswith(", graph"))


def times_of(name: str, contenders: dict[str, Any]) -> Times:
    """The time of one of our contenders, divided by the time of each reference of its row."""
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
        head = (
            row.get("axis", row.get("tail", "")),
            "x".join(map(str, row["shape"])),
            str(row.get("k", "")),
        )
        head += (row["dtype"], row.get("layout", ""), row["direction"])
    return tuple(filter(None, head))


def relative_times(result: Result) -> dict[Key, Times]:
    """The times of our contenders on every row."""
    found = {}
    for row in result["rows"]:
        head = place(row)
        for name in OURS:
            if name in row["contenders"]:
                found[(*head, name)] = times_of(name, row["contenders"])
    return {key: times for key, times in found.items() if times}


# ---- changes ----


def side(old: Time, new: Time) -> int:
    """1 if the new spread lies above the old one, -1 if below, 0 if they overlap."""
    return int(new.low > old.high) - int(new.high < old.low)


def change_of(old: Times, new: Times) -> tuple[int, float] | None:
    """1 if slower beside every reference, -1 if faster, else 0; and the new time over the old.

    None if nothing was measured beside both.
    """
    names = [name for name in old if name in new]
    if not names:
        return None
    sides = {side(old[name], new[name]) for name in names}
    factor = median(new[name].median / old[name].median for name in names)
    return sides.pop() if len(sides) == 1 else 0, factor


Changes = dict[Key, tuple[int, float]]


def changes(before: Result, after: Result) -> Changes:
    """Of every row that is in both."""
    old, new = relative_times(before), relative_times(after)
    found = ((key, change_of(old[key], new[key])) for key in old if key in new)
    return {key: change for key, change in found if change}


def other_conditions(before: Result, after: Result) -> list[str]:
    """What differs between the machines."""
    pairs = (
        (what, before["machine"].get(what), after["machine"].get(what))
        for what in ("device", "gpu", "cpu", "threads", "malloc", "torch")
    )
    return [f"measured with another {what}: {a} and {b}" for what, a, b in pairs if a != b]


WORDS = {1: "SLOWER", -1: "faster"}


def compare(before: Result, after: Result, rerun: Result | None = None) -> tuple[str, int]:
    """Text and exit status: 0 if nothing became slower or is missing, 2 if nothing is in both.

    Args:
        before: the old result.
        after: the new one, of the same script.
        rerun: a second result of the new code.
    """
    found = changes(before, after)
    seen = found if rerun is None else changes(before, rerun)
    lines = [f"before: {tables.where(before['machine'])}"]
    for name, result in (("after", after), ("rerun", rerun)):
        if result is not None:
            lines += [f"{name}: {tables.where(result['machine'])}"]
            lines += other_conditions(before, result)
    listed: dict[int, list[str]] = {1: [], -1: []}
    once = 0
    for key, (sign, factor) in found.items():
        if not sign:
            continue
        if seen.get(key, (0, 1.0))[0] != sign:
            once += 1
            continue
        again = "" if rerun is None else f", again {seen[key][1]:.2f}x"
        listed[sign].append(f"{WORDS[sign]} {' '.join(key)}: {factor:.2f}x the time{again}")
    missing = [f"MISSING {' '.join(key)}" for key in relative_times(before) if key not in found]
    counts = f"{len(listed[1])} slower, {len(listed[-1])} faster, {len(missing)} missing"
    if rerun is None:
        counts += "; a rerun of the new code, given as a third result, tells change from noise"
    else:
        counts += f"; {once} changed in one of the two alone"
    lines.append(f"{len(found)} in both, {counts}")
    status = 2 if not found else int(bool(listed[1] or missing))
    return "\n".join([*lines, *listed[1], *missing, *listed[-1]]), status
