"""The CUDA planner's choice for a layer."""

import importlib
from typing import Any

import torch

from eca_fused.ops import native
from lib.cases import Case


def planner() -> Any:
    return importlib.import_module("eca_fused._C")


def gpu_limits() -> Any:
    """Limits of the current GPU, or of an H200 if there is none."""
    if torch.cuda.is_available():
        return native.gpu_of_device(torch.cuda.current_device())
    return planner().gpu_by_name("sm_90:132")


def plan_of(
    case: Case, backward: bool, forced: Any = None, limits: Any = None
) -> dict[str, Any] | str:
    """The planner's choice, or a forced plan; or why there is none."""
    try:
        n, c, h, w = case.shape
        made: dict[str, Any] = planner().plan(
            backward=backward, dtype=case.dtype, channels_last=case.layout == "channels_last",
            samples=n, channels=c, pixels=h * w, kernel_size=case.k, own_taps=False,
            circular=False, aligned=True, in_place=False, gpu=limits or gpu_limits(), forced=forced,
        )  # fmt: skip
    except Exception as reason:
        return f"{type(reason).__name__}: {reason}"
    return made
