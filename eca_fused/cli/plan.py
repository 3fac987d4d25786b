"""`python -m eca_fused plan`: how the CUDA kernels would run the ECA layers of known networks."""

import argparse
import json
import math
import re
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, TextIO

import torch

from eca_fused.cli.common.console import bold, table
from eca_fused.cli.common.options import Options, positive
from eca_fused.cli.common.timing import RESNET50
from eca_fused.ops.checks import DTYPES, MAX_SPATIAL_DIMS
from eca_fused.ops.cuda_plan import Plan, gpu_limits, plan, planner
from eca_fused.ops.taps import adaptive_kernel_size

__all__ = ["main"]

PLANNER_MISSING = 3  # argparse itself exits with 2

# (C, H, W) of x in the ECA layers: after each stage of the ResNets and each stage of MobileNetV2 at
# 224x224, and after each stage of ResNet-50 at the sizes of object detection.
MODELS: dict[str, tuple[str, list[tuple[int, ...]]]] = {
    "resnet50": ("ResNet-50", [layer[:3] for layer in RESNET50]),
    "resnet18": ("ResNet-18", [(64, 56, 56), (128, 28, 28), (256, 14, 14), (512, 7, 7)]),
    "mobilenetv2": (
        "MobileNetV2",
        [
            (16, 112, 112),
            (24, 56, 56),
            (32, 28, 28),
            (64, 14, 14),
            (96, 14, 14),
            (160, 7, 7),
            (320, 7, 7),
        ],
    ),
    "detection": (
        "Detection: ResNet-50 at 1280x800, and its first stage at 1336x800",
        [(256, 200, 320), (512, 100, 160), (1024, 50, 80), (2048, 25, 40), (256, 200, 334)],
    ),
    "extremes": ("Large planes, one pixel", [(64, 224, 224), (2048, 1, 1)]),
}
LAYOUTS = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}
LETTERS = {"contiguous": "NCHW", "channels_last": "NHWC"}
PASSES = ("forward", "backward")
DTYPE_NAMES = {str(dtype).removeprefix("torch."): dtype for dtype in DTYPES}

# A card for each compute capability, its peak bandwidth in GB/s and its highest clock in GHz, by
# NVIDIA's datasheets and architecture white papers. The planner assumes its number of
# multiprocessors (kGpus in csrc/plan.cpp). No copy reaches the peak.
DATASHEET = {
    75: ("T4", 320, 1.59),
    80: ("A100 80GB SXM", 2039, 1.41),
    86: ("RTX 3080 Ti", 912, 1.665),
    89: ("RTX 4090", 1008, 2.52),
    90: ("H200", 4800, 1.98),
    100: ("B200", 8000, 1.965),
    120: ("RTX 5090", 1792, 2.407),
}
# A multiprocessor issues up to 4 warp instructions in a cycle. Code like ours, which waits for
# memory, issues about six tenths of these.
ISSUED = 4 * 0.6

HEAD = [
    *("shape", "k", "layout", "pass", "strategy", "tile", "halo"),
    *("threads", "blocks", "KiB", "/SM", "DRAM/B", "L2/B", "instr", "us"),
]


@dataclass(frozen=True)
class Row:
    """The plan of one call."""

    model: str
    shape: tuple[int, ...]  # (N, C, *spatial)
    k: int
    layout: str
    pass_: str
    plan: Plan
    x_bytes: int
    seconds: float  # modelled

    @property
    def instructions(self) -> float:
        """Of warps, modelled, for 512 bytes of x."""
        return self.plan.instructions / max(1, self.x_bytes / 512)


