"""Times ECA as samples, channels or pixels grow, from one pixel to what memory allows.

    python benchmarks/sizes.py                            # up to 8 GB, as far as memory goes
    python benchmarks/sizes.py --most-bytes 256e6 --output sizes.json --plot sizes.png

ECA is bound by memory, so the time per element must be flat. lib/steps.py says what counts as a
cliff. A step is measured again, with the two sizes side by side in newly allocated maps. Sizes
between the powers of two are measured too, because cliffs hide there: rows that are no multiple of
a vector, and tiles that just fit or just do not.
"""

import argparse
import os
import sys
import time
from collections.abc import Iterator
from itertools import product
from typing import Any

import torch

import report
from eca_fused.cli.common.measure import reason
from eca_fused.torch_state import forget_compiled
from layers import measure_direction
from lib import steps, tables
from lib.cases import DIRECTIONS, DTYPES, LAYOUTS, Case
from lib.checking import Judge
from lib.contenders import (
    Contender,
    Inputs,
    compiled,
    contenders,
    make_inputs,
    record,
    record_copy,
)
from lib.devices import Device, device_named
from lib.gpu_timing import no_collection
from lib.machine import machine
from lib.script import (
    INTERRUPTED,
    add_options,
    amount,
    chosen_options,
    prepare,
    progress,
    until_interrupted,
    write,
)
from lib.timing import call_times, statistics_of

# Axis, and the layer that it starts from: samples, channels, height, width.
AXES = {"N": (1, 256, 14, 14), "C": (8, 1, 28, 28), "S": (8, 64, 1, 1)}
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


def memory_at_hand(device: Device, dtype: str) -> float:
    """Bytes of the largest map.

    The inputs of two calls, a contender's outputs and the copy's need a dozen maps. The exact y and
    dx of both calls, in float64, need 32 bytes for each element of x. A CPU needs three times as
    much in all: the recycled heap keeps the pieces that smaller sizes left.
    """
    maps = 12 + 32 / DTYPES[dtype].itemsize
    if device.tensors != device.kind:
        return 1 << 14  # a dry run
    if device.kind == "cuda":
        return min(LARGEST, float(torch.cuda.mem_get_info()[0]) / maps)
    free = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return min(LARGEST, free / (3 * maps))


def together(case: Case, running: dict[str, Contender]) -> list[dict[str, Contender]]:
    """All contenders side by side; for large maps each alone, as all would fill the memory."""
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
        forget_compiled()
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


# ---- steps, measured again ----


def side_by_side(
    names: list[str], direction: str, pair: list[Inputs], device: Device, rounds: int
) -> dict[str, dict[str, float]]:
    """Each one's time per element at the second size, divided by that at the first, by round."""
    recordings = {}
    for name, (which, inputs) in product(names, enumerate(pair)):
        recordings[f"{name} {which}"] = (
            record_copy(direction, inputs.case, device)
            if name == "copy"
            else record(direction, contenders(inputs.taps)[name], inputs, device)
        )
    samples = call_times(device, recordings, rounds)
    first, second = (inputs.case.map_bytes for inputs in pair)
    return {
        name: statistics_of(
            [
                (after / second) / (before / first)
                for before, after in zip(samples[f"{name} 0"], samples[f"{name} 1"], strict=True)
            ]
        )
        for name in names
    }


def measure_again(step: steps.Step, device: Device, rounds: int) -> None:
    """Measure both sizes in each round, and add our step and the copy's to the row as "again".

    Lost rows are measured again in a new process. Steps are not: a difference between processes
    would look like a step.
    """
    pair = [
        make_inputs(Case(tuple(row["shape"]), row["k"], row["dtype"], row["layout"]), device)
        for row in (step.before, step.after)
    ]
    names, found = [step.name, "copy"], {}
    for some in [names] if pair[1].case.map_bytes < ALONE else [[name] for name in names]:
        with no_collection():
            found |= side_by_side(some, step.after["direction"], pair, device, rounds)
        device.free()
    step.after.setdefault("again", {})[step.name] = {
        "ours": found[step.name],
        "copy": found["copy"],
    }


def again(args: argparse.Namespace, device: Device, result: dict[str, Any]) -> None:
    """Measure the steps again, those furthest beyond the copy's first."""
    end = time.monotonic() + args.again_seconds
    found = list(steps.steps_of(result["rows"]))
    found.sort(key=lambda step: step.first[1] / step.first[0])
    for step in progress(found, len(found)):
        if time.monotonic() >= end:
            break
        try:
            measure_again(step, device, 2 * args.rounds)
        except Exception as error:
            result["remarks"].append(f"FAILED again: {step}: {reason(error)}")
            device.free()
        write(args.output, result)


# ---- the script ----


def parse(argv: list[str]) -> argparse.Namespace:
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
    parser.add_argument(
        "--again-seconds", type=amount, default=120, metavar="SECONDS",
        help="measure no step again after this time (default 120; 0: none)",
    )  # fmt: skip
    args = parser.parse_args(argv)
    if args.most_bytes is not None:
        for axis in args.axis:
            least = Case(AXES[axis], TAPS, args.dtype, "contiguous").map_bytes
            if not args.most_bytes >= least:  # nor is nan
                parser.error(
                    f"--most-bytes: the smallest map of axis {axis} has {least} bytes, "
                    f"got {args.most_bytes:g}"
                )
    return args


def run(args: argparse.Namespace, device: Device, result: dict[str, Any]) -> None:
    """Measure all sizes, and write the result after each."""
    most = memory_at_hand(device, args.dtype) if args.most_bytes is None else args.most_bytes
    for layout, axis in product(args.layout, args.axis):
        cases = sizes(axis, args.dtype, layout, most)
        for case in progress(cases, len(cases)):
            try:
                for row in measure(case, axis, args, device):
                    result["rows"].append(row)
                    result["remarks"] += [
                        f"FAILED {tables.layer_of(row)}: {what}" for what in row["failed"]
                    ]
            except Exception as error:  # out of memory, say: the others can still be measured
                result["remarks"].append(f"FAILED {case}: {reason(error)}")
                device.free()
            write(args.output, result)


def main(argv: list[str]) -> int:
    args = parse(argv)
    prepare(args)
    device = device_named(args.device)
    device.full_precision()
    result: dict[str, Any] = {
        "script": "sizes",
        "machine": machine(device),
        "options": chosen_options(args),
        "rows": [],
        "remarks": [],
    }
    with until_interrupted(result):
        run(args, device, result)
        again(args, device, result)
    write(args.output, result)
    status = report.show(result, args.plot)
    return INTERRUPTED if "interrupted" in result else status


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
