"""The operators of attention after an activation, against the same formulas in float64."""

import itertools

import pytest
import torch
from torch import Tensor

from eca_fused import reference
from eca_fused.ops import native
from eca_fused.ops.gating import ACTIVATIONS
from eca_fused.ops.results import output_strides, sums_dtype
from helpers.cases import (
    DEVICE,
    DTYPES,
    LAYOUTS,
    READ_IN_PLACE,
    SHAPES,
    VIEWS,
    assert_near,
    in_layout,
    make_case,
    name_of,
    needs_extension,
    normal,
)
from helpers.gating import FUNCTIONS, Exact, spread, total

pytestmark = [pytest.mark.any_device, needs_extension]

ops = torch.ops.eca_fused
HAS_BLOCK = DEVICE in native.one_pass_gating_devices


class Given:
    """Arguments of the operators: maps, and coefficients in the dtype of sums."""

    def __init__(self, shape, dtype=torch.float64, layout="contiguous", seed=0, k=3) -> None:
        case = make_case(shape, dtype=dtype, layout=layout, seed=seed, k=k)
        self.x, self.dy, self.weight = case.x, case.dy, case.weight
        g = torch.Generator().manual_seed(seed)
        n, c = shape[:2]

        def numbers(*sizes):
            return normal(sizes, g).to(sums_dtype(case.x)).to(DEVICE)

        self.channels = numbers(3, c)
        self.gate = numbers(n, c).sigmoid()
        self.planes = torch.stack([self.gate, numbers(n, c)])
        self.gradient_channels = numbers(2, c)

    def results(self, activation: str) -> dict[str, Tensor]:
        number = ACTIVATIONS.index(activation)
        x, dy, channels = self.x, self.dy, self.channels
        rest = (self.planes, channels, self.gradient_channels, number)
        found = {
            "z": ops.activated_sums(None, x, channels, number, False)[0],
            "dy z": ops.activated_sums(dy, x, channels, number, False)[0],
            "all": ops.activated_sums(dy, x, channels, number, True),
            "y": ops.gated(x, self.gate, channels, number),
            "dx": ops.gated_gradients(dy, x, *rest, True),
            "dx alone": ops.gated_gradients(dy, x, *rest, False),
        }
        if HAS_BLOCK:
            block = ops.gated_block(x, self.weight, channels, False, number)
            found |= zip(("block y", "block mean", "block gate"), block, strict=True)
        return found

    def exact(self, activation: str) -> dict[str, Tensor]:
        e = Exact(self.x, self.channels, activation)
        sums, mean = e.sums(self.dy), total(e.z) / max(self.x[0, 0].numel(), 1)
        gate = torch.sigmoid(reference.convolve(mean, self.weight.double()))
        alone = torch.zeros_like(self.gradient_channels)
        return {
            "z": total(e.z),
            "dy z": sums[0],
            "all": sums,
            "y": spread(self.gate.double(), self.x) * e.z,
            "dx": e.gradient(self.dy, self.planes, self.gradient_channels),
            "dx alone": e.gradient(self.dy, self.planes, alone),
            "block y": spread(gate, self.x) * e.z,
            "block mean": mean,
            "block gate": gate,
        }


