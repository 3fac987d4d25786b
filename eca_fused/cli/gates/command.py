"""`python -m eca_fused gates`: the gate of each channel for images of different classes.

Like the figures of channel weights in the appendix of Wang et al., "ECA-Net" (CVPR 2020): a panel
for the last block of each stage, with a colour for each class, the mean over its images.
"""

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

import torch

from eca_fused import attention
from eca_fused.cli.common.console import finite, table
from eca_fused.cli.common.options import Options, picture
from eca_fused.cli.common.packages import PACKAGES_MISSING, missing_packages, need
from eca_fused.cli.common.photographs import Photograph, load_photographs
from eca_fused.cli.gates.class_gates import (
    Classes,
    Stage,
    find_classes,
    mean_gates,
    printable,
    randomise,
)
from eca_fused.conversion.checkpoints import CheckpointError, load_checkpoint
from eca_fused.models import RESNETS, Bottleneck, MobileNetV2, ResNet, mobilenetv2, resnet

__all__ = ["main"]

MODELS = (*(f"resnet{depth}" for depth in RESNETS), "mobilenetv2")
GATED = tuple(name for name in attention.METHODS if name != "none")
ORDERS = ("gate", "channel")
SEED = 0
LEAST_SIDE = 64  # below it the last stage has one pixel, too few for batch norm statistics
MOST_SIDE = 2**20
RANDOM = "random weights: the gates say nothing about the classes"


@dataclass(frozen=True)
class Found:
    """The network, the classes and their gates."""

    network: str
    classes: Classes
    stages: Sequence[Stage]


def side(text: str) -> int:
    """A side of images, in pixels."""
    if not text.isdecimal() or not LEAST_SIDE <= int(text) <= MOST_SIDE:
        raise argparse.ArgumentTypeError(
            f"expected a whole number of pixels from {LEAST_SIDE} to {MOST_SIDE}, got {text!r}"
        )
    return int(text)


