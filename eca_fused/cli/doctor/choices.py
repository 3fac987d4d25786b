"""Who computes on each device, why the others do not, and what would make them."""

import os
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import product

import torch

from eca_fused.cli.doctor.facts import Compiled, Gpus
from eca_fused.ops import native
from eca_fused.ops.backend import backends, select
from eca_fused.ops.checks import DTYPES

__all__ = ["LAYOUTS", "Choice", "Finding", "Off", "choices", "findings", "off"]

LAYOUTS = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}
BUILD = "`pip install .` in the source folder"
PLAIN = "reference"

# What the dynamic linker says of a file, what this means, and the fix.
LINKER = (
    ("undefined symbol", "it was built for another torch", f"build it for this torch: {BUILD}"),
    (
        "GLIBC",
        "it was built on a system with newer libraries than this one",
        f"build it on this system: {BUILD}",
    ),
    (
        "cannot open shared object",
        "a library that it needs is missing",
        f"install that library, or build the kernels anew: {BUILD}",
    ),
    ("invalid ELF header", "the file is damaged", f"install the package again, or {BUILD}"),
    ("file too short", "the file is damaged", f"install the package again, or {BUILD}"),
    ("wrong ELF class", "it was built for another kind of machine", f"build it here: {BUILD}"),
)


@dataclass(frozen=True)
class Finding:
    """What is not as it should be, or what a user should know.

    Attributes:
        problem: something that should run does not; a warning otherwise.
        what: it.
        fix: what to do.
    """

    problem: bool
    what: str
    fix: str


@dataclass(frozen=True)
class Choice:
    """The backends that "auto" takes for maps of one kind; `error` if it takes none.

    norm_act stands for NormActAttention. "reference" there means that its modules are called.
    """

    device: str
    dtype: str
    layout: str
    eca: str = ""
    residual_tail: str = ""
    norm_act: str = ""
    error: str = ""


@dataclass(frozen=True)
class Off:
    """A backend that does not run on a device, and what would make it run; "" if nothing need."""

    device: str
    backend: str
    reason: str
    fix: str


# ---- who computes ----


def choices(devices: list[torch.device]) -> list[Choice]:
    """For each device, dtype and memory layout."""
    return [
        choice(device, dtype, layout) for device, dtype, layout in product(devices, DTYPES, LAYOUTS)
    ]


def choice(device: torch.device, dtype: torch.dtype, layout: str) -> Choice:
    named = str(device), str(dtype).removeprefix("torch."), layout
    try:
        x = torch.empty(1, 2, 2, 2, device=device, dtype=dtype)
        with warnings.catch_warnings():  # a fallback warns once, which the report says anyway
            warnings.simplefilter("ignore")
            kernels = select(x.contiguous(memory_format=LAYOUTS[layout]), "auto")
    except Exception as error:  # a wrong setting; a GPU that does not answer, in any way
        return Choice(*named, error=str(error).partition("\n")[0])
    if kernels is None:
        return Choice(*named, PLAIN, PLAIN, PLAIN)
    kind = device.type
    return Choice(
        *named,
        kernels.name,
        kernels.name if kind in kernels.tail_devices else PLAIN,
        kernels.name if kind in kernels.gating_devices else PLAIN,
    )


def off(devices: list[torch.device], module: Compiled) -> list[Off]:
    """The backends that run on none of a device's maps."""
    found = []
    triton = backends()["triton"]
    for device in devices:
        if reason := native.unsupported(device):
            if native.missing is not None:  # the same for every device
                reason, fix = missing_module(module)
            else:
                fix = _fix_for(device)
            found.append(Off(str(device), "native", reason, fix))
        if device.type not in (triton.devices or ()):
            on_gpus = "its kernels run on GPUs only"
            reason = on_gpus if triton or device.type == "cpu" else triton.detail
            found.append(Off(str(device), "triton", reason, _fix_of_triton(device)))
    return found


def _fix_of_triton(device: torch.device) -> str:
    if device.type == "cpu":
        return ""
    return f"install the Triton that belongs to torch {torch.__version__}"


