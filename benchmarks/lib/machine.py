"""The machine of a measurement: what a result depends on."""

import os
import platform
import subprocess
import time
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch

import eca_fused
from eca_fused.cli.common.environment import commit, cpu_model
from lib.devices import Device, DryRun
from lib.script import recycles_heap


def machine(device: Device) -> dict[str, Any]:
    """What a result depends on, for the result file."""
    found = {
        "device": device.kind,
        "dry_run": isinstance(device, DryRun),
        "cpu": cpu_model(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "kernels": eca_fused.backends()["native"].detail,
        "malloc": "recycled" if recycles_heap() else "default",
        "python": platform.python_version(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "eca_fused": eca_fused.__version__,
        # A copy of the source with no history, or with an older one, can be told its commit.
        "commit": os.environ.get("ECA_FUSED_COMMIT") or commit() or "unknown",
        "date": time.strftime("%Y-%m-%d"),
    }
    return found | gpu() if device.kind == "cuda" and not found["dry_run"] else found


def gpu() -> dict[str, Any]:
    """What a result on the current GPU depends on beside machine()."""
    properties = torch.cuda.get_device_properties(torch.cuda.current_device())
    try:
        triton = version("triton")
    except PackageNotFoundError:
        triton = None
    return {
        "gpu": properties.name,
        "capability": f"{properties.major}.{properties.minor}",
        "multiprocessors": properties.multi_processor_count,
        "l2_bytes": properties.L2_cache_size,
        "memory_bytes": properties.total_memory,
        "triton": triton,
        "tf32": torch.backends.cudnn.allow_tf32,
        **gpu_state(),
    }


def gpu_state() -> dict[str, str]:
    """Driver, clocks, temperature and power, only read; empty where nvidia-smi does not run."""
    fields = ["driver_version", "clocks.sm", "clocks.mem", "temperature.gpu", "power.draw"]
    command = [
        "nvidia-smi",
        "-i",
        f"GPU-{torch.cuda.get_device_properties(torch.cuda.current_device()).uuid}",
        f"--query-gpu={','.join(fields)}",
        "--format=csv,noheader",
    ]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True)
    except (OSError, subprocess.SubprocessError):
        return {}
    values = [value.strip() for value in done.stdout.strip().split(",")]
    return dict(zip(("driver", *fields[1:]), values, strict=False))
