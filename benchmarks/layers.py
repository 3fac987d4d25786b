"""Times ECA layers, forward and backward: ours, plain PyTorch, timm, torch.compile, and a copy.

    python benchmarks/layers.py                                # under 2 minutes
    python benchmarks/layers.py --layers mobilenetv2 --dtype bfloat16 --layout channels_last
    python benchmarks/layers.py --shape 8 96 28 28 --taps 5 --direction forward
    python benchmarks/layers.py --full --again 5 --output r.json       # everything: hours
    python benchmarks/report.py r.json                             # tables from a result

Every contender's outputs are checked against float64 on the same inputs before it is timed. A wrong
one is reported, not timed, and makes the exit status 1. GB/s counts the ideal bytes, whatever a
contender really moves: x and y forward, dy, x and dx backward, all five for both. The copy moves as
many. Forward runs without autograd, as in inference. devices.py says how a time is taken. The most
important layers come first; the result lists those left out for lack of time. With --again, a row
on which a rival wins is measured again in a new process, and counts as lost if it is lost there
too.
"""

import argparse
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict
from itertools import product
from typing import Any

import torch

import report
from eca_fused.cli.common.measure import reason
from eca_fused.torch_state import forget_compiled
from lib.again import measure_again
from lib.cases import (
    DIRECTIONS,
    DTYPES,
    LAYOUTS,
    NETWORKS,
    Case,
    all_cases,
    cpu_cases,
    gpu_cases,
    grid,
)
from lib.checking import Judge
from lib.contenders import (
    CHOICES,
    FORMS,
    MODES,
    Contender,
    Inputs,
    compiled,
    contenders,
    make_inputs,
    missing,
    record,
    record_copy,
    record_existing_memory,
)
from lib.devices import Device, Gpu, Recording, device_named
from lib.gpu_timing import no_collection
from lib.machine import gpu, gpu_state, machine
from lib.plans import plan_of
from lib.script import (
    INTERRUPTED,
    add_options,
    amount,
    chosen_options,
    positive,
    prepare,
    progress,
    write,
)
from lib.timing import call_times, summarise

DEFAULT_SECONDS = 85  # no layer starts later; one takes up to half a minute


class Clock:
    """The time left, in all and for torch.compile."""

    def __init__(self, seconds: float, compile_seconds: float) -> None:
        self.end, self.compile_left = time.monotonic() + seconds, compile_seconds

    @property
    def over(self) -> bool:
        return time.monotonic() > self.end

    @property
    def may_compile(self) -> bool:
        return self.compile_left > 0 and not self.over


def compile_all(
    inputs: Inputs,
    args: argparse.Namespace,
    clock: Clock,
    left_out: list[str],
    failed: list[str],
) -> dict[str, Contender]:
    """The forms of torch.compile that there is time for, compiled for inference and training."""
    forget_compiled()
    found = {}
    for mode, form in product(args.compile_mode, FORMS):
        name = f"compile {form}, {mode}"
        if not clock.may_compile:
            left_out.append(f"{name}: no time left for it")
            continue
        began = time.monotonic()
        try:
            one = compiled(form, mode, inputs.taps)
            with torch.no_grad():
                one.call(inputs.xs[0])
            x = inputs.xs[0].detach().requires_grad_()
            torch.autograd.grad(one.call(x), (x, one.weight), inputs.dys[0])
            found[name] = one
        except Exception as error:  # a contender that does not run is a result, not an end
            failed.append(f"{name}: {reason(error)}")
        clock.compile_left -= time.monotonic() - began
    return found


def measure_direction(
    direction: str,
    inputs: Inputs,
    running: dict[str, Contender],
    judge: Judge,
    device: Device,
    *,
    rounds: int,
    profile: bool = False,
    existing_memory: bool = False,
) -> dict[str, Any]:
    """Record, check and time all contenders on one direction of a layer."""
    case, failed = inputs.case, []
    recordings: dict[str, Recording] = {"copy": record_copy(direction, case, device)}
    for name, one in running.items():
        try:
            recording = record(direction, one, inputs, device)
            wrong = judge.faults(recording, direction)
        except Exception as error:
            wrong = [reason(error)]
        if wrong:
            failed.append(f"{name}: {', '.join(wrong)}")
        else:
            recordings[name] = recording
    if existing_memory and device.kind == "cpu" and direction == "forward":
        existing = record_existing_memory(inputs, device)
        for name, recording in existing.items():
            wrong = [] if name.startswith("copy") else judge.faults(recording, direction)
            failed += [f"{name}: {what}" for what in wrong]
            if not wrong:
                recordings[name] = recording
    ideal = case.ideal_bytes(direction)
    found = summarise(call_times(device, recordings, rounds), ideal)
    if profile:
        for name, recording in recordings.items():
            found[name]["profiler_us"] = device.profiled_us(recording)
    row: dict[str, Any] = {**asdict(case), "direction": direction, "ideal_bytes": ideal}
    calls = recordings["copy"].calls
    row |= {"calls": calls, "cold": device.cold(calls, ideal)}
    row |= {"contenders": found, "failed": failed}
    if device.kind == "cuda" and direction != "forward and backward":
        row["plan"] = plan_of(case, direction == "backward")
    return row


