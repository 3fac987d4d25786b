"""`python -m eca_fused tables`: parameters and FLOPs beside the figures of ECA-Net's poster."""

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from eca_fused import attention
from eca_fused.cli.common.console import table
from eca_fused.cli.common.options import Options
from eca_fused.cli.tables.count import MMDETECTION, count_flops, count_parameters
from eca_fused.cli.tables.published import (
    BACKBONES,
    DETECTOR_DEPTH,
    DETECTOR_TOLERANCE,
    DETECTORS,
    MEGA,
    METHODS,
    MOBILENET_TOLERANCE,
    RESNET_TOLERANCE,
    Backbone,
    Detector,
    Method,
)

__all__ = ["main"]

FORMATS = ("text", "markdown", "json")
WIDTHS = (256, 512, 1024, 2048)  # C of ResNet-50's four stages
DETECTOR_INPUT = (1, 3, 800, 1280)
MILLION, BILLION = 10**6, 10**9  # M and G for detectors
OUTSIDE = 1
CHECKED = {True: "yes", False: "NO", None: "not held"}

ABOUT = (
    "Counted here, beside the figures of the ECA-Net poster (CVPR 2020). Accuracy is as reported "
    "there, in %:\nnothing of it was measured here."
)
METHOD_HEAD = [
    *("method", "attention", "parameters", f"reported, C={WIDTHS[0]}", "counted", "difference"),
    *("agrees", "Top-1 reported", "Top-5 reported"),
]
BACKBONE_HEAD = [
    *("backbone", "method", "M reported", "counted", "difference"),
    *("FLOPs reported", "counted", "difference", "agrees", "Top-1 reported", "Top-5 reported"),
]
DETECTOR_HEAD = [
    *("detector", "method", "M reported", "counted", "difference"),
    *("GFLOPs reported", "counted", "difference", "agrees", "AP reported"),
]
UNITS = (
    "M is 2^20 parameters; FLOPs are multiply-adds at 224x224 as thop counts them, in 2^30 (G) or "
    "2^20 (M).\nParameters must agree in every printed digit, FLOPs within "
    f"{100 * RESNET_TOLERANCE:g} % (ResNets) or {100 * MOBILENET_TOLERANCE:g} % (MobileNetV2)."
)
DETECTOR_UNITS = (
    f"Detectors on MS-COCO, on ResNet-{DETECTOR_DEPTH}. M is 10^6 trainable parameters: the "
    "ResNet's stem and first stage are frozen,\nthe parameters of batch norms are not; the R-CNNs "
    "have 81 classes, with the background, RetinaNet 80.\nGFLOPs are 10^9 multiply-adds at "
    "1280x800 as MMDetection 1 counts them, on 1000 regions, 100 for masks.\nParameters must "
    f"agree in every printed digit, GFLOPs within {100 * DETECTOR_TOLERANCE:g} %."
)


@dataclass(frozen=True)
class MethodRow:
    """A method, and the parameters of one module of it."""

    published: Method
    counted: dict[int, int]  # parameters by C
    agrees: bool

    @property
    def difference(self) -> int:
        """The largest difference at any width."""
        return max((n - self.published.parameters(c) for c, n in self.counted.items()), key=abs)


@dataclass(frozen=True)
class BackboneRow:
    """A network and its counted parameters and FLOPs."""

    published: Backbone
    parameters: int
    flops: int
    agrees: bool | None  # None if the row is not held to a tolerance

    @property
    def parameters_difference(self) -> float:
        """In the poster's unit."""
        return self.parameters / MEGA - float(self.published.parameters)

    @property
    def flops_difference(self) -> float:
        """Relative to the poster's."""
        return self.flops / self.published.flops_unit / float(self.published.flops) - 1


@dataclass(frozen=True)
class DetectorRow:
    """A detector and its counted parameters and FLOPs, or why they were not counted."""

    published: Detector
    parameters: int = 0  # trainable ones
    flops: int = 0
    missing: str = ""

    @property
    def parameters_difference(self) -> float:
        """In the poster's unit."""
        return self.parameters / MILLION - float(self.published.parameters)

    @property
    def flops_difference(self) -> float:
        """Relative to the poster's."""
        return self.flops / BILLION / float(self.published.flops) - 1

    @property
    def agrees(self) -> bool | None:
        """None if nothing was counted."""
        if self.missing:
            return None
        printed = self.published.parameters
        same = f"{self.parameters / MILLION:.{_digits(printed)}f}" == printed
        return same and abs(self.flops_difference) <= DETECTOR_TOLERANCE


