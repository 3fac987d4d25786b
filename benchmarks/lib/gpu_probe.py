"""Small programs for a GPU and for the tools that watch one; gpu_check.py runs them.

    python -m lib.gpu_probe facts                       # card, versions
    python -m lib.gpu_probe small                       # every plan on small maps, checked
    compute-sanitizer --tool racecheck python -m lib.gpu_probe small
    ncu ... python -m lib.gpu_probe layers calls.json   # one call of each layer of interest
    python -m lib.gpu_probe read calls.json ncu.csv     # what those calls did

PYTHONPATH must have the repository and benchmarks/. --device cpu rehearses each program without a
GPU, as far as that is possible.
"""

import argparse
import csv
import json
import platform
import subprocess
import sys
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

import eca_fused
from eca_fused.ops import native
from lib.cases import Case
from lib.plans import gpu_limits, plan_of

Forced = dict[str, Any]  # arguments of native.force_plan()


def forced(strategy: str, **sizes: int) -> Forced:
    return {"strategy": strategy, **sizes}


# Every strategy, on maps so small that an instrumented kernel takes seconds. Where
# possible there is a halo, and a smaller last tile.
SMALL: list[tuple[tuple[int, ...], str, Forced | None]] = [
    ((2, 16, 10, 10), "contiguous", forced("two_pass")),
    ((2, 16, 10, 10), "channels_last", forced("two_pass")),
    ((2, 24, 8, 8), "contiguous", forced("rows", threads=128, depth=7)),
    ((2, 20, 16, 16), "contiguous", forced("rows", tile=4, threads=128, depth=13)),
    ((2, 24, 7, 7), "contiguous", forced("runs", threads=128, depth=8)),
    ((2, 24, 7, 7), "contiguous", forced("runs", tile=8, threads=128, depth=2)),
    ((2, 48, 6, 6), "channels_last", forced("columns", tile=16, threads=64, depth=7)),
    ((2, 48, 12, 12), "channels_last", forced("columns", tile=16, threads=64, depth=13)),
    ((2, 48, 6, 6), "channels_last", forced("columns", threads=128, depth=4)),
    ((5, 48, 16, 16), "channels_last", forced("kept", threads=256)),
    ((5, 48, 16, 16), "channels_last", forced("kept", threads=256, depth=3)),
    ((2, 64, 56, 56), "channels_last", forced("kept", threads=256)),
    ((5, 48, 16, 16), "channels_last", forced("stream")),
    ((2, 5, 160, 160), "contiguous", forced("stream")),
    ((2, 7, 5, 3), "contiguous", None),
    ((2, 7, 5, 3), "channels_last", None),
]

# The counters of a kernel, by their names in the table.
COUNTERS = {
    "us": "gpu__time_duration.sum",
    "read": "dram__bytes_read.sum",
    "written": "dram__bytes_write.sum",
    "instructions": "smsp__inst_executed.sum",
    "issue active %": "smsp__issue_active.avg.pct_of_peak_sustained_active",
    "warps active %": "sm__warps_active.avg.pct_of_peak_sustained_active",
    "bank conflicts": "l1tex__data_bank_conflicts_pipe_lsu_mem_shared.sum",
    "stall long": "smsp__average_warps_issue_stalled_long_scoreboard_per_issue_active.ratio",
    "stall short": "smsp__average_warps_issue_stalled_short_scoreboard_per_issue_active.ratio",
    "stall barrier": "smsp__average_warps_issue_stalled_barrier_per_issue_active.ratio",
    "stall mio": "smsp__average_warps_issue_stalled_mio_throttle_per_issue_active.ratio",
}
FEWEST_COUNTERS = ("us", "read", "written", "instructions")  # every Nsight Compute has these
OUR_KERNELS = "regex:forward_|backward_|sum_|make_|rescale_|add_"


def force(plan: Forced | None) -> None:
    if "cuda" in (eca_fused.backends()["native"].devices or ()):
        native.force_plan(**(plan or {"strategy": None}))


# ---- facts ----


def facts(device: str) -> int:
    """Print what a result depends on."""
    found: dict[str, Any] = {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "limits": gpu_limits(),
        "backends": {name: str(status) for name, status in eca_fused.backends().items()},
    }
    if device == "cuda":
        found["gpu"] = torch.cuda.get_device_name()
        smi = subprocess.run(
            ["nvidia-smi", "-q", "-d", "CLOCK,POWER"], capture_output=True, text=True
        )
        print(smi.stdout)
    print(json.dumps(found, indent=1))
    return 0


