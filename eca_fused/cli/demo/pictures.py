"""The pictures of the main job, as PNG files."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor

from eca_fused.cli.common.bars import draw_bars, handles
from eca_fused.cli.common.photographs import Photograph, crop
from eca_fused.cli.common.style import BLUE, GREY, ORANGE, STYLE, save
from eca_fused.cli.common.timing import Case

__all__ = ["draw_gates", "draw_times"]


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