def assert_same(given: Given, activation: str) -> None:
    """In float64 the results are those of the formulas."""
    exact = given.exact(activation)
    for name, got in given.results(activation).items():
        torch.testing.assert_close(got, exact[name], msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_every_shape(activation, layout):
    for shape in SHAPES:
        assert_same(Given(shape, layout=layout), activation)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_rounds_once(activation, dtype, layout):
    """Maps are rounded to their dtype, sums and everything else are in float32.

    GELU's distribution function is within 1e-7, about one unit of float32.
    """
    for shape in [(3, 20, 9, 9), (2, 5, 40, 41), (2, 7, 3)]:
        given = Given(shape, dtype, layout)
        exact = given.exact(activation)
        # The magnitude of the terms: v's, each times the largest factor that it meets.
        x = given.x.double().abs() + spread(given.channels[2].double().abs(), given.x)
        p, q = (spread(c.double().abs(), given.x) for c in given.channels[:2])
        v, dy = (p * x + q).max(), given.dy.double().abs().max()
        factors = {"y": 1, "block y": 1, "dx": p.max() * (dy + 3) * (1 + v) + 3 * x.max() + 3}
        factors["dx alone"] = factors["dx"]
        accumulator = sums_dtype(given.x)
        for name, got in given.results(activation).items():
            if name in factors:
                terms = v * factors[name] if name.endswith("y") else factors[name]
                assert_near(name, got, exact[name], terms, dtype, accumulator)
                continue
            pixels = max(given.x[0, 0].numel(), 1)
            terms = (1 + v) * (1 + dy) * (1 + x.max())
            if not name.startswith("block"):  # a sum
                terms = terms * pixels
            assert_near(name, got, exact[name], terms, got.dtype, accumulator)


@pytest.mark.parametrize("name", READ_IN_PLACE)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_slices_are_read_in_place(layout, name):
    given = Given((5, 12, 6, 7), layout=layout)
    view = READ_IN_PLACE[name]
    part = Given(tuple(view(given.x).shape))
    part.x, part.dy = view(given.x), view(given.dy)
    assert_same(part, "silu")


@pytest.mark.parametrize("name", VIEWS)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("which", ["x", "dy"])
def test_views(which, layout, name):
    given = Given((3, 8, 6, 6), layout=layout)
    of = VIEWS[name]
    part = Given(tuple(of(given.x).shape))
    for key in ("x", "dy"):
        t = of(getattr(given, key))
        setattr(part, key, t if key == which else in_layout(t.clone(), "channels_last"))
    assert_same(part, "hardswish")
    results = part.results("relu")
    for key in {"y", "block y", "dx"} & results.keys():
        assert results[key].stride() == output_strides(part.x)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("shape", [(3, 24, 7, 7), (2, 300, 3, 3), (5, 7, 40, 40)], ids=name_of)
def test_any_number_of_threads_gives_the_same_maps(shape, layout, threads):
    given = Given(shape, torch.float32, layout)
    ours = given.results("silu")
    torch.set_num_threads(1)
    for name, want in given.results("silu").items():
        # With fewer samples than threads, pixels are summed in several parts, in float64.
        if ours[name].dtype == torch.float64 or name.startswith("block"):
            torch.testing.assert_close(ours[name], want, rtol=1e-6, atol=1e-6)
        else:
            assert torch.equal(ours[name], want)


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_values_that_are_not_finite(activation):
    """NaN stays NaN, and an infinite gradient is lost where the activation is flat."""
    x = torch.tensor([[-8.0, 8.0, float("nan"), float("inf")]])
    channels = torch.tensor([[1.0], [0.0], [0.0]]).expand(3, 4).contiguous()
    given, number = FUNCTIONS[activation], ACTIVATIONS.index(activation)
    y = ops.gated(x, torch.ones(1, 4), channels, number)
    known = slice(3 if activation == "gelu" else 4)  # PyTorch's GELU of infinity is NaN
    torch.testing.assert_close(y[:, known], given(x)[:, known], equal_nan=True)
    if activation not in ("relu", "hardswish"):
        return
    planes = torch.stack([torch.ones(1, 4), torch.zeros(1, 4)])
    dy = torch.full_like(x, float("inf"))
    dx = ops.gated_gradients(dy, x, planes, channels, torch.zeros(2, 4), number, False)
    assert dx[0, 0] == 0
    assert dx[0, 1] == float("inf")


@pytest.mark.parametrize("shape", [(0, 4, 3, 3), (2, 4, 0, 3), (2, 0, 3, 3)])
def test_empty_maps(shape):
    x = torch.randn(shape)
    n, c = shape[:2]
    channels, gate, weight = torch.ones(3, c), torch.ones(n, c), torch.ones(1, 1, 3)
    assert ops.gated(x, gate, channels, 1).shape == shape
    assert not ops.activated_sums(x, x, channels, 1, True).any()
    if not HAS_BLOCK:
        return
    y, mean, gates = ops.gated_block(x, weight, channels, False, 1)
    assert y.shape == shape
    assert not mean.any()
    assert not gates.any()


@pytest.mark.parametrize("layout", LAYOUTS)
def test_opcheck(layout):
    for shape, dtype in itertools.product(((2, 8), (2, 9, 4, 5)), (torch.float64, torch.bfloat16)):
        given = Given(shape, dtype, layout)
        x, dy, channels, check = given.x, given.dy, given.channels, torch.library.opcheck
        check(ops.activated_sums, (None, x, channels, 1, False))
        check(ops.activated_sums, (dy, x, channels, 2, True))
        check(ops.gated, (x, given.gate, channels, 3))
        rest = (given.planes, channels, given.gradient_channels, 4)
        check(ops.gated_gradients, (dy, x, *rest, True))
        if HAS_BLOCK:
            check(ops.gated_block, (x, given.weight, channels, False, 0))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"gate": lambda t: t[:1]}, "expected gate contiguous, of shape"),
        ({"channels": lambda t: t.double()}, "expected channels contiguous, of shape"),
        ({"activation": lambda t: 5}, "expected activation from 0 to 4"),
        ({"x": lambda t: t[0, 0, 0]}, "expected x of shape"),
    ],
    ids=lambda v: next(iter(v)) if isinstance(v, dict) else None,
)
def test_operators_refuse_what_does_not_fit(change, message):
    x = torch.randn(2, 4, 3, 3)
    args = {"x": x, "gate": torch.ones(2, 4), "channels": torch.ones(3, 4), "activation": 1}
    ((name, make),) = change.items()
    with pytest.raises(RuntimeError, match=message):
        ops.gated(**(args | {name: make(args[name])}))


def test_sums_for_a_norm_need_a_gradient():
    x = torch.randn(2, 4, 3, 3)
    with pytest.raises(RuntimeError, match="expected dy for the sums"):
        ops.activated_sums(None, x, torch.ones(3, 4), 1, True)
    with pytest.raises(RuntimeError, match="expected dy of shape"):
        ops.activated_sums(x[:1], x, torch.ones(3, 4), 1, True)


def test_the_ways_without_kernels_do_not_claim_them():
    assert native.one_pass_gating_devices <= native.gating_devices <= native.tail_devices
