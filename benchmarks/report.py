"""Makes the README's tables, and a picture, from a result file of microbench.py or of gpu_bench.py.

python benchmarks/report.py benchmarks/results/cpu.json            # Markdown
python benchmarks/report.py benchmarks/results/cpu.json --plot cpu.png
"""

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import gpu_report

Times = dict[str, Any]


def ms(times: Times, name: str) -> float:
    return float(times[name]["ms"]["median"])


def best_compile(times: Times) -> str:
    """Name of the faster of torch.compile's two forms."""
    return min(
        (name for name in times if name.startswith("compile")), key=lambda name: ms(times, name)
    )


def ratio(times: Times, name: str) -> str:
    return f"{times[name]['times_ours']['median']:.2f}x"


def where(machine: dict[str, Any]) -> str:
    return (
        f"{machine['cpu']}, {machine['cores']} cores, {machine['threads']} threads, "
        f"{machine['kernels']}, "
        f"torch {machine['torch']}, malloc {machine['malloc']}, "
        f"commit {machine['commit']}, {machine['date']}"
    )


def table(result: dict[str, Any]) -> str:
    """Markdown: a row for each layer and direction, medians, ratios of times in the same round."""
    lines = [
        "| layer | dtype | layout | direction | ours | GB/s "
        "| copy / ours | eager / ours | compile / ours |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for row in result["layers"]:
        shape = "x".join(map(str, row["shape"]))
        for direction in ("forward", "backward"):
            times = row[direction]["contenders"]
            ours = ms(times, "native")
            lines.append(
                f"| {shape} k={row['k']} | {row['dtype']} | {row['layout']} | {direction} "
                f"| {ours:.2f} ms | {row[direction]['ideal_bytes'] / ours / 1e6:.1f} "
                f"| {ratio(times, 'copy')} | {ratio(times, 'eager')} "
                f"| {ratio(times, best_compile(times))} |"
            )
    return "\n".join([*lines, "", f"Measured on {where(result['machine'])}."])


def summary(result: dict[str, Any]) -> str:
    """Markdown: a row for each dtype, layout and direction, with the range over the layers."""
    rows: dict[tuple[str, str, str], list[list[float]]] = {}
    for row in result["layers"]:
        for direction in ("forward", "backward"):
            times = row[direction]["contenders"]
            ratios = rows.setdefault((row["dtype"], row["layout"], direction), [])
            names = ["copy", "eager", best_compile(times), "native in place"]
            ratios.append([times[n]["times_ours"]["median"] for n in names if n in times])
    lines = [
        "| dtype | layout | direction "
        "| copy / ours | eager / ours | torch.compile / ours | in place / ours |",
        "|---|---|---|---|---|---|---|",
    ]
    for key, ratios in rows.items():
        cells = [f"{min(r):.2f} to {max(r):.2f}x" for r in zip(*ratios, strict=True)]
        cells += ["-"] * (4 - len(cells))
        lines.append(f"| {' | '.join([*key, *cells])} |")
    return "\n".join([*lines, "", f"Measured on {where(result['machine'])}."])


def host_table(result: dict[str, Any]) -> str:
    """Markdown: host time of a small call."""
    lines = [
        "| 1x64x7x7 | ours | timm, eager | timm, compiled | ours / eager |",
        "|---|---|---|---|---|",
    ]
    for direction in ("forward", "forward and backward"):
        times = result["host"][direction]
        cells = [f"{1e3 * ms(times, name):.1f} us" for name in ("native", "eager", "compile")]
        share = 1 / times["eager"]["times_ours"]["median"]
        lines.append(f"| {direction} | {' | '.join(cells)} | {share:.2f} |")
    return "\n".join(lines)


# What the kernels were written to reach on a CPU: direction, contender, its time in units of ours.
GOALS = [
    ("forward", "copy", 1 / 1.15),
    ("forward", "eager", 1.5),
    ("forward", "compile", 1.6),
    ("backward", "eager", 3.7),
    ("backward", "compile", 1.6),
]


def goals(result: dict[str, Any]) -> str:
    """Markdown: on how many of the layers each goal was reached."""
    lines = ["| goal | reached on | least | most |", "|---|---|---|---|"]
    for direction, contender, goal in GOALS:
        ratios = []
        for row in result["layers"]:
            times = row[direction]["contenders"]
            name = best_compile(times) if contender == "compile" else contender
            ratios.append(times[name]["times_ours"]["median"])
        reached = sum(r >= goal for r in ratios)
        lines.append(
            f"| {direction}: {contender} / ours at least {goal:.2f}x | {reached} of {len(ratios)} "
            f"layers | {min(ratios):.2f}x | {max(ratios):.2f}x |"
        )
    for direction in ("forward", "forward and backward"):
        share = 1 / result["host"][direction]["eager"]["times_ours"]["median"]
        lines.append(
            f"| small call, {direction}: ours / eager at most 0.25 "
            f"| {'reached' if share <= 0.25 else 'missed'} | {share:.2f} | {share:.2f} |"
        )
    return "\n".join(lines)


def plot(result: dict[str, Any], path: Path) -> None:
    """Bars of every contender's time in units of ours, with the spread from p20 to p80."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    groups = list(dict.fromkeys((row["dtype"], row["layout"]) for row in result["layers"]))
    colors = {"copy": "#999999", "native": "#0072b2", "eager": "#e69f00", "compile": "#009e73"}
    labels = {
        "copy": "copy of x",
        "native": "eca_fused",
        "eager": "eager",
        "compile": "torch.compile (best form)",
    }
    figure, axes = plt.subplots(
        len(groups), 2, figsize=(11, 2.7 * len(groups) + 1), squeeze=False, sharey=True
    )
    for line, group in zip(axes, groups, strict=True):
        rows = [row for row in result["layers"] if (row["dtype"], row["layout"]) == group]
        for axis, direction in zip(line, ("forward", "backward"), strict=True):
            for i, kind in enumerate(colors):
                for j, row in enumerate(rows):
                    times = row[direction]["contenders"]
                    name = best_compile(times) if kind == "compile" else kind
                    t = times[name]["times_ours"]
                    spread = [[max(t["median"] - t["p20"], 0)], [max(t["p80"] - t["median"], 0)]]
                    axis.bar(
                        j + 0.21 * (i - 1.5),
                        t["median"],
                        0.2,
                        color=colors[kind],
                        yerr=spread,
                        error_kw={"lw": 0.8},
                        label=labels[kind] if j == 0 else None,
                    )
                    axis.text(
                        j + 0.21 * (i - 1.5),
                        t["p80"] + 0.08,
                        f"{t['median']:.1f}",
                        ha="center",
                        fontsize=7,
                    )
            axis.set_title(f"{direction}, {group[0]}, {group[1]}", fontsize=10)
            axis.set_xticks(
                range(len(rows)), ["x".join(map(str, r["shape"])) for r in rows], fontsize=8
            )
            axis.spines[["top", "right"]].set_visible(False)
        line[0].set_ylabel("time / time of eca_fused", fontsize=9)
    figure.legend(
        *axes[0][0].get_legend_handles_labels(), loc="upper center", ncols=4, frameon=False
    )
    machine = result["machine"]
    figure.text(
        0.5,
        0.005,
        f"{machine['cpu']}, {machine['threads']} threads, torch {machine['torch']}, "
        f"heap {machine['malloc']}; median of interleaved rounds, bars from p20 to p80",
        ha="center",
        fontsize=8,
    )
    height = figure.get_figheight()
    figure.tight_layout(rect=(0, 0.25 / height, 1, 1 - 0.35 / height))
    figure.savefig(path, dpi=150)


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("result", type=Path, help="JSON file of microbench.py or gpu_bench.py")
    parser.add_argument("--plot", type=Path, help="picture to write")
    args = parser.parse_args(argv)
    result = json.loads(args.result.read_text())
    if result["machine"]["device"] == "cuda":
        print(gpu_report.markdown(result))
        if args.plot:
            gpu_report.plot(result, args.plot)
        return 0
    print(*(make(result) for make in (summary, host_table, goals, table)), sep="\n\n")
    if args.plot:
        plot(result, args.plot)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
