"""Times ECA as samples, channels or pixels grow, from one pixel to the memory at hand.

    python benchmarks/scaling.py                                 # maps up to 256 MB on a CPU
    python benchmarks/scaling.py --most-bytes 8e9 --output scaling.json --plot scaling.png

Where memory is what bounds it, the time per element must be flat. A step of more than 15 % from a
size to the next is reported, with the step of the copy beside it: where the copy has it too, a
cache has ended; where it has not, the kernels have a cliff.
"""

import argparse
import sys
from itertools import pairwise
from typing import Any

import plots
import tables
import torch
from cases import DIRECTIONS, DTYPES, LAYOUTS, Case
from checking import Judge
from contenders import Contender, compiled, contenders, make_inputs
from devices import Device, device_named
from gpu_timing import no_collection
from harness import add_options, machine, prepare, progress, reason_of, write
from microbench import measure_direction

# Axis, and the layer that it starts from: samples, channels, height, width.
AXES = {"N": (1, 256, 14, 14), "C": (8, 1, 28, 28), "S": (8, 64, 1, 1)}
STEP = 1.15
TAPS = 5


def sizes(axis: str, dtype: str, layout: str, most_bytes: float) -> list[Case]:
    """The layers of an axis, each twice as large as the one before (S: four times)."""
    n, c, h, w = AXES[axis]
    found: list[Case] = []
    while True:
        case = Case((n, c, h, w), TAPS, dtype, layout)
        if case.map_bytes > most_bytes:
            return found
        found.append(case)
        if axis == "S":
            h, w = 2 * h, 2 * w
        else:
            n, c = (2 * n, c) if axis == "N" else (n, 2 * c)


def memory_at_hand(device: Device) -> float:
    """Bytes of the largest map: of a GPU's memory, where contenders and checks take some 50."""
    if device.kind == "cuda" and device.tensors == "cuda":
        return float(torch.cuda.mem_get_info()[0]) / 64
    if device.tensors != device.kind:
        return 1 << 14  # a dry run
    return 256e6


def steps(rows: list[dict[str, Any]]) -> list[str]:
    """Where the time per element of one of ours grows by more than 15 % to the next size."""
    found = []
    for before, after in pairwise(rows):
        group = ("axis", "layout", "direction")
        if any(before[name] != after[name] for name in group):
            continue
        copy = per_element(after, "copy") / per_element(before, "copy")
        for name in ("native", "triton"):
            if name in before["contenders"] and name in after["contenders"]:
                step = per_element(after, name) / per_element(before, name)
                if step > STEP:
                    found.append(
                        f"{name}, {after['layout']}, {after['direction']}, {after['axis']} grows: "
                        f"{step:.2f}x per element from {tables.layer_of(before)} to "
                        f"{tables.layer_of(after)} (the copy {copy:.2f}x)"
                    )
    return found


def per_element(row: dict[str, Any], name: str) -> float:
    return float(row["contenders"][name]["ps_per_element"])


def measure(
    case: Case, axis: str, args: argparse.Namespace, device: Device
) -> list[dict[str, Any]]:
    inputs = make_inputs(case, device)
    running: dict[str, Contender] = contenders(inputs.taps)
    if args.compile:
        torch._dynamo.reset()
        running["compile shifted"] = compiled("shifted", "default", inputs.taps)
    judge = Judge(inputs)
    rows = []
    with no_collection():
        for direction in args.direction:
            row = measure_direction(direction, inputs, running, judge, device, rounds=args.rounds)
            for entry in row["contenders"].values():
                entry["ps_per_element"] = 1e6 * entry["us"]["median"] / inputs.xs[0].numel()
            rows.append({**row, "axis": axis, "map_bytes": case.map_bytes})
            device.free()
    return rows


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
    parser.add_argument("--compile", action="store_true", help="also torch.compile, at every size")
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
    status = 0
    for layout in args.layout:
        for axis in args.axis:
            cases = sizes(axis, args.dtype, layout, most)
            rows: list[dict[str, Any]] = []
            for case in progress(cases, len(cases)):
                try:
                    rows += measure(case, axis, args, device)
                except Exception as reason:  # out of memory, say
                    result["remarks"].append(f"left out: {case}: {reason_of(reason)}")
                    status = 1
            order = {direction: i for i, direction in enumerate(args.direction)}
            rows.sort(key=lambda row: order[row["direction"]])
            for row in rows:
                result["remarks"] += [f"FAILED {what}" for what in row["failed"]]
            result["remarks"] += steps(rows)
            result["rows"] += rows
            write(args.output, result)
    status |= any(what.startswith("FAILED") for what in result["remarks"])
    print(tables.scaling(result))
    print("\n".join(result["remarks"]))
    print(f"Measured on {tables.where(result['machine'])}.")
    if args.plot:
        plots.scaling(result, args.plot)
    return status


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
