"""Pictures from results."""

import io
from pathlib import Path
from typing import Any

from lib import tables

Result = dict[str, Any]

COLORS = {
    "copy": "#999999",
    "native": "#0072b2",
    "triton": "#56b4e9",
    "eager": "#e69f00",
    "timm": "#cc79a7",
    "compile": "#009e73",
}
LABELS = {
    "copy": "copy of as many bytes",
    "native": "eca_fused",
    "triton": "eca_fused, Triton",
    "eager": "eager",
    "timm": "timm, eager",
    "compile": "torch.compile (best form)",
}
MOST_GROUPS = 6  # lines of pictures
FEW_DECADES = 100  # largest over smallest value of an axis


def pyplot() -> Any:
    """matplotlib without a display.

    Raises:
        SystemExit: it is not there.
    """
    try:
        import matplotlib
    except ImportError:
        raise SystemExit("a picture needs matplotlib: pip install matplotlib") from None
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    return plt


def readable(axis: Any) -> None:
    """Few labels on a logarithmic axis of few decades, where minor ones would overlap."""
    from matplotlib import ticker

    low, high = axis.get_view_interval()
    if high / low < FEW_DECADES:
        few = high / low < 10  # 1, 2 and 5 may all lie outside
        axis.set_major_locator(ticker.MaxNLocator(3) if few else ticker.LogLocator(subs=(1, 2, 5)))
        axis.set_major_formatter(ticker.StrMethodFormatter("{x:g}"))
    axis.set_minor_formatter(ticker.NullFormatter())


def save(figure: Any, path: Path, dpi: int) -> None:
    """A PNG file of 32 colours, which make it a quarter as large."""
    from PIL import Image

    made = io.BytesIO()
    figure.savefig(made, dpi=dpi)
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.open(made).convert("RGB").quantize(32, Image.Quantize.MAXCOVERAGE).save(
        path, format="PNG", optimize=True
    )


def finish(figure: Any, axes: Any, path: Path, result: Result, what: str) -> None:
    """Legend above, place and method below, and the file."""
    for axis in axes.flat:
        axis.grid(alpha=0.3)
        axis.spines[["top", "right"]].set_visible(False)
        for one in (axis.xaxis, axis.yaxis):
            if one.get_scale() == "log":
                readable(one)
    handles = {
        label: handle
        for axis in axes.flat
        for handle, label in zip(*axis.get_legend_handles_labels(), strict=True)
    }
    figure.legend(handles.values(), handles, loc="upper center", ncols=6, frameon=False, fontsize=8)
    line = f"{tables.where(result['machine'])}; {what}"
    figure.text(0.5, 0.005, line, ha="center", fontsize=6.5)
    height = figure.get_figheight()
    figure.tight_layout(rect=(0, 0.25 / height, 1, 1 - 0.4 / height))
    save(figure, path, 90)


def layers(result: Result, path: Path) -> None:
    """Every contender's share of the copy's speed, over the size of the layer's ideal bytes."""
    plt = pyplot()
    if not result["rows"]:
        return
    groups = list(dict.fromkeys((row["dtype"], row["layout"]) for row in result["rows"]))
    groups = groups[:MOST_GROUPS]
    figure, axes = plt.subplots(
        len(groups), 2, figsize=(11, 2.9 * len(groups) + 1), squeeze=False, sharex=True, sharey=True
    )
    for line, group in zip(axes, groups, strict=True):
        for axis, direction in zip(line, ("forward", "backward"), strict=True):
            rows = [
                row
                for row in result["rows"]
                if (row["dtype"], row["layout"]) == group and row["direction"] == direction
            ]
            for kind in COLORS:
                shares(axis, sorted(rows, key=lambda row: float(row["ideal_bytes"])), kind)
            axis.set_xscale("log")
            axis.set_title(f"{direction}, {group[0]}, {group[1]}", fontsize=10)
        line[0].set_ylabel("share of the copy's speed", fontsize=9)
    for axis in axes[-1]:
        axis.set_xlabel("ideal bytes of the layer, MB", fontsize=9)
    how = "nothing in L2" if result["machine"]["device"] == "cuda" else "interleaved rounds"
    finish(figure, axes, path, result, f"{how}; medians, bars from p20 to p80")
    plt.close(figure)