def measure_warm(
    inputs: Inputs, running: dict[str, Contender], device: Device, rounds: int
) -> dict[str, Any]:
    """The forward pass of one input again and again: it stays in the L2 cache."""
    x = inputs.xs[0]

    def again(call: Any) -> list[Any]:
        def once() -> tuple[()]:
            call(x)
            return ()

        return [once] * 50

    with torch.no_grad():
        recordings = {"copy": device.record(again(torch.clone))}
        recordings |= {name: device.record(again(one.call)) for name, one in running.items()}
        ideal = inputs.case.ideal_bytes("forward")
        found = summarise(call_times(device, recordings, rounds), ideal)
    head = {**asdict(inputs.case), "direction": "warm forward", "ideal_bytes": ideal, "calls": 50}
    return {**head, "contenders": found, "failed": []}


def measure(
    case: Case, args: argparse.Namespace, clock: Clock, device: Device, profile: bool = False
) -> Iterator[dict[str, Any]]:
    """One layer: a row for each direction."""
    left_out: list[str] = []
    failed: list[str] = []
    inputs = make_inputs(case, device)
    running = {n: c for n, c in contenders(inputs.taps).items() if n in args.contender}
    if "compile" in args.contender:
        running |= compile_all(inputs, args, clock, left_out, failed)
    judge = Judge(inputs)
    device.free()
    sound: dict[str, Contender] = {}
    with no_collection():
        for direction in args.direction:
            row = measure_direction(
                direction,
                inputs,
                running,
                judge,
                device,
                rounds=args.rounds,
                profile=profile,
                existing_memory="existing memory" in args.contender,
            )
            if direction == args.direction[0]:
                row |= {"left_out": left_out, "failed": failed + row["failed"]}
            if direction == "forward":
                sound = {name: running[name] for name in running if name in row["contenders"]}
            yield row
            device.free()
        if isinstance(device, Gpu) and sound and 4 * case.map_bytes < device.l2:
            yield measure_warm(inputs, sound, device, args.rounds)


# ---- the script ----


def chosen(args: argparse.Namespace) -> bool:
    """Whether the layers are the user's choice."""
    return any((args.layers, args.shape, args.batch, args.dtype, args.layout))


def parse(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__.split("\n")[0],
        epilog="Without options, on a CPU: ResNet-50's layers, batch 32, float32, contiguous. On a "
        "GPU: the layers of known networks, most in bfloat16, while time is left.",
    )
    add_options(parser, rounds=25)
    which = parser.add_mutually_exclusive_group()
    which.add_argument("--full", action="store_true", help="every layer, dtype, layout and batch")
    which.add_argument("--layers", choices=NETWORKS, nargs="+", help="layers of these networks")
    which.add_argument("--shape", type=positive, nargs=4, metavar=("N", "C", "H", "W"))
    parser.add_argument("--taps", type=positive, help="taps of --shape, odd (default 3)")
    parser.add_argument("--batch", type=positive, nargs="+", help="samples")
    parser.add_argument("--dtype", choices=DTYPES, nargs="+")
    parser.add_argument("--layout", choices=LAYOUTS, nargs="+")
    parser.add_argument(
        "--direction", choices=DIRECTIONS, nargs="+", default=["forward", "backward"]
    )
    parser.add_argument(
        "--contender", choices=CHOICES, nargs="+",
        help="beside the copy (default: all that run here); existing memory: in place, and into a "
        "preallocated output (on a CPU)",
    )  # fmt: skip
    parser.add_argument("--compile-mode", choices=MODES, nargs="+", default=list(MODES[:1]))
    parser.add_argument(
        "--again", action="store_true", help="measure rows on which a rival wins in a new process"
    )
    parser.add_argument("--seconds", type=amount, help="start no layer after this time")
    parser.add_argument("--compile-seconds", type=amount, help="time for torch.compile")
    parser.add_argument(
        "--largest-map", type=amount, help="largest map of --full on a CPU, in MB (default 256)"
    )
    args = parser.parse_args(argv)
    for option, goes_with in (("taps", "shape"), ("largest_map", "full")):
        if getattr(args, option) and not getattr(args, goes_with):
            name = option.replace("_", "-")
            parser.error(f"--{name} is for --{goes_with}, which is not given")
    args.contender = args.contender or list(CHOICES)
    args.taps, args.largest_map = args.taps or 3, args.largest_map or 256
    if args.taps % 2 == 0:
        parser.error(f"expected an odd number of --taps, got {args.taps}")
    for option in ("contender", "direction", "compile_mode", "batch", "dtype", "layout"):
        if getattr(args, option):  # each once
            setattr(args, option, list(dict.fromkeys(getattr(args, option))))
    limit = float("inf") if args.full or chosen(args) else DEFAULT_SECONDS
    args.seconds = limit if args.seconds is None else args.seconds
    if args.compile_seconds is None:
        args.compile_seconds = 0.5 * args.seconds
    return args


