"""What there is on this machine: versions, settings, GPUs, and the compiled parts."""

import ctypes
import importlib.metadata
import importlib.util
import os
import platform
import re
import shutil
import subprocess
import sys
import sysconfig
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from eca_fused._version import __version__
from eca_fused.cli.common.environment import commit, cpu_model
from eca_fused.ops import cuda_plan, native

__all__ = ["Compiled", "Gpus", "compiled", "cpu", "gpus", "settings", "software"]

PACKAGE = Path(__file__).resolve().parents[2]
# Variables that change what is built, found or chosen.
SETTINGS = (
    *("CUDA_HOME", "CUDA_VISIBLE_DEVICES", "CXX", "LD_LIBRARY_PATH", "LD_PRELOAD"),
    *("OMP_NUM_THREADS", "PYTHONPATH", "TORCH_CUDA_ARCH_LIST", "TRITON_INTERPRET"),
)


# ---- versions ----


def software() -> dict[str, str | None]:
    """Versions by name; None for what is not there."""
    cuda = torch.version.cuda
    return {
        "eca_fused": __version__,
        "commit": commit(),
        "folder": str(PACKAGE),
        "torch": torch.__version__,
        "torch_cuda": cuda,
        "torch_hip": torch.version.hip,
        "triton": triton(),
        "nvidia_driver": next(iter(_nvidia_smi("driver_version")), None),
        "driver_cuda": driver_cuda(),
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.release()} {platform.machine()}",
        "libc": " ".join(platform.libc_ver()).strip() or None,
        "compiler": compiler(),
        "nvcc": nvcc(),
    }


def triton() -> str | None:
    """Triton's version, without importing it; None if it is not installed."""
    if importlib.util.find_spec("triton") is None:
        return None
    owners = importlib.metadata.packages_distributions().get("triton", [])
    return importlib.metadata.version(owners[0]) if owners else "of unknown version"


def driver_cuda() -> str | None:
    """The newest CUDA that the driver can run, such as "13.0"; None without a driver."""
    number = ctypes.c_int()
    try:
        found = ctypes.CDLL("libcuda.so.1").cuDriverGetVersion(ctypes.byref(number))
    except (OSError, AttributeError):
        return None
    return f"{number.value // 1000}.{number.value % 1000 // 10}" if found == 0 else None


def compiler() -> str | None:
    """The C++ compiler that a build would take, with its version."""
    names = (os.environ.get("CXX"), sysconfig.get_config_var("CXX"), "c++", "g++", "clang++")
    commands = [name.split()[0] for name in names if name and name.strip()]
    found = next(filter(shutil.which, commands), None)
    if found is None:
        return None
    return (_output([found, "--version"]) or [found])[0]


def nvcc() -> str | None:
    """The version of the CUDA compiler on PATH."""
    found = re.search(r"release (\S+),", " ".join(_output(["nvcc", "--version"])))
    return found[1] if found else None


def settings() -> dict[str, str]:
    """The variables that are set."""
    ours = sorted(name for name in os.environ if name.startswith("ECA_FUSED_"))
    return {name: os.environ[name] for name in [*ours, *SETTINGS] if name in os.environ}


def _output(command: list[str]) -> list[str]:
    """The lines that a command prints; none if it fails, or takes longer than 10 seconds."""
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, errors="replace", check=False, timeout=10
        )
    except (OSError, subprocess.TimeoutExpired):
        return []
    lines = [line.strip() for line in done.stdout.splitlines() if line.strip()]
    return lines if done.returncode == 0 else []


def _nvidia_smi(column: str) -> list[str]:
    """A column of NVIDIA's own list of the GPUs, which needs no torch."""
    return _output(["nvidia-smi", f"--query-gpu={column}", "--format=csv,noheader"])


# ---- the machine ----


def cpu() -> dict[str, Any]:
    return {
        "model": cpu_model(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "torch_capability": torch.backends.cpu.get_cpu_capability(),
    }


@dataclass(frozen=True)
class Gpus:
    """The GPUs that torch can use, and those that it cannot.

    Attributes:
        usable: index, name, capability and so on of each.
        unseen: names of those that the driver lists, where torch can use none.
        hidden: CUDA_VISIBLE_DEVICES hides them.
        reason: why torch can use none.
    """

    usable: list[dict[str, Any]]
    unseen: list[str]
    hidden: bool
    reason: str


def gpus() -> Gpus:
    with warnings.catch_warnings(record=True) as seen:  # of a driver that is too old, say
        warnings.simplefilter("always")
        count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if count:
        return Gpus([_gpu(index) for index in range(count)], [], False, "")
    unseen = _nvidia_smi("name") or [path.name for path in Path("/dev").glob("nvidia[0-9]*")]
    hidden = os.environ.get("CUDA_VISIBLE_DEVICES") in ("", "-1")
    if torch.version.cuda is None:
        reason = "this torch was built without CUDA"
    else:
        reason = str(seen[0].message) if seen else _error_of_cuda()
    return Gpus([], unseen, hidden, reason.partition("\n")[0])


def _gpu(index: int) -> dict[str, Any]:
    properties = torch.cuda.get_device_properties(index)
    return {
        "index": index,
        "name": properties.name,
        "capability": f"{properties.major}.{properties.minor}",
        "multiprocessors": properties.multi_processor_count,
        "memory_bytes": properties.total_memory,
    }


def _error_of_cuda() -> str:
    """What starting CUDA says."""
    try:
        torch.cuda.init()  # type: ignore[no-untyped-call]
    except Exception as error:  # of any kind: torch's, the driver's, the dynamic linker's
        return str(error)
    return "torch finds no GPU"


# ---- the compiled parts ----


@dataclass(frozen=True)
class Compiled:
    """The library of the kernels, as it was loaded with the package, and the planner.

    Attributes:
        file: of the library; None without one.
        error: what loading it raised; None if it is loaded, or if there is no file.
        info: what it was compiled for; empty if it is not loaded.
        is_source: the package is in the folder of its sources.
        installed: where another copy of the package is installed that has the library.
        planner_error: what importing the planner raises; None if it is there.
    """

    file: str | None
    error: str | None
    info: native.BuildInfo
    is_source: bool
    installed: str | None
    planner_error: str | None = None

    @property
    def loaded(self) -> bool:
        return bool(self.info) and self.error is None


def compiled() -> Compiled:
    found = native.LIBRARY.is_file()
    root = PACKAGE.parent
    return Compiled(
        file=str(native.LIBRARY) if found else None,
        error=native.load_error if found else None,
        info=native.build_info,
        is_source=(root / "setup.py").is_file() and (root / "csrc").is_dir(),
        installed=_installed_elsewhere(),
        planner_error=_error_of_planner(),
    )


def _error_of_planner() -> str | None:
    try:
        cuda_plan.planner()
    except RuntimeError as error:
        return str(error)
    return None


def _installed_elsewhere() -> str | None:
    """The folder of another copy with the kernels: Python took the one in this folder."""
    for place in sys.path:
        folder = Path(place or ".").resolve() / "eca_fused"
        if folder != PACKAGE and (folder / native.LIBRARY.name).is_file():
            return str(folder)
    return None