def _fix_for(device: torch.device) -> str:
    """What makes the library have kernels for a GPU."""
    if device.type not in native.devices:
        return f"`ECA_FUSED_CUDA=1 {BUILD.removeprefix('`')}"
    major, minor = torch.cuda.get_device_capability(device)
    return f"`TORCH_CUDA_ARCH_LIST={major}.{minor} ECA_FUSED_CUDA=1 {BUILD.removeprefix('`')}"


def missing_module(module: Compiled) -> tuple[str, str]:
    """Why there are no compiled kernels, and the fix."""
    error = native.load_error or ""
    if module.error is not None and "ECA_FUSED_" in error:
        return f"the compiled kernels do not start: {error}", "unset this variable"
    if module.file:
        meaning, fix = _linkers(error)
        return f"the compiled kernels do not load, as {meaning}: {error}", fix
    if module.installed:
        return (
            "Python imported the sources in this folder, which have no compiled kernels",
            f"start Python in another folder, so that it finds {module.installed}",
        )
    if module.is_source:
        return (
            "the sources in this folder have no compiled kernels",
            "`make build` compiles it here; or `pip install .`, and start Python in another folder",
        )
    return (
        "this install has no compiled kernels: it was built with ECA_FUSED_NATIVE=0 or without a "
        "C++ compiler",
        f"{BUILD}, with a C++ compiler and without ECA_FUSED_NATIVE=0",
    )


def _linkers(error: str) -> tuple[str, str]:
    for sign, meaning, fix in LINKER:
        if sign in error:
            return meaning, fix
    return "it is broken, or another version's", f"build it anew: {BUILD}"


# ---- what is wrong ----


def findings(
    module: Compiled, gpus: Gpus, chosen: list[Choice], switched_off: list[Off]
) -> Iterator[Finding]:
    """Problems and warnings; what the self-test finds comes on top."""
    if native.missing is not None:
        reason, fix = missing_module(module)
        without = "NO COMPILED KERNELS, so CPUs run the slower plain PyTorch"
        yield Finding(module.file is not None, f"{without}: {reason}", fix)
    elif module.planner_error:
        what, _, fix = module.planner_error.rpartition("; ")
        yield Finding(False, f"plan() does not work: {what}", fix)
    if gpus.unseen and not gpus.hidden:
        names = ", ".join(gpus.unseen)
        yield Finding(True, f"torch cannot use the GPU ({names}): {gpus.reason}", _for_torch(gpus))
    wanted = os.environ.get("ECA_FUSED_BACKEND") or "auto"
    for message in dict.fromkeys(one.error for one in chosen if one.error):
        devices = dict.fromkeys(one.device for one in chosen if one.error == message)
        setting = "ECA_FUSED_BACKEND" in message
        fix = (
            "unset ECA_FUSED_BACKEND" if setting else "check the GPU with another program of torch"
        )
        yield Finding(True, f"nothing runs on {', '.join(devices)}: {message}", fix)
    if wanted in ("triton", PLAIN):
        what = f"ECA_FUSED_BACKEND={wanted} replaces the backend that would be chosen"
        yield Finding(False, what, "unset ECA_FUSED_BACKEND")
    if wanted == PLAIN:
        return
    for device in dict.fromkeys(one.device for one in chosen if one.device != "cpu"):
        taken = {one.eca for one in chosen if one.device == device}
        reasons = {one.backend: one for one in switched_off if one.device == device}
        if PLAIN in taken:
            what = f"{device} runs plain PyTorch, which is slower, as no backend has kernels for it"
            yield Finding(True, what, _first_fix(reasons))
        elif taken == {"triton"} and wanted == "auto" and native.missing is None:
            what = f"{device} runs the Triton kernels: {reasons['native'].reason}"
            yield Finding(False, what, reasons["native"].fix)


def _first_fix(reasons: dict[str, Off]) -> str:
    fixes = [reasons[name].fix for name in ("native", "triton") if name in reasons]
    return "; or ".join(fix for fix in fixes if fix)


def _for_torch(gpus: Gpus) -> str:
    if torch.version.cuda is None:
        return "install a torch with CUDA: `pip install torch` has it on Linux"
    return "update the driver, or install a torch for its CUDA version; see pytorch.org"
