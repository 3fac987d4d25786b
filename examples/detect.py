"""Trains a detector for a few steps on shapes painted over photographs, and shows what it finds.

python examples/detect.py                                    # Faster R-CNN on ECA-ResNet-18
python examples/detect.py --detector mask_rcnn --depth 50    # also retinanet
python examples/detect.py --attention se                     # any method of eca_fused.attention
python examples/detect.py --plain                            # ECA in plain PyTorch

It only shows that the detectors of eca_fused.models.detection train and find shapes. A minute on
two photographs says nothing about a method's accuracy. It needs torchvision, but no network access.
"""

import argparse
import csv
import importlib
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import OneCycleLR

from detecting.scenes import CLASSES, SMALLEST, Scene, make_scene, matched
from eca_fused.attention import METHODS
from eca_fused.cli.common.console import Progress
from eca_fused.cli.common.packages import PACKAGES_MISSING, missing_packages, need
from eca_fused.cli.common.photographs import Photograph, load_photographs
from eca_fused.cli.tables.published import TITLES
from training.options import natural, positive, rate

DEPTHS = (18, 34, 50, 101, 152)
SHOWN = 4  # scenes that are not trained on
SURE = 0.5  # the least score of a detection that counts
# Half the usual width, and fewer regions: a step then takes a CPU one second, not several.
WIDTH = 128
SAMPLES = {"rpn_post_nms_top_n_train": 200, "box_batch_size_per_image": 64}


def main(argv: Sequence[str]) -> int:
    """Train and draw as the arguments say; return the exit status."""
    args = options(argv)
    if missing := missing_packages():
        say(need(missing))
        return PACKAGES_MISSING
    try:
        detection: Any = importlib.import_module("eca_fused.models.detection")
    except ImportError as error:
        say(f"error: {error}")
        return PACKAGES_MISSING
    photographs = load_photographs()
    model = build(detection, args)
    first_label = detection.DETECTORS[args.detector].first_label
    losses = train(model, args, photographs, first_label)
    # Another seed, so that none of these was trained on.
    generator = torch.Generator().manual_seed(args.seed + 1)
    scenes = [make_scene(photographs, args.size, generator) for _ in range(SHOWN)]
    found = [detect(model, scene, first_label) for scene in scenes]
    write_losses(args.output / "losses.csv", losses)
    from detecting.pictures import draw_run

    totals = [sum(parts.values()) for parts in losses]
    draw_run(args.output / "detections.png", scenes, found, totals, title(args), note(args))
    there = sum(len(scene.boxes) for scene in scenes)
    boxes = sum(len(detections["boxes"]) for detections in found)
    hits = sum(matched(s, f["boxes"], f["classes"]) for s, f in zip(scenes, found, strict=True))
    few = min(5, len(totals))
    print(
        f"Loss {sum(totals[:few]) / few:.3f} at first, {sum(totals[-few:]) / few:.3f} at last "
        f"(means of {few} steps)\n"
        f"Found {hits} of {there} shapes in {SHOWN} new scenes, with {boxes - hits} boxes too many"
        f"; {args.output / 'detections.png'}"
    )
    return 0


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def options(argv: Sequence[str]) -> argparse.Namespace:
    """The options from the arguments; exits with 2 if they do not fit."""
    made = argparse.ArgumentParser(
        prog="detect.py",
        description="Train a detector for a few steps on discs and rectangles painted over "
        "photographs, and draw what it finds in new ones.",
        epilog="Exit status: 0, 2 for options that do not fit, 3 if a package is missing.",
        allow_abbrev=False,
    )
    add = made.add_argument
    add("--detector", choices=TITLES, default="faster_rcnn", help="default: faster_rcnn")
    add("--depth", type=int, choices=DEPTHS, default=18, help="of the ResNet (18)")
    add("--attention", choices=METHODS, default="eca", help="in the ResNet's blocks (eca)")
    form = made.add_mutually_exclusive_group()
    form.add_argument("--fused", action="store_true", help="on the fused kernels (default)")
    form.add_argument("--plain", action="store_true", help="attention in plain PyTorch")
    add("--steps", type=positive, default=100, metavar="N", help="default: 100")
    add("--batch-size", type=positive, default=2, metavar="N", help="scenes in a step (2)")
    add("--size", type=positive, default=256, metavar="N", help="side of a scene in pixels (256)")
    add("--lr", type=rate, default=5e-4, help="highest learning rate of AdamW (0.0005)")
    add("--seed", type=natural, default=0, metavar="N", help="default: 0")
    add(
        "--output",
        type=Path,
        default=Path("eca_fused_output/detection"),
        metavar="DIR",
        help="folder for the picture and the losses (eca_fused_output/detection)",
    )
    args = made.parse_args(argv)
    if args.size < SMALLEST:
        made.error(f"--size {args.size}: expected from {SMALLEST} up")
    try:
        args.output.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        made.error(f"--output {args.output}: cannot make this folder: {error.strerror}")
    return args


