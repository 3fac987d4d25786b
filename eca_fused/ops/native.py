"""The native backend: loads the library of the kernels, or says why it is missing.

The library has the operators and no Python, so the same file serves every Python and every torch
from the oldest one on. This module implements the interface Kernels, see kernels.py.
"""

import functools
import json
import re
from typing import TYPE_CHECKING, TypedDict, cast

import torch

from eca_fused.ops import fakes, flops, gating_fakes, tail_fakes, writing
from eca_fused.ops.library import LIBRARY, load, operators, qualified
from eca_fused.torch_state import folded

if TYPE_CHECKING:
    from eca_fused._C import Gpu

__all__ = [
    "LIBRARY",
    "BuildInfo",
    "activated_sums",
    "backward",
    "batch_moments",
    "block_tail",
    "block_tail_backward",
    "build_info",
    "description",
    "devices",
    "force_plan",
    "forward",
    "gated",
    "gated_block",
    "gated_gradients",
    "gating_devices",
    "gpu_of_device",
    "inference",
    "inference_",
    "inference_into",
    "load_error",
    "missing",
    "moments",
    "name",
    "one_pass_gating_devices",
    "one_pass_tail_devices",
    "pool",
    "rescale",
    "rescale_backward",
    "tail",
    "tail_backward",
    "tail_coefficients",
    "tail_devices",
    "tail_gradient_coefficients",
    "tail_gradients",
    "tail_inference",
    "tail_sums",
    "tail_totals",
    "tail_training",
    "unsupported",
    "whole_tail_devices",
]


class BuildInfo(TypedDict, total=False):
    """What the library was built with and for. Empty if it does not load."""

    cpu_capability: str  # the instruction set of the CPU kernels in use
    cpu_capabilities: list[str]  # all that were compiled, the best first
    cuda_architectures: str  # compute capabilities, as in TORCH_CUDA_ARCH_LIST; "" without CUDA
    cuda_toolkit: str  # its version, such as "13.0"; "" without CUDA
    torch_abi: str  # the oldest torch that it loads in, such as "2.11"
    compiler: str  # of C++, with its version


def gpu_of_device(index: int) -> "Gpu":
    """The limits of a CUDA device of this machine."""
    names = (
        *("capability", "multiprocessors", "shared_per_block", "shared_per_multiprocessor"),
        *("l2", "threads_per_multiprocessor"),
    )
    limits = operators.gpu_of_device(index)
    return cast("Gpu", dict(zip(names, limits, strict=True)))


def force_plan(strategy: str | None, *, tile: int = 0, threads: int = 256, depth: int = 0) -> None:
    """Only for tuning and tests: run a plan instead of the planner's choice.

    Every later call of the CUDA kernels in this process uses it, until force_plan(None).

    Args:
        strategy: as Plan.strategy.
        tile: channels; 0 is as many as fit.
        threads: of a block.
        depth: vectors of a thread; 0 is as many as fit.

    Raises:
        RuntimeError: there is no such plan, or the library has no CUDA kernels.
    """
    if "cuda" not in devices:
        if strategy is None:
            return
        raise RuntimeError(
            "the extension was compiled without CUDA kernels, so no plan of them can be forced"
        )
    operators.force_plan(strategy or "", tile, threads, depth)


name = "native"
missing: str | None = None  # the reason why there are no native kernels
load_error: str | None = None  # what loading the library raised
build_info: BuildInfo = {}
devices: frozenset[str] = frozenset()  # device types that the extension was compiled for
tail_devices: frozenset[str] = frozenset()  # those with kernels for the tail of a block
one_pass_tail_devices: frozenset[str] = frozenset()  # those with block_tail()
whole_tail_devices: frozenset[str] = frozenset()  # those with tail_backward()
gating_devices: frozenset[str] = frozenset()  # those with kernels for attention after activations
one_pass_gating_devices: frozenset[str] = frozenset()  # those with gated_block()
description = ""
architectures = ""  # of CUDA: compute capabilities, as in TORCH_CUDA_ARCH_LIST; "" if not known

