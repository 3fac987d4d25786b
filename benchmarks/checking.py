"""Whether what a contender computes is right: against float64, before it is timed."""

from typing import Any

import torch
from cases import DTYPES
from contenders import Inputs, plain
from devices import Recording
from torch import Tensor

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


def exact(x: Tensor, weight: Tensor, dy: Tensor) -> dict[str, Tensor]:
    """y, dx and dweight in float64."""
    y, dx = (torch.empty(x.shape, dtype=torch.float64, device=x.device) for _ in range(2))
    dweight = torch.zeros(weight.shape, dtype=torch.float64, device=x.device)
    step = max(1, CHUNK // max(1, x[0].numel()))
    for begin in range(0, x.shape[0], step):
        part = slice(begin, begin + step)
        y[part], dx[part], dw = results(plain, x[part].double(), weight.double(), dy[part].double())
        dweight += dw
    return {"y": y, "dx": dx, "dweight": dweight}


def error(got: Tensor, want: Tensor) -> float:
    """Largest error relative to the largest value; NaN where there is one."""
    return float((got.double() - want).abs().max() / want.abs().max())


class Judge:
    """Knows the results for the first and the last of the inputs, and what error they may have."""

    def __init__(self, inputs: Inputs) -> None:
        self.wanted = {
            i: exact(inputs.xs[i], inputs.taps, inputs.dys[i])
            for i in dict.fromkeys((0, len(inputs.xs) - 1))
        }
        usual = results(plain, inputs.xs[0], inputs.taps, inputs.dys[0])
        eps = torch.finfo(DTYPES[inputs.case.dtype]).eps
        # As good as plain PyTorch in this dtype, but for the order of its sums.
        self.allowed = {
            name: 4 * (error(got, self.wanted[0][name]) + eps)
            for name, got in zip(("y", "dx", "dweight"), usual, strict=True)
        }

    def faults(self, recording: Recording, direction: str) -> list[str]:
        """What the calls get wrong, with outputs that were full of NaN before."""
        recording.poison()
        recording.replay()
        wrong = []
        for i, wanted in self.wanted.items():
            for name, got in zip(RETURNS[direction], recording.outputs[i], strict=True):
                off = error(got, wanted[name])
                if not off <= self.allowed[name]:
                    wrong.append(
                        f"{name} of input {i} has relative error {off:.2g}, "
                        f"allowed {self.allowed[name]:.2g}"
                    )
        recording.forget()
        return wrong
