"""Every backend that can run here, on small maps, forward and backward, against float64."""

import functools
import time
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import product

import torch
from torch import Tensor

from eca_fused.cli.common.accuracy import error, floor, magnitudes
from eca_fused.cli.doctor.choices import LAYOUTS
from eca_fused.functional import eca, residual_tail
from eca_fused.ops import native
from eca_fused.ops.backend import backends
from eca_fused.ops.checks import DTYPES

__all__ = ["Result", "self_test", "testable"]

# Planes that are whole vectors for some dtypes only, and more channels than a tile has.
SHAPE = (2, 96, 14, 14)
SMALL = (1, 12, 3, 5)  # for Triton's interpreter, which takes a second for 50,000 elements
TAPS = 5
OPERATIONS = ("eca", "residual_tail")
# Plain PyTorch in low precision rounds each result on the way, some of them sums of rounded terms.
PLAIN_UNITS = 16
TF32 = 2.0**-10  # a unit of the convolutions in float32 of GPUs


@dataclass(frozen=True)
class Result:
    """One operation of a backend, forward and backward.

    Attributes:
        used: the share of the allowed error that the worst of its results has; passed up to 1.
        failure: what is wrong; "" if it passed.
    """

    device: str
    backend: str
    operation: str
    dtype: str
    layout: str
    used: float
    failure: str
    seconds: float

    @property
    def passed(self) -> bool:
        return not self.failure


def testable(devices: list[torch.device]) -> list[tuple[torch.device, str]]:
    """The devices with each of the backends that can run there."""
    found = []
    for device, (name, backend) in product(devices, backends().items()):
        works = backend and (backend.devices is None or device.type in backend.devices)
        if works and (name != "native" or native.unsupported(device) is None):
            found.append((device, name))
    return found


def self_test(device: torch.device, backend: str) -> Iterator[Result]:
    """A result for each operation, dtype and layout.

    Triton compiles for each of them, which takes seconds, so it has one layout for each dtype.
    """
    shape = SMALL if backend == "triton" and device.type == "cpu" else SHAPE
    for number, dtype in enumerate(DTYPES):
        layouts = list(LAYOUTS)
        if backend == "triton":
            layouts = [layouts[number % 2]]
        for layout, operation in product(layouts, OPERATIONS):
            began = time.perf_counter()
            try:
                used, failure = examine(device, backend, operation, dtype, layout, shape)
            except Exception as reason:  # whatever a broken backend raises is its result
                used = float("inf")
                failure = f"{type(reason).__name__}: {str(reason).strip()}".partition("\n")[0]
            yield Result(
                str(device),
                backend,
                operation,
                str(dtype).removeprefix("torch."),
                layout,
                used,
                failure,
                time.perf_counter() - began,
            )


@dataclass(frozen=True)
class Inputs:
    """Of one call, on the CPU: x, identity and dy (N, C, H, W), taps (1, 1, k)."""

    x: Tensor
    identity: Tensor
    dy: Tensor
    taps: Tensor

    def to(self, device: torch.device, dtype: torch.dtype, layout: str) -> "Inputs":
        x, identity, dy = (
            t.to(device, dtype).contiguous(memory_format=LAYOUTS[layout])
            for t in (self.x, self.identity, self.dy)
        )
        return Inputs(x, identity, dy, self.taps.to(device, dtype))


def make_inputs(shape: tuple[int, ...], dtype: torch.dtype) -> Inputs:
    """Random numbers in float64 that dtype can hold."""
    generator = torch.Generator().manual_seed(0)
    x, identity, dy = (torch.randn(shape, generator=generator) for _ in range(3))
    taps = torch.randn(1, 1, TAPS, generator=generator)
    # No sum near zero, where a rounding decides whether ReLU lets a gradient pass.
    near = eca(x.double(), taps.double(), backend="reference") + identity
    identity = identity + 0.2 * near.sign()
    return Inputs(*(t.to(dtype).double() for t in (x, identity, dy, taps)))


def run(operation: str, backend: str, inputs: Inputs) -> dict[str, Tensor]:
    """The results of an operation, in inference and in training."""
    leaves = [t.detach().requires_grad_() for t in (inputs.x, inputs.taps)]
    x, taps = leaves
    if operation == "eca":
        with torch.no_grad():
            inference = eca(x, taps, backend=backend)
        y = eca(x, taps, backend=backend)
        names = ["dx", "dw"]
    else:
        identity = inputs.identity.detach().requires_grad_()
        with torch.no_grad():
            inference = residual_tail(x, identity, taps, backend=backend)
        y = residual_tail(x, identity, taps, backend=backend)
        leaves, names = [*leaves, identity], ["dx", "dw", "d_identity"]
    gradients = torch.autograd.grad(y, leaves, inputs.dy)
    found = {
        "y in inference": inference,
        "y": y.detach(),
        **dict(zip(names, gradients, strict=True)),
    }
    return {name: t.cpu() for name, t in found.items()}


@dataclass(frozen=True)
class Yardstick:
    """What the results of a call are compared with.

    Attributes:
        exact: the results in float64.
        usual: those of plain PyTorch on the CPU, in the dtype of the call.
        magnitudes: what the rounding of each result's sums is relative to, see accuracy.py.
    """

    inputs: Inputs
    exact: dict[str, Tensor]
    usual: dict[str, Tensor]
    magnitudes: dict[str, float]


@functools.cache  # the backends share it
def yardstick(operation: str, dtype: torch.dtype, layout: str, shape: tuple[int, ...]) -> Yardstick:
    inputs = make_inputs(shape, dtype)
    exact = run(operation, "reference", inputs)
    usual = run(operation, "reference", inputs.to(torch.device("cpu"), dtype, layout))
    if operation == "eca":
        found = magnitudes(inputs.x, inputs.taps, inputs.dy)
    else:
        passed = inputs.dy * (exact["y"] > 0)
        found = magnitudes(inputs.x, inputs.taps, passed)
        found["y"] += float(inputs.identity.abs().max())
        found["d_identity"] = float(passed.abs().max())
    return Yardstick(inputs, exact, usual, {**found, "y in inference": found["y"]})


def examine(
    device: torch.device,
    backend: str,
    operation: str,
    dtype: torch.dtype,
    layout: str,
    shape: tuple[int, ...],
) -> tuple[float, str]:
    """The share of the allowed error that is used, and what is wrong.

    The allowed error is that of plain PyTorch on the CPU in the same dtype, and the floor of
    accuracy.py. Plain PyTorch itself may be some units of its dtype away.
    """
    known = yardstick(operation, dtype, layout, shape)
    with warnings.catch_warnings():  # of other packages; a failure is told
        warnings.simplefilter("ignore")
        found = run(operation, backend, known.inputs.to(device, dtype, layout))
    worst, failure = 0.0, ""
    unit = torch.finfo(dtype).eps
    if device.type == "cuda" and dtype == torch.float32:
        unit = TF32
    for name, target in known.exact.items():
        magnitude, scale = known.magnitudes[name], float(target.abs().max())
        off = error([found[name]], target) / scale
        if backend == "reference":
            allowed = PLAIN_UNITS * unit * max(1.0, magnitude / scale)
        else:
            usual = error([known.usual[name]], target) / scale
            allowed = usual + floor(dtype, magnitude, scale)
        share = off / allowed
        if not share <= 1 and not failure:  # NaN too
            failure = (
                f"{name} is {off:.2g} of its largest value away from float64, "
                f"{allowed:.2g} is allowed"
            )
        worst = max(worst, share) if share == share else float("inf")
    return worst, failure
