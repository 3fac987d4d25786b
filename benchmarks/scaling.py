"""Times ECA as samples, channels or pixels grow, from one pixel to the memory at hand.

    python benchmarks/scaling.py                            # up to 8 GB, as far as memory goes
    python benchmarks/scaling.py --most-bytes 256e6 --output scaling.json --plot scaling.png

Where memory is what bounds it, the time per element must be flat. A step of more than 15 % from a
size to the next is reported, with the step of the copy beside it: where the copy has it too, a
cache has ended; where it has not, the kernels have a cliff. Sizes between the powers of two are
measured as well, as cliffs hide there: rows that are no multiple of a vector, and tiles that just
fit or just do not.
"""

import argparse
import os
import sys
from collections.abc import Iterator
from itertools import pairwise, product
from typing import Any

import report
import tables
import torch
import torch._dynamo
from cases import DIRECTIONS, DTYPES, LAYOUTS, Case
from checking import Judge
from contenders import Contender, compiled, contenders, make_inputs
from devices import Device, device_named
from gpu_timing import no_collection
from harness import machine, progress, reason_of, write
from microbench import measure_direction
from options import add_options, prepare

# Axis, and the layer that it starts from: samples, channels, height, width.
AXES = {"N": (1, 256, 14, 14), "C": (8, 1, 28, 28), "S": (8, 64, 1, 1)}
STEP = 1.15
TAPS = 5
LARGEST = 8e9  # bytes of a map
ALONE = 256e6  # bytes of a map from which the contenders are measured one by one


def sizes(axis: str, dtype: str, layout: str, most_bytes: float) -> list[Case]:
    """The layers of an axis: 1, 2, 3, 4, 6, 8, 11, 16, ... samples, channels, or pixels a side."""
    n, c, h, w = AXES[axis]
    found: list[Case] = []
    for side in dict.fromkeys(round(2 ** (i / 2)) for i in range(64)):
        shape = {"N": (side, c, h, w), "C": (n, side, h, w), "S": (n, c, side, side)}[axis]
        case = Case(shape, TAPS, dtype, layout)
        if case.map_bytes > most_bytes:
            break
        found.append(case)
    return found


def memory_at_hand(device: Device) -> float:
    """Bytes of the largest map, which a contender, the copy and the check need a dozen times."""
    if device.tensors != device.kind:
        return 1 << 14  # a dry run
    host = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 16
    if device.kind == "cuda":
        # The exact results, in float64, are in the host's memory.
        return min(LARGEST, float(torch.cuda.mem_get_info()[0]) / 12, host)
    return min(LARGEST, host)


def steps(rows: list[dict[str, Any]]) -> list[str]:
    """Where the time per element of one of ours grows by more than 15 % to the next size."""
    found = []
    for before, after in pairwise(rows):
        group = ("axis", "layout", "direction")
        if any(before[name] != after[name] for name in group):
            continue
        for name in ("native", "triton"):
            if name in before["contenders"] and name in after["contenders"]:
                step = growth(before, after, name, "median", "median")
                if step <= STEP:
                    continue
                copy = growth(before, after, "copy", "median", "median")
                noise = growth(before, after, name, "p80", "p20") <= 1
                found.append(
                    f"{name}, {after['layout']}, {after['direction']}, {after['axis']} grows: "
                    f"{step:.2f}x per element from {tables.layer_of(before)} to "
                    f"{tables.layer_of(after)} (the copy {copy:.2f}x)"
                    + (", within the noise" if noise else "")
                )
    return found


def growth(before: dict[str, Any], after: dict[str, Any], name: str, low: str, high: str) -> float:
    """Time per element after, in units of that before, by these two statistics."""
    times = (
        one["contenders"][name]["us"][which] / one["ideal_bytes"]
        for one, which in ((before, low), (after, high))
    )
    first, second = times
    return float(second / first)


def together(case: Case, running: dict[str, Contender]) -> list[dict[str, Contender]]:
    """Who is measured side by side: all, unless what each keeps for itself fills the memory."""
    if case.map_bytes < ALONE:
        return [running]
    return [{name: one} for name, one in running.items()]


def measure(
    case: Case, axis: str, args: argparse.Namespace, device: Device
) -> Iterator[dict[str, Any]]:
    """One layer: a row for each direction."""
    inputs = make_inputs(case, device)
    running: dict[str, Contender] = contenders(inputs.taps)
    if args.compile:
        torch._dynamo.reset()
        running["compile shifted"] = compiled("shifted", "default", inputs.taps)
    judge = Judge(inputs)
    with no_collection():
        for direction in args.direction:
            row: dict[str, Any] = {"contenders": {}, "failed": []}
            for some in together(case, running):
                found = measure_direction(
                    direction, inputs, some, judge, device, rounds=args.rounds
                )
                row = {
                    **found,
                    "contenders": found["contenders"] | row["contenders"],
                    "failed": row["failed"] + found["failed"],
                }
                device.free()
            for entry in row["contenders"].values():
                entry["ps_per_element"] = 1e6 * entry["us"]["median"] / inputs.xs[0].numel()
            yield {**row, "axis": axis, "map_bytes": case.map_bytes}


def remarks(rows: list[dict[str, Any]]) -> list[str]:
    """What failed, and the steps, of the rows of an axis in order of size."""
    found = [f"FAILED {tables.layer_of(row)}: {what}" for row in rows for what in row["failed"]]
    for direction in DIRECTIONS:
        found += steps([row for row in rows if row["direction"] == direction])
    return found


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    add_options(parser, rounds=9)
    parser.add_argument("--axis", choices=AXES, nargs="+", default=list(AXES))
    parser.add_argument("--dtype", choices=DTYPES, default="float32")
    parser.add_argument("--layout", choices=LAYOUTS, nargs="+", default=list(LAYOUTS))
    parser.add_argument(
        "--direction", choices=DIRECTIONS[:2], nargs="+", default=list(DIRECTIONS[:2])
    )
    parser.add_argument("--most-bytes", type=float, help="of a map (default: what memory allows)")
    parser.add_argument(
        "--no-compile", dest="compile", action="store_false", help="leave torch.compile out"
    )
    args = parser.parse_args(argv)
    prepare(args)
    device = device_named(args.device)
    device.full_precision()
    most = args.most_bytes or memory_at_hand(device)
    result: dict[str, Any] = {
        "script": "scaling",
        "machine": machine(device),
        "rows": [],
        "remarks": [],
    }
    known: list[str] = []
    for layout, axis in product(args.layout, args.axis):
        cases, rows = sizes(axis, args.dtype, layout, most), []
        for case in progress(cases, len(cases)):
            try:
                for row in measure(case, axis, args, device):
                    rows.append(row)
                    result["rows"].append(row)
            except Exception as reason:  # out of memory, say: the others can still be measured
                known.append(f"FAILED {case}: {reason_of(reason)}")
                device.free()
            result["remarks"] = known + remarks(rows)
            write(args.output, result)
        known = result["remarks"]
    return report.show(result, args.plot)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
