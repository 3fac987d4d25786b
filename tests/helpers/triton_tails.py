"""The passes of a residual block's tail by Triton's operators, as tail_passes.py calls them."""

from typing import Any

import torch
from torch import Tensor

from eca_fused.ops import triton
from eca_fused.ops.checks import ACTIVATIONS
from eca_fused.ops.results import mask_bytes
from helpers.cases import DEVICE
from helpers.gpu_host import Outcome


class TritonPasses:
    """Maps are (N, C, S). Results come back to the CPU, where the expected ones are."""

    def run(self, operation: str, x: Tensor, layout: str, **given: Any) -> Outcome:
        given = {k: v.to(DEVICE) if isinstance(v, Tensor) else v for k, v in given.items()}
        results = getattr(self, f"_{operation}")(x.to(DEVICE), layout, **given)
        results = [None if t is None else t.cpu() for t in results]
        first, second, mask, sums = results
        nothing = torch.full_like(x, float("nan"))
        some = torch.full((3, *x.shape[:2]), float("nan"), dtype=torch.float64, device="cpu")
        if sums is not None:
            some[: len(sums)] = sums
        return Outcome(
            (
                nothing if first is None else first,
                nothing if second is None else second,
                torch.full((1,), 255, device="cpu") if mask is None else mask,
                some,
            ),
            {},
        )

    def _moments(self, x: Tensor, layout: str) -> list[Tensor | None]:
        return [None, None, None, triton.moments(x)]

    def _tail(
        self,
        x: Tensor,
        layout: str,
        identity: Tensor | None,
        want_mask: bool,
        planes: Tensor,
        channels: Tensor,
        activation: str,
    ) -> list[Tensor | None]:
        number = ACTIVATIONS.index(activation)
        y, mask = triton.tail(x, identity, planes, channels, number, want_mask)
        if not want_mask:
            assert mask.numel() == 0
            return [y, None, None, None]
        size = mask_bytes(x, layout == "contiguous")
        assert not mask[size:].any()
        return [y, None, mask[:size], None]

    def _tail_sums(
        self,
        x: Tensor,
        layout: str,
        identity: Tensor | None,
        dy: Tensor,
        mask: Tensor,
        identity_sum: bool,
        planes: Tensor,
        channels: Tensor,
        activation: str,
    ) -> list[Tensor | None]:
        bits, number = whole_mask(mask, x, activation), ACTIVATIONS.index(activation)
        maps = dy, x, identity, bits
        return [None] * 3 + [triton.tail_sums(*maps, planes, channels, number, identity_sum)]

    def _tail_gradients(
        self,
        x: Tensor,
        layout: str,
        identity: Tensor | None,
        dy: Tensor,
        mask: Tensor,
        gradient_planes: Tensor,
        gradient_channels: Tensor,
        by: tuple[bool, bool],
        wants: tuple[bool, bool],
        planes: Tensor,
        channels: Tensor,
        activation: str,
    ) -> list[Tensor | None]:
        bits, number = whole_mask(mask, x, activation), ACTIVATIONS.index(activation)
        given = planes, channels, gradient_planes, gradient_channels, number
        found = triton.tail_gradients(dy, x, identity, bits, *given, *by, *wants)
        maps = [t if want else None for t, want in zip(found, wants, strict=True)]
        for t, want in zip(found, wants, strict=True):
            assert want or t.numel() == 0
        return [*maps, None, None]


def whole_mask(mask: Tensor, x: Tensor, activation: str) -> Tensor:
    """A mask with the bytes that the other layout would need, as the operators take it."""
    if activation != "relu":
        return mask[:0]
    size = max(mask_bytes(x, True), mask_bytes(x, False))
    return torch.nn.functional.pad(mask, (0, size - mask.numel()))