def shares(axis: Any, rows: list[dict[str, Any]], kind: str) -> None:
    points = [
        (row["ideal_bytes"] / tables.MB, row["contenders"][name]["of_copy"])
        for row in rows
        if (name := tables.named(row, kind))
    ]
    if points:
        medians = [share["median"] for _, share in points]
        low = [max(s["median"] - s["p20"], 0) for _, s in points]
        high = [max(s["p80"] - s["median"], 0) for _, s in points]
        axis.errorbar(
            [size for size, _ in points], medians, yerr=[low, high], fmt="o", ms=3.5, lw=0.7,
            color=COLORS[kind], label=LABELS[kind], alpha=0.8,
        )  # fmt: skip


def sizes(result: Result, path: Path) -> None:
    """Time per element over the size of the map, a picture for each axis and direction."""
    plt = pyplot()
    if not result["rows"]:
        return
    axes_named = list(dict.fromkeys((row["axis"], row["layout"]) for row in result["rows"]))
    directions = list(dict.fromkeys(row["direction"] for row in result["rows"]))
    figure, axes = plt.subplots(
        len(axes_named), len(directions), squeeze=False, sharey=True,
        figsize=(5.5 * len(directions), 2.9 * len(axes_named) + 1),
    )  # fmt: skip
    for line, group in zip(axes, axes_named, strict=True):
        for axis, direction in zip(line, directions, strict=True):
            rows = [
                row
                for row in result["rows"]
                if (row["axis"], row["layout"]) == group and row["direction"] == direction
            ]
            for kind, color in COLORS.items():
                points = [
                    (row["map_bytes"] / tables.MB, row["contenders"][name]["ps_per_element"])
                    for row in rows
                    if (name := tables.named(row, kind))
                ]
                if points:
                    axis.plot(*zip(*points, strict=True), "o-", ms=3, lw=1, color=color,
                              label=LABELS[kind])  # fmt: skip
            axis.set_xscale("log")
            axis.set_yscale("log")
            axis.set_title(f"{direction}, {group[0]} grows, {group[1]}", fontsize=10)
        line[0].set_ylabel("ps per element", fontsize=9)
    for axis in axes[-1]:
        axis.set_xlabel("bytes of the map, MB", fontsize=9)
    finish(figure, axes, path, result, "medians")
    plt.close(figure)


def networks(result: Result, path: Path) -> None:
    """Time of every network divided by that without attention."""
    plt = pyplot()
    if not result["rows"]:
        return
    names = list(dict.fromkeys(row["network"] for row in result["rows"]))
    figure, axes = plt.subplots(len(names), 1, figsize=(11, 3 * len(names) + 1), squeeze=False)
    colors = {
        "none": "#999999",
        "plain": "#e69f00",
        "fused": "#0072b2",
        "native": "#56b4e9",
        "tails": "#009e73",
        "native tails": "#8fd6bd",
    }
    for axis, name in zip(axes[:, 0], names, strict=True):
        rows = [row for row in result["rows"] if row["network"] == name]
        kinds = list(dict.fromkeys(kind for row in rows for kind in row["contenders"]))
        for i, kind in enumerate(kinds):
            entries = [row["contenders"].get(kind, {}).get("times_none") for row in rows]
            if not any(entries):  # no line in the legend
                continue
            width = 0.88 / len(kinds)
            at = [j + width * (i - (len(kinds) - 1) / 2) for j, e in enumerate(entries) if e]
            ratios = [entry["median"] for entry in entries if entry]
            axis.bar(at, ratios, 0.9 * width, color=colors[tables.kind_of(kind)], label=kind)
            for x, value in zip(at, ratios, strict=True):
                axis.text(x, value, f"{value:.2f}", ha="center", va="bottom", fontsize=6)
        labels = [f"{row['pass']}\n{row['mode']}\n{row['layout']}" for row in rows]
        axis.set_xticks(range(len(rows)), labels, fontsize=7)
        axis.set_title(name, fontsize=10)
        axis.set_ylabel("time / without attention", fontsize=9)
    finish(figure, axes, path, result, "medians of interleaved rounds")
    plt.close(figure)


