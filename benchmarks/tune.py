"""Times plans that the planner would not choose, to replace the constants that it assumes.

    python benchmarks/tune.py --output tune.json                  # six layers, two minutes
    python benchmarks/tune.py --shape 32 256 56 56 --taps 3 --layout channels_last
    python benchmarks/tune.py --shape 32 2048 7 7 --taps 7 --strategy runs      # these plans alone
    python benchmarks/tune.py --list --gpu sm_90:132              # the plans alone; needs no GPU

Forces every plan that the CUDA kernels can run for a layer, from a grid of tiles, groups and
threads. Each is checked against float64 and timed as in layers.py. The table of a layer is sorted
by time; `*` marks the planner's choice. TUNING.md says what the numbers are for.
"""

import argparse
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from eca_fused.cli.common.measure import reason
from eca_fused.ops import native
from lib.cases import DIRECTIONS, DTYPES, LAYOUTS, Case
from lib.checking import Judge
from lib.contenders import Inputs, make_inputs, record_copy
from lib.devices import Device, device_named
from lib.gpu_timing import Call, no_collection
from lib.machine import machine
from lib.plans import gpu_limits, plan_of, planner
from lib.script import write
from lib.timing import call_times, summarise

LAYERS = [
    Case((32, 1024, 14, 14), 5, "bfloat16", "contiguous"),
    Case((64, 256, 56, 56), 3, "bfloat16", "contiguous"),
    Case((64, 256, 56, 56), 3, "bfloat16", "channels_last"),
    Case((32, 2048, 7, 7), 7, "bfloat16", "contiguous"),
    Case((32, 1024, 14, 14), 5, "bfloat16", "channels_last"),
    Case((32, 512, 28, 28), 5, "bfloat16", "contiguous"),
]
MOST_HALO = 1.6  # L2 bytes over the maps' bytes; beyond this, halos cost too much
SHOWN = 12  # rows of a table


class Forced(NamedTuple):
    """Arguments of native.force_plan()."""

    strategy: str
    tile: int = 0
    threads: int = 256
    depth: int = 0

    def __str__(self) -> str:
        if self.strategy == "two_pass":
            return self.strategy
        depth = f" {self.depth}" if self.depth else ""
        return f"{self.strategy}{depth}, tile {self.tile or 'largest'}, {self.threads} threads"


IN_REGISTERS = {"rows": (7, 13), "runs": (2, 4, 8), "columns": (4, 7, 13)}  # with their depths
KEPT = (4, 8, 12, 16, 20, 25, 32, 0)  # vectors of a thread


def candidates(
    case: Case, backward: bool, limits: Any, strategies: Sequence[str] = ()
) -> dict[Forced, dict[str, Any]]:
    """The plans that can run, by what forces them; all strategies, or only these."""
    found = {}
    ways = [Forced("two_pass"), Forced("stream")]
    named = [(name, depth) for name, depths in IN_REGISTERS.items() for depth in depths]
    sizes = product(named, (64, 128, 256, 512), (0, 16, 32, 64, 128))
    ways += [Forced(name, tile, n, depth) for (name, depth), n, tile in sizes]
    ways += [Forced("kept", depth=vectors) for vectors in KEPT]
    for forced in ways:
        if strategies and forced.strategy not in strategies:
            continue
        plan = plan_of(case, backward, forced._asdict(), limits)
        if isinstance(plan, str) or plan["occupancy"] < 1:
            continue
        if forced.strategy == "two_pass" or plan["l2_bytes"] <= MOST_HALO * plan["map_bytes"]:
            found[forced] = plan
    return found


def same(plan: dict[str, Any], other: Any) -> bool:
    sizes = ("strategy", "tile", "threads", "depth", "chunk", "parts")
    return isinstance(other, dict) and all(plan[name] == other[name] for name in sizes)


def force(forced: Forced | None) -> None:
    native.force_plan(**(forced._asdict() if forced else {"strategy": None}))


def record(
    inputs: Inputs, saved: list[tuple[Tensor, Tensor]], backward: bool, device: Device
) -> Any:
    """Calls of the operators themselves, without autograd."""
    ops: Any = torch.ops.eca_fused

    def forward(x: Tensor) -> tuple[Tensor]:
        return (ops.forward(x, inputs.taps, False)[0],)

    def gradients(x: Tensor, dy: Tensor, mean: Tensor, gate: Tensor) -> tuple[Tensor, ...]:
        made: tuple[Tensor, ...] = ops.backward(dy, x, inputs.taps, mean, gate, False)
        return made

    calls: list[Call] = [partial(forward, x) for x in inputs.xs]
    if backward:
        calls = [
            partial(gradients, x, dy, *numbers)
            for x, dy, numbers in zip(inputs.xs, inputs.dys, saved, strict=True)
        ]
    return device.record(calls)


