"""Tails with ECA's gate by Triton's operators, as block_tails.py calls them."""

from typing import Any

import torch
from torch import Tensor

from eca_fused.ops import triton
from eca_fused.ops.checks import ACTIVATIONS
from eca_fused.ops.results import mask_bytes
from helpers.cases import DEVICE
from helpers.gpu_host import Outcome


class TritonBlockTails:
    """Maps are (N, C, S). Results come back to the CPU, where the expected ones are."""

    def run_block(
        self,
        x: Tensor,
        identity: Tensor | None,
        weight: Tensor,
        scale: Tensor,
        channels: Tensor,
        layout: str,
        activation: str,
        circular: bool,
        dy: Tensor | None = None,
        saved: tuple[Tensor, ...] | None = None,
        want_mask: bool = False,
        identity_sum: bool = False,
        wants: tuple[bool, ...] = (True, True, True),
    ) -> Outcome:
        rows = channels[[2, 0, 1, 3, 4, 5]]  # the operator's has the shift first
        there = [t if t is None else t.to(DEVICE) for t in (x, identity, weight, scale, rows)]
        rest = circular, ACTIVATIONS.index(activation)
        size = mask_bytes(x, layout == "contiguous")
        results: Any
        if dy is None:
            y, mask, *found = triton.block_tail(*there, *rest, want_mask)
            assert not mask[size:].any()
            results = y, mask[:size] if want_mask else torch.full((size,), 255), *found
        else:
            assert saved is not None, "the forward pass's results"
            bits = saved[0] if activation == "relu" else saved[0][:0]
            # The operator's mask is as long as either layout needs.
            whole = torch.zeros(max(mask_bytes(x, True), mask_bytes(x, False)), dtype=torch.uint8)
            whole[: len(bits)] = bits
            mask = whole if activation == "relu" else bits
            kept = [t.to(DEVICE) for t in (mask, *saved[1:])]
            dx, d_identity, sums, dmean, dweight = triton.block_tail_backward(
                *(dy.to(DEVICE), *there[:2], kept[0], *there[2:], *kept[1:], *rest),
                *(identity_sum, *wants),
            )
            found = {"dx": dx, "d_identity": d_identity, "dweight": dweight}
            for (name, t), wanted in zip(found.items(), wants, strict=True):
                if not wanted:
                    assert t.numel() == 0, name
                    found[name] = torch.full((1,), float("nan"))
            results = found["dx"], found["d_identity"], sums, dmean, found["dweight"]
        return Outcome(tuple(t.cpu() for t in results), {})
