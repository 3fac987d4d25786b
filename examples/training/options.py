"""The options of a training run, and which of them must match those of a checkpoint."""

import argparse
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

__all__ = ["DETERMINING", "Options", "UsageError", "parse"]

# Options that determine the numbers of a run. It resumes only from a checkpoint with the same ones.
DETERMINING = (
    "epochs",
    "batch_size",
    "lr",
    "seed",
    "samples",
    "layers",
    "plain",
    "precision",
    "channels_last",
    "compile",
)


class UsageError(Exception):
    """Options or a checkpoint that do not fit; the message says what to do."""


@dataclass(frozen=True)
class Options:
    """One run, as the command line describes it; `train.py --help` says what each means."""

    parallel: str
    epochs: int
    batch_size: int
    lr: float
    seed: int
    samples: int | None
    layers: tuple[int, ...]
    plain: bool
    precision: str
    channels_last: bool
    compile: str | None
    output: Path
    checkpoint: Path
    save_every: int
    resume: bool

    def determining(self) -> dict[str, Any]:
        """The options in DETERMINING, as JSON returns them."""
        found = {name: getattr(self, name) for name in DETERMINING}
        return found | {"layers": list(self.layers)}


class Parser(argparse.ArgumentParser):
    """Raises UsageError, so that only one of many processes prints the message."""

    def error(self, message: str) -> NoReturn:
        raise UsageError(message)


def parse(argv: Sequence[str]) -> Options:
    """The options from the arguments.

    Raises:
        UsageError: an argument is unknown or has a value that does not fit.
        SystemExit: 0 after --help.
    """
    args = vars(parser().parse_args(argv))
    args["layers"] = tuple(args["layers"])
    args["checkpoint"] = args["checkpoint"] or args["output"] / "checkpoints"
    return Options(**args)


def parser() -> argparse.ArgumentParser:
    made = Parser(
        prog="train.py",
        description="Train an ECA-ResNet on the handwritten digits of scikit-learn, in one process "
        "or, under torchrun, in several, on GPUs where there are any.",
        epilog="Exit status: 0 after the last epoch, 2 for options or a checkpoint that do not "
        "fit, 3 if a package is missing.",
        allow_abbrev=False,
    )
    add = made.add_argument
    add(
        "--parallel",
        choices=("ddp", "fsdp"),
        default="ddp",
        help="under torchrun: DistributedDataParallel (default), or FSDP2's fully_shard",
    )
    add("--epochs", type=positive, default=5, metavar="N", help="default: 5")
    add(
        "--batch-size",
        type=positive,
        default=64,
        metavar="N",
        help="images in a step, of all processes together (64)",
    )
    add("--lr", type=rate, default=0.05, help="highest learning rate (0.05)")
    add("--seed", type=natural, default=0, metavar="N", help="default: 0")
    add("--samples", type=positive, metavar="N", help="train on the first N images only")
    add(
        "--layers",
        type=positive,
        nargs=4,
        default=(2, 2, 2, 2),
        metavar="N",
        help="blocks of each of the four stages (2 2 2 2: ECA-ResNet-18)",
    )
    add("--plain", action="store_true", help="ECA in plain PyTorch instead of fused")
    add(
        "--precision",
        choices=("float32", "bfloat16", "float16"),
        default="float32",
        help="of the convolutions, by autocast; float16 also scales the loss (float32)",
    )
    add("--channels-last", action="store_true", help="memory format channels_last")
    add(
        "--compile",
        nargs="?",
        const="inductor",
        metavar="BACKEND",
        help="compile the network; BACKEND is one of torch.compile's (inductor)",
    )
    add(
        "--output",
        type=Path,
        default=Path("eca_fused_output/digits"),
        metavar="DIR",
        help="folder for history, curve and weights (eca_fused_output/digits)",
    )
    add(
        "--checkpoint",
        type=Path,
        metavar="DIR",
        help="folder for the checkpoint (OUTPUT/checkpoints); all processes must see it",
    )
    add(
        "--save-every",
        type=positive,
        default=20,
        metavar="N",
        help="steps between checkpoints (20); there is one after each epoch too",
    )
    add(
        "--resume",
        action="store_true",
        help="continue from the checkpoint if there is one, else start",
    )
    return made


def positive(text: str) -> int:
    """A whole number from 1 up."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"expected a whole number from 1 up, got {text!r}")
    return int(text)


def natural(text: str) -> int:
    """A whole number from 0 up."""
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"expected a whole number from 0 up, got {text!r}")
    return int(text)


def rate(text: str) -> float:
    """A finite number above 0."""
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 < value < float("inf"):
        raise argparse.ArgumentTypeError(f"expected a number above 0, such as 0.05, got {text!r}")
    return value
