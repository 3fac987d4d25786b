"""The result of the main job as text and as a document for JSON."""

from collections.abc import Sequence
from dataclasses import asdict
from textwrap import fill
from typing import Any, TextIO

from eca_fused.cli.common.console import bold, table
from eca_fused.cli.common.measure import Contender, Spread, ratio
from eca_fused.cli.demo.comparison import Check, Comparison
from eca_fused.cli.demo.timing import Case

__all__ = ["check_document", "check_text", "timing_document", "timing_text"]

RULE = (
    "Largest error against float64, relative to the largest value. Allowed: the error of plain,\n"
    "plus a floor. For an ECA layer, on the same map in both forms, the floor is half a unit in\n"
    "the last place of the dtype for the result, eight units of the sums' dtype for the steps\n"
    "inside, and for dw the random walk of a running sum, half a unit times the root of its\n"
    "length. For the network it is twice the change in plain if every gate moves by one unit in\n"
    "the last place."
)


WIDTH = 98  # of the text, in characters
NOTICEABLE = 0.1  # share of the processors


def check_text(check: Check, stream: TextIO) -> str:
    """The tables of the check, and what failed."""
    rows = [
        [
            f"{c.place}, {'ECA ' + c.quantity if c.quantity != 'output' else 'network'}",
            f"{c.plain:.1e}",
            f"{c.fused:.1e}",
            f"{c.tolerance:.1e}",
            "yes" if c.passed else "NO",
        ]
        for c in (*check.layers, *check.stages)
    ]
    lines = [
        bold("Check", stream),
        table(["", "plain", "fused", "allowed", "within"], rows, stream),
        "",
        RULE,
        "",
        *(f"Top-5 of {t.photograph}: {t.verdict}, classes {t.fused}" for t in check.top5),
    ]
    lines += [f"FAILED: {failure}" for failure in check.failures] or ["The check passed."]
    return "\n".join(lines)


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


def timing_text(cases: Sequence[Case], where: str, stream: TextIO) -> str:
    """The tables of the times, with the missing entries and why they are missing."""
    layers = [case for case in cases if case.ideal_bytes is not None]
    rows = [
        [
            f"{case.place} {'x'.join(map(str, case.shape))} {case.pass_}",
            *(milliseconds(case.contenders.get(n)) for n in ("copy", "plain", "compiled", "fused")),
            times(case.contenders, "plain"),
            times(case.contenders, "compiled"),
            gigabytes(case),
        ]
        for case in layers
    ]
    head = ["ECA layers, ms", "copy", "plain", "compiled", "fused", "vs plain", "vs comp.", "GB/s"]
    lines = [bold("Times", stream), fill(where, WIDTH), "", table(head, rows, stream), ""]

    both = "fused, compiled"
    rows = [
        [
            f"{case.place} {'x'.join(map(str, case.shape))} {case.pass_}",
            *(milliseconds(case.contenders.get(n)) for n in ("plain", "compiled", "fused", both)),
            times(case.contenders, "plain"),
            times(case.contenders, "compiled"),
            times(case.contenders, "compiled", both),
        ]
        for case in cases
        if case.ideal_bytes is None
    ]
    head = ["ECA-ResNet-50, ms", "plain", "compiled", "fused", "both", "vs plain", "vs comp."]
    lines += [table([*head, "both vs comp."], rows, stream), ""]
    lines += [
        "Times are medians. Ratios are medians over the rounds; above 1, fused is faster. A ?",
        "means that the rounds disagree on which is faster.",
        "plain: eager PyTorch. compiled: torch.compile of plain. both: torch.compile of fused.",
        "GB/s: the least that fused must move (x and y; backward dy, x and dx) over its time.",
        *disturbance(cases),
    ]
    return "\n".join([*lines, *missing_text(cases)])


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


def check_document(check: Check) -> dict[str, Any]:
    """The check for JSON."""

    def comparison(c: Comparison) -> dict[str, Any]:
        return asdict(c) | {"tolerance": c.tolerance, "passed": c.passed}

    return {
        "passed": check.passed,
        "failures": check.failures,
        "rule": RULE.replace("\n", " "),
        "layers": [comparison(c) for c in check.layers],
        "network": [comparison(c) for c in check.stages],
        "top5": [asdict(t) | {"verdict": t.verdict, "passed": t.passed} for t in check.top5],
    }


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