def parser() -> argparse.ArgumentParser:
    """The options of the command."""
    made = Options(
        "gates",
        description="Draw the gate of each channel in the last block of each stage of a network, "
        "for images of one or more classes: a panel for each stage, a colour for each class.",
        status="0, 2 for bad arguments, images or checkpoints, 3 if a package is missing",
        examples=["gates cats/ dogs/ --checkpoint weights.pth --output gates.png"],
    )
    made.add_argument(
        "images",
        nargs="*",
        metavar="IMAGE",
        help="an image or a folder of images, whose name is the class; or CLASS=path; default: the "
        "two photographs of the main job",
    )
    made.add_argument(
        "--checkpoint",
        type=Path,
        metavar="FILE",
        help="weights for eca_fused.load_checkpoint(); by default they are random, and the gates "
        "mean nothing",
    )
    made.add_argument(
        "--model",
        choices=MODELS,
        help="default: that of the checkpoint, which must then have ECA; without one, resnet50",
    )
    made.add_argument("--attention", choices=GATED, help="default: eca")
    made.add_argument(
        "--size", type=side, default=224, metavar="N", help="side of the images, in pixels (224)"
    )
    made.add_argument(
        "--order",
        choices=ORDERS,
        default="gate",
        help="of the channels in a panel: by their mean gate (default), or their own, as in the "
        "paper",
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


def build(args: argparse.Namespace) -> ResNet | MobileNetV2:
    """The network that the arguments name, or that of the checkpoint if they name none.

    Raises:
        ValueError: the checkpoint cannot be read, does not fit, or has no attention.
        OSError: there is no such file.
        ImportError: a file of safetensors needs safetensors.
    """
    model: Any
    if args.checkpoint and not args.model and not args.attention:
        try:
            model = load_checkpoint(args.checkpoint)
        except CheckpointError as error:
            hint = "if its attention is not ECA, give --model and --attention"
            raise ValueError(f"{error}\n  {hint}") from error
        if not any(isinstance(module, attention.ECALayer) for module in model.modules()):
            raise ValueError(
                f"expected {args.checkpoint} as weights of a network with attention, got none"
            )
        return model.float()  # type: ignore[no-any-return]
    name, method = args.model or "resnet50", args.attention or "eca"
    if name == "mobilenetv2":
        model = mobilenetv2(method)
    else:
        model = resnet(int(name.removeprefix("resnet")), method)
    if args.checkpoint:
        load_checkpoint(args.checkpoint, model)
    return model  # type: ignore[no-any-return]


def find_gates(args: argparse.Namespace) -> Found:
    """The classes that the arguments name, and their gates.

    Raises:
        ValueError, OSError, ImportError: an image or the checkpoint cannot be read or used.
    """
    classes: Classes = (
        find_classes(args.images) if args.images else {p.name: [p] for p in load_photographs()}
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(SEED)
        model = build(args)
        if not args.checkpoint:
            randomise(model, classes, args.size)
    network = f"{title(model)} with {attention.METHODS[args.attention or 'eca'].title}"
    return Found(network, classes, mean_gates(model.eval(), classes, args.size))


def title(model: ResNet | MobileNetV2) -> str:
    """The name of a network as in the papers."""
    if isinstance(model, MobileNetV2):
        return "MobileNetV2"
    stages = (model.layer1, model.layer2, model.layer3, model.layer4)
    convolutions = 3 if isinstance(model.layer1[0], Bottleneck) else 2
    return f"ResNet-{sum(map(len, stages)) * convolutions + 2}"


def source(args: argparse.Namespace) -> str:
    """Where the weights come from."""
    return f"weights of {printable(args.checkpoint.name)}" if args.checkpoint else RANDOM


def text(args: argparse.Namespace, found: Found, out: TextIO) -> str:
    """The network and its classes, and a table with a row for each stage."""
    rows = []
    for stage in found.stages:
        values = stage.gates.mean(), stage.gates.min(), stage.gates.max()
        difference = "-" if stage.difference is None else f"{stage.difference:.4f}"
        numbers = [f"{value:.4f}" for value in values]
        rows.append([stage.layer, str(stage.gates.shape[1]), *numbers, difference])
    head = ["layer", "channels", "mean gate", "least", "most", "classes differ by"]
    counts = ", ".join(f"{name} ({len(images)})" for name, images in found.classes.items())
    lines = [
        f"{found.network}, {source(args)}",
        f"Classes, with their numbers of images: {counts}",
        "",
        table(head, rows, out),
        "",
        "Classes differ by: the largest minus the least gate of any class, mean over channels.",
        str(args.output),
    ]
    return "\n".join(lines)


def document(args: argparse.Namespace, found: Found) -> dict[str, Any]:
    """The result for JSON, with every gate."""
    return {
        "network": found.network,
        "weights": str(args.checkpoint) if args.checkpoint else "random",
        "size": args.size,
        "classes": {
            name: [i.name if isinstance(i, Photograph) else str(i) for i in images]
            for name, images in found.classes.items()
        },
        "stages": [
            {
                "layer": stage.layer,
                "difference": stage.difference,
                "gates": dict(zip(found.classes, stage.gates.tolist(), strict=True)),
            }
            for stage in found.stages
        ],
        "picture": str(args.output),
    }


def draw(args: argparse.Namespace, found: Found) -> None:
    """Write the picture."""
    from eca_fused.cli.gates.pictures import draw_class_gates

    weights = source(args)
    draw_class_gates(
        args.output,
        [
            (f"Stage {i}, {stage.layer}: {stage.gates.shape[1]} channels", stage.gates)
            for i, stage in enumerate(found.stages, 1)
        ],
        [f"{name} ({len(i)} image{'s' * (len(i) != 1)})" for name, i in found.classes.items()],
        args.order == "gate",
        f"{found.network}: gates of the last block of each stage\n"
        f"{weights[0].upper()}{weights[1:]}",
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
        print(need(missing), file=sys.stderr)
        return PACKAGES_MISSING
    try:
        found = find_gates(args)
    except (ValueError, OSError, ImportError) as error:
        options.error(str(error))
    try:
        args.output.parent.mkdir(parents=True, exist_ok=True)
        draw(args, found)
    except OSError as error:
        options.error(f"--output {args.output}: cannot write there: {error.strerror}")
    if args.json:
        print(json.dumps(finite(document(args, found)), indent=2, allow_nan=False))
    else:
        print(text(args, found, sys.stdout))
    return 0
