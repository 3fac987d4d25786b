"""`python -m eca_fused gates`: the gate of each channel for images of different classes.

As the figures of channel weights in the appendix of Wang et al., "ECA-Net" (CVPR 2020): a panel for
the last block of each stage, and in it a colour for each class, the mean over its images.
"""

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TextIO

import torch

from eca_fused import attention
from eca_fused.demo.class_gates import (
    Classes,
    Stage,
    find_classes,
    load_weights,
    mean_gates,
    randomise,
)
from eca_fused.demo.command import PACKAGES_MISSING, missing_packages
from eca_fused.demo.console import table
from eca_fused.demo.photographs import Photograph, load_photographs
from eca_fused.demo.report import finite
from eca_fused.models import RESNETS, MobileNetV2, ResNet, mobilenetv2, resnet

__all__ = ["main"]

NAMES = {f"resnet{depth}": f"ResNet-{depth}" for depth in RESNETS} | {"mobilenetv2": "MobileNetV2"}
GATED = tuple(name for name in attention.METHODS if name != "none")
ENDINGS = (".pdf", ".png", ".svg")
ORDERS = ("gate", "channel")
SEED = 0
LEAST_SIDE = 64  # below, the last stage is one pixel, of which batch norms have no statistics
RANDOM = "random weights: the gates say nothing about the classes"


def side(text: str) -> int:
    """A side of images, in pixels."""
    if not text.isdecimal() or int(text) < LEAST_SIDE:
        raise argparse.ArgumentTypeError(
            f"expected a whole number of pixels from {LEAST_SIDE} up, got {text!r}"
        )
    return int(text)


def picture(text: str) -> Path:
    """The file of a picture."""
    path = Path(text)
    if path.suffix.lower() not in ENDINGS:
        raise argparse.ArgumentTypeError(
            f"expected a file that ends with {', '.join(ENDINGS)}, got {text!r}"
        )
    return path


def parser() -> argparse.ArgumentParser:
    """The options of the command."""
    made = argparse.ArgumentParser(
        prog="python -m eca_fused gates",
        description="Draw the gate of each channel in the last block of each stage of a network, "
        "for images of one or more classes: a panel for each stage, a colour for each class.",
        epilog="Exit status: 0, 2 for bad arguments, images or checkpoints, 3 if a package is "
        "missing.",
    )
    made.add_argument(
        "images",
        nargs="*",
        metavar="IMAGE",
        help="an image or a folder of images, whose name is the class, or CLASS=path; default: the "
        "two photographs of the main job",
    )
    made.add_argument("--model", choices=NAMES, default="resnet50", help="default: resnet50")
    made.add_argument("--attention", choices=GATED, default="eca", help="default: eca")
    made.add_argument(
        "--checkpoint",
        type=Path,
        metavar="FILE",
        help="weights of the model; without, they are random, and the gates mean nothing",
    )
    made.add_argument(
        "--size", type=side, default=224, metavar="N", help="side of the images, in pixels (224)"
    )
    made.add_argument(
        "--order",
        choices=ORDERS,
        default="gate",
        help="of the channels in a panel: that of their mean gate (default), or their own, as in "
        "the paper",
    )
    made.add_argument(
        "--output",
        type=picture,
        metavar="FILE",
        default=Path("eca_fused_output/class_gates.png"),
        help="the picture: PNG, PDF or SVG (eca_fused_output/class_gates.png)",
    )
    made.add_argument("--json", action="store_true", help="every gate as JSON on standard output")
    return made


def build(name: str, method: str) -> ResNet | MobileNetV2:
    """A network of NAMES."""
    if name == "mobilenetv2":
        return mobilenetv2(method)
    return resnet(int(name.removeprefix("resnet")), method)