def parser() -> argparse.ArgumentParser:
    """The options of the command."""
    made = Options(
        "plan",
        description="Print how the CUDA kernels would run the ECA layers of known networks on a "
        "GPU, and the memory traffic that they would cause. Everything is modelled: nothing is run "
        "or measured, and no GPU is needed.",
        status="0, 2 for bad arguments, 3 if the compiled planner is missing",
        examples=["plan --device sm_80 --model resnet50", "plan --shape 256x56x56 --batch 64"],
    )
    made.add_argument(
        "--device",
        default="sm_90",
        metavar="GPU",
        help="compute capability and number of multiprocessors as sm_90:132, or sm_90 for the "
        "usual number; cuda or cuda:1 is a GPU of this machine (sm_90)",
    )
    made.add_argument("--batch", type=positive, default=32, metavar="N", help="samples (32)")
    made.add_argument(
        "--dtype", choices=DTYPE_NAMES, default="bfloat16", help="of the feature maps (bfloat16)"
    )
    made.add_argument("--layout", choices=LAYOUTS, help="only this memory format")
    made.add_argument("--pass", choices=PASSES, dest="pass_", help="only this pass")
    made.add_argument(
        "--model",
        choices=MODELS,
        nargs="+",
        metavar="MODEL",
        help=f"only the layers of these: {', '.join(MODELS)}",
    )
    made.add_argument(
        "--shape",
        type=shape,
        nargs="+",
        metavar="CxHxW",
        help="your own layers instead, such as 256x56x56; 0 to 3 spatial sizes",
    )
    made.add_argument(
        "--bandwidth",
        type=bandwidth,
        metavar="GB/S",
        help="of DRAM, for the modelled time (from the datasheet of the capability's usual GPU)",
    )
    made.add_argument("--json", action="store_true", help="one JSON document on standard output")
    return made


def bandwidth(text: str) -> float:
    """GB/s, finite and above 0."""
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not (math.isfinite(value) and value > 0):
        raise argparse.ArgumentTypeError(f"expected GB/s above 0, such as 4800, got {text!r}")
    return value


def shape(text: str) -> tuple[int, ...]:
    """The sizes of x without the batch: 256x56x56."""
    if not re.fullmatch(rf"[1-9][0-9]*(x[1-9][0-9]*){{0,{MAX_SPATIAL_DIMS}}}", text):
        raise argparse.ArgumentTypeError(
            f"expected channels and 0 to {MAX_SPATIAL_DIMS} spatial sizes from 1 up, "
            f"such as 256x56x56, got {text!r}"
        )
    return tuple(map(int, text.split("x")))


def datasheet(capability: int) -> tuple[str, float, float]:
    """The card assumed for a compute capability, its bandwidth in GB/s and its clock in GHz."""
    return DATASHEET[max(known for known in DATASHEET if known <= capability)]


def chosen(args: argparse.Namespace) -> list[tuple[str, list[tuple[int, ...]]]]:
    """The sections of the table: titles, and the shapes under each."""
    models = args.model or ([] if args.shape else MODELS)
    sections = [MODELS[name] for name in dict.fromkeys(models)]
    return [*sections, ("Your shapes", args.shape)] if args.shape else sections


def make_rows(args: argparse.Namespace, gigabytes: float, issue_rate: float) -> list[Row]:
    """The plans that the arguments ask for; raises ValueError if the planner refuses a shape."""
    dtype = DTYPE_NAMES[args.dtype]
    rows = []
    for title, shapes in chosen(args):
        for sizes in shapes:
            full = (args.batch, *sizes)
            for layout in [args.layout] if args.layout else LAYOUTS:
                for pass_ in [args.pass_] if args.pass_ else PASSES:
                    found = plan(
                        full,
                        dtype,
                        LAYOUTS[layout],
                        device=args.device,
                        backward=pass_ == "backward",
                    )
                    rows.append(
                        Row(
                            model=title,
                            shape=full,
                            k=adaptive_kernel_size(sizes[0]),
                            layout=layout,
                            pass_=pass_,
                            plan=found,
                            x_bytes=math.prod(full) * dtype.itemsize,
                            seconds=found.seconds(1e9 * gigabytes, issue_rate),
                        )
                    )
    return rows