def tune(
    case: Case,
    direction: str,
    inputs: Inputs,
    *,
    limits: Any,
    device: Device,
    rounds: int,
    strategies: Sequence[str] = (),
) -> dict[str, Any]:
    """Check and time all candidates on one direction of a layer."""
    backward = direction == "backward"
    ops: Any = torch.ops.eca_fused
    saved = [ops.forward(x, inputs.taps, False)[1:] for x in inputs.xs]
    chosen = plan_of(case, backward, None, limits)
    plans = candidates(case, backward, limits, strategies)
    judge = Judge(inputs)
    recordings = {"copy": record_copy(direction, case, device)}
    failed = []
    # The planner's choice comes first, unforced: a Forced may not describe it.
    for forced in [None, *plans]:
        name = "planner" if forced is None else str(forced)
        try:
            force(forced)
            recording = record(inputs, saved, backward, device)
            force(None)
            wrong = judge.faults(recording, direction)
        except Exception as error:
            wrong = [reason(error)]
        finally:
            force(None)
        if wrong:
            failed.append(f"{name}: {', '.join(wrong)}")
            device.synchronize()  # raises if the GPU no longer answers
        else:
            recordings[name] = recording
    samples = call_times(device, recordings, rounds, budget_ms=4000)
    by_name = {str(forced): plan for forced, plan in plans.items()}
    rows = [
        {
            "name": name,
            "plan": by_name.get(name, chosen if name == "planner" else None),
            "chosen": name == "planner" or (name in by_name and same(by_name[name], chosen)),
            **entry,
        }
        for name, entry in summarise(samples, case.ideal_bytes(direction)).items()
    ]
    rows.sort(key=lambda row: row["us"]["median"])
    return {"ideal_bytes": case.ideal_bytes(direction), "plans": rows, "failed": failed}


def table(case: Case, direction: str, found: dict[str, Any], most: int = SHOWN) -> str:
    """Text: the fastest plans; the copy and the planner's choice, whatever their place."""
    lines = [f"{case} {direction}, {found['ideal_bytes'] / 1e6:.0f} MB, {len(found['plans'])} rows"]
    lines.append(f"  {'':36} {'us':>8} {'p20':>8} {'p80':>8} {'GB/s':>6} {'of copy':>7}  resident")
    for place, row in enumerate(found["plans"]):
        if place >= most and not row["chosen"] and row["name"] != "copy":
            continue
        plan, us = row["plan"], row["us"]
        resident = f"{plan['strategy']} {plan['occupancy']}" if isinstance(plan, dict) else "-"
        mark = "*" if row["chosen"] else " "
        lines.append(
            f"{mark} {row['name']:36} {us['median']:8.2f} {us['p20']:8.2f} {us['p80']:8.2f} "
            f"{row['gbps']:6.0f} {row['of_copy']['median']:7.2f}  {resident}"
        )
    lines += [f"  FAILED {what}" for what in found["failed"]]
    return "\n".join(lines)


def listing(case: Case, limits: Any, strategies: Sequence[str] = ()) -> str:
    lines = []
    for direction in DIRECTIONS[:2]:
        backward = direction == "backward"
        chosen = plan_of(case, backward, None, limits)
        plans = candidates(case, backward, limits, strategies)
        lines.append(f"{case} {direction}: {len(plans)} plans")
        for forced, plan in plans.items():
            mark = "*" if same(plan, chosen) else " "
            lines.append(f"{mark} {forced!s:36} {plan['strategy']} {plan['occupancy']} resident")
    return "\n".join(lines)


def parse(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--shape", type=int, nargs=4, metavar=("N", "C", "H", "W"))
    parser.add_argument("--taps", type=int, default=3, help="taps of --shape (default 3)")
    parser.add_argument("--dtype", choices=DTYPES, default="bfloat16", help="of --shape")
    parser.add_argument("--layout", choices=LAYOUTS, default="contiguous", help="of --shape")
    parser.add_argument("--layers", type=int, default=len(LAYERS), help="only the first of them")
    known = ("two_pass", "stream", "kept", *IN_REGISTERS)
    parser.add_argument(
        "--strategy", nargs="+", choices=known, default=[], help="only plans of these"
    )
    parser.add_argument("--rounds", type=int, default=15, help="samples of each plan (default 15)")
    parser.add_argument("--seconds", type=float, default=120, help="start no layer after this")
    parser.add_argument("--list", action="store_true", help="print the plans, and time none")
    parser.add_argument("--gpu", help="for --list: another GPU, such as sm_90:132")
    parser.add_argument("--device", choices=["cuda", "dry-run"], default="cuda")
    parser.add_argument("--output", type=Path, help="JSON file to write")
    args = parser.parse_args(argv)
    if args.gpu and not args.list:
        parser.error("--gpu names another GPU for --list; what is measured is the one that is here")
    return args


def main(argv: list[str]) -> int:
    args = parse(argv)
    layers = LAYERS[: args.layers]
    if args.shape:
        layers = [Case(tuple(args.shape), args.taps, args.dtype, args.layout)]
    limits = planner().gpu_by_name(args.gpu) if args.gpu else gpu_limits()
    if args.list:
        print("\n".join(listing(case, limits, args.strategy) for case in layers))
        return 0
    device = device_named(args.device)
    device.full_precision()
    torch.manual_seed(0)
    result: dict[str, Any] = {"machine": machine(device), "limits": limits, "layers": []}
    status, end = 0, time.monotonic() + args.seconds
    for case in layers:
        inputs = make_inputs(case, device)
        for direction in DIRECTIONS[:2]:
            if time.monotonic() > end:
                print(f"left out: {case} {direction}: no time left")
                continue
            with no_collection(), torch.no_grad():
                found = tune(
                    case,
                    direction,
                    inputs,
                    limits=limits,
                    device=device,
                    rounds=args.rounds,
                    strategies=args.strategy,
                )
            device.free()
            status |= bool(found["failed"])
            result["layers"].append({**asdict(case), "direction": direction, **found})
            print(table(case, direction, found), flush=True)
            write(args.output, result)
    return status


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
