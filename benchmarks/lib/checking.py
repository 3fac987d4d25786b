"""Whether what a contender computes is right: against float64, before it is timed."""

from typing import Any

import torch
from cases import DTYPES
from contenders import Inputs, plain
from devices import Recording
from torch import Tensor

import eca_fused

CHUNK = 1 << 24  # elements that are computed in float64 at a time
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
    """Runs of samples, of n with so many elements each."""
    step = max(1, CHUNK // max(1, elements))
    return [slice(begin, begin + step) for begin in range(0, n, step)]


def exact(x: Tensor, weight: Tensor, dy: Tensor) -> dict[str, Tensor]:
    """y, dx and dweight in float64, and `terms`: the sum of the absolute values in dweight.

    On the device of x: the maps of one layer and contender would take seconds to cross the bus.
    """
    y, dx = (torch.empty(x.shape, dtype=torch.float64, device=x.device) for _ in range(2))
    w = weight.double()
    dweight, terms = torch.zeros_like(w), torch.zeros_like(w)
    for part in chunks(x.shape[0], x[0].numel()):
        v, g = x[part].double(), dy[part].double()
        y[part], dx[part], dw = results(plain, v, w, g)
        dweight += dw
        taps = w.clone().requires_grad_()
        dz = (g * v).abs().sum((2, 3)) / 4  # a (1 - a) <= 1 / 4
        with torch.enable_grad():
            z = eca_fused.reference.convolve(v.abs().mean((2, 3)), taps)
        terms += torch.autograd.grad(z, taps, dz)[0]
    return {"y": y, "dx": dx, "dweight": dweight, "terms": terms}


def error(got: Tensor, want: Tensor) -> float:
    """Largest error relative to the largest value; NaN where there is one."""
    off = largest = torch.zeros((), dtype=torch.float64, device=got.device)
    for part in chunks(got.shape[0], got[0].numel()):
        off = torch.maximum(off, (got[part].double() - want[part]).abs().max())
        largest = torch.maximum(largest, want[part].abs().max())
    return float(off / largest)


class Judge:
    """Knows the results for the first and the last of the inputs, and what error they may have.

    As good as plain PyTorch in this dtype, but for the order of its sums. The gradient of the taps
    is a sum of many numbers of either sign: it keeps the rounding errors of its terms, however
    small it is, so that one form may come close to it by luck and another may not. Those of
    different planes are independent, so that they grow as the root of the number of planes.
    """

    def __init__(self, inputs: Inputs) -> None:
        self.wanted = {
            i: exact(inputs.xs[i], inputs.taps, inputs.dys[i])
            for i in dict.fromkeys((0, len(inputs.xs) - 1))
        }
        usual = results(plain, inputs.xs[0], inputs.taps, inputs.dys[0])
        eps = torch.finfo(DTYPES[inputs.case.dtype]).eps
        self.allowed = {
            name: 4 * (error(got, self.wanted[0][name]) + eps)
            for name, got in zip(("y", "dx", "dweight"), usual, strict=True)
        }
        n, c = inputs.case.shape[:2]
        self.terms_error = 8 * torch.finfo(torch.float32).eps / (n * c) ** 0.5

    def limit(self, name: str, wanted: dict[str, Tensor]) -> float:
        """The error that a result may have, relative to its largest value."""
        if name != "dweight":
            return self.allowed[name]
        largest = wanted["dweight"].abs().max()
        return self.allowed[name] + self.terms_error * float(wanted["terms"].max() / largest)

    def faults(self, recording: Recording, direction: str) -> list[str]:
        """What the calls get wrong, with outputs that were full of NaN before."""
        recording.poison()
        recording.replay()
        wrong = []
        for i, wanted in self.wanted.items():
            for name, got in zip(RETURNS[direction], recording.outputs[i], strict=True):
                off, limit = error(got, wanted[name]), self.limit(name, wanted)
                if not off <= limit:
                    wrong.append(
                        f"{name} of input {i} has relative error {off:.2g}, allowed {limit:.2g}"
                    )
        recording.forget()
        return wrong
