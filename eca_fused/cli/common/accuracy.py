"""How far from float64 a result of ECA may be: the floor that no implementation can avoid."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from eca_fused import reference

__all__ = ["error", "floor", "magnitudes"]

UNITS = 8  # sum, mean, taps, sigmoid and product round about once each, forward and backward


def error(values: Sequence[Tensor], exact: Tensor) -> float:
    """The largest absolute difference of any of the values; NaN where there is one."""
    return float(torch.stack([(v.double() - exact).abs().max() for v in values]).max())


def floor(dtype: torch.dtype, magnitude: float, scale: float) -> float:
    """The error that rounding alone makes, divided by the largest absolute value of the result.

    Args:
        dtype: of x and of the result. Sums are in float32, or in float64 for float64.
        magnitude: of the terms of its sums, see magnitudes().
        scale: the largest absolute value of the result.

    Returns:
        Half a unit in the last place of dtype, and UNITS of the sums' dtype.
    """
    sums = torch.finfo(torch.promote_types(dtype, torch.float32)).eps
    return torch.finfo(dtype).eps / 2 + UNITS * sums * magnitude / scale


def magnitudes(
    x: Tensor, weight: Tensor, dy: Tensor, padding_mode: str = "zeros", samples: int | None = None
) -> dict[str, float]:
    """What the rounding of the sums in y, dx and dw is relative to.

    The terms of a sum that cancels are larger than the sum, and so are their roundings. These are
    as often up as down, so terms count in quadrature. dw comes out of two long sums, over pixels
    and over planes, where the roundings of a running sum make a random walk: half the square root
    of the number of terms, in units.

    Args:
        x, dy: (N, C, H, W) in float64.
        weight: (1, 1, k) in float64.
        padding_mode: "zeros" or "circular".
        samples: of the whole batch, where x is a part of it. The dw of the parts then add up in
            quadrature.
    """
    planes, pixels = (samples or x.shape[0]) * x.shape[1], x[0, 0].numel()
    mean2 = x.mean((2, 3)).square().requires_grad_()  # (N, C)
    w2 = weight.detach().square().requires_grad_()
    dz2 = (dy * x).square().sum((2, 3)) / 16  # dz = a (1 - a) sum(dy x), and a (1 - a) <= 1 / 4
    with torch.enable_grad():
        z = reference.convolve(mean2, w2, padding_mode)
        dm2, dw2 = torch.autograd.grad(z, (mean2, w2), dz2)
    dx = dy.abs().max() + dm2.sqrt().max() / pixels
    walk = 1 + (math.sqrt(planes) + math.sqrt(pixels)) / 2 / UNITS
    return {"y": float(x.abs().max()), "dx": float(dx), "dw": float(dw2.sqrt().max()) * walk}
