"""Runs the CUDA kernels of attention after an activation on the CPU: see gpu_host.py."""

import json
import struct
from typing import Any

import torch
from torch import Tensor

from eca_fused.ops.gating import ACTIVATIONS
from helpers.gpu_host import DTYPES, Outcome, View, in_shape, like, raw, view
from helpers.gpu_host_tails import PassGpu

OPERATIONS = ["activated_sums", "gated", "gated_gradients"]


class GatingGpu(PassGpu):
    """Maps are (N, C, S), coefficients as in csrc/gated_ops.cpp."""

    family = "gated"
    calls = (
        ("run_activated_sums", "const ActivatedSums&, const TailSumPlan&"),
        ("run_gated", "const Gated&, const TailPlan&"),
        ("run_gated_gradients", "const GatedGradients&, const TailPlan&"),
    )

    def run(
        self,
        operation: str,
        x: Tensor,
        layout: str,
        *,
        planes: Tensor,
        channels: Tensor,
        gradient_channels: Tensor,
        dy: Tensor | None = None,
        activation: str = "none",
        for_norm: bool = False,
        by_x: bool = False,
        seed: int = 1,
        count: bool = False,
        multiprocessors: int = 132,
        misplaced: int = 0,
    ) -> Outcome:
        """A map, and sums (1 or 5, N, C): what was not written is NaN."""
        last = layout != "contiguous"
        n, c, s = x.shape
        none = View(x[:0], 0, 0, 0)
        out = like(x, last)
        maps = [view(x, last), none if dy is None else view(dy, last), out]
        numbers: list[Any] = [
            OPERATIONS.index(operation), DTYPES.index(x.dtype), last, n, c, s,
            ACTIVATIONS.index(activation), dy is not None, for_norm, by_x, seed, count,
            multiprocessors, misplaced,
        ]  # fmt: skip
        for v in maps:
            numbers += v.fields()
        request = struct.pack(f"{len(numbers)}q", *map(int, numbers))
        request += b"".join(raw(v.memory) for v in maps[:2])
        for t, shape in ((planes, (2, n, c)), (channels, (3, c)), (gradient_channels, (2, c))):
            assert t.shape == shape
            request += raw(torch.zeros(misplaced, dtype=t.dtype)) + raw(t)
        self.call(request)
        status = self.text()
        assert status == "ok", status
        plan, traffic = json.loads(self.text()), json.loads(self.text())
        result = in_shape(self.tensor(out.memory), out, x, last)
        kinds = 5 if for_norm else 1
        sums = self.tensor(torch.empty(kinds * n * c, dtype=torch.float64)).reshape(kinds, n, c)
        return Outcome((result, sums), plan, traffic)
