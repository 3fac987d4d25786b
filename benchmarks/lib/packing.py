"""Results as they are committed: no derived values, four digits, a row on each line."""

import json
from collections.abc import Callable
from typing import Any

Result = dict[str, Any]

SPREAD = ("median", "p20", "p80", "samples")
DERIVED = ("gbps", "of_copy", "ps_per_element")
DIGITS = 4


def pack(result: Result) -> str:
    """The text of a result's file; report.load() reads it like any other.

    Spreads become lists, in the order of SPREAD. Derived values are left out and computed again:
    the speed from the bytes and the time, the share of the copy from the medians. Only our own
    contender's share keeps its spread: it is the copy's times_ours.
    """
    head = {name: rounded(value) for name, value in result.items() if name != "rows"}
    tight: dict[str, Any] = {"separators": (",", ":")}
    lines = [json.dumps(rounded(with_contenders(packed, row)), **tight) for row in result["rows"]]
    text = json.dumps({**head, "packed": True, "rows": []}, **tight)
    return text[: -len("]}")] + "\n" + ",\n".join(lines) + "\n]}\n"


def unpack(result: Result) -> Result:
    """A result as the scripts write it, from a packed one."""
    if not result.pop("packed", False):
        return result
    return {**result, "rows": [with_contenders(unpacked, row) for row in result["rows"]]}


def with_contenders(change: Callable[[Any, Result], Any], row: Result) -> Result:
    if "contenders" not in row:
        return row
    return {**row, "contenders": change(row["contenders"], row)}


def packed(contenders: dict[str, Any], row: Result) -> dict[str, Any]:
    return {
        name: {
            what: [value[part] for part in SPREAD] if is_spread(value) else value
            for what, value in entry.items()
            if value is not None and what not in DERIVED
        }
        for name, entry in contenders.items()
    }


def unpacked(contenders: dict[str, Any], row: Result) -> dict[str, Any]:
    found: dict[str, Any] = {
        name: {
            what: dict(zip(SPREAD, value, strict=True)) if isinstance(value, list) else value
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
            entry["ps_per_element"] = 1e6 * us / (row["map_bytes"] / SIZES[row["dtype"]])
        if copy:
            share = copy["us"]["median"] / us
            entry["of_copy"] = {**dict.fromkeys(SPREAD, share), "samples": entry["us"]["samples"]}
    ours = found.get("native") or found.get("triton")
    if copy and ours and "times_ours" in copy:
        ours["of_copy"] = dict(copy["times_ours"])
    return found


SIZES = {"float32": 4, "float64": 8, "float16": 2, "bfloat16": 2}


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
