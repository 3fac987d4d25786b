"""`python -m eca_fused bench`: checks and times the ECA layers of ResNet-50 on random maps."""

import argparse
import contextlib
import copy
import json
import logging
import os
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from textwrap import fill
from typing import Any, TextIO

import torch
from torch import Tensor

from eca_fused.cli.common import environment
from eca_fused.cli.common.comparison import Comparison, compare_layer
from eca_fused.cli.common.console import bold, finite, table
from eca_fused.cli.common.options import Options, picture, positive
from eca_fused.cli.common.packages import PACKAGES_MISSING, missing_packages, need
from eca_fused.cli.common.time_tables import (
    NOTES,
    WIDTH,
    disturbance,
    how_timed,
    layers_table,
    missing_text,
    timing_document,
)
from eca_fused.cli.common.timing import BOTH, FORWARD, RESNET50, Case, Effort, layer_case
from eca_fused.layer import ECALayer
from eca_fused.ops.checks import DTYPES

__all__ = ["main"]

CHECK_FAILED = 1
SEED = 0
NAMES = {str(dtype).removeprefix("torch."): dtype for dtype in DTYPES}
LAYOUTS = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}
FULL = Effort(budget_s=2, rounds=(5, 60), compile_training=True, compile_network=False)
QUICK = Effort(budget_s=0.5, rounds=(5, 20), compile_training=False, compile_network=False)


def parser() -> argparse.ArgumentParser:
    """The options of the command."""
    made = Options(
        "bench",
        description="Check the ECA layers of ResNet-50 against float64, forward and backward, then "
        "time ours (fused), plain PyTorch, torch.compile of it, and a copy of as many bytes, "
        "interleaved in one run. A layer that is wrong is not timed.",
        status="0, 1 if a check fails, 2 for bad arguments, 3 if matplotlib is missing for a "
        "picture",
        examples=["bench --quick", "bench --dtype bfloat16 --batch 64 --picture bench.png"],
    )
    made.add_argument(
        "--quick",
        action="store_true",
        help="smaller batch, fewer rounds; torch.compile of the forward pass only",
    )
    made.add_argument(
        "--device", choices=("cpu", "cuda"), help="default: cuda if there is one, else cpu"
    )
    made.add_argument("--dtype", choices=NAMES, default="float32", help="of the maps (float32)")
    made.add_argument(
        "--batch", type=positive, metavar="N", help="samples (8, --quick 2; 32 and 8 on CUDA)"
    )
    made.add_argument(
        "--layout", choices=LAYOUTS, default="contiguous", help="memory format (contiguous)"
    )
    made.add_argument("--output", type=Path, metavar="FILE", help="JSON file to write")
    made.add_argument(
        "--picture", type=picture, metavar="FILE", help="bars of the times; needs matplotlib"
    )
    return made


def check_files(args: argparse.Namespace, options: argparse.ArgumentParser) -> None:
    """End with status 2, before anything is measured, if a file cannot be written."""
    for name in ("output", "picture"):
        path = getattr(args, name)
        if path is None:
            continue
        if path.is_dir():
            options.error(f"--{name}: expected a file to write, got the folder {path}")
        if not path.parent.is_dir():
            options.error(f"--{name} {path}: there is no folder {path.parent}; make it first")
        if not os.access(path if path.exists() else path.parent, os.W_OK):
            options.error(f"--{name} {path}: cannot be written; choose another place")


# ---- measuring ----


def layers(args: argparse.Namespace, layer: tuple[int, int, int, int]) -> tuple[Any, Any, Tensor]:
    """The layer in plain PyTorch and fused, with the same taps, and a map (N, C, H, W)."""
    channels, height, width, taps = layer
    generator = torch.Generator().manual_seed(SEED)
    dtype, device = NAMES[args.dtype], torch.device(args.device)
    plain = ECALayer(channels, kernel_size=taps, fused=False)
    with torch.no_grad():
        plain.conv.weight.copy_(torch.randn(1, 1, taps, generator=generator))
    plain = plain.to(device, dtype)
    fused = copy.deepcopy(plain)
    fused.fused = True
    x = torch.randn(args.batch, channels, height, width, generator=generator)
    return plain, fused, x.to(device, dtype).contiguous(memory_format=LAYOUTS[args.layout])


def measure(args: argparse.Namespace, effort: Effort) -> tuple[list[Comparison], list[Case]]:
    """The checks of every layer, and the times of those that passed."""
    checks, cases = [], []
    for stage, layer in enumerate(RESNET50, 1):
        place = f"stage {stage}"
        print(
            f"{place}: {'x'.join(map(str, layer[:3]))}, k={layer[3]}", file=sys.stderr, flush=True
        )
        plain, fused, x = layers(args, layer)
        found = compare_layer(place, plain, fused, x)
        checks += found
        if all(comparison.passed for comparison in found):
            cases += [
                layer_case(place, pass_, plain, fused, x, effort) for pass_ in (FORWARD, BOTH)
            ]
    return checks, cases


