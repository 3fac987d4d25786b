"""A few calls of the CUDA kernels for other tools to watch; gpu_check.sh is who runs it.

compute-sanitizer --tool racecheck python benchmarks/gpu_probe.py small
ncu ... python benchmarks/gpu_probe.py large calls.json    # one call of each strategy
python benchmarks/gpu_probe.py read calls.json ncu.csv     # what those calls moved
"""

import csv
import json
import sys
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from cases import Case
from plans import native_module, plan_of

import eca_fused

Wish = tuple[int, int, int, bool]  # tile, group, threads, two passes

# Every strategy and exchange on maps so small that an instrumented kernel takes seconds, with a
# halo and with a last tile that is smaller where there can be.
SMALL: list[tuple[tuple[int, ...], str, Wish | None]] = [
    ((2, 24, 8, 8), "contiguous", (24, 1, 128, False)),
    ((2, 20, 8, 8), "contiguous", (8, 1, 64, False)),
    ((2, 20, 8, 8), "contiguous", (8, 2, 64, False)),
    ((2, 20, 8, 8), "contiguous", (8, 12, 64, False)),
    ((2, 48, 6, 6), "channels_last", (16, 1, 64, False)),
    ((2, 48, 6, 6), "channels_last", (48, 4, 64, False)),
    ((2, 48, 6, 6), "channels_last", (48, 12, 64, False)),
    ((2, 16, 10, 10), "contiguous", (0, 1, 256, True)),
    ((2, 16, 10, 10), "channels_last", (0, 1, 256, True)),
    ((2, 7, 5, 3), "contiguous", None),
    ((2, 7, 5, 3), "channels_last", None),
]
READ, WRITTEN = "dram__bytes_read.sum", "dram__bytes_write.sum"


def wish(sizes: Wish | None) -> None:
    native_module().wish(*(sizes or (None,)))


