"""The pictures of the main job, as PNG files."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor

from eca_fused.cli.common.measure import ratio
from eca_fused.cli.common.photographs import Photograph, crop
from eca_fused.cli.common.style import BLUE, GREEN, GREY, ORANGE, SKY, STYLE, save
from eca_fused.cli.demo.timing import Case

__all__ = ["draw_gates", "draw_times"]

CONTENDERS = {  # the name in a Case, with its colour and its name in the legend
    "plain": (ORANGE, "plain PyTorch"),
    "compiled": (GREEN, "torch.compile of plain"),
    "fused": (BLUE, "fused"),
    "fused, compiled": (SKY, "torch.compile of fused"),
}


def draw_gates(
    path: Path,
    photographs: Sequence[Photograph],
    gates: Sequence[Tensor],
    size: int,
    title: str,
    note: str,
) -> None:
    """Each photograph as the network sees it, and the gates of the last ECA layer of each stage.

    Args:
        path: the PNG file to write.
        photographs: two of them.
        gates: (2, C) for each of the four stages, from 0 to 1.
        size: side of the network's input, in pixels.
        title, note: above and below.
    """
    names = [photograph.name for photograph in photographs]
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(12, 6.4), layout="constrained")
        figure.suptitle(title, x=0.01, ha="left", fontsize=13, fontweight="bold")
        figure.supxlabel(note, x=0.01, ha="left", fontsize=9, color=GREY)
        parts: Any = figure.subfigures(1, 2, width_ratios=[1, 3.4])
        column = parts[0].subplots(2, 1)
        for axes, photograph, color in zip(column, photographs, (BLUE, ORANGE), strict=True):
            draw_photograph(axes, photograph, size, color)
        grid = parts[1].subplots(2, 2, sharey=True)
        for stage, (axes, values) in enumerate(zip(grid.flat, gates, strict=True), 1):
            draw_stage(axes, f"Stage {stage}: {values.shape[1]} channels", values, names)
        for axes in grid[1]:
            axes.set_xlabel(f"channels, in the order of their gate for {names[0]}")
        for axes in grid[:, 0]:
            axes.set_ylabel("gate")
        dots, line = grid[0, 0].get_legend_handles_labels()[0]
        grid[0, 0].legend(handles=[line, dots], loc="lower right", frameon=False, markerscale=2)
        save(figure, path)


def draw_photograph(axes: Axes, photograph: Photograph, size: int, color: str) -> None:
    axes.imshow(crop(photograph.pixels, size).permute(1, 2, 0).clamp(0, 1).numpy())
    axes.set_title(photograph.name, loc="center")
    axes.set_xticks([])
    axes.set_yticks([])
    for spine in axes.spines.values():
        spine.set(visible=True, color=color, linewidth=4)


def draw_stage(axes: Axes, title: str, values: Tensor, names: Sequence[str]) -> None:
    """The gates (2, C) of one stage: a line for the first photograph, dots for the second."""
    first, second = values.cpu()
    order = first.argsort()
    channels = range(len(order))
    axes.scatter(
        channels,
        second[order].numpy(),
        s=min(10.0, 6000 / len(order)),
        color=ORANGE,
        linewidths=0,
        label=names[1],
    )
    axes.plot(channels, first[order].numpy(), color=BLUE, linewidth=2.2, label=names[0])
    difference = (first - second).abs()
    text = (
        f"the two differ by {difference.mean():.3f} on average,\nby {difference.max():.3f} at most"
    )
    axes.text(0.02, 0.97, text, transform=axes.transAxes, va="top", fontsize=9, color=GREY)
    axes.set_title(title)
    axes.set_xlim(-0.01 * len(order), 1.01 * len(order))
    axes.set_ylim(0, 1)
    axes.grid(axis="y")


def draw_times(path: Path, cases: Sequence[Case], title: str, note: str) -> None:
    """Bars of the medians with their spread, labelled with the speed relative to plain PyTorch.

    Args:
        path: the PNG file to write.
        cases: the timed cases.
        title, note: above and below.
    """
    panels = [
        ("ECA layer, forward", [c for c in cases if c.ideal_bytes and c.pass_ == "forward"]),
        ("ECA layer, forward + backward", [c for c in cases if c.ideal_bytes and "+" in c.pass_]),
        ("Whole ECA-ResNet-50", [c for c in cases if not c.ideal_bytes]),
    ]
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(14, 5.2), layout="constrained")
        figure.suptitle(title, x=0.01, ha="left", fontsize=13, fontweight="bold")
        figure.supxlabel(note, x=0.01, ha="left", fontsize=9, color=GREY)
        row = figure.subplots(1, len(panels), width_ratios=[4, 4, 3])
        for axes, (name, shown) in zip(row, panels, strict=True):
            draw_bars(axes, name, shown)
        figure.legend(handles=handles(cases), loc="outside upper right", ncols=4, frameon=False)
        save(figure, path)


def handles(cases: Sequence[Case]) -> list[Any]:
    """The legend, with the contenders that were timed."""
    from matplotlib.patches import Patch

    timed = {n for case in cases for n, c in case.contenders.items() if c.seconds}
    return [Patch(color=c, label=label) for n, (c, label) in CONTENDERS.items() if n in timed]


def draw_bars(axes: Axes, title: str, cases: Sequence[Case]) -> None:
    axes.set_title(title)
    axes.set_ylabel("time of one call, ms")
    axes.grid(axis="y")
    for i, case in enumerate(cases):
        shown = [name for name in CONTENDERS if name in case.contenders]
        shown = [name for name in shown if case.contenders[name].seconds]
        width = 0.88 / max(len(shown), 3)
        for j, name in enumerate(shown):
            contender = case.contenders[name]
            spread = contender.spread
            assert spread is not None
            low, middle, high = (1e3 * t for t in (spread.p20, spread.median, spread.p80))
            place = i + (j - (len(shown) - 1) / 2) * width
            axes.bar(
                place,
                middle,
                0.92 * width,
                color=CONTENDERS[name][0],
                yerr=[[max(middle - low, 0)], [max(high - middle, 0)]],
                error_kw={"linewidth": 1, "capsize": 2},
            )
            times = ratio(case.contenders["plain"], contender)
            if name != "plain" and times is not None:
                axes.annotate(
                    f"{times.median:.2f}",
                    (place, high),
                    (0, 3),
                    textcoords="offset points",
                    ha="center",
                    fontsize=9,
                    fontweight="bold" if name == "fused" else "normal",
                )
    labels = [
        f"{case.place if case.ideal_bytes else case.pass_}\n{'x'.join(map(str, case.shape))}"
        for case in cases
    ]
    axes.set_xticks(range(len(cases)), labels, fontsize=9)
    axes.margins(y=0.12)