def cells(row: Row) -> list[str]:
    """A row of the table, under HEAD."""
    p = row.plan
    return [
        "x".join(map(str, row.shape[1:])),
        str(row.k),
        LETTERS[row.layout],
        row.pass_,
        p.strategy if p.launches <= 2 else f"{p.strategy} x{p.launches}",
        str(p.tile),
        str(p.halo),
        str(p.threads),
        str(p.blocks),
        f"{p.shared_bytes / 1024:.1f}",
        str(p.occupancy),
        f"{p.dram_bytes / row.x_bytes:.2f}",
        f"{p.l2_bytes / row.x_bytes:.2f}",
        f"{row.instructions:.0f}",
        f"{1e6 * row.seconds:.3g}" if row.seconds < 1e-3 else f"{1e6 * row.seconds:.0f}",
    ]


def text(rows: Sequence[Row], where: str, source: str, stream: TextIO) -> str:
    """The meaning of the columns, and the table."""
    head, rule, *lines = table(HEAD, [cells(row) for row in rows], stream).split("\n")
    printed = [
        f"Modelled plans of the CUDA kernels: {where}.",
        "",
        "strategy: what a block keeps. In registers: rows (planes), runs of planes, columns of "
        "pixels, kept (a part of a",
        "  sample). Nothing: stream (one launch), two_pass (x97: 97 launches). The gradient of the "
        "taps takes one more launch.",
        "tile, halo: channels. blocks: per launch. KiB: shared memory per block. "
        "/SM: blocks per multiprocessor.",
        "DRAM/B, L2/B: modelled bytes of memory traffic over B, the bytes of x.",
        "instr: modelled instructions of warps for 512 bytes of x.",
        f"us: modelled, the DRAM bytes at {source}; a floor.",
        "  Where the instructions take longer: these, at six tenths of what the GPU can issue.",
        "",
        head,
        rule,
    ]
    title = ""
    for row, line in zip(rows, lines, strict=True):
        if row.model != title:
            title = row.model
            printed += ["", bold(title, stream)] if printed[-1] != rule else [bold(title, stream)]
        printed.append(line)
    return "\n".join(printed)


def document(row: Row) -> dict[str, Any]:
    """A row for JSON, sizes in bytes and times in seconds."""
    return {
        "model": row.model,
        "shape": row.shape,
        "kernel_size": row.k,
        "layout": row.layout,
        "pass": row.pass_,
        "x_bytes": row.x_bytes,
        **asdict(row.plan),
        "instructions_per_512_bytes": row.instructions,
        "seconds": row.seconds,
    }


def main(argv: Sequence[str]) -> int:
    """Print the plans.

    Returns:
        The exit status: 0, or 3 if the compiled planner is missing.

    Raises:
        SystemExit: 2 for bad arguments, 0 after --help.
    """
    options = parser()
    args = options.parse_args(argv)
    try:
        planner()
    except RuntimeError as error:
        print(f"error: {error}", file=sys.stderr)
        return PLANNER_MISSING
    try:
        gpu = gpu_limits(args.device)
    except (ValueError, RuntimeError) as error:
        options.error(f"--device: {error}")
    card, assumed, gigahertz = datasheet(gpu["capability"])
    issue_rate = gpu["multiprocessors"] * ISSUED * 1e9 * gigahertz
    gigabytes = args.bandwidth or assumed
    source = f"{gigabytes:g} GB/s" + ("" if args.bandwidth else f", assumed: datasheet of {card}")
    try:
        rows = make_rows(args, gigabytes, issue_rate)
    except ValueError as error:
        options.error(str(error))
    if args.json:
        found = {
            "modelled": True,
            "device": args.device,
            "gpu": gpu,
            "batch": args.batch,
            "dtype": args.dtype,
            "bandwidth": 1e9 * gigabytes,
            "issue_rate": issue_rate,
            "bandwidth_source": "argument" if args.bandwidth else f"assumed: datasheet of {card}",
            "plans": [document(row) for row in rows],
        }
        print(json.dumps(found, indent=2, allow_nan=False))
        return 0
    where = (
        f"{args.device}, {gpu['multiprocessors']} multiprocessors, batch {args.batch}, {args.dtype}"
    )
    print(text(rows, where, source, sys.stdout))
    return 0