def small() -> int:
    """Run the small calls; they are checked against the CPU kernels, whose inputs are the same."""
    torch.manual_seed(0)
    wrong = 0
    ops: Any = torch.ops.eca_fused
    for shape, layout, sizes in SMALL:
        for dtype in (torch.float32, torch.bfloat16):
            x, dy = (torch.randn(shape).to(dtype) for _ in range(2))
            if layout == "channels_last":
                x, dy = (t.contiguous(memory_format=torch.channels_last) for t in (x, dy))
            weight = torch.randn(1, 1, 5).to(dtype)

            def both(*tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
                x, dy, weight = tensors
                y, mean, gate = ops.forward(x, weight, False)
                return y, *ops.backward(dy, x, weight, mean, gate, False)

            want = both(x, dy, weight)
            wish(sizes)
            got = both(x.cuda(), dy.cuda(), weight.cuda())
            wish(None)
            torch.cuda.synchronize()
            for name, a, b in zip(("y", "dx", "dweight"), got, want, strict=True):
                error = float((a.cpu().double() - b.double()).abs().max() / b.double().abs().max())
                if not error <= 8 * torch.finfo(dtype).eps:
                    print(f"WRONG {name} of {shape} {layout} {dtype} {sizes}: {error:.3g}")
                    wrong += 1
    print(f"{2 * len(SMALL)} calls, {wrong} wrong results")
    return 1 if wrong else 0


def large_calls() -> list[tuple[Case, Wish | None]]:
    planes = Case((256, 256, 56, 56), 3, "bfloat16", "contiguous")
    pixels = Case((256, 256, 56, 56), 3, "bfloat16", "channels_last")
    small_planes = Case((256, 1024, 14, 14), 5, "bfloat16", "contiguous")
    return [
        (planes, None),
        (planes, (8, 1, 256, False)),
        (planes, (16, 2, 256, False)),
        (planes, (0, 1, 256, True)),
        (pixels, None),
        (pixels, (0, 1, 256, True)),
        (small_planes, None),
    ]


def large(output: Path) -> int:
    """One forward and one backward call of each, inside the profiler's range."""
    torch.manual_seed(0)
    ops: Any = torch.ops.eca_fused
    done: list[dict[str, Any]] = []
    profiler: Any = torch.cuda.profiler
    for case, sizes in large_calls():
        x, dy = case.random_map("cuda"), case.random_map("cuda")
        weight = torch.randn(1, 1, case.k, device="cuda", dtype=x.dtype)
        wish(sizes)
        y, mean, gate = ops.forward(x, weight, False)
        ops.backward(dy, x, weight, mean, gate, False)
        torch.cuda.synchronize()
        calls: list[Callable[[], object]] = [
            lambda x=x, w=weight: ops.forward(x, w, False),  # type: ignore[misc]
            lambda x=x, w=weight, dy=dy, m=mean, g=gate: ops.backward(dy, x, w, m, g, False),  # type: ignore[misc]
        ]
        for direction, call in zip(("forward", "backward"), calls, strict=True):
            profiler.start()
            call()
            torch.cuda.synchronize()
            profiler.stop()
            plan = plan_of(case, direction == "backward", sizes)
            ideal = case.ideal_bytes(direction)
            done.append({**asdict(case), "direction": direction, "plan": plan, "ideal": ideal})
        wish(None)
        del x, dy, y, mean, gate
        torch.cuda.empty_cache()
    output.write_text(json.dumps(done))
    return 0


def kernels(lines: list[str]) -> list[dict[str, Any]]:
    """Name and bytes of every kernel in the CSV output of ncu, in order."""
    begin = next((i for i, line in enumerate(lines) if line.startswith('"ID"')), None)
    if begin is None:
        return []
    found: dict[str, dict[str, Any]] = {}
    for row in csv.DictReader(lines[begin:]):
        if not (row.get("ID") or "").isdigit():  # the row of units
            continue
        entry = found.setdefault(row["ID"], {"name": row.get("Kernel Name", "?")})
        pairs = [(row.get("Metric Name"), row.get("Metric Value"))]
        pairs += [(name, row.get(name)) for name in (READ, WRITTEN)]
        for name, value in pairs:
            if name in (READ, WRITTEN) and value:
                entry[name] = float(value.replace(",", ""))
    return [entry for entry in found.values() if READ in entry and WRITTEN in entry]


def traffic(calls: list[dict[str, Any]], seen: list[dict[str, Any]]) -> str:
    """What each call moved, over what it must and what the planner thinks."""
    launches = [c["plan"]["launches"] if isinstance(c["plan"], dict) else 1 for c in calls]
    if sum(launches) != len(seen):
        rows = [f"{k['name']}: read {k[READ]:.4g}, written {k[WRITTEN]:.4g}" for k in seen]
        return "\n".join([f"expected {sum(launches)} kernels, saw {len(seen)}:", *rows])
    lines = ["strategy, layer, direction: MB read, written, ideal, modelled; moved / ideal"]
    at = 0
    for call, count in zip(calls, launches, strict=True):
        own = seen[at : at + count]
        at += count
        read, written = (sum(k[name] for k in own) / 1e6 for name in (READ, WRITTEN))
        plan, ideal = call["plan"], call["ideal"] / 1e6
        shape = "x".join(map(str, call["shape"]))
        lines.append(
            f"{plan['strategy']} group {plan['group']} {shape} {call['layout']} "
            f"{call['direction']}: {read:.1f}, {written:.1f}, {ideal:.1f}, "
            f"{plan['dram_bytes'] / 1e6:.1f}; {(read + written) / ideal:.3f}"
        )
    return "\n".join(lines)


def main(argv: list[str]) -> int:
    if argv[:1] == ["read"]:
        calls = json.loads(Path(argv[1]).read_text())
        seen = kernels(Path(argv[2]).read_text(errors="replace").splitlines())
        if not seen:
            print("no counters in the output of ncu")
            return 3
        print(traffic(calls, seen))
        return 0
    if "cuda" not in (eca_fused.backends()["native"].detail or "").lower():
        print("the extension was compiled without CUDA kernels")
        return 2
    if argv[:1] == ["large"]:
        return large(Path(argv[1]))
    return small()


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