def speed(layers: Result, networks: dict[str, Result], path: Path) -> None:
    """Two panels of ResNet-50: layers relative to ours, training steps to those without attention.

    Args:
        layers: of layers.py with rivals, on a GPU.
        networks: of networks.py, by the name of the place.
        path: the PNG file to write.
    """
    plt = pyplot()
    figure, (left, right) = plt.subplots(
        1, 2, figsize=(11, 4.2), width_ratios=(3, 2), layout="constrained"
    )
    rows = [
        row
        for row in layers["rows"]
        if (row["layout"], row["shape"][0], row["dtype"]) == ("contiguous", 256, "bfloat16")
    ]
    kinds = ("compile", "eager")
    for i, kind in enumerate(kinds):
        found = [(j, tables.ratio(row, kind)) for j, row in enumerate(rows)]
        at = [j + 0.36 * (i - 0.5) for j, value in found if value]
        values = [value for _, value in found if value]
        left.bar(at, values, 0.34, color=COLORS[kind], label=LABELS[kind].split(" (")[0])
        for x, value in zip(at, values, strict=True):
            left.text(x, value, f"{value:.1f}", ha="center", va="bottom", fontsize=8)
    left.axhline(1, color=COLORS["native"], lw=1.5, label="ours")
    names = ["x".join(map(str, row["shape"][1:])) for row in rows]
    places = [f"{name}\n{row['direction']}" for name, row in zip(names, rows, strict=True)]
    left.set_xticks(range(len(rows)), places, fontsize=7)
    left.set_ylabel("time, divided by ours")
    left.set_title("ECA layers of ResNet-50, H200, batch 256, bfloat16")
    steps = [
        (place, row)
        for place, result in networks.items()
        for row in result["rows"]
        if (row["network"], row["mode"], row["pass"]) == ("resnet50", "eager", "training step")
    ]
    for i, (kind, color) in enumerate((("plain ECA", "#e69f00"), ("fused ECA", "#0072b2"))):
        values = [row["contenders"][kind]["times_none"]["median"] for _, row in steps]
        at = [j + 0.36 * (i - 0.5) for j in range(len(steps))]
        right.bar(at, values, 0.34, color=color, label=kind)
        for x, value in zip(at, values, strict=True):
            right.text(x, value, f"{value:.2f}", ha="center", va="bottom", fontsize=8)
    right.axhline(1, color="#666666", lw=1.5, label="without attention")
    under = [
        f"{place}, batch {row['batch']}\n{row['precision']}\n{row['layout']}"
        for place, row in steps
    ]
    right.set_xticks(range(len(steps)), under, fontsize=8)
    right.set_ylim(0, 1.7)  # room for the legend
    right.set_ylabel("time, divided by that without attention")
    right.set_title("Training step of ResNet-50")
    for axis in (left, right):
        axis.grid(axis="y", alpha=0.3)
        axis.set_axisbelow(True)
        axis.spines[["top", "right"]].set_visible(False)
    left.legend(frameon=False, fontsize=9, loc="upper left")
    right.legend(frameon=False, fontsize=9, loc="upper right")
    where = "\n".join(tables.where(result["machine"]) for result in (layers, *networks.values()))
    figure.supxlabel(where, fontsize=6.5)
    save(figure, path, 110)
    plt.close(figure)
