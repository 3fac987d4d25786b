"""What the tests share: inputs, the float64 oracle, and the tolerance that follows from it."""

import itertools
import os
from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

import eca_fused
from eca_fused import reference
from eca_fused.ops import native

needs_extension = pytest.mark.skipif(
    native.missing is not None, reason="needs the compiled extension: run `make build`"
)

# Where the cases are. conftest.py makes "cuda" torch's default device too, for all other tensors.
DEVICE = os.environ.get("ECA_FUSED_TEST_DEVICE", "cpu")

# The backends that run there; only the one that ECA_FUSED_BACKEND asks for, if it is set.
BACKENDS = [
    name
    for name, status in eca_fused.backends().items()
    if status
    and DEVICE in (status.devices or ())
    and os.environ.get("ECA_FUSED_BACKEND", name) in (name, "auto")
]
# Backends under torch.compile, and whether sizes are dynamic.
COMPILED = [
    ("auto", None),
    pytest.param("native", None, marks=needs_extension, id="native"),
    pytest.param("native", True, marks=needs_extension, id="native-dynamic"),
]
DTYPES = [torch.float32, torch.float64, torch.float16, torch.bfloat16]
LAYOUTS = ["contiguous", "channels_last"]
IN_REGISTERS = ("rows", "runs", "columns", "kept", "stream")  # strategies of the CUDA kernels
MODES = ["zeros", "circular"]

# 0 to 3 spatial dimensions; one pixel; planes below, at and above a vector, a row, a tile; channels
# below and above k; one channel; one sample; sizes that no vector length divides.
SHAPES = [
    (2, 8),
    (3, 1),
    (2, 9, 5),
    (1, 1, 1, 1),
    (2, 70, 1, 1),
    (3, 6, 2, 2),
    (2, 33, 7, 7),
    (2, 5, 16, 16),
    (1, 3, 31, 33),
    (2, 130, 3, 5),
    (2, 4, 3, 4, 5),
    (1, 2, 70, 71),
]
# Views of maps of five samples and 12 channels that kernels read in place.
READ_IN_PLACE = {
    "a batch slice": lambda t: t[1:3],
    "every second sample": lambda t: t[::2],
    "the first channels": lambda t: t[:, :6],
    "later channels": lambda t: t[:, 3:10],
    "later channels of later samples": lambda t: t[2:, 5:],
    "one sample": lambda t: t[3:4, 2:],
}
# Views of maps of eight channels or more, some of which have to be copied.
VIEWS = {
    "whole": lambda t: t,
    "batch slice": lambda t: t[1:],
    "channel slice": lambda t: t[:, 2:7],
    "spatial slice": lambda t: t[..., 1:3],
    "transposed": lambda t: t.transpose(-1, -2),
    "expanded": lambda t: t[:1].expand_as(t),
}


def name_of(value: object) -> str | None:
    """A short test id for what pytest would number."""
    if isinstance(value, torch.dtype):
        return str(value).removeprefix("torch.")
    if isinstance(value, tuple):
        return "x".join(map(str, value))
    return None


def in_layout(x: Tensor, layout: str) -> Tensor:
    """x with the channels innermost for channels_last, for any number of spatial dimensions."""
    if layout == "contiguous":
        return x.contiguous()
    return x.movedim(1, -1).contiguous().movedim(-1, 1)


@dataclass
class Case:
    """Arguments of eca() and the gradient of its result."""

    x: Tensor  # (N, C, *spatial)
    weight: Tensor  # (1 or C, 1, k)
    dy: Tensor  # (N, C, *spatial)
    padding_mode: str = "zeros"


