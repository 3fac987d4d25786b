"""The picture of a run of detect.py: scenes with true and found boxes, and the loss."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Patch, Rectangle
from matplotlib.ticker import MaxNLocator
from torch import Tensor

from eca_fused.cli.common.style import BLUE, GREY, STYLE
from training.results import smoothed

from .scenes import CLASSES, Scene

__all__ = ["draw_run"]

THERE, FOUND = "white", "#cc79a7"  # Okabe and Ito's reddish purple, in which nothing is painted


def draw_run(
    path: Path,
    scenes: Sequence[Scene],
    found: Sequence[dict[str, Tensor]],
    losses: Sequence[float],
    title: str,
    note: str,
) -> None:
    """Draw scenes with the boxes of their shapes and the boxes found, and the loss of each step.

    Args:
        path: the PNG file to write.
        scenes: four of them.
        found: for each scene, boxes (d, 4), classes (d,), scores (d,) and, if there are any, masks
            (d, 1, size, size).
        losses: of at least one step.
        title, note: above and below.
    """
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(13, 6.6), layout="constrained")
        figure.suptitle(title, x=0.01, ha="left", fontsize=13, fontweight="bold")
        figure.supxlabel(note, x=0.01, ha="left", fontsize=9, color=GREY)
        parts: Any = figure.subfigures(1, 2, width_ratios=[1, 1.1])
        left, right = parts
        for axes, scene, detections in zip(left.subplots(2, 2).flat, scenes, found, strict=True):
            draw_scene(axes, scene, detections)
        handles = [
            Patch(facecolor="none", edgecolor="black", linestyle="--", label="painted there"),
            Patch(facecolor="none", edgecolor=FOUND, linewidth=2, label="found, with its score"),
        ]
        left.legend(handles=handles, loc="outside lower center", ncols=2, frameon=False)
        draw_losses(right.subplots(), losses)
        figure.savefig(path)


def draw_scene(axes: Axes, scene: Scene, found: dict[str, Tensor]) -> None:
    axes.imshow(scene.image.permute(1, 2, 0).numpy())
    axes.set_axis_off()
    for mask in found.get("masks", ()):
        axes.contour(mask[0].numpy(), levels=[0.5], colors=FOUND, linewidths=1.2)
    for box in scene.boxes.tolist():
        # Dashes over a dark line show on any background.
        draw_box(axes, box, "black", linewidth=1.6)
        draw_box(axes, box, THERE, linewidth=1.6, linestyle=(0, (3, 3)))
    size = scene.image.shape[1]
    rows = [*zip(found["boxes"].tolist(), found["classes"], found["scores"], strict=True)]
    for box, kind, score in reversed(rows):  # the surest last, above the others
        draw_box(axes, box, FOUND, linewidth=2)
        axes.text(
            box[0],
            max(box[1], 0.07 * size),
            f"{CLASSES[int(kind)]} {score:.2f}",
            color="white",
            fontsize=8,
            va="bottom",
            bbox={"facecolor": FOUND, "edgecolor": "none", "pad": 1.5},
        )


def draw_box(axes: Axes, box: Sequence[float], colour: str, **style: Any) -> None:
    x, y, right, bottom = box
    axes.add_patch(
        Rectangle((x - 0.5, y - 0.5), right - x, bottom - y, fill=False, edgecolor=colour, **style)
    )


def draw_losses(axes: Axes, losses: Sequence[float]) -> None:
    steps = range(1, len(losses) + 1)
    axes.scatter(steps, losses, s=12, color=BLUE, alpha=0.4, linewidths=0)
    axes.plot(steps, smoothed(list(losses), max(len(losses) // 8, 1)), color=BLUE, linewidth=2)
    axes.set_title("Training loss of each step, all its parts together")
    axes.set_xlabel("steps")
    axes.set_ylabel("loss")
    axes.set_ylim(bottom=0)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.grid(axis="y")
