"""Attention after an activation in float64, under the names of csrc/eca.h."""

import torch
from torch import Tensor
from torch.nn import functional as F

FUNCTIONS = {
    "none": lambda v: v * 1,
    "relu": torch.relu,
    "silu": F.silu,
    "gelu": F.gelu,
    "hardswish": F.hardswish,
}


def spread(values: Tensor, x: Tensor) -> Tensor:
    """Values (C,) or (N, C) in the shape of a map."""
    return values.reshape(*values.shape, *(1,) * (x.dim() - 2))


def total(t: Tensor) -> Tensor:
    return t.flatten(2).sum(2) if t.dim() > 2 else t


class Exact:
    """What the operators compute, in float64, and the magnitudes of its terms."""

    def __init__(self, x: Tensor, channels: Tensor, activation: str) -> None:
        p, q, centre = (spread(c, x) for c in channels.double())
        self.from_centre = x.double() - centre
        v = (p * self.from_centre + q).requires_grad_()
        self.z = FUNCTIONS[activation](v)
        (self.slope,) = torch.autograd.grad(self.z, v, torch.ones_like(v))
        self.z, self.p = self.z.detach(), p
        self.v_terms = (p * self.from_centre).abs() + q.abs()

    def _sums(self, dy: Tensor, z: Tensor, slope: Tensor, from_centre: Tensor) -> Tensor:
        g = dy * slope
        terms = (dy * z, g, g * from_centre, slope, slope * from_centre)
        return torch.stack([total(t) for t in terms])

    def sums(self, dy: Tensor) -> Tensor:
        return self._sums(dy.double(), self.z, self.slope, self.from_centre)

    # No activation is steeper than 1.5, and no slope but those of ReLU and hard swish, where they
    # jump, steeper than 1.

    def sums_terms(self, dy: Tensor) -> Tensor:
        z, slope = 1.5 * self.v_terms, 1.5 + self.v_terms
        return self._sums(dy.double().abs(), z, slope, self.from_centre.abs())

    def _gradient(
        self,
        dy: Tensor,
        slope: Tensor,
        p: Tensor,
        from_centre: Tensor,
        planes: Tensor,
        channels: Tensor,
    ) -> Tensor:
        gate, shift, by_x, offset = (spread(k, dy) for k in (*planes, *channels))
        return p * (gate * dy + shift) * slope + by_x * from_centre + offset

    def gradient(self, dy: Tensor, planes: Tensor, channels: Tensor) -> Tensor:
        given = planes.double(), channels.double()
        return self._gradient(dy.double(), self.slope, self.p, self.from_centre, *given)

    def gradient_terms(self, dy: Tensor, planes: Tensor, channels: Tensor) -> Tensor:
        given = planes.double().abs(), channels.double().abs()
        slope, p, from_centre = 1.5 + self.v_terms, self.p.abs(), self.from_centre.abs()
        return self._gradient(dy.double().abs(), slope, p, from_centre, *given)
