"""The report as text of at most 100 columns."""

import textwrap
from collections.abc import Sequence
from typing import Any, TextIO

from eca_fused.cli.common.console import bold
from eca_fused.cli.doctor.choices import Choice, Finding, Off
from eca_fused.cli.doctor.facts import Compiled, Gpus
from eca_fused.cli.doctor.self_test import Result

__all__ = ["backends", "case", "facts", "tests", "verdict"]

WIDTH = 96
LABEL = 12  # columns of the names on the left
OPERATIONS = {"eca": "eca()", "residual_tail": "ResidualTail", "norm_act": "NormActAttention"}
PLAIN = {"reference": "plain PyTorch"}
SHOWN = 2  # cases that fail in the same way


def line(label: str, value: str, indent: int = 2) -> str:
    """A name and what it stands for, whose further lines begin under the first."""
    first = " " * indent + label.ljust(LABEL)
    if not first.endswith(" "):
        first += " "
    return textwrap.fill(
        value,
        WIDTH,
        initial_indent=first,
        subsequent_indent=" " * (indent + LABEL),
        break_long_words=False,
        break_on_hyphens=False,
    )


# ---- what there is ----


def facts(
    software: dict[str, str | None],
    settings: dict[str, str],
    cpu: dict[str, Any],
    gpus: Gpus,
    compiled: Compiled,
    stream: TextIO,
) -> str:
    return "\n".join(
        [
            bold("Versions", stream),
            *versions(software),
            *(
                [line("variables", ", ".join(f"{k}={v}" for k, v in settings.items()))]
                * bool(settings)
            ),
            "",
            bold("Machine", stream),
            *machine(cpu, gpus),
            "",
            bold("Compiled kernels", stream),
            *module(compiled),
            "",
        ]
    )


def versions(software: dict[str, str | None]) -> list[str]:
    s = software
    commit = f", commit {s['commit']}" if s["commit"] else ""
    built = f"built for CUDA {s['torch_cuda']}" if s["torch_cuda"] else "built without CUDA"
    if s["torch_hip"]:
        built = f"built for ROCm {s['torch_hip']}"
    driver = s["nvidia_driver"] or ("version not known" if s["driver_cuda"] else "none")
    runs = f", runs CUDA up to {s['driver_cuda']}" if s["driver_cuda"] else ""
    return [
        line("eca_fused", f"{s['eca_fused']}{commit}, in {s['folder']}"),
        line("torch", f"{s['torch']}, {built}"),
        line("Triton", s["triton"] or "not installed"),
        line("NVIDIA driver", f"{driver}{runs}"),
        line("Python", str(s["python"])),
        line("system", ", ".join(part for part in (s["system"], s["libc"]) if part)),
        line("compiler", s["compiler"] or "none"),
        line("nvcc", s["nvcc"] or "none on PATH"),
    ]


def machine(cpu: dict[str, Any], gpus: Gpus) -> list[str]:
    found = [
        line(
            "CPU",
            f"{cpu['model']}, {cpu['cores']} cores, {cpu['threads']} threads, "
            f"torch uses {cpu['torch_capability']}",
        )
    ]
    found += [
        line(
            f"cuda:{gpu['index']}",
            f"{gpu['name']}, compute capability {gpu['capability']}, "
            f"{gpu['multiprocessors']} multiprocessors, {gpu['memory_bytes'] / 2**30:.0f} GiB",
        )
        for gpu in gpus.usable
    ]
    if gpus.unseen:
        why = (
            "hidden by CUDA_VISIBLE_DEVICES"
            if gpus.hidden
            else f"torch cannot use it: {gpus.reason}"
        )
        found += [line("GPU", f"{name}; {why}") for name in gpus.unseen]
    elif not gpus.usable:
        found.append(line("GPU", "none"))
    return found


