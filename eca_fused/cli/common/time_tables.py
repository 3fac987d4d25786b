"""Times of ECA layers as text and as a document for JSON."""

from collections.abc import Sequence
from dataclasses import asdict
from textwrap import fill
from typing import Any, TextIO

from eca_fused.cli.common.console import table
from eca_fused.cli.common.measure import Contender, Spread, ratio
from eca_fused.cli.common.timing import Case

__all__ = [
    "NOTES",
    "WIDTH",
    "disturbance",
    "how_timed",
    "layers_table",
    "milliseconds",
    "missing_text",
    "times",
    "timing_document",
]

WIDTH = 98  # of the text, in characters
NOTICEABLE = 0.1  # share of the processors
NOTES = (
    "Times are medians. Ratios are medians over the rounds; above 1, fused is faster. A ?",
    "means that the rounds disagree on which is faster.",
    "plain: eager PyTorch. compiled: torch.compile of plain. copy: of the bytes that a layer must",
    "move at least (x and y; backward dy, x and dx). GB/s: these bytes over the time of fused.",
)


def milliseconds(contender: Contender | None) -> str:
    if contender is None:
        return ""
    spread = contender.spread
    return f"{1e3 * spread.median:.3g}" if spread else "-"


def times(contenders: dict[str, Contender], slower: str, faster: str = "fused") -> str:
    """How many times as fast, or "-" if one of them did not run."""
    if slower not in contenders or faster not in contenders:
        return ""
    spread = ratio(contenders[slower], contenders[faster])
    if spread is None:
        return "-"
    return f"{spread.median:.2f}x" + ("?" if spread.p20 <= 1 <= spread.p80 else " ")


def layers_table(cases: Sequence[Case], stream: TextIO) -> str:
    """The times of ECA layers, in milliseconds."""
    rows = [
        [
            f"{case.place} {'x'.join(map(str, case.shape))} {case.pass_}",
            *(milliseconds(case.contenders.get(n)) for n in ("plain", "compiled", "fused")),
            times(case.contenders, "plain"),
            times(case.contenders, "compiled"),
            times(case.contenders, "copy"),
            gigabytes(case),
        ]
        for case in cases
        if case.ideal_bytes is not None
    ]
    head = ["ECA layers, ms", "plain", "compiled", "fused", "vs plain", "vs comp."]
    head += ["vs copy", "GB/s"]
    return table(head, rows, stream)


def how_timed(found: dict[str, Any]) -> str:
    """How the times were taken, and the settings they depend on."""
    if found["device"] == "cuda":
        return "Timed by CUDA events around eager calls; maps rotate, so the layers find a cold L2."
    text = f"Timed by the clock in interleaved rounds, {found['threads']} threads, every result in "
    text += f"new memory, malloc: {found['malloc']}."
    if found["malloc"] == "default":
        text += (
            " With this malloc, results of tens of MB and more cost page faults, equally in every "
            "column; MALLOC_MMAP_MAX_=0 MALLOC_TRIM_THRESHOLD_=1099511627776 in the environment "
            "recycles the heap instead."
        )
    return text


def disturbance(cases: Sequence[Case]) -> list[str]:
    """A warning if the machine was not quiet during the rounds."""
    others = max((case.others or 0.0 for case in cases), default=0.0)
    if others < NOTICEABLE:
        return []
    return [
        f"Other programs took up to {100 * others:.0f} % of the processors during the rounds:",
        "neither times nor ratios are reliable.",
    ]


def gigabytes(case: Case) -> str:
    spread = case.contenders["fused"].spread
    return f"{case.ideal_bytes / spread.median / 1e9:.3g}" if spread and case.ideal_bytes else "-"


def missing_text(cases: Sequence[Case]) -> list[str]:
    """What could not be timed: a line for each reason, with all cases that it concerns."""
    reasons: dict[tuple[str, str], list[str]] = {}
    for case in cases:
        for name, contender in case.contenders.items():
            if contender.missing:
                what = reasons.setdefault((name, contender.missing), [])
                what.append(f"{case.place} {case.pass_}")
    lines = [f"Not timed: {name}, {', '.join(w)}: {why}" for (name, why), w in reasons.items()]
    return [fill(line, WIDTH, subsequent_indent="  ") for line in lines]


def timing_document(cases: Sequence[Case]) -> list[dict[str, Any]]:
    """The times for JSON: seconds of one call, and how many times as fast fused is."""

    def spread(values: Spread | None) -> dict[str, Any] | None:
        return asdict(values) if values else None

    return [
        {
            "place": case.place,
            "pass": case.pass_,
            "shape": case.shape,
            "ideal_bytes": case.ideal_bytes,
            "others_processor_share": case.others,
            "contenders": {
                name: {
                    "seconds": spread(contender.spread),
                    "missing": contender.missing or None,
                    "times_fused": spread(ratio(contender, case.contenders["fused"])),
                }
                for name, contender in case.contenders.items()
            },
        }
        for case in cases
    ]
