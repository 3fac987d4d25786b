"""`python -m eca_fused doctor` on the command line: text, JSON, exit status."""

import argparse
import contextlib
import faulthandler
import json
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass

import torch

from eca_fused.cli.common.console import bold, finite
from eca_fused.cli.common.options import Options
from eca_fused.cli.doctor import facts, text
from eca_fused.cli.doctor.choices import Choice, Finding, Off, choices, findings, off
from eca_fused.cli.doctor.self_test import Result, self_test, testable
from eca_fused.ops.backend import backends

__all__ = ["main"]

PROBLEMS = 1


@dataclass(frozen=True)
class Report:
    """All that was found before the self-test."""

    software: dict[str, str | None]
    settings: dict[str, str]
    cpu: dict[str, object]
    gpus: facts.Gpus
    compiled: facts.Compiled
    choices: list[Choice]
    off: list[Off]
    findings: list[Finding]


def parser() -> argparse.ArgumentParser:
    """The options of the command."""
    made = Options(
        "doctor",
        description="Show versions, GPUs, what the kernels were built for and which backend "
        "runs where, and test every backend that can run here against float64, for about two "
        "seconds. Triton's first run compiles, which takes longer. Send its output with a bug "
        "report.",
        status="0 if all that should run does, 1 if something does not, 2 for bad arguments",
        examples=["doctor", "doctor --json > doctor.json"],
    )
    made.add_argument("--json", action="store_true", help="one JSON document on standard output")
    return made


def collect() -> Report:
    module, gpus = facts.compiled(), facts.gpus()
    devices = devices_of(gpus)
    chosen, switched_off = choices(devices), off(devices, module)
    return Report(
        facts.software(),
        facts.settings(),
        facts.cpu(),
        gpus,
        module,
        chosen,
        switched_off,
        list(findings(module, gpus, chosen, switched_off)),
    )


def devices_of(gpus: facts.Gpus) -> list[torch.device]:
    return [torch.device("cpu"), *(torch.device("cuda", gpu["index"]) for gpu in gpus.usable)]


def tested(report: Report) -> Iterator[list[Result]]:
    """The results of each backend on each device, as they come."""
    for device, backend in testable(devices_of(report.gpus)):
        yield list(self_test(device, backend))


def failures(results: list[Result]) -> Iterator[Finding]:
    """A problem for each backend that fails on a device: the first failure, and their number."""
    failed = [result for result in results if not result.passed]
    if failed:
        first = failed[0]
        yield Finding(
            True,
            f"the self-test of {first.backend} on {first.device} fails {len(failed)} of "
            f"{len(results)} cases, first {text.case(first)}: {first.failure}",
            other_way(first),
        )


def other_way(failed: Result) -> str:
    if "ECA_FUSED_" in failed.failure:  # a wrong setting
        return "unset this variable"
    if failed.backend == "reference":
        return f"plain PyTorch itself is wrong on {failed.device}: check this install of torch"
    return (
        "set ECA_FUSED_BACKEND=reference, which does not use these kernels, and report this with "
        "the output of the command"
    )


def document(report: Report, results: list[Result], found: list[Finding]) -> dict[str, object]:
    """The report for JSON."""
    compiled = {**asdict(report.compiled), "loaded": report.compiled.loaded}
    return {
        "ok": not any(finding.problem for finding in found),
        "problems": [{"what": f.what, "fix": f.fix} for f in found if f.problem],
        "warnings": [{"what": f.what, "fix": f.fix} for f in found if not f.problem],
        "software": report.software,
        "settings": report.settings,
        "cpu": report.cpu,
        "gpus": asdict(report.gpus),
        "compiled": compiled,
        "choices": [asdict(one) for one in report.choices],
        "backends": {name: str(backend) for name, backend in backends().items()},
        "off": [asdict(one) for one in report.off],
        "self_test": [{**asdict(one), "passed": one.passed} for one in results],
    }


def main(argv: Sequence[str]) -> int:
    """Report what is there and whether it works.

    Returns:
        The exit status: 0, or 1 if something that should run does not.

    Raises:
        SystemExit: 2 for bad arguments, 0 after --help.
    """
    args = parser().parse_args(argv)
    with contextlib.suppress(ValueError, OSError):  # a closed stderr
        faulthandler.enable()  # where a backend ends the process, say in which call
    out = sys.stdout
    # Output of compilers and other packages must not get into the JSON document.
    with contextlib.redirect_stdout(sys.stderr):
        report = collect()
        if not args.json:  # before the self-test, which a broken build may end
            print(
                text.facts(
                    report.software, report.settings, report.cpu, report.gpus, report.compiled, out
                ),
                file=out,
            )
            print(text.backends(report.choices, report.off, out), file=out)
            print(
                bold("Self-test, forward and backward, against float64", out), file=out, flush=True
            )
        results: list[Result] = []
        found = list(report.findings)
        for of_backend in tested(report):
            results += of_backend
            found += failures(of_backend)
            if not args.json:
                print(text.tests(of_backend), file=out, flush=True)
    if args.json:
        print(json.dumps(finite(document(report, results, found)), indent=2, allow_nan=False))
    else:
        print(text.verdict(found, out))
    return PROBLEMS if any(finding.problem for finding in found) else 0