def module(compiled: Compiled) -> list[str]:
    if not compiled.file:
        return [line("file", "none")]
    found = [line("file", compiled.file)]
    if not compiled.loaded:
        return [*found, line("NOT LOADED", compiled.error or "")]
    info = compiled.info
    every = ", ".join(info["cpu_capabilities"])
    found.append(line("CPU", f"compiled for {every}; in use: {info['cpu_capability']}"))
    if info["cuda_architectures"]:
        found.append(line("CUDA", f"compute capabilities {info['cuda_architectures']}"))
        found.append(line("toolkit", f"CUDA {info['cuda_toolkit']}"))
    else:
        found.append(line("CUDA", "compiled without CUDA kernels"))
    abi = info["torch_abi"]
    found.append(line("torch ABI", f"stable, of torch {abi}: loads in {abi} and later"))
    found.append(line("compiler", info["compiler"]))
    found.append(line("planner", "NOT LOADED" if compiled.planner_error else "loaded"))
    return found


# ---- who computes ----


def backends(choices: Sequence[Choice], off: Sequence[Off], stream: TextIO) -> str:
    """For each device what runs, and what does not."""
    found = [bold('Which backend runs (backend="auto")', stream)]
    for device in dict.fromkeys(one.device for one in choices):
        of_device = [one for one in choices if one.device == device]
        texts = dict.fromkeys(runs(one) for one in of_device)
        for what in texts:
            kinds = [one for one in of_device if runs(one) == what]
            where = "every dtype and layout"
            if len(kinds) < len(of_device):
                where = ", ".join(f"{one.dtype} {one.layout}" for one in kinds)
            found.append(line(device, what if kinds[0].error else f"{what}, in {where}"))
        for one in off:
            if one.device == device:
                fix = f". Fix: {one.fix}" if one.fix else ""
                found.append(line("", f"{one.backend} is off: {one.reason}{fix}"))
    return "\n".join([*found, ""])


def runs(one: Choice) -> str:
    """The backend of each operation, those of one backend together."""
    if one.error:
        return f"NOTHING RUNS: {one.error}"
    names = {"eca": one.eca, "residual_tail": one.residual_tail, "norm_act": one.norm_act}
    return "; ".join(
        f"{PLAIN.get(backend, backend)} for "
        + ", ".join(OPERATIONS[name] for name, its in names.items() if its == backend)
        for backend in dict.fromkeys(names.values())
    )


# ---- the self-test ----


def case(result: Result) -> str:
    return f"{result.operation} {result.dtype} {result.layout}"


def tests(results: Sequence[Result]) -> str:
    """A line for a backend on a device, and one for each failure."""
    first = results[0]
    seconds = sum(result.seconds for result in results)
    failed = [result for result in results if not result.passed]
    label = f"{first.device} {first.backend}".ljust(LABEL + 8)
    if not failed:
        worst = max(result.used for result in results)
        return (
            f"  {label}passed, {len(results)} cases, error at most {worst:.2f} of what is allowed "
            f"({seconds:.1f} s)"
        )
    lines = [f"  {label}FAILED, {len(failed)} of {len(results)} cases ({seconds:.1f} s)"]
    for failure in dict.fromkeys(one.failure for one in failed):
        alike = [case(one) for one in failed if one.failure == failure]
        more = f" and {len(alike) - SHOWN} more" if len(alike) > SHOWN else ""
        lines.append(line("", f"{', '.join(alike[:SHOWN])}{more}: {failure}"))
    return "\n".join(lines)


# ---- the verdict ----


def verdict(found: Sequence[Finding], stream: TextIO) -> str:
    """Problems and warnings with their fixes, and one last line."""
    lines = [""]
    for problem, title in ((True, "PROBLEM"), (False, "WARNING")):
        for one in found:
            if one.problem == problem:
                lines.append(bold(line(title, one.what, indent=0), stream))
                lines.append(line("  fix", one.fix, indent=0))
    problems = sum(one.problem for one in found)
    warnings = len(found) - problems
    if not found:
        lines.append("No problems: all that should run here does.")
    else:
        counts = [f"{problems} problem{'s' * (problems != 1)}"] if problems else ["No problems"]
        counts += [f"{warnings} warning{'s' * (warnings != 1)}"] * bool(warnings)
        lines.append(", ".join(counts) + ".")
    return "\n".join(lines)