def count_method(published: Method) -> MethodRow:
    """The parameters of one module of a method, for each of WIDTHS."""
    sized = attention.METHODS[published.name].sized
    options: dict[str, Any] = {"kernel_size": 3} if sized else {}
    counted = {
        c: count_parameters(attention.make(published.name, c, device="meta", **options))
        for c in WIDTHS
    }
    return MethodRow(published, counted, all(published.parameters(c) == counted[c] for c in WIDTHS))


def count_backbone(published: Backbone) -> BackboneRow:
    """The parameters and FLOPs of a network."""
    model = published.build()
    parameters, flops = count_parameters(model), count_flops(model)
    row = BackboneRow(published, parameters, flops, None)
    if not published.held:
        return row
    digits = _digits(published.parameters)
    same = f"{parameters / MEGA:.{digits}f}" == published.parameters
    near = abs(row.flops_difference) <= published.tolerance
    return BackboneRow(published, parameters, flops, same and near)


def count_detector(published: Detector) -> DetectorRow:
    """The trainable parameters and the FLOPs of a detector."""
    try:
        model, counted = published.build()
    except ImportError as error:
        return DetectorRow(published, missing=f"not counted: {error}")
    flops = count_flops(counted, DETECTOR_INPUT, MMDETECTION)
    return DetectorRow(published, count_parameters(model, trainable=True), flops)


def _digits(printed: str) -> int:
    return len(printed.partition(".")[2])


def _signed(value: float, digits: int) -> str:
    """The number with a sign, but without one if it rounds to zero."""
    return f"{value:+.{digits}f}" if round(value, digits) else f"{0:.{digits}f}"


def method_cells(row: MethodRow) -> list[str]:
    """A row under METHOD_HEAD."""
    p = row.published
    return [
        attention.METHODS[p.name].title,
        p.gate,
        p.formula,
        str(p.parameters(WIDTHS[0])),
        str(row.counted[WIDTHS[0]]),
        str(row.difference),
        CHECKED[row.agrees],
        p.top1,
        p.top5,
    ]


def backbone_cells(row: BackboneRow, mark: str = "") -> list[str]:
    """A row under BACKBONE_HEAD, its method with the mark of its note."""
    p = row.published
    unit = "M" if p.depth is None else "G"
    parameter_digits, flop_digits = _digits(p.parameters), _digits(p.flops)
    return [
        p.network,
        p.method + mark,
        p.parameters,
        f"{row.parameters / MEGA:.{parameter_digits}f}",
        _signed(row.parameters_difference, parameter_digits),
        f"{p.flops} {unit}",
        f"{row.flops / p.flops_unit:.{flop_digits}f} {unit}",
        f"{_signed(100 * row.flops_difference, 2)} %",
        CHECKED[row.agrees],
        p.top1,
        p.top5,
    ]


def detector_cells(row: DetectorRow, mark: str = "") -> list[str]:
    """A row under DETECTOR_HEAD, its method with the mark of its note."""
    p = row.published
    digits, flop_digits = _digits(p.parameters), _digits(p.flops)
    parameters = [
        f"{row.parameters / MILLION:.{digits}f}",
        _signed(row.parameters_difference, digits),
    ]
    flops = [
        f"{row.flops / BILLION:.{flop_digits}f}",
        f"{_signed(100 * row.flops_difference, 3)} %",
    ]
    agrees = CHECKED[row.agrees]
    if row.missing:
        parameters, flops, agrees = ["-", "-"], ["-", "-"], "-"
    return [p.title, p.method + mark, p.parameters, *parameters, p.flops, *flops, agrees, p.ap]


