"""Results as they are committed: no derived values, four digits, a row on each line."""

import json
import math
from typing import Any

from lib.cases import Case, TailCase

Result = dict[str, Any]

SPREAD = ("median", "p20", "p80", "samples")
DERIVED = ("gbps", "of_copy", "ps_per_element")
DIGITS = 4


def pack(result: Result) -> str:
    """The text of a result's file; report.load() reads it like any other.

    Spreads become lists, in the order of SPREAD. Derived values are left out and computed again:
    the speed from the bytes and the time, the share of the copy from the medians. The share of our
    own contender keeps its spread, because times_ours of the copy has it.
    """
    head = {name: rounded(value) for name, value in result.items() if name != "rows"}
    tight: dict[str, Any] = {"separators": (",", ":")}
    lines = [json.dumps(rounded(packed_row(row)), **tight) for row in result["rows"]]
    text = json.dumps({**head, "packed": True, "rows": []}, **tight)
    return text[: -len("]}")] + "\n" + ",\n".join(lines) + "\n]}\n"


def unpack(result: Result) -> Result:
    """A result as the scripts write it, from a packed one."""
    if not result.pop("packed", False):
        return result
    return {**result, "rows": [unpacked_row(row) for row in result["rows"]]}


def packed_row(row: Result) -> Result:
    if "contenders" not in row:
        return row
    row = dropped(row)
    return {**row, "contenders": packed(row["contenders"], row)}


def unpacked_row(row: Result) -> Result:
    if "contenders" not in row:
        return row
    row = usual(row) | row
    contenders = unpacked(row["contenders"], row)
    row.pop("samples", None)
    return {**row, "contenders": contenders}


def bytes_of(row: Result) -> dict[str, int]:
    """The bytes that follow from the shape; a row of a network, or of small calls, has none."""
    if "shape" not in row or "k" not in row:
        return {}
    fields = tuple(row["shape"]), row["k"], row["dtype"], row["layout"]
    case = TailCase(*fields, row["tail"]) if "tail" in row else Case(*fields)
    found = {"ideal_bytes": case.ideal_bytes(row["direction"].removeprefix("warm "))}
    return found | ({"map_bytes": case.map_bytes} if "axis" in row else {})


def usual(row: Result) -> Result:
    """What a row has unless it says otherwise: on a CPU a call is timed alone."""
    alone = {"calls": 1, "cold": False} if row.get("calls", 1) == 1 and "k" in row else {}
    return {**bytes_of(row), **alone, "failed": []}


def dropped(row: Result) -> Result:
    """Without what is usual, and with the number of samples once, if all spreads have the same."""
    known = usual(row)
    found = {name: value for name, value in row.items() if value != known.get(name, [])}
    counts = {
        value["samples"]
        for entry in row["contenders"].values()
        for value in entry.values()
        if is_spread(value)
    }
    return found | ({"samples": counts.pop()} if len(counts) == 1 else {})


def packed(contenders: dict[str, Any], row: Result) -> dict[str, Any]:
    ours = ours_of(contenders)
    return {
        name: {
            what: [value[part] for part in SPREAD[: 3 if "samples" in row else 4]]
            if is_spread(value)
            else value
            for what, value in entry.items()
            if value is not None and what not in DERIVED
            if what != "times_ours" or entry is not ours
        }
        for name, entry in contenders.items()
    }


def ours_of(contenders: dict[str, Any]) -> Any:
    """The entry by which the others' times_ours is measured, or None."""
    return contenders.get("native") or contenders.get("triton")


def unpacked(contenders: dict[str, Any], row: Result) -> dict[str, Any]:
    found: dict[str, Any] = {
        name: {
            what: dict(zip(SPREAD, [*value, row.get("samples")], strict=False))
            if isinstance(value, list)
            else value
            for what, value in entry.items()
        }
        for name, entry in contenders.items()
    }
    copy = found.get("copy")
    for entry in found.values():
        us = entry["us"]["median"]
        if "ideal_bytes" in row:
            entry["gbps"] = row["ideal_bytes"] / us / 1e3
        if "map_bytes" in row:
            entry["ps_per_element"] = 1e6 * us / math.prod(row["shape"])
        if copy:
            share = copy["us"]["median"] / us
            entry["of_copy"] = {**dict.fromkeys(SPREAD, share), "samples": entry["us"]["samples"]}
    ours = ours_of(found)
    if ours and any("times_ours" in entry for entry in found.values()):
        ours["times_ours"] = {**dict.fromkeys(SPREAD, 1.0), "samples": ours["us"]["samples"]}
    if copy and ours and "times_ours" in copy:
        ours["of_copy"] = dict(copy["times_ours"])
    return found


def is_spread(value: Any) -> bool:
    return isinstance(value, dict) and tuple(value) == SPREAD


def rounded(value: Any) -> Any:
    """A document with floats of a few digits."""
    if isinstance(value, float):
        return float(f"{value:.{DIGITS}g}")
    if isinstance(value, dict):
        return {name: rounded(part) for name, part in value.items()}
    if isinstance(value, list):
        return [rounded(part) for part in value]
    return value