def too_large(case: Case, args: argparse.Namespace) -> bool:
    return case.map_bytes > 1e6 * args.largest_map


def selected(args: argparse.Namespace, device: Device) -> list[Case]:
    """The layers to measure, those that matter most first."""
    on_gpu = device.kind == "cuda"
    if args.full:
        return [
            case
            for case in all_cases()
            if (on_gpu or not too_large(case, args))
            and (not args.dtype or case.dtype in args.dtype)
            and (not args.layout or case.layout in args.layout)
            and (not args.batch or case.shape[0] in args.batch)
        ]
    if not chosen(args):
        return gpu_cases() if on_gpu else cpu_cases()
    layers = [layer for name in args.layers or ["resnet50"] for layer in NETWORKS[name]]
    batches = args.batch or [32]
    if args.shape:
        layers, batches = [(*args.shape[1:], args.taps)], args.batch or args.shape[:1]
    usual = "bfloat16" if on_gpu else "float32"
    return grid(layers, batches, args.dtype or [usual], args.layout or LAYOUTS[:1])


def describe(row: dict[str, Any]) -> str:
    case = Case(tuple(row["shape"]), row["k"], row["dtype"], row["layout"])
    times = (f"{name} {t['us']['median']:.1f}us" for name, t in row["contenders"].items())
    return f"{case} {row['direction']}: {', '.join(times)}"


def announce(case: Case, row: dict[str, Any]) -> None:
    """Print what failed and, where there is no progress bar, what was measured."""
    for fault in row["failed"]:
        print(f"FAILED {case} {row['direction']}: {fault}", file=sys.stderr, flush=True)
    if not sys.stderr.isatty():
        print(describe(row), flush=True)


def run(args: argparse.Namespace, device: Device, cases: list[Case], result: dict[str, Any]) -> int:
    """Measure all layers, and write the result after each. 0; 1 after an error; 130 if stopped."""
    clock, status = Clock(args.seconds, args.compile_seconds), 0
    for i, case in enumerate(progress(cases, len(cases))):
        if clock.over:
            result["left_out"].append(f"{case}: no time left")
            continue
        try:
            # The profiler costs a second each time: a few layers are enough to compare with.
            for row in measure(case, args, clock, device, profile=i in (0, 5, 17)):
                result["rows"].append(row)
                announce(case, row)
        except KeyboardInterrupt:
            result["left_out"].append(f"{case} and all that follows: interrupted")
            return INTERRUPTED
        except Exception as error:  # out of memory, say: the others can still be measured
            result["left_out"].append(f"{case}: {reason(error)}")
            print(f"FAILED {case}: {reason(error)}", file=sys.stderr, flush=True)
            status = 1
            try:
                device.free()
                device.synchronize()
            except Exception:  # after an illegal access no call of this process will work
                result["left_out"].append("all that follows: the GPU does not answer any more")
                break
        if device.kind == "cuda" and not result["machine"]["dry_run"]:
            result["rows"][-1]["gpu"] = gpu_state()
        write(args.output, result)
    return status


def main(argv: list[str]) -> int:
    args = parse(argv)
    prepare(args)
    device = device_named(args.device)
    device.full_precision()
    result: dict[str, Any] = {"machine": machine(device), "rows": [], "left_out": []}
    result |= {"script": "layers", "options": chosen_options(args)}
    if args.full and device.kind == "cpu":
        large = (case for case in all_cases() if too_large(case, args))
        result["left_out"] += [f"{case}: larger than {args.largest_map:.0f} MB" for case in large]
    if args.contender != list(CHOICES):  # the default asks for none by name
        result["left_out"] += missing(args.contender, torch.device(device.tensors).type)
    status = run(args, device, selected(args, device), result)
    if device.kind == "cuda" and not result["machine"]["dry_run"]:
        result["machine"]["after"] = gpu()
    if args.again and status != INTERRUPTED:
        for _ in measure_again(result, args):
            write(args.output, result)
    write(args.output, result)
    failed = report.show(result, args.plot)
    return status or failed


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