def normal(shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    """Random numbers in float64, drawn on the CPU: the same ones for every device."""
    return torch.randn(shape, generator=generator, dtype=torch.float64, device="cpu")


def make_case(
    shape: tuple[int, ...],
    k: int = 3,
    dtype: torch.dtype = torch.float32,
    layout: str = "contiguous",
    padding_mode: str = "zeros",
    own_taps: bool = False,
    taps_dtype: torch.dtype | None = None,
    seed: int = 0,
) -> Case:
    g = torch.Generator().manual_seed(seed)
    rows = shape[1] if own_taps else 1
    # A mean away from zero gives the gates something to work on.
    x = normal(shape, g) + normal(shape[:2] + (1,) * (len(shape) - 2), g)
    weight = normal((rows, 1, k), g)
    dy = normal(shape, g)
    return Case(
        in_layout(x.to(dtype), layout).to(DEVICE),
        weight.to(taps_dtype or dtype).to(DEVICE),
        in_layout(dy.to(dtype), layout).to(DEVICE),
        padding_mode,
    )


Results = tuple[Tensor, Tensor, Tensor]  # y, dx, dweight


def run(
    function: Callable[[Tensor, Tensor], Tensor], case: Case, dtype: torch.dtype | None = None
) -> Results:
    """y, dx and dweight of a function of x and weight, in another dtype if given."""
    x = case.x.detach().to(dtype or case.x.dtype).requires_grad_()
    weight = case.weight.detach().to(dtype or case.weight.dtype).requires_grad_()
    y = function(x, weight)
    dx, dweight = torch.autograd.grad(y, (x, weight), case.dy.to(y.dtype))
    return y.detach(), dx, dweight


def plain(case: Case) -> Callable[[Tensor, Tensor], Tensor]:
    return lambda x, w: reference.eca(x, w, padding_mode=case.padding_mode)


def shifted(t: Tensor, offset: int) -> Tensor:
    """A copy of t with its strides, `offset` bytes past a multiple of 64 bytes."""
    elements = 1 + sum((n - 1) * s for n, s in zip(t.shape, t.stride(), strict=True))
    memory = bytearray(elements * t.element_size() + 64)
    begin = torch.frombuffer(memory, dtype=torch.uint8).data_ptr() % 64
    flat = torch.frombuffer(
        memory, dtype=t.dtype, count=elements, offset=(64 - begin) % 64 + offset
    )
    return flat.as_strided(t.shape, t.stride()).copy_(t)


def assert_same_sums(ours: Tensor, theirs: Tensor) -> None:
    """The same bits on the CPU. On a GPU the kernel depends on the layout and on whether it runs in
    place, and kernels add up in different orders."""
    tolerance = 0 if DEVICE == "cpu" else 8 * torch.finfo(ours.dtype).eps
    scale = float(theirs.abs().max()) if theirs.numel() else 0.0
    torch.testing.assert_close(ours, theirs, rtol=0, atol=tolerance * scale)


def magnitudes(case: Case) -> Results:
    """The results with the absolute value of every term of every sum: the scale of the errors.

    A sum that cancels keeps the rounding errors of its terms, however small the sum is.
    """
    x, w, g = case.x.double().abs(), case.weight.double().abs(), case.dy.double().abs()
    spatial = tuple(range(2, x.dim()))
    mean = x.mean(spatial) if spatial else x  # (N, C)
    dz = (g * x).sum(spatial) / 4 if spatial else g * x / 4  # a (1 - a) <= 1 / 4
    _, dm, dw = run(
        lambda m, t: reference.convolve(m, t, case.padding_mode), Case(mean, w, dz), torch.float64
    )
    pixels = max(x[0, 0].numel(), 1) if x.shape[0] and x.shape[1] else 1
    return x, g + (dm / pixels).reshape(dm.shape + (1,) * len(spatial)), dw


def assert_near(
    name: str,
    got: Tensor,
    want: Tensor,
    terms: Tensor,
    dtype: torch.dtype,
    accumulator: torch.dtype,
    more: float = 0,
) -> None:
    """A result is no farther from the one in float64 than the floor plus `more`.

    The floor is what no implementation can avoid: half a unit in the last place of the result for
    its one rounding to dtype, and 8 units of the accumulator relative to the magnitude of the terms
    (sum, mean, taps, sigmoid and product round about once each).
    """
    assert got.dtype == dtype, f"{name} has dtype {got.dtype}"
    assert got.shape == want.shape, f"{name} has shape {tuple(got.shape)}"
    if got.numel() == 0:
        return
    floor = torch.finfo(dtype).eps / 2 * want.abs().max()
    floor = floor + 8 * torch.finfo(accumulator).eps * terms.abs().max()
    error, allowed = (got.double() - want).abs().max(), floor + more
    assert error <= allowed, f"{name}: error {error:.3g}, allowed {allowed:.3g}"


def assert_as_accurate(results: Results, case: Case) -> None:
    """Results are no farther from float64 than plain PyTorch's in the same dtype, plus a floor.

    In half precision only the floor of assert_near() is allowed. Plain PyTorch rounds means and
    gates to half precision too, and its error would hide faults of the kernels, which do not.
    """
    exact = run(plain(case), case, torch.float64)
    usual = run(plain(case), case)
    accumulator = torch.float64 if case.x.dtype == torch.float64 else torch.float32
    for name, got, want, other, scale in zip(
        ("y", "dx", "dweight"), results, exact, usual, magnitudes(case), strict=True
    ):
        dtype = case.weight.dtype if name == "dweight" else case.x.dtype
        half = case.x.dtype in (torch.float16, torch.bfloat16) or got.numel() == 0
        usual_error = 0 if half else float((other.double() - want).abs().max())
        assert_near(name, got, want, scale, dtype, accumulator, usual_error)


def grid(**axes: list[object]) -> list[dict[str, object]]:
    """All combinations of the values of the axes, as keyword arguments."""
    return [dict(zip(axes, values, strict=True)) for values in itertools.product(*axes.values())]
