"""Checks a contender's results against float64 before it is timed."""

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from eca_fused.cli.common.accuracy import floor, magnitudes
from lib.cases import DTYPES
from lib.contenders import Inputs, plain
from lib.devices import Recording

CHUNK = 1 << 24  # elements computed in float64 at a time
RETURNS = {
    "forward": ("y",),
    "backward": ("dx", "dweight"),
    "forward and backward": ("y", "dx", "dweight"),
}


def results(layer: Any, x: Tensor, weight: Tensor, dy: Tensor) -> tuple[Tensor, ...]:
    """y, dx and dweight."""
    x, weight = x.detach().clone().requires_grad_(), weight.detach().clone().requires_grad_()
    with torch.enable_grad():
        y = layer(x, weight)
        return y.detach(), *torch.autograd.grad(y, (x, weight), dy)


def chunks(n: int, elements: int) -> list[slice]:
    """Slices of n samples: each has one sample or at most CHUNK elements."""
    step = max(1, CHUNK // max(1, elements))
    return [slice(begin, begin + step) for begin in range(0, n, step)]


@dataclass
class Exact:
    """y, dx and dweight in float64, and the scales of the rounding errors of their sums."""

    values: dict[str, Tensor]
    magnitudes: dict[str, float]


def exact(x: Tensor, weight: Tensor, dy: Tensor) -> Exact:
    """Computed in parts, on the device of x: maps would take seconds to cross the bus."""
    y, dx = (torch.empty(x.shape, dtype=torch.float64, device=x.device) for _ in range(2))
    w = weight.double()
    dweight = torch.zeros_like(w)
    largest = {"y": 0.0, "dx": 0.0, "dweight": 0.0}
    for part in chunks(x.shape[0], x[0].numel()):
        v, g = x[part].double(), dy[part].double()
        y[part], dx[part], dw = results(plain, v, w, g)
        dweight += dw
        found = magnitudes(v, w, g, samples=x.shape[0])
        largest = {
            "y": max(largest["y"], found["y"]),
            "dx": max(largest["dx"], found["dx"]),
            "dweight": math.hypot(largest["dweight"], found["dw"]),
        }
    return Exact({"y": y, "dx": dx, "dweight": dweight}, largest)


def relative_error(got: Tensor, want: Tensor) -> float:
    """Largest error relative to the largest value; NaN where there is one."""
    off = largest = torch.zeros((), dtype=torch.float64, device=got.device)
    for part in chunks(got.shape[0], got[0].numel()):
        off = torch.maximum(off, (got[part].double() - want[part]).abs().max())
        largest = torch.maximum(largest, want[part].abs().max())
    return float(off / largest)


class Judge:
    """Knows the exact results for the first and the last input, and the allowed errors.

    A contender's error may be four times that of plain PyTorch in this dtype, plus the floor of
    accuracy.py. This allows another order of sums and roundings; a wrong formula is farther off.
    """

    def __init__(self, inputs: Inputs) -> None:
        self.wanted = {
            i: exact(inputs.xs[i], inputs.taps, inputs.dys[i])
            for i in dict.fromkeys((0, len(inputs.xs) - 1))
        }
        self.dtype = DTYPES[inputs.case.dtype]
        usual = results(plain, inputs.xs[0], inputs.taps, inputs.dys[0])
        first = self.wanted[0].values
        self.usual = {
            name: relative_error(got, first[name]) for name, got in zip(first, usual, strict=True)
        }

    def limit(self, name: str, wanted: Exact) -> float:
        """The error that a result may have, relative to its largest value."""
        scale = float(wanted.values[name].abs().max()) or 1.0
        return 4 * self.usual[name] + floor(self.dtype, wanted.magnitudes[name], scale)

    def faults(self, recording: Recording, direction: str) -> list[str]:
        """What the calls get wrong; their outputs are filled with NaN first."""
        recording.poison()
        recording.replay()
        wrong = []
        for i, wanted in self.wanted.items():
            for name, got in zip(RETURNS[direction], recording.outputs[i], strict=True):
                off = relative_error(got, wanted.values[name])
                limit = self.limit(name, wanted)
                if not off <= limit:
                    wrong.append(
                        f"{name} of input {i} has relative error {off:.2g}, allowed {limit:.2g}"
                    )
        recording.forget()
        return wrong
