"""Compares an ECA layer, plain and fused, with float64."""

import copy
import math
from dataclasses import dataclass

import torch
from torch import Tensor

from eca_fused.cli.common.accuracy import error, floor, magnitudes
from eca_fused.layer import ECALayer

__all__ = ["Comparison", "compare_layer"]

SEED = 1


@dataclass(frozen=True)
class Comparison:
    """Errors of one quantity against float64, relative to its largest absolute value.

    Attributes:
        place: "stage 1" to "stage 4", or "logits".
        quantity: "y", "dx" and "dw" of an ECA layer, or "output" of the network up to this place.
        scale: the largest absolute value in float64.
        plain, fused: largest absolute error, divided by scale.
        floor: error allowed beyond plain PyTorch's own error, divided by scale.
    """

    place: str
    quantity: str
    scale: float
    plain: float
    fused: float
    floor: float

    @property
    def tolerance(self) -> float:
        return self.plain + self.floor

    @property
    def passed(self) -> bool:
        return self.fused <= self.tolerance  # false for NaN

    @property
    def used(self) -> float:
        """The share of the tolerance that the fused error takes; above 1 if it fails."""
        if self.fused == 0:
            return 0.0
        share = self.fused / self.tolerance if self.tolerance else math.inf
        return math.inf if math.isnan(share) else share

    def __str__(self) -> str:
        what = f"{self.quantity} of the ECA layers" if self.quantity != "output" else "output"
        return (
            f"{self.place}, {what}: fused is {self.fused:.2g} of the largest value "
            f"({self.scale:.3g}) away from float64, {self.tolerance:.2g} is allowed, "
            f"and plain is {self.plain:.2g} away"
        )


def layer_results(layer: ECALayer, x: Tensor, dy: Tensor) -> dict[str, list[Tensor]]:
    """y (in inference and in training), dx and dw of a layer."""
    with torch.no_grad():
        y = layer(x)
    with torch.enable_grad():
        leaf = x.detach().requires_grad_()
        y_training = layer(leaf)
        dx, dw = torch.autograd.grad(y_training, (leaf, layer.conv.weight), dy)
    return {"y": [y, y_training.detach()], "dx": [dx], "dw": [dw]}


def compare_layer(place: str, plain: ECALayer, fused: ECALayer, x: Tensor) -> list[Comparison]:
    """y, dx and dw of one layer, for a map x (N, C, H, W) and a random gradient of y."""
    noise = torch.randn(x.shape, generator=torch.Generator().manual_seed(SEED))
    dy = torch.empty_like(x).copy_(noise)
    layer64, x64, dy64 = copy.deepcopy(plain).double(), x.double(), dy.double()
    exact = layer_results(layer64, x64, dy64)
    largest = magnitudes(x64, layer64.conv.weight, dy64, plain.padding_mode)
    usual, ours = layer_results(plain, x, dy), layer_results(fused, x, dy)
    found = []
    for name, (target, *_) in exact.items():
        scale = float(target.abs().max()) or 1.0
        found.append(
            Comparison(
                place,
                name,
                scale,
                plain=error(usual[name], target) / scale,
                fused=error(ours[name], target) / scale,
                floor=floor(x.dtype, largest[name], scale),
            )
        )
    return found
