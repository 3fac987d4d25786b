"""The passes of attention after an activation by Triton's operators, as gating_passes.py does."""

from typing import Any

import torch
from torch import Tensor

from eca_fused.ops import triton
from eca_fused.ops.gating import ACTIVATIONS
from eca_fused.ops.results import output_strides
from helpers.cases import DEVICE
from helpers.gpu_host import Outcome


class TritonGating:
    """Maps are (N, C, S). Results come back to the CPU, where the expected ones are."""

    def run(self, operation: str, x: Tensor, layout: str, **given: Any) -> Outcome:
        """A map, and sums (1 or 5, N, C): what was not written is NaN."""
        given = {k: v.to(DEVICE) if isinstance(v, Tensor) else v for k, v in given.items()}
        number = ACTIVATIONS.index(given.pop("activation"))
        result = getattr(self, f"_{operation}")(x.to(DEVICE), number, **given).cpu()
        nan = float("nan")
        if operation == "activated_sums":
            return Outcome((torch.full_like(x, nan), result), {})
        assert result.stride() == output_strides(x)
        return Outcome((result, torch.full((1, *x.shape[:2]), nan, device="cpu")), {})

    def _activated_sums(
        self,
        x: Tensor,
        number: int,
        channels: Tensor,
        dy: Tensor | None = None,
        for_norm: bool = False,
        **_: Any,
    ) -> Tensor:
        return triton.activated_sums(dy, x, channels, number, for_norm)

    def _gated(self, x: Tensor, number: int, planes: Tensor, channels: Tensor, **_: Any) -> Tensor:
        return triton.gated(x, planes[0], channels, number)

    def _gated_gradients(
        self,
        x: Tensor,
        number: int,
        dy: Tensor,
        planes: Tensor,
        channels: Tensor,
        gradient_channels: Tensor,
        by_x: bool,
    ) -> Tensor:
        return triton.gated_gradients(dy, x, planes, channels, gradient_channels, number, by_x)
