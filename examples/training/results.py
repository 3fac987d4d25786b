"""Writes the results of a run: its history as JSON, CSV and a picture, and the weights."""

import csv
import importlib
import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict

from eca_fused.cli.common.style import BLUE, GREEN, GREY, STYLE

from .loop import History
from .options import Options
from .processes import Processes

__all__ = ["write_results"]


def write_results(model: nn.Module, history: History, options: Options, at: Processes) -> None:
    """Write weights.pt, history.json, history.csv and curve.png into the output folder.

    weights.pt holds a state dict for models.ResNet, however the network was spread.
    """
    whole = StateDictOptions(full_state_dict=True, cpu_offload=True)
    weights = get_model_state_dict(model, options=whole)
    if not at.first:
        return
    torch.save(weights, options.output / "weights.pt")
    document = {
        "options": options.determining() | {"parallel": options.parallel},
        "processes": at.world,
        "device": at.device.type,
        "accuracy": history.accuracy(),
        **asdict(history),
    }
    (options.output / "history.json").write_text(json.dumps(document, indent=2) + "\n")
    write_csv(options.output / "history.csv", history)
    draw_curve(options.output / "curve.png", history, title(options), where(options, at))


def write_csv(path: Path, history: History) -> None:
    """A row for each step; the accuracy is in the last row of its epoch."""
    with open(path, "w", newline="") as file:
        rows = csv.writer(file)
        rows.writerow(["step", "epoch", "training_loss", "held_out_accuracy"])
        for step, loss in enumerate(history.losses, 1):
            epoch, rest = divmod(step, history.steps_per_epoch)
            accuracy = "" if rest else history.correct[epoch - 1] / history.held_out
            rows.writerow([step, epoch + bool(rest), loss, accuracy])


def title(options: Options) -> str:
    form = "plain PyTorch" if options.plain else "fused ECA"
    depth = 2 + 2 * sum(options.layers)  # the stem, two convolutions in each block, the classifier
    return f"ECA-ResNet-{depth} on handwritten digits, {form}"


def where(options: Options, at: Processes) -> str:
    how = {"ddp": "DistributedDataParallel", "fsdp": "FSDP2"}[options.parallel]
    processes = "one process" if at.world == 1 else f"{at.world} processes, {how}"
    device = torch.cuda.get_device_name(at.device) if at.device.type == "cuda" else "CPU"
    return (
        f"{processes}, {device}, {options.precision}, batch {options.batch_size}, highest learning "
        f"rate {options.lr:g}, seed {options.seed}. Line: mean of the steps around."
    )


def smoothed(values: list[float], width: int) -> list[float]:
    """The mean of the values around each, over up to `width` of them."""
    half = width // 2
    windows = [values[max(i - half, 0) : i + half + 1] for i in range(len(values))]
    return [sum(window) / len(window) for window in windows]


def draw_curve(path: Path, history: History, title: str, note: str) -> None:
    """The training loss of each step, and the held-out accuracy after each epoch.

    Args:
        path: the PNG file to write.
        history: of at least one epoch.
        title, note: above and below.
    """
    matplotlib: Any = importlib.import_module("matplotlib")
    figures: Any = importlib.import_module("matplotlib.figure")
    epochs = len(history.correct)
    with matplotlib.rc_context(STYLE):
        figure = figures.Figure(figsize=(11, 4.4), layout="constrained")
        figure.suptitle(title, x=0.01, ha="left", fontsize=13, fontweight="bold")
        figure.supxlabel(note, x=0.01, ha="left", fontsize=9, color=GREY)
        loss, accuracy = figure.subplots(1, 2, width_ratios=[1.4, 1])

        places = [(i + 1) / history.steps_per_epoch for i in range(len(history.losses))]
        loss.scatter(places, history.losses, s=8, color=BLUE, alpha=0.35, linewidths=0)
        around = max(history.steps_per_epoch // 4, 1)
        loss.plot(places, smoothed(history.losses, around), color=BLUE, linewidth=2)
        loss.set_title("Training loss of each step")
        loss.set_ylabel("cross-entropy")
        loss.set_ylim(bottom=0)

        percent = [100 * correct / history.held_out for correct in history.correct]
        accuracy.plot(range(1, epochs + 1), percent, color=GREEN, linewidth=2, marker="o")
        accuracy.annotate(
            f"{percent[-1]:.1f} %",
            (epochs, percent[-1]),
            (0, 7),
            textcoords="offset points",
            ha="right",
            fontweight="bold",
            color=GREEN,
        )
        accuracy.set_title(f"Accuracy on {history.held_out} images held out")
        accuracy.set_ylabel("recognised, %")
        accuracy.margins(y=0.15)
        for axes in (loss, accuracy):
            axes.set_xlabel("epochs")
            axes.set_xlim(0, epochs * 1.03)
            axes.xaxis.get_major_locator().set_params(integer=True)
            axes.grid(axis="y")
        figure.savefig(path)
