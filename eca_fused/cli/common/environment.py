"""The machine, versions and settings that the numbers of a run depend on."""

import os
import platform
import re
import subprocess
from pathlib import Path
from typing import Any

import torch

from eca_fused._version import __version__
from eca_fused.ops import native
from eca_fused.ops.backend import backends, select

__all__ = ["describe", "fused_kernels", "summary"]


def cpu_model() -> str:
    """The processor's name as the system reports it."""
    try:
        names = re.findall(r"^model name\s*: (.*)$", Path("/proc/cpuinfo").read_text(), re.M)
    except OSError:
        names = []
    return names[0] if names else platform.processor() or platform.machine()


def commit() -> str | None:
    """The commit of the source that runs, with "-dirty" for local changes; None if installed."""
    root = Path(__file__).resolve().parents[3]
    if not (root / ".git").exists():
        return None
    command = ["git", "-C", str(root), "describe", "--always", "--dirty", "--abbrev=12"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    except OSError:
        return None
    return done.stdout.strip() or None


def malloc() -> str:
    """The settings of the C library's malloc, which the time of large new outputs depends on."""
    names = ("MALLOC_MMAP_MAX_", "MALLOC_TRIM_THRESHOLD_", "MALLOC_TOP_PAD_", "GLIBC_TUNABLES")
    settings = [f"{name}={os.environ[name]}" for name in names if name in os.environ]
    if "malloc" in os.environ.get("LD_PRELOAD", ""):
        settings.append(f"LD_PRELOAD={os.environ['LD_PRELOAD']}")
    return " ".join(settings) or "default"


def fused_kernels(device: torch.device, dtype: torch.dtype) -> str:
    """The kernels that the fused ECA runs on, or why it runs in plain PyTorch."""
    kernels = select(torch.empty(1, 1, device=device, dtype=dtype), "auto")
    if kernels is None:
        chosen = os.environ.get("ECA_FUSED_BACKEND", "auto")
        why = native.missing or f"there are no kernels for {device.type} here"
        if chosen != "auto":
            why = f"ECA_FUSED_BACKEND={chosen}"
        return f"plain PyTorch, as {why}"
    return f"kernels of {kernels.name}, {getattr(kernels, 'description', '')}".rstrip(", ")


def describe(device: torch.device, dtype: torch.dtype) -> dict[str, Any]:
    """The environment of a run, ready for JSON."""
    found: dict[str, Any] = {
        "device": device.type,
        "cpu": cpu_model(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "malloc": malloc(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "eca_fused": __version__,
        "commit": commit(),
        "fused": fused_kernels(device, dtype),
        "backends": {name: str(backend) for name, backend in backends().items()},
    }
    if device.type == "cuda":
        cudnn: Any = torch.backends.cudnn
        properties = torch.cuda.get_device_properties(device)
        found |= {
            "gpu": properties.name,
            "gpu_l2_bytes": properties.L2_cache_size,
            "cuda": torch.version.cuda,
            "cudnn": cudnn.version(),
            "tf32_convolutions": cudnn.allow_tf32,
        }
    return found


def summary(environment: dict[str, Any]) -> str:
    """The device and the software in one line, for the pictures."""
    if environment["device"] == "cuda":
        where = f"{environment['gpu']}, CUDA {environment['cuda']}"
    else:
        setting = "default" if environment["malloc"] == "default" else "set"
        where = f"{environment['cpu']}, {environment['threads']} threads, malloc {setting}"
    return f"{where}, PyTorch {environment['torch']}"
