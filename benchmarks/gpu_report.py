"""Tables and a picture from a result file of gpu_bench.py; report.py is the script."""

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

Times = dict[str, Any]

CONTENDERS = ("copy", "native", "triton", "eager", "timm", "compile")
COLORS = dict(
    zip(
        CONTENDERS,
        ("#999999", "#0072b2", "#56b4e9", "#e69f00", "#cc79a7", "#009e73"),
        strict=True,
    )
)
LABELS = {
    "copy": "copy of as many bytes",
    "native": "eca_fused, CUDA",
    "triton": "eca_fused, Triton",
    "eager": "eager",
    "timm": "timm, eager",
    "compile": "torch.compile (best form)",
}

# What the CUDA kernels were written to reach on an H200: ideal bytes from and up to, then the share
# of the copy's speed, and eager's and torch.compile's time in units of ours.
MB = 10**6
SHARE_GOALS: list[tuple[int, int | None, str, float]]
SHARE_GOALS = [(256 * MB, None, "forward", 0.97), (256 * MB, None, "backward", 0.95)]
SHARE_GOALS += [(16 * MB, 256 * MB, "forward", 0.87), (16 * MB, 256 * MB, "backward", 0.84)]
TIME_GOALS = [
    ("forward", "compile", 1.45),
    ("backward", "compile", 1.3),
    ("forward", "eager", 1.45),
    ("backward", "eager", 3.2),
]
ONE_SAMPLE_GOALS = {"forward": 4.0, "backward": 6.0}  # us of ResNet-50's layers


def us(times: Times, name: str) -> float:
    return float(times[name]["us"]["median"])


def named(times: Times, kind: str) -> str | None:
    """The contender of a kind; of torch.compile's forms the fastest."""
    if kind != "compile":
        return kind if kind in times else None
    forms = [name for name in times if name.startswith("compile")]
    return min(forms, key=lambda name: us(times, name)) if forms else None


def ratio(times: Times, kind: str) -> str:
    """Time of a contender in units of ours."""
    name = named(times, kind)
    if name is None or "native" not in times:
        return "-"
    return f"{times[name]['times_ours']['median']:.2f}x"


def where(machine: dict[str, Any]) -> str:
    return (
        f"{machine['gpu']}, driver {machine.get('driver', 'unknown')}, CUDA {machine['cuda']}, "
        f"torch {machine['torch']}, Triton {machine.get('triton')}, commit {machine['commit']}, "
        f"{machine['date']}"
    )


def plan_text(plan: Any) -> str:
    if not isinstance(plan, dict):
        return "-"
    if plan["strategy"] == "C":
        return f"C, chunk {plan['chunk']}, parts {plan['parts']}"
    return (
        f"{plan['strategy']}, tile {plan['tile']}, group {plan['group']}, "
        f"{plan['threads']} threads, {plan['occupancy']} resident"
    )


def rows(result: dict[str, Any], *directions: str) -> Iterator[tuple[dict[str, Any], str, Times]]:
    for case in result["cases"]:
        for direction in directions:
            if direction in case:
                yield case, direction, case[direction]["contenders"]


def shape_of(case: dict[str, Any]) -> str:
    return f"{'x'.join(map(str, case['shape']))} k={case['k']}"


def table(result: dict[str, Any]) -> str:
    """Markdown: a row for each layer and direction, medians, ratios of times in the same round."""
    lines = [
        "| layer | dtype | layout | direction | ours | GB/s | share of copy "
        "| eager / ours | timm / ours | compile / ours | Triton / ours | plan |",
        "|---|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for case, direction, times in rows(
        result, "forward", "backward", "forward and backward", "warm forward"
    ):
        own = times.get("native")
        cells = ["failed", "-", "-"]
        if own:
            share = own["of_copy"]["median"]
            cells = [f"{us(times, 'native'):.1f} us", f"{own['gbps']:.0f}", f"{share:.2f}"]
        cells += [ratio(times, kind) for kind in ("eager", "timm", "compile", "triton")]
        cells.append(plan_text(case[direction].get("plan")))
        head = [shape_of(case), case["dtype"], case["layout"], direction]
        lines.append(f"| {' | '.join([*head, *cells])} |")
    return "\n".join([*lines, "", f"Measured on {where(result['machine'])}."])


def goals(result: dict[str, Any]) -> str:
    """Markdown: on how many of the bfloat16 layers each goal was reached."""
    lines = ["| goal, bfloat16 | reached on | least | most |", "|---|---|---|---|"]

    def line(what: str, values: list[float], goal: float, at_most: bool = False) -> None:
        if not values:
            lines.append(f"| {what} | not measured | - | - |")
            return
        reached = sum(v <= goal if at_most else v >= goal for v in values)
        lines.append(
            f"| {what} | {reached} of {len(values)} | {min(values):.2f} | {max(values):.2f} |"
        )

    def chosen(direction: str, least: float, most: float | None) -> list[Times]:
        return [
            times
            for case, _, times in rows(result, direction)
            if case["dtype"] == "bfloat16"
            and "native" in times
            and least <= case[direction]["ideal_bytes"] < (most or float("inf"))
        ]

    for least, most, direction, goal in SHARE_GOALS:
        size = f"{least // MB} MB and more" if most is None else f"{least // MB} to {most // MB} MB"
        shares = [t["native"]["of_copy"]["median"] for t in chosen(direction, least, most)]
        line(f"{direction}, {size}: share of copy at least {goal:.2f}", shares, goal)
    for direction, kind, goal in TIME_GOALS:
        ratios = [
            times[name]["times_ours"]["median"]
            for times in chosen(direction, 256 * MB, None)
            if (name := named(times, kind))
        ]
        line(f"{direction}, 256 MB and more: {kind} / ours at least {goal:.2f}", ratios, goal)
    for direction, goal in ONE_SAMPLE_GOALS.items():
        single = [
            us(times, "native")
            for case, _, times in rows(result, direction)
            if case["shape"][0] == 1
            and case["dtype"] == "bfloat16"
            and case["shape"][1:] in ([256, 56, 56], [512, 28, 28], [1024, 14, 14], [2048, 7, 7])
            and "native" in times
        ]
        line(f"{direction}, ResNet-50, batch 1: at most {goal:.0f} us", single, goal, at_most=True)
    for direction, times in result.get("host", {}).items():
        if isinstance(times, dict) and "eager" in times and times["eager"]["times_ours"]:
            share = 1 / times["eager"]["times_ours"]["median"]
            line(f"host time of a small call, {direction}: ours / eager at most 0.25", [share],
                 0.25, at_most=True)  # fmt: skip
    return "\n".join(lines)