try:
    load()
    build_info = json.loads(operators.build_info())
    architectures = build_info["cuda_architectures"]
    devices = frozenset({"cpu", "cuda"} if architectures else {"cpu"})
    description = f"CPU ({build_info['cpu_capability']})" + (" and CUDA" if architectures else "")
    forward = operators.forward.default
    backward = operators.backward.default
    inference = operators.inference.default
    # The operators without the leading "_" also check gradients and count writes: see writing.py.
    inference_ = operators._inference_.default
    inference_into = operators._inference_into.default
    pool = operators.pool.default
    rescale = operators.rescale.default
    rescale_backward = operators.rescale_backward.default
    moments = operators.moments.default
    tail = operators.tail.default
    tail_sums = operators.tail_sums.default
    tail_gradients = operators.tail_gradients.default
    block_tail = operators.block_tail.default
    block_tail_backward = operators.block_tail_backward.default
    tail_inference = operators.tail_inference.default
    tail_training = operators.tail_training.default
    tail_backward = operators.tail_backward.default
    batch_moments = operators.batch_moments.default
    tail_coefficients = operators.tail_coefficients.default
    tail_totals = operators.tail_totals.default
    tail_gradient_coefficients = operators.tail_gradient_coefficients.default
    tail_devices = devices
    one_pass_tail_devices = whole_tail_devices = devices
    activated_sums = operators.activated_sums.default
    gated = operators.gated.default
    gated_gradients = operators.gated_gradients.default
    gated_block = operators.gated_block.default
    gating_devices = devices
    one_pass_gating_devices = frozenset({"cpu"})
except Exception as error:  # a broken build may fail in any way, and must not break the import
    devices = tail_devices = one_pass_tail_devices = whole_tail_devices = frozenset()
    gating_devices = one_pass_gating_devices = frozenset()
    reason = error.__cause__ or error  # torch's own error hides what the dynamic linker says
    load_error = f"{type(reason).__name__}: {reason}"
    if not LIBRARY.is_file():
        missing = (
            "this install has no compiled kernels; build them with `pip install .` in the source "
            "folder, which needs a C++ compiler"
        )
    elif "ECA_FUSED_" in load_error:  # a bad value of a setting: building again would not help
        missing = (
            f"the compiled extension does not start: {error}; unset the variable, or give it one "
            "of these values"
        )
    else:
        missing = (
            f"the compiled extension could not be loaded, or is another version's "
            f"({load_error}); build it with `pip install .` in the source folder"
        )

if missing is None:
    for _fakes in (fakes, tail_fakes, gating_fakes):
        for _operator in _fakes.__all__:
            torch.library.register_fake(qualified(_operator))(getattr(_fakes, _operator))
    writing.register("", inference_, inference_into)
    flops.register("")


def runs_on(capability: tuple[int, int], compiled: str) -> bool:
    """Whether code for these architectures runs on a GPU of this compute capability.

    Binary code runs on later GPUs of the same major version. PTX is compiled for any later GPU.
    Code for an architecture with a letter, as 9.0a, runs on that architecture alone.

    Args:
        capability: major and minor version.
        compiled: as in TORCH_CUDA_ARCH_LIST, for example "7.5;8.0;12.0+PTX" or "8.0 9.0". A name
            such as "Hopper" is assumed to run.
    """
    for architecture in re.split(r"[; ]+", compiled.strip()):
        number, _, ptx = architecture.partition("+")
        if not number[:1].isdigit():
            return True
        major, minor = (int(part) for part in number.rstrip("af").split("."))
        if (major, minor) == capability:
            return True
        earlier = number[-1] not in "af" and (major, minor) < capability
        if earlier and (ptx or major == capability[0]):
            return True
    return False


@functools.cache
def _gpu_unsupported(index: int) -> str | None:
    capability = torch.cuda.get_device_capability(index)
    if not architectures or runs_on(capability, architectures):
        return None
    return (
        f"the extension was compiled for GPUs of compute capability {architectures}, and this one "
        f"has {capability[0]}.{capability[1]}; build it with that in TORCH_CUDA_ARCH_LIST"
    )


@folded  # the answer never changes, so torch.compile may fold it
def unsupported(device: torch.device) -> str | None:
    """Why the extension cannot run on this device, or None."""
    if missing is not None:
        return missing
    if device.type not in devices:
        return f"the extension was compiled without kernels for {device.type}"
    if device.type == "cuda" and torch.cuda.is_available():
        index = torch.cuda.current_device() if device.index is None else device.index
        return _gpu_unsupported(index)
    return None
