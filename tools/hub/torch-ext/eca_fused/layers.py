"""Layers for kernelize(): each has a forward for modules of another library, and no state.

kernelize() puts the forward on the modules it finds, so `self` is one of theirs. A layer may have
no constructor, no methods and no members but those that say what it supports.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .functional import eca, pool, rescale
from .functional.convolution import by_calling, plain_taps

__all__ = ["CecaModule", "ECALayer", "EcaModule"]


def _attend(x: Tensor, conv: nn.Module, padding_mode: str) -> Tensor:
    """ECA with the taps of a convolution. One with hooks, a bias or a wrapper is called."""
    taps = plain_taps(conv, False, True)
    if taps is None:
        return by_calling(x, conv, padding_mode, "auto", False)
    return eca(x, taps, padding_mode=padding_mode)


def _is_sigmoid(gate: nn.Module) -> bool:
    """Whether it is torch's sigmoid or timm's, which compute the same."""
    return type(gate).__name__ == "Sigmoid"


class ECALayer(nn.Module):
    """For the eca_layer of ECA-Net's authors."""

    can_torch_compile: bool = True
    conv: nn.Conv1d

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return _attend(x, self.conv, "zeros")


class EcaModule(nn.Module):
    """For timm's EcaModule. With other gates, pooling and rescaling are fused."""

    can_torch_compile: bool = True
    conv: nn.Conv1d
    act: nn.Module | None
    conv2: nn.Conv1d | None
    gate: nn.Module

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.conv2 is None and _is_sigmoid(self.gate):
            return _attend(x, self.conv, "zeros")
        y = self.conv(pool(x).unsqueeze(1))
        if self.conv2 is not None:
            y = self.conv2(self.act(y))
        return rescale(x, self.gate(y).squeeze(1))


class CecaModule(nn.Module):
    """For timm's CecaModule, whose convolution wraps around at the first and last channel."""

    can_torch_compile: bool = True
    conv: nn.Conv1d
    gate: nn.Module
    padding: int

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if _is_sigmoid(self.gate):
            return _attend(x, self.conv, "circular")
        around = F.pad(pool(x).unsqueeze(1), (self.padding, self.padding), mode="circular")
        return rescale(x, self.gate(self.conv(around)).squeeze(1))