# ---- small ----


def small(device: str, backend: str) -> int:
    """Run the small calls, and check them against the CPU kernels on the same inputs."""
    torch.manual_seed(0)
    wrong = 0
    cpu: Any = torch.ops.eca_fused
    if backend == "triton":
        from eca_fused.ops import triton as triton_kernels

        ops: Any = triton_kernels
    else:
        ops = cpu
    for shape, layout, sizes in SMALL:
        for dtype in (torch.float32, torch.bfloat16):
            x, dy = (torch.randn(shape).to(dtype) for _ in range(2))
            if layout == "channels_last":
                x, dy = (t.contiguous(memory_format=torch.channels_last) for t in (x, dy))
            weight = torch.randn(1, 1, 5).to(dtype)

            def both(ops: Any, *tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
                x, dy, weight = tensors
                y, mean, gate = ops.forward(x, weight, False)
                return y, *ops.backward(dy, x, weight, mean, gate, False)

            want = both(cpu, x, dy, weight)
            force(sizes)
            got = both(ops, *(t.to(device) for t in (x, dy, weight)))
            force(None)
            for name, a, b in zip(("y", "dx", "dweight"), got, want, strict=True):
                error = float((a.cpu().double() - b.double()).abs().max() / b.double().abs().max())
                if not error <= 8 * torch.finfo(dtype).eps:
                    print(f"WRONG {name} of {shape} {layout} {dtype} {sizes}: {error:.3g}")
                    wrong += 1
    print(f"{2 * len(SMALL)} calls, {wrong} wrong results")
    return 1 if wrong else 0


# ---- counters ----


def layers() -> list[Case]:
    """Layers that instructions may limit rather than bytes, and the largest in both layouts."""
    large = [
        Case((256, 256, 56, 56), 3, "bfloat16", layout)
        for layout in ("contiguous", "channels_last")
    ]
    few = [
        Case((32, c, side, side), k, dtype, "contiguous")
        for c, side, k in ((512, 28, 5), (1024, 14, 5), (2048, 7, 7))
        for dtype in ("bfloat16", "float32")
    ]
    pixels = [
        Case((32, c, side, side), k, "bfloat16", "channels_last")
        for c, side, k in ((1024, 14, 5), (2048, 7, 7))
    ]
    return [*large, *few, *pixels]


def run_layers(device: str, cases: list[Case], output: Path) -> int:
    """One forward and one backward call of each, inside the profiler's range."""
    torch.manual_seed(0)
    ops: Any = torch.ops.eca_fused
    profiler: Any = torch.cuda.profiler
    done: list[dict[str, Any]] = []
    for case in cases:
        x, dy = case.random_map(device), case.random_map(device)
        weight = torch.randn(1, 1, case.k, device=device, dtype=x.dtype)
        y, mean, gate = ops.forward(x, weight, False)
        ops.backward(dy, x, weight, mean, gate, False)
        calls: list[Callable[[], object]] = [
            lambda x=x, w=weight: ops.forward(x, w, False),  # type: ignore[misc]
            lambda x=x, w=weight, dy=dy, m=mean, g=gate: ops.backward(dy, x, w, m, g, False),  # type: ignore[misc]
        ]
        for direction, call in zip(("forward", "backward"), calls, strict=True):
            if device == "cuda":
                torch.cuda.synchronize()
                profiler.start()
            call()
            if device == "cuda":
                torch.cuda.synchronize()
                profiler.stop()
            plan = plan_of(case, direction == "backward")
            ideal = case.ideal_bytes(direction)
            done.append({**asdict(case), "direction": direction, "plan": plan, "ideal": ideal})
        del x, dy, y, mean, gate, calls
    output.write_text(json.dumps(done))
    return 0


def kernels(lines: list[str]) -> list[dict[str, Any]]:
    """Name and counters of every kernel in the CSV output of ncu, in order."""
    begin = next((i for i, line in enumerate(lines) if line.startswith('"ID"')), None)
    if begin is None:
        return []
    short = {name: key for key, name in COUNTERS.items()}
    found: dict[str, dict[str, Any]] = {}
    for row in csv.DictReader(lines[begin:]):
        if not (row.get("ID") or "").isdigit():  # the row of units
            continue
        entry = found.setdefault(row["ID"], {"name": row.get("Kernel Name", "?")})
        pairs = [(row.get("Metric Name"), row.get("Metric Value"))]
        pairs += [(name, row.get(name)) for name in short]
        for name, value in pairs:
            if name in short and value and value != "n/a":
                number = float(value.replace(",", ""))
                entry[short[name]] = number / 1e3 if short[name] == "us" else number  # from ns
    return [entry for entry in found.values() if "read" in entry and "written" in entry]


def of_calls(calls: list[dict[str, Any]], seen: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Each call with its kernels' counters.

    Raises:
        ValueError: there are more or fewer kernels than the plans say.
    """
    launches = [c["plan"]["launches"] if isinstance(c["plan"], dict) else 1 for c in calls]
    if sum(launches) != len(seen):
        raise ValueError(f"expected {sum(launches)} kernels, saw {len(seen)}")
    found, at = [], 0
    for call, count in zip(calls, launches, strict=True):
        found.append({**call, "kernels": seen[at : at + count]})
        at += count
    return found


def table(calls: list[dict[str, Any]]) -> str:
    """Markdown: a row for each call."""
    lines = [
        "| layer | direction | strategy | us | DRAM / ideal | warp instructions per 512 B of x | "
        "issue active % | warps active % | bank conflicts per 512 B | "
        "stalls: long, short, barrier, mio |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for call in calls:
        own, plan = call["kernels"], call["plan"]
        case = Case(tuple(call["shape"]), call["k"], call["dtype"], call["layout"])
        units = case.map_bytes / 512

        def total(name: str, own: Any = own) -> float:
            return float(sum(kernel.get(name, 0) for kernel in own))

        longest = max(own, key=lambda kernel: kernel.get("us", 0))
        stalls = [longest.get(f"stall {s}") for s in ("long", "short", "barrier", "mio")]
        cells = [
            str(case),
            call["direction"],
            plan["strategy"] if isinstance(plan, dict) else "-",
            f"{total('us'):.1f}",
            f"{(total('read') + total('written')) / call['ideal']:.3f}",
            f"{total('instructions') / units:.0f}",
            f"{longest.get('issue active %', float('nan')):.0f}",
            f"{longest.get('warps active %', float('nan')):.0f}",
            f"{total('bank conflicts') / units:.1f}",
            ", ".join("-" if s is None else f"{s:.1f}" for s in stalls),
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def pretended_counters(calls: list[dict[str, Any]]) -> str:
    """What ncu might have printed for these calls: for a rehearsal."""
    lines = ["==PROF== Connected", '"ID","Kernel Name","Metric Name","Metric Unit","Metric Value"']
    at = 0
    for call in calls:
        for _ in range(call["plan"]["launches"] if isinstance(call["plan"], dict) else 1):
            lines += [f'"{at}","pretended","{name}","","1,024"' for name in COUNTERS.values()]
            at += 1
    return "\n".join(lines)


def read(calls_file: Path, csv_file: Path, output: Path | None) -> int:
    calls = json.loads(calls_file.read_text())
    seen = kernels(csv_file.read_text(errors="replace").splitlines())
    if not seen:
        print("no counters in the output of ncu")
        return 3
    try:
        found = of_calls(calls, seen)
    except ValueError as error:
        print(f"{error}: {[kernel['name'] for kernel in seen]}")
        return 1
    if output:
        output.write_text(json.dumps(found) + "\n")
    print(table(found))
    return 0


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("what", choices=["facts", "small", "layers", "read"])
    parser.add_argument("files", type=Path, nargs="*", help="layers: one; read: two or three")
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--backend", choices=["native", "triton"], default="native")
    args = parser.parse_args(argv)
    if args.what == "read":
        calls, seen, *output = args.files
        return read(calls, seen, *(output or [None]))
    if args.what == "facts":
        return facts(args.device)
    if args.device not in (eca_fused.backends()[args.backend].devices or ()):
        print(f"no {args.backend} kernels for {args.device}: {eca_fused.backends()[args.backend]}")
        return 2
    if args.what == "small":
        return small(args.device, args.backend)
    if args.device == "cuda":
        return run_layers("cuda", layers(), args.files[0])
    tiny = [Case((2, 16, 6, 6), 3, "bfloat16", "contiguous")]
    status = run_layers("cpu", tiny, args.files[0])
    print(pretended_counters(json.loads(args.files[0].read_text())))
    return status


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