def find_gates(args: argparse.Namespace) -> tuple[Classes, list[Stage]]:
    """The classes that the arguments name, and their gates.

    Raises:
        ValueError: an image or the checkpoint cannot be read, or does not fit.
    """
    classes: Classes = (
        find_classes(args.images) if args.images else {p.name: [p] for p in load_photographs()}
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(SEED)
        model = build(args.model, args.attention)
        if args.checkpoint:
            load_weights(model, args.checkpoint)
        else:
            randomise(model, classes, args.size)
    return classes, mean_gates(model.eval(), classes, args.size)


def describe(args: argparse.Namespace) -> tuple[str, str]:
    """The network, and the source of its weights."""
    network = f"{NAMES[args.model]} with {attention.METHODS[args.attention].title}"
    return network, f"weights of {args.checkpoint.name}" if args.checkpoint else RANDOM


def text(args: argparse.Namespace, classes: Classes, stages: Sequence[Stage], out: TextIO) -> str:
    """What was run, and a table with a row for each stage."""
    rows = []
    for stage in stages:
        values = stage.gates.mean(), stage.gates.min(), stage.gates.max()
        difference = "-" if stage.difference is None else f"{stage.difference:.4f}"
        numbers = [f"{value:.4f}" for value in values]
        rows.append([stage.layer, str(stage.gates.shape[1]), *numbers, difference])
    head = ["layer", "channels", "mean gate", "least", "most", "classes differ by"]
    counts = ", ".join(f"{name} ({len(images)})" for name, images in classes.items())
    lines = [
        "{}, {}".format(*describe(args)),
        f"Classes, with their numbers of images: {counts}",
        "",
        table(head, rows, out),
        "",
        "Classes differ by the largest less the least gate of any class, mean over channels.",
        str(args.output),
    ]
    return "\n".join(lines)


def document(args: argparse.Namespace, classes: Classes, stages: Sequence[Stage]) -> dict[str, Any]:
    """The result for JSON, with every gate."""
    return {
        "model": args.model,
        "attention": args.attention,
        "weights": str(args.checkpoint) if args.checkpoint else "random",
        "size": args.size,
        "classes": {
            name: [i.name if isinstance(i, Photograph) else str(i) for i in images]
            for name, images in classes.items()
        },
        "stages": [
            {
                "layer": stage.layer,
                "difference": stage.difference,
                "gates": dict(zip(classes, stage.gates.tolist(), strict=True)),
            }
            for stage in stages
        ],
        "picture": str(args.output),
    }


def draw(args: argparse.Namespace, classes: Classes, stages: Sequence[Stage]) -> None:
    """Write the picture."""
    from eca_fused.demo.pictures import draw_class_gates

    network, weights = describe(args)
    draw_class_gates(
        args.output,
        [
            (f"Stage {i}, {stage.layer}: {stage.gates.shape[1]} channels", stage.gates)
            for i, stage in enumerate(stages, 1)
        ],
        [f"{name} ({len(i)} image{'s' * (len(i) != 1)})" for name, i in classes.items()],
        args.order == "gate",
        f"{network}: gates of the last block of each stage\n{weights[0].upper()}{weights[1:]}",
    )


def main(argv: Sequence[str]) -> int:
    """Draw the gates.

    Returns:
        The exit status: 0, or 3 if a package is missing.

    Raises:
        SystemExit: 2 for bad arguments, images or checkpoints, 0 after --help.
    """
    options = parser()
    args = options.parse_args(argv)
    needed = {"matplotlib", "PIL"} | (set() if args.images else {"sklearn"})
    if missing := missing_packages(needed):
        print(
            f"error: {', '.join(missing)} not installed; pip install 'eca-fused[demo]'",
            file=sys.stderr,
        )
        return PACKAGES_MISSING
    try:
        classes, stages = find_gates(args)
    except (ValueError, OSError) as error:
        options.error(str(error))
    try:
        args.output.parent.mkdir(parents=True, exist_ok=True)
        draw(args, classes, stages)
    except OSError as error:
        options.error(f"--output {args.output}: cannot write there: {error.strerror}")
    if args.json:
        print(json.dumps(finite(document(args, classes, stages)), indent=2, allow_nan=False))
    else:
        print(text(args, classes, stages, sys.stdout))
    return 0