def markdown(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table in Markdown."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in lines)


def document(
    methods: Sequence[MethodRow],
    backbones: Sequence[BackboneRow],
    detectors: Sequence[DetectorRow],
) -> dict[str, Any]:
    """The rows for JSON, parameters and FLOPs as plain numbers."""
    return {
        "accuracy": "as reported, not measured here",
        "methods": [
            {
                "method": row.published.name,
                "formula": row.published.formula,
                "parameters": row.counted,
                "parameters_reported": {c: row.published.parameters(c) for c in row.counted},
                "agrees": row.agrees,
                "top1_reported": float(row.published.top1),
                "top5_reported": float(row.published.top5),
            }
            for row in methods
        ],
        "backbones": [
            {
                "backbone": row.published.network,
                "method": row.published.method,
                "parameters": row.parameters,
                "parameters_reported": float(row.published.parameters) * MEGA,
                "flops": row.flops,
                "flops_reported": float(row.published.flops) * row.published.flops_unit,
                "flops_difference": row.flops_difference,
                "agrees": row.agrees,
                "note": row.published.note,
                "top1_reported": float(row.published.top1),
                "top5_reported": float(row.published.top5),
            }
            for row in backbones
        ],
        "detectors": [
            {
                "detector": row.published.title,
                "backbone": f"ResNet-{DETECTOR_DEPTH}",
                "method": row.published.method,
                "parameters": None if row.missing else row.parameters,
                "parameters_reported": float(row.published.parameters) * MILLION,
                "flops": None if row.missing else row.flops,
                "flops_reported": float(row.published.flops) * BILLION,
                "flops_difference": None if row.missing else row.flops_difference,
                "agrees": row.agrees,
                "note": row.missing or row.published.note,
                "ap_reported": float(row.published.ap),
            }
            for row in detectors
        ],
    }


def show(
    methods: Sequence[MethodRow],
    backbones: Sequence[BackboneRow],
    detectors: Sequence[DetectorRow],
    in_markdown: bool,
) -> None:
    """Print the tables and their notes."""
    backbone_notes = [row.published.note for row in backbones]
    detector_notes = [row.missing or row.published.note for row in detectors]
    found = [note for note in dict.fromkeys((*backbone_notes, *detector_notes)) if note]

    def marked(rows: Sequence[Any], notes: Sequence[str], cells: Any) -> list[list[str]]:
        marks = [f" [{found.index(note) + 1}]" if note else "" for note in notes]
        return [cells(*pair) for pair in zip(rows, marks, strict=True)]

    def block(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
        return markdown(head, rows) if in_markdown else table(head, rows, sys.stdout)

    print(ABOUT, end="\n\n")
    print(block(METHOD_HEAD, [method_cells(row) for row in methods]), end="\n\n")
    print(UNITS, end="\n\n")
    print(block(BACKBONE_HEAD, marked(backbones, backbone_notes, backbone_cells)), end="\n\n")
    print(DETECTOR_UNITS, end="\n\n")
    print(block(DETECTOR_HEAD, marked(detectors, detector_notes, detector_cells)), end="\n\n")
    print("\n".join(f"[{i}] {note}." for i, note in enumerate(found, 1)))


def parser() -> argparse.ArgumentParser:
    """The options of the command."""
    made = Options(
        "tables",
        description="Print the parameters and FLOPs of every row of the ECA-Net poster's tables of "
        "methods, of ImageNet backbones and of detectors beside the poster's figures. Accuracy is "
        "printed as reported, never as measured here.",
        status="0, 1 if a figure is outside its tolerance, 2 for bad arguments",
        examples=["tables", "tables --format markdown > tables.md"],
    )
    made.add_argument("--format", choices=FORMATS, default="text", help="of the output (text)")
    return made


def main(argv: Sequence[str]) -> int:
    """Print the tables.

    Returns:
        The exit status: 0, or 1 if a figure is outside its tolerance.

    Raises:
        SystemExit: 2 for bad arguments, 0 after --help.
    """
    args = parser().parse_args(argv)
    methods = [count_method(row) for row in METHODS]
    backbones = [count_backbone(row) for row in BACKBONES]
    detectors = [count_detector(row) for row in DETECTORS]
    if args.format == "json":
        print(json.dumps(document(methods, backbones, detectors), indent=2, allow_nan=False))
    else:
        show(methods, backbones, detectors, in_markdown=args.format == "markdown")
    agree: list[bool | None] = [row.agrees for row in methods]
    agree += [row.agrees for row in backbones] + [row.agrees for row in detectors]
    wrong = agree.count(False)
    if wrong:
        print(f"error: {wrong} rows are outside their tolerance: agrees is NO", file=sys.stderr)
        return OUTSIDE
    return 0