def build(detection: Any, args: argparse.Namespace) -> nn.Module:
    """The detector, with all layers trained; a ResNet from ImageNet would keep its statistics."""
    torch.manual_seed(args.seed)
    model: nn.Module = detection.detector(
        args.detector,
        args.depth,
        args.attention,
        num_classes=len(CLASSES),
        trainable_layers=5,
        norm_eval=False,
        body={"fused": not args.plain},
        channels=WIDTH,
        min_size=args.size,
        max_size=args.size,
        **({} if args.detector == "retinanet" else SAMPLES),
    )
    return model.to("cuda" if torch.cuda.is_available() else "cpu")


def train(
    model: nn.Module, args: argparse.Namespace, photographs: Sequence[Photograph], first_label: int
) -> list[dict[str, float]]:
    """Train on new scenes in every step; return the parts of each step's loss."""
    device = next(model.parameters()).device
    generator = torch.Generator().manual_seed(args.seed)
    optimizer = torch.optim.AdamW(model.parameters(), args.lr, weight_decay=1e-4)
    scheduler = OneCycleLR(optimizer, args.lr, total_steps=args.steps + 1, cycle_momentum=False)
    losses: list[dict[str, float]] = []
    progress = Progress(args.steps)
    model.train()
    for _ in range(args.steps):
        last = f"loss {sum(losses[-1].values()):.3f}" if losses else "training"
        progress.step(last)
        scenes = [make_scene(photographs, args.size, generator) for _ in range(args.batch_size)]
        parts: dict[str, Tensor] = model(
            [scene.image.to(device) for scene in scenes],
            [scene.target(first_label, device) for scene in scenes],
        )
        optimizer.zero_grad(set_to_none=True)
        torch.stack([*parts.values()]).sum().backward()  # type: ignore[no-untyped-call]
        # The first gradients of random weights are large.
        nn.utils.clip_grad_norm_(model.parameters(), 10.0)
        optimizer.step()
        scheduler.step()
        losses.append({name: float(part.detach()) for name, part in parts.items()})
    progress.close()
    return losses


@torch.no_grad()
def detect(model: nn.Module, scene: Scene, first_label: int) -> dict[str, Tensor]:
    """The detections in a scene from a score of SURE up: boxes, classes, scores and any masks."""
    device = next(model.parameters()).device
    found: dict[str, Tensor] = model.eval()([scene.image.to(device)])[0]
    sure = {name: value[found["scores"] >= SURE].cpu() for name, value in found.items()}
    return sure | {"classes": sure["labels"] - first_label}


def write_losses(path: Path, losses: Sequence[dict[str, float]]) -> None:
    """A row for each step with the parts of its loss."""
    with open(path, "w", newline="") as file:
        rows = csv.writer(file)
        rows.writerow(["step", *losses[0]])
        rows.writerows([step, *parts.values()] for step, parts in enumerate(losses, 1))


def title(args: argparse.Namespace) -> str:
    method = METHODS[args.attention].title
    form = (
        "" if not METHODS[args.attention].fused else ", plain PyTorch" if args.plain else ", fused"
    )
    return (
        f"{TITLES[args.detector]} on ResNet-{args.depth} ({method}{form}), random weights trained "
        f"for {args.steps} steps"
    )


def note(args: argparse.Namespace) -> str:
    return (
        f"Shapes painted over two photographs, at {args.size}x{args.size}; the scenes shown were "
        f"not trained on.\nBatch {args.batch_size}, AdamW up to {args.lr:g}, seed {args.seed}; "
        f"boxes with a score from {SURE} up. Line: mean of the steps around."
    )


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
