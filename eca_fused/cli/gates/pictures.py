"""The picture of the gates of each stage, by channel and class of images."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor

from eca_fused.cli.common.style import (
    BLACK,
    BLUE,
    GREEN,
    ORANGE,
    PURPLE,
    RED,
    SKY,
    STYLE,
    save,
)

__all__ = ["draw_class_gates"]

LINES = (BLUE, ORANGE, GREEN, RED, SKY, PURPLE, BLACK)


def draw_class_gates(
    path: Path,
    stages: Sequence[tuple[str, Tensor]],
    names: Sequence[str],
    by_gate: bool,
    title: str,
) -> None:
    """A panel for each stage with the gates of its channels, in a colour for each class.

    Args:
        path: the file to write.
        stages: title and gates (classes, C) of each.
        names: of the classes, for the legend; up to 14.
        by_gate: draw dots, with channels sorted by their mean gate over the classes; otherwise
            lines, with channels in their own order.
        title: above the panels.
    """
    columns = 2 if by_gate else 1  # lines through thousands of channels need the whole width
    rows = -(-len(stages) // columns)
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(14, 1.2 + (3.4 if by_gate else 2.4) * rows), layout="constrained")
        figure.suptitle(title, x=0.01, ha="left", fontsize=13, fontweight="bold")
        grid = figure.subplots(rows, columns, sharey=True, squeeze=False)
        for axes, (label, gates) in zip(grid.flat, stages, strict=False):
            draw_classes(axes, gates.cpu(), by_gate)
            axes.set_title(label)
        for axes in grid.flat[len(stages) :]:
            axes.set_visible(False)
        for axes in grid[:, 0]:
            axes.set_ylabel("mean gate")
        for axes in grid.flat[max(len(stages) - columns, 0) : len(stages)]:
            axes.set_xlabel("channels, in the order of their mean gate" if by_gate else "channel")
        figure.legend(
            [handle(i, by_gate) for i in range(len(names))],
            names,
            title="mean over the images of",
            loc="outside lower left",
            ncols=min(len(names), 5),
            frameon=False,
            alignment="left",
        )
        save(figure, path)


def draw_classes(axes: Axes, gates: Tensor, by_gate: bool) -> None:
    """The gates (classes, C) of one stage."""
    channels = gates.shape[1]
    shown = gates[:, gates.mean(0).argsort()] if by_gate else gates
    for i, values in enumerate(shown):
        style: dict[str, Any] = {"linewidth": min(1.6, 0.4 + 200 / channels)}
        if by_gate:
            style = {"markersize": min(4.0, 1.2 + 400 / channels), "markeredgewidth": 0}
        axes.plot(values.numpy(), **class_style(i, by_gate), **style)
    axes.set_xlim(-0.01 * channels, 1.01 * channels)
    axes.grid(axis="y")


def class_style(i: int, dots: bool) -> dict[str, Any]:
    """Seven colours, each in two forms."""
    again = i >= len(LINES)
    form = {"linestyle": "", "marker": "s" if again else "o"}
    return {"color": LINES[i % len(LINES)]} | (form if dots else {"linestyle": "-:"[again]})


def handle(i: int, dots: bool) -> Any:
    """A class in the legend."""
    from matplotlib.lines import Line2D

    return Line2D([], [], linewidth=2.5, markersize=7, markeredgewidth=0, **class_style(i, dots))
