"""The result of the main job as text and as a document for JSON."""

from collections.abc import Sequence
from dataclasses import asdict
from textwrap import fill
from typing import Any, TextIO

from eca_fused.cli.common.comparison import Comparison
from eca_fused.cli.common.console import bold, table
from eca_fused.cli.common.time_tables import (
    NOTES,
    WIDTH,
    disturbance,
    layers_table,
    milliseconds,
    missing_text,
    times,
)
from eca_fused.cli.common.timing import Case
from eca_fused.cli.demo.comparison import Check

__all__ = ["check_document", "check_text", "timing_text"]

RULE = (
    "Largest error against float64, relative to the largest value. Allowed: the error of plain,\n"
    "plus a floor. For an ECA layer, on the same map in both forms, the floor is half a unit in\n"
    "the last place of the dtype for the result, eight units of the sums' dtype for the steps\n"
    "inside, and for dw the random walk of a running sum, half a unit times the root of its\n"
    "length. For the network it is twice the change in plain if every gate moves by one unit in\n"
    "the last place."
)


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


def timing_text(cases: Sequence[Case], where: str, stream: TextIO) -> str:
    """The tables of the times, with the missing entries and why they are missing."""
    lines = [bold("Times", stream), fill(where, WIDTH), "", layers_table(cases, stream), ""]

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
        *NOTES,
        "both: torch.compile of fused.",
        *disturbance(cases),
    ]
    return "\n".join([*lines, *missing_text(cases)])


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
