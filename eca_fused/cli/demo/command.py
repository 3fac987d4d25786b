"""`python -m eca_fused` on the command line: options, exit status, JSON."""

import argparse
import contextlib
import io
import json
import logging
import sys
from collections.abc import Sequence
from pathlib import Path

import torch

from eca_fused.cli.common.console import finite
from eca_fused.cli.common.options import Options, positive
from eca_fused.cli.common.packages import PACKAGES_MISSING, missing_packages, need
from eca_fused.cli.demo.main_job import Settings, run
from eca_fused.cli.demo.timing import Effort

__all__ = ["main"]

CHECK_FAILED = 1

DTYPES = {str(d).removeprefix("torch."): d for d in (torch.float32, torch.float64)}
DTYPES |= {str(d).removeprefix("torch."): d for d in (torch.float16, torch.bfloat16)}

FULL = Effort(budget_s=3, rounds=(5, 60), compile_training=True, compile_network=True)
QUICK = Effort(budget_s=0.8, rounds=(5, 20), compile_training=False, compile_network=False)


def parser() -> argparse.ArgumentParser:
    """The options of the main job."""
    made = Options(
        "run",
        description="Run an ECA-ResNet-50 on two photographs: check the fused ECA against plain "
        "PyTorch and float64, time it, and draw its gates and the times.",
        status="0 if the check passes, 1 if it fails, 2 for bad arguments, 3 if a package is "
        "missing",
        examples=["run", "run --quick --dtype bfloat16 --output pictures"],
    )
    made.add_argument(
        "--quick",
        action="store_true",
        help="smaller batch, fewer rounds; torch.compile of the forward ECA layers only",
    )
    made.add_argument(
        "--batch",
        type=positive,
        metavar="N",
        help="images in the batch (8, --quick 2; 32 and 8 on CUDA; 2 for float16 on the CPU)",
    )
    made.add_argument("--dtype", choices=DTYPES, default="float32", help="default: float32")
    made.add_argument(
        "--device", choices=("cpu", "cuda"), help="default: cuda if there is one, else cpu"
    )
    made.add_argument("--channels-last", action="store_true", help="memory format channels_last")
    made.add_argument(
        "--output",
        type=Path,
        metavar="DIR",
        default=Path("eca_fused_output"),
        help="folder for the pictures (eca_fused_output)",
    )
    made.add_argument("--json", action="store_true", help="one JSON document on standard output")
    return made


def default_batch(device: str, dtype: torch.dtype, quick: bool) -> int:
    """A batch that keeps the run short."""
    if device == "cuda":
        return 8 if quick else 32
    # Few processors have float16 convolutions; on others they take ten times as long.
    return 2 if quick or dtype == torch.float16 else 8


def settings(argv: Sequence[str]) -> tuple[Settings, bool]:
    """The settings from the arguments, and whether JSON is wanted; exits with 2 if bad."""
    options = parser()
    args = options.parse_args(argv)
    device = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
    if device == "cuda" and not torch.cuda.is_available():
        options.error("--device cuda: PyTorch finds no CUDA device; use --device cpu")
    try:
        args.output.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        options.error(f"--output {args.output}: cannot make this folder: {error.strerror}")
    dtype = DTYPES[args.dtype]
    made = Settings(
        batch=args.batch or default_batch(device, dtype, args.quick),
        dtype=dtype,
        device=torch.device(device),
        channels_last=args.channels_last,
        output=args.output,
        effort=QUICK if args.quick else FULL,
    )
    return made, args.json


def main(argv: Sequence[str]) -> int:
    """Run the main job.

    Returns:
        The exit status: 0, 1 if the check failed, 3 if a package is missing.

    Raises:
        SystemExit: 2 for bad arguments, 0 after --help.
    """
    made, as_json = settings(argv)
    if missing := missing_packages():
        print(need(missing), file=sys.stderr)
        return PACKAGES_MISSING
    # torch.compile warns on every machine without a GPU.
    logging.getLogger("torch.utils.cpp_extension").setLevel(logging.ERROR)
    out = io.StringIO() if as_json else sys.stdout
    # Output of other packages must not get into the JSON document.
    with contextlib.redirect_stdout(sys.stderr if as_json else sys.stdout):
        result = run(made, out)
    if as_json:
        print(json.dumps(finite(result), indent=2, allow_nan=False))
    if result["check"]["passed"]:
        return 0
    print(f"error: the check failed: {result['check']['failures'][0]}", file=sys.stderr)
    return CHECK_FAILED