def host_table(result: dict[str, Any]) -> str:
    """Markdown: microseconds that the host takes for a small call."""
    host = result.get("host", {})
    directions = [d for d in ("forward", "forward and backward") if d in host]
    names = list(dict.fromkeys(name for d in directions for name in host[d]))
    lines = [f"| host time, 1x64x7x7 | {' | '.join(names)} |", "|---" * (len(names) + 1) + "|"]
    for direction in directions:
        cells = [f"{us(host[direction], n):.1f} us" if n in host[direction] else "-" for n in names]
        lines.append(f"| {direction} | {' | '.join(cells)} |")
    return "\n".join(lines)


def profiler_table(result: dict[str, Any]) -> str:
    """Markdown: times by events over graph replays beside the profiler's."""
    lines = ["| layer | direction | contender | graph | profiler |", "|---|---|---|---|---|"]
    for case, direction, times in rows(result, "forward", "backward"):
        for name, t in times.items():
            if t.get("profiler_us"):
                head = f"{case['dtype']} {case['layout']} {shape_of(case)}"
                lines.append(
                    f"| {head} | {direction} | {name} | {us(times, name):.1f} us "
                    f"| {t['profiler_us']:.1f} us |"
                )
    return "\n".join(lines) if len(lines) > 2 else ""


def failures(result: dict[str, Any]) -> str:
    lines = [
        f"- FAILED {case['dtype']} {case['layout']} {shape_of(case)} {direction}: {what}"
        for case, direction, _ in rows(result, "forward", "backward", "forward and backward")
        for what in case[direction]["failed"]
    ]
    lines += [f"- left out: {what}" for what in result["left_out"]]
    for case in result["cases"]:
        lines += [f"- left out of {shape_of(case)}: {what}" for what in case["left_out"]]
    return "\n".join(lines)


def markdown(result: dict[str, Any]) -> str:
    parts = (goals, host_table, table, profiler_table, failures)
    return "\n\n".join(text for text in (part(result) for part in parts) if text)


def plot(result: dict[str, Any], path: Path) -> None:
    """Every contender's share of the copy's speed, over the size of the layer's ideal bytes."""
    try:
        import matplotlib
    except ImportError:
        print("no picture: matplotlib is not installed", file=sys.stderr)
        return

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    groups = list(dict.fromkeys((case["dtype"], case["layout"]) for case in result["cases"]))
    groups = sorted(groups, key=lambda group: (group[0] != "bfloat16", group))[:4]
    figure, axes = plt.subplots(
        len(groups), 2, figsize=(11, 3.2 * len(groups) + 1), squeeze=False, sharex=True, sharey=True
    )
    for line, (dtype, layout) in zip(axes, groups, strict=True):
        for axis, direction in zip(line, ("forward", "backward"), strict=True):
            for kind in CONTENDERS:
                points = []
                for case, _, times in rows(result, direction):
                    name = named(times, kind)
                    if (case["dtype"], case["layout"]) == (dtype, layout) and name:
                        share = times[name]["of_copy"]
                        points.append((case[direction]["ideal_bytes"] / MB, share))
                if not points:
                    continue
                points.sort(key=lambda point: point[0])
                shares = [share["median"] for _, share in points]
                spread = [
                    [max(s["median"] - s["p20"], 0) for _, s in points],
                    [max(s["p80"] - s["median"], 0) for _, s in points],
                ]
                axis.errorbar(
                    [size for size, _ in points], shares, yerr=spread, fmt="o", ms=4, lw=0.8,
                    color=COLORS[kind], label=LABELS[kind],
                )  # fmt: skip
            axis.set_xscale("log")
            axis.set_title(f"{direction}, {dtype}, {layout}", fontsize=10)
            axis.grid(alpha=0.3)
            axis.spines[["top", "right"]].set_visible(False)
        line[0].set_ylabel("share of the copy's speed", fontsize=9)
    for axis in axes[-1]:
        axis.set_xlabel("ideal bytes of the layer, MB", fontsize=9)
    handles = {
        label: handle
        for axis in axes.flat
        for handle, label in zip(*axis.get_legend_handles_labels(), strict=True)
    }
    figure.legend(handles.values(), handles, loc="upper center", ncols=6, frameon=False, fontsize=8)
    figure.text(
        0.5, 0.005,
        f"{where(result['machine'])}; nothing in the L2 cache; medians, bars from p20 to p80",
        ha="center", fontsize=7,
    )  # fmt: skip
    height = figure.get_figheight()
    figure.tight_layout(rect=(0, 0.25 / height, 1, 1 - 0.4 / height))
    figure.savefig(path, dpi=130)
    plt.close(figure)