# ---- the report ----


def check_table(checks: Sequence[Comparison], stream: TextIO) -> str:
    rows = [
        [
            f"{c.place}, {c.quantity}",
            f"{c.plain:.1e}",
            f"{c.fused:.1e}",
            f"{c.tolerance:.1e}",
            "yes" if c.passed else "NO",
        ]
        for c in checks
    ]
    return table(["error against float64", "plain", "fused", "allowed", "within"], rows, stream)


def text(
    args: argparse.Namespace,
    found: dict[str, Any],
    checks: Sequence[Comparison],
    cases: Sequence[Case],
    stream: TextIO,
) -> str:
    lines = [
        f"ECA layers of ResNet-50, batch {args.batch}, {args.dtype}, {args.layout}",
        f"On: {environment.summary(found)}",
        f"Fused ECA: {found['fused']}",
        "",
        check_table(checks, stream),
        *(f"FAILED and not timed: {c}" for c in checks if not c.passed),
        "",
    ]
    if cases:
        lines += [
            bold("Times", stream),
            fill(how_timed(found), WIDTH),
            "",
            layers_table(cases, stream),
            "",
            *NOTES,
            *disturbance(cases),
            *missing_text(cases),
        ]
    return "\n".join(lines)


def document(
    args: argparse.Namespace,
    found: dict[str, Any],
    checks: Sequence[Comparison],
    cases: Sequence[Case],
) -> dict[str, Any]:
    """The result for JSON."""
    return {
        "environment": found,
        "batch": args.batch,
        "dtype": args.dtype,
        "layout": args.layout,
        "passed": all(c.passed for c in checks),
        "checks": [asdict(c) | {"tolerance": c.tolerance, "passed": c.passed} for c in checks],
        "times": timing_document(cases),
    }


def draw(path: Path, args: argparse.Namespace, cases: Sequence[Case], where: str) -> None:
    """Bars of the times, a panel for each direction."""
    import matplotlib
    from matplotlib.figure import Figure

    from eca_fused.cli.common.bars import draw_bars, handles
    from eca_fused.cli.common.style import GREY, STYLE, save

    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(14, 5.2), layout="constrained")
        title = f"ECA layers: batch {args.batch}, {args.dtype}, {args.layout}"
        figure.suptitle(title, x=0.01, ha="left", fontsize=13, fontweight="bold")
        note = (
            "Medians of interleaved rounds, p20 and p80. Numbers: how many times as fast as plain."
        )
        figure.supxlabel(f"{note}\n{where}.", x=0.01, ha="left", fontsize=9, color=GREY)
        for axes, pass_ in zip(figure.subplots(1, 2), (FORWARD, BOTH), strict=True):
            draw_bars(axes, pass_, [case for case in cases if case.pass_ == pass_])
        figure.legend(handles=handles(cases), loc="outside upper right", ncols=4, frameon=False)
        save(figure, path)


def main(argv: Sequence[str]) -> int:
    """Check and time the layers.

    Returns:
        The exit status: 0, 1 if a check failed, 3 if matplotlib is missing.

    Raises:
        SystemExit: 2 for bad arguments, 0 after --help.
    """
    options = parser()
    args = options.parse_args(argv)
    args.device = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
    if args.device == "cuda" and not torch.cuda.is_available():
        options.error("--device cuda: PyTorch finds no CUDA device; use --device cpu")
    check_files(args, options)
    if args.picture and (missing := missing_packages(["matplotlib"])):
        print(need(missing), file=sys.stderr)
        return PACKAGES_MISSING
    smaller, usual = (8, 32) if args.device == "cuda" else (2, 8)
    args.batch = args.batch or (smaller if args.quick else usual)
    # torch.compile warns on every machine without a GPU.
    logging.getLogger("torch.utils.cpp_extension").setLevel(logging.ERROR)
    found = environment.describe(torch.device(args.device), NAMES[args.dtype])
    with contextlib.redirect_stdout(sys.stderr):  # of other packages
        checks, cases = measure(args, QUICK if args.quick else FULL)
    print(text(args, found, checks, cases, sys.stdout))
    if args.output:
        result = finite(document(args, found, checks, cases))
        args.output.write_text(json.dumps(result, indent=2, allow_nan=False) + "\n")
    if args.picture and cases:
        draw(args.picture, args, cases, environment.summary(found))
        print(args.picture)
    failed = [comparison for comparison in checks if not comparison.passed]
    if failed:
        print(f"error: the check failed: {failed[0]}", file=sys.stderr)
        return CHECK_FAILED
    return 0
