"""The Triton backend's residual tail where it runs: on a GPU, or in Triton's interpreter."""

import copy
import itertools
import math

import pytest
import torch
from torch import Tensor, nn

import eca_fused
from eca_fused import ECALayer, ResidualTail, attention
from eca_fused.attention import residual_tail
from eca_fused.ops import native
from eca_fused.ops.checks import ACTIVATIONS
from eca_fused.ops.library import operators
from eca_fused.ops.results import mask_bytes
from helpers.cases import DEVICE, DTYPES, LAYOUTS, in_layout, name_of, needs_extension, normal
from helpers.tail_passes import Case, check_gradients, check_moments, check_sums, check_tail
from helpers.tails import assert_same_step, batch_norm, called

_status = eca_fused.backends()["triton"]
if DEVICE not in (_status.devices or ()):
    pytest.skip(
        f"needs a GPU, or TRITON_INTERPRET=1 before Python starts: {_status}",
        allow_module_level=True,
    )

from eca_fused.ops import triton  # noqa: E402
from eca_fused.ops.triton import coefficients, launch, plan, tail_launch  # noqa: E402
from helpers.triton_tails import TritonPasses  # noqa: E402

pytestmark = pytest.mark.any_device

passes = TritonPasses()
each_layout = pytest.mark.parametrize("layout", LAYOUTS)


def check(case: Case, by: tuple[bool, bool] = (True, True)) -> None:
    with_identity = case.identity is not None
    check_tail(passes, case)
    check_sums(passes, case, with_identity)
    check_gradients(passes, case, (by[0], by[1] and with_identity), (True, True))
    check_moments(passes, case.x, case.layout, case.wide)


# ---- the passes, against a model in float64 ----


@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
@each_layout
def test_all_passes(layout, dtype):
    """Rows below a byte, no multiples of eight, whole bytes; more than a tile of either side."""
    for shape in ((2, 5, 3), (2, 12, 49), (1, 24, 64), (1, 3, 1500), (1, 300, 9)):
        for activation, identity in (("relu", True), ("gelu", False)):
            check(Case(shape, dtype, layout, activation, identity))


@each_layout
def test_options(layout):
    for activation, identity in itertools.product(ACTIVATIONS, (False, True)):
        case = Case((1, 10, 9), torch.float32, layout, activation, identity)
        check_tail(passes, case)
        for identity_sum in {False, identity}:
            check_sums(passes, case, identity_sum)
        for by_x, by_identity in itertools.product((False, True), {False, identity}):
            for wants in ((True, True), (True, False), (False, True)):
                check_gradients(passes, case, (by_x, by_identity), wants)


VIEWS = {
    "batch slice": lambda t: t[1:],
    "channel slice": lambda t: t[:, 8:24],
    "odd channels": lambda t: t[:, 3:10],
    "every second sample": lambda t: t[::2],
    "but for a channel": lambda t: t[:, 1:],
    "every second pixel": lambda t: t[..., ::2],  # this one is copied
}


@each_layout
def test_views(layout):
    for view, pixels in zip(VIEWS.values(), (9, 16, 9, 16, 9, 32), strict=True):
        check(Case((3, 32, pixels), torch.bfloat16, layout, view=view))


@each_layout
def test_maps_of_another_layout_than_x(layout):
    case = Case((2, 10, 9), torch.float32, layout)
    other = LAYOUTS[1 - LAYOUTS.index(layout)]
    case.identity, case.dy = (in_layout(t, other) for t in (case.identity, case.dy))
    check(case)


@each_layout
def test_many_tiles_and_parts(layout, monkeypatch):
    monkeypatch.setattr(plan, "TAIL", 64)
    monkeypatch.setattr(plan, "ROW_MOST", 16)
    monkeypatch.setattr(plan, "PROGRAMS", 1)
    monkeypatch.setattr(plan, "LINE_BYTES", 16)
    found = plan.tail(plan.Shape(1, 9, 150, 1, layout == "contiguous", 4))
    assert found.blocks > 1
    assert found.splits > 1
    assert found.tile.channels < 9
    check(Case((1, 9, 150), torch.float32, layout))


@each_layout
def test_indices_of_64_bits(layout, monkeypatch):
    monkeypatch.setattr(launch, "WIDE_FROM", 1)
    check(Case((2, 9, 35), torch.float32, layout))


# ---- moments ----


@each_layout
def test_moments_far_from_zero(layout, monkeypatch):
    """The mean is 1e4 standard deviations, as far as the dtype can hold that."""
    for parts in (False, True):
        if parts:
            monkeypatch.setattr(plan, "TAIL", 64)
            monkeypatch.setattr(plan, "ROW_MOST", 64)
        for dtype, far in ((torch.float32, 1e4), (torch.float64, 1e4), (torch.bfloat16, 100)):
            x = normal((1, 9, 300), torch.Generator("cpu").manual_seed(1)) + far
            wide = torch.float64 if dtype == torch.float64 else torch.float32
            check_moments(passes, in_layout(x.to(dtype), layout), layout, wide)


@each_layout
def test_moments_of_a_plane_that_begins_elsewhere(layout):
    """The first pixels are no guide to the others."""
    x = normal((1, 9, 1600), torch.Generator("cpu").manual_seed(1)).float() + 1e3
    x[..., :200] = 0
    found = triton.moments(in_layout(x, layout).to(DEVICE))[1].cpu()
    exact = (x.double() - x.double().mean(2, keepdim=True)).square().sum(2)
    torch.testing.assert_close(found, exact, rtol=1e-6, atol=0)


def test_moments_of_constant_and_infinite_planes():
    x = torch.full((3, 4, 37), 0.1, device=DEVICE)
    x[1, 2, 5] = math.inf
    x[2, 1, 5] = math.nan
    mean, squares = triton.moments(x)
    assert mean[1, 2] == math.inf  # as plain PyTorch has it, so that gates are finite
    assert mean[2, 1].isnan()
    assert squares[1, 2].isnan()
    assert (squares[0] >= 0).all()
    assert (squares[0] < 1e-12).all()


# ---- ReLU's mask ----


@each_layout
def test_mask_is_a_bit_for_each_element(layout):
    case = Case((2, 16, 64), torch.float32, layout)
    x = case.x.to(DEVICE)
    given = (case.identity.to(DEVICE), case.planes.to(DEVICE), case.channels.to(DEVICE))
    for number, name in enumerate(ACTIVATIONS):
        for needed in (True, False):
            _, mask = triton.tail(x, *given, number, needed)
            assert mask.numel() == (x.numel() // 8 if needed and name == "relu" else 0)


@each_layout
def test_mask_has_bytes_enough_for_either_layout(layout):
    """So its size is known to torch.compile, and a run gives the same bytes as another."""
    case = Case((2, 3, 49), torch.float32, layout)
    given = (case.planes.to(DEVICE), case.channels.to(DEVICE))
    first, second = (triton.tail(case.x.to(DEVICE), None, *given, 1, True)[1] for _ in range(2))
    assert first.numel() == max(mask_bytes(case.x, True), mask_bytes(case.x, False))
    assert torch.equal(first, second)


def test_nan_is_kept():
    case = Case((1, 8, 16), torch.float32, "contiguous")
    case.x[0, 3, 5] = math.nan
    given = {"identity": case.identity, "want_mask": True}
    y, _, mask, _ = passes.run("tail", case.x, case.layout, **given, **case.arguments()).tensors
    assert y[0, 3, 5].isnan()
    assert case.kept_by(mask)[0, 3, 5]


# ---- what is read and written ----


@each_layout
def test_nothing_is_read_or_written_in_vain(layout, monkeypatch):
    case = Case((1, 4, 9), torch.float32, layout)
    maps = {"x": case.x, "identity": case.identity}
    launched = {}

    class Recorder:
        def __init__(self, kernel):
            self.kernel = kernel

        def __getitem__(self, grid):
            def call(*args, **_):
                launched.update(zip(self.kernel.arg_names, args, strict=False))

            return call

    monkeypatch.setattr(tail_launch, "wrap_triton", Recorder)
    given = case.planes, case.channels
    rest = case.gradient_planes, case.gradient_channels
    mask = torch.empty(0, dtype=torch.uint8)
    for activation, smooth in ((0, False), (2, True)):
        for flag in (True, False):
            sums = torch.empty(3 if flag else 2, 1, 4, dtype=torch.float64)
            tail_launch.tail_sums(case.dy, *maps.values(), mask, *given, activation, sums)
            assert (launched["identity"] is not None) == (flag or smooth)
        for by_x, by_identity, dx, d_identity in itertools.product((True, False), repeat=4):
            results = (case.x.clone() if wanted else None for wanted in (dx, d_identity))
            flags = activation, by_x, by_identity
            tail_launch.tail_gradients(
                case.dy, *maps.values(), mask, *given, *rest, *flags, *results
            )
            assert (launched["x"] is not None) == (smooth or (by_x and dx))
            assert (launched["identity"] is not None) == (smooth or (by_identity and d_identity))
            assert (launched["dx"] is not None) == dx
            assert (launched["d_identity"] is not None) == d_identity


def test_empty_maps():
    for shape in ((0, 4, 3), (2, 4, 0)):
        x = torch.randn(shape, device=DEVICE)
        planes, channels = (torch.ones(k, device=DEVICE) for k in ((2, *shape[:2]), (3, 4)))
        y, mask = triton.tail(x, x, planes, channels, 1, True)
        assert y.shape == shape
        assert mask.numel() == 0
        assert not triton.moments(x).any()
        assert not triton.tail_sums(x, x, x, mask, planes, channels, 1, True).any()
        rest = planes, torch.ones(4, 4, device=DEVICE), 1, True, True
        dx, none = triton.tail_gradients(x, x, x, mask, planes, channels, *rest, True, False)
        assert dx.shape == shape
        assert none.numel() == 0


# ---- as operators ----


@each_layout
def test_opcheck(layout):
    check = torch.library.opcheck
    case = Case((2, 9, 20), torch.float32, layout)
    x, dy = case.x.to(DEVICE), case.dy.to(DEVICE)
    coefficients = case.planes, case.channels, case.gradient_planes, case.gradient_channels
    planes, channels, *rest = (t.to(DEVICE) for t in coefficients)
    check(triton.moments, (x,))
    check(triton.tail, (x, x, planes, channels, 1, True))
    _, mask = triton.tail(x, x, planes, channels, 1, True)
    args = (dy, x, x, mask, planes, channels)
    check(triton.tail_sums, (*args, 1, True))
    for flags in itertools.product((True, False), repeat=2):
        check(triton.tail_gradients, (*args, *rest, 1, True, True, *flags))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"planes": lambda t: t[:1]}, "expected planes contiguous, of shape"),
        ({"channels": lambda t: t.double()}, "expected channels contiguous, of shape"),
        ({"identity": lambda t: t[:, :2]}, "expected identity of the shape"),
        ({"activation": lambda t: 7}, "expected activation from 0 to 3"),
    ],
    ids=lambda v: next(iter(v)) if isinstance(v, dict) else None,
)
def test_operators_refuse_what_does_not_fit(change, message):
    x = torch.randn(2, 4, 3, 3, device=DEVICE)
    planes, channels = torch.ones(2, 2, 4, device=DEVICE), torch.ones(3, 4, device=DEVICE)
    args = {"x": x, "identity": x, "planes": planes, "channels": channels, "activation": 1}
    ((name, make),) = change.items()
    with pytest.raises(ValueError, match=message):
        triton.tail(**(args | {name: make(args[name])}), need_mask=True)
    mask = torch.empty(1, dtype=torch.uint8, device=DEVICE)
    with pytest.raises(ValueError, match="expected mask as the forward operator returned it"):
        triton.tail_sums(x, x, None, mask, planes, channels, 1, False)
    with pytest.raises(ValueError, match="expected identity for its sum"):
        triton.tail_sums(x, x, None, mask[:0], planes, channels, 0, True)


# ---- the numbers between the passes ----


def norms(c: int, dtype: torch.dtype) -> list[tuple[Tensor | float | None, ...]]:
    """With all parameters, without any, and no norm at all."""
    g = torch.Generator("cpu").manual_seed(2)
    mean, variance, gamma, beta = (normal((c,), g).to(DEVICE) for _ in range(4))
    return [
        (mean.float(), variance.square().float() + 1, gamma.to(dtype), beta.float(), 1e-5),
        (mean, variance.square() + 1, None, None, 1e-3),
        (None, None, None, None, 0.0),
    ]


@needs_extension
@pytest.mark.skipif(DEVICE not in native.tail_devices, reason="needs native kernels of tails")
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=name_of)
@pytest.mark.parametrize("sizes", [(3, 7), (33, 70)], ids=["a tile", "more than a tile"])
def test_numbers_between_the_passes_are_those_of_the_native_backend(sizes, dtype):
    (n, c), pixels = sizes, 15
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    g = torch.Generator("cpu").manual_seed(1)

    def some(*shape: int, of: torch.dtype = torch.float64) -> Tensor:
        return normal(shape, g).to(DEVICE, of)

    def same(operator: str, *args: object) -> None:
        ours = getattr(coefficients, operator)(*args)
        theirs = getattr(operators, operator)(*args)
        for got, want in zip(ours, theirs, strict=True):
            assert got.shape == want.shape
            if got.numel() == 0:
                continue
            # Both are rounded from float64, in another order of operations.
            eps = torch.finfo(got.dtype).eps
            # A sum of n * c terms is exact to their number of units of float64, at most.
            least = max(16 * eps, n * c * torch.finfo(torch.float64).eps)
            torch.testing.assert_close(got, want, rtol=least, atol=least)

    x, gate, scale = some(n, c, pixels, of=dtype), some(n, c).sigmoid(), some(n, of=wide)
    shared, own_taps = some(1, 1, 3, of=wide), some(c, 1, 5, of=dtype)
    means, distance, dmean = some(n, c), some(n, c, of=wide), some(n, c, of=wide)
    sums, totals, shares = some(3, n, c), some(4, c), some(4, c)
    given = gate.to(dtype)  # by the caller; one that taps made is in the dtype of sums
    none = (None,) * 4
    same("batch_statistics", some(2, n, c).square(), pixels)
    # In the interpreter many tiles take long; how a norm is read does not depend on their number.
    some_norms = norms(c, wide)[: 3 if n < 8 else 1]
    for own, other in itertools.product(some_norms, some_norms):
        for args in ((shared, means, None, scale), (own_taps, means, *none[:2])):
            same("tail_coefficients", x, *args, *own, *other, True, True)
        for args in ((None, means, given, scale), none):
            same("tail_coefficients", x, *args, *own, *other, False, True)
            same("tail_coefficients", x, *args, *own, *other, False, False)
        for by, values in itertools.product(
            ((totals, None), (totals, shares), (None, None)), ((5.0, 0.0), (0.0, 7.0))
        ):
            for args in (
                (given, scale, dmean, *own, *other, True),
                (*none[:3], *own, *other, False),
            ):
                same("tail_gradient_coefficients", x, *by, *values, *args)
    for own, flag in itertools.product(some_norms, (True, False)):
        for args in (
            (sums, shared, gate.to(wide), scale, None, distance),
            (sums[:2].contiguous(), own_taps, gate.to(wide), None, None, distance),
            (sums, None, given, scale, dmean, distance),
            (sums, None, *none),
        ):
            same("tail_totals", x, *args, *own, flag, flag, flag, flag)


NO_NORM = (None, None, None, None, 0.0)


def test_opcheck_between_the_passes():
    check = torch.library.opcheck
    n, c = 3, 7
    x = torch.randn(n, c, 4, device=DEVICE)
    (_, own, _), ones = norms(c, torch.float32), torch.ones(n, c, device=DEVICE)
    weight, scale = torch.randn(1, 1, 3, device=DEVICE), ones[:, 0]
    wide = ones.double()
    check(coefficients.batch_statistics, (torch.stack([wide, wide]), 4))
    for norm in (own, NO_NORM):
        check(
            coefficients.tail_coefficients, (x, weight, wide, None, scale, *norm, *norm, True, True)
        )
        check(coefficients.tail_coefficients, (x, *(None,) * 4, *norm, *norm, False, False))
        sums, totals = torch.stack([wide, wide]), torch.ones(4, c, device=DEVICE).double()
        for flag in (True, False):
            args = x, sums, weight, ones, scale, None, ones, *norm, True
            check(coefficients.tail_totals, (*args, flag, flag, flag))
        for given in ((totals, totals, 4.0, 4.0), (None, None, 0.0, 0.0)):
            args = *given, ones, scale, ones, *norm, *norm
            check(coefficients.tail_gradient_coefficients, (x, *args, True))


def test_between_the_passes_of_empty_maps():
    for n, c in ((0, 4), (2, 0)):
        x = torch.randn(n, c, 3, device=DEVICE)
        own = norms(c, torch.float32)[0]
        planes, channels, made, distance = coefficients.tail_coefficients(
            x, torch.ones(1, 1, 1, device=DEVICE), x[..., 0], None, None, *own, *own, False, True
        )
        assert planes.shape == (2, n, c)
        assert made.shape == distance.shape == (n, c)
        assert channels.shape == (6, c)
        if c:  # the channels' rows do not depend on samples
            assert (channels[1] - own[2] / (own[1] + own[4]).sqrt()).abs().max() < 1e-6
        sums = torch.ones(2, n, c, device=DEVICE).double()
        weight = torch.ones(1, 1, 1, device=DEVICE)
        totals, _, _, dmean, dweight = coefficients.tail_totals(
            x, sums, weight, made, None, None, distance, *own, False, False, False, True
        )
        assert not totals.any()
        assert dmean.shape == (n, c)
        assert dweight.tolist() == [[[0.0]]]


def test_infinite_values_between_the_passes():
    """An infinite tap has no term in the padding, and an infinite sum of g none without a norm."""
    n, c = 2, 5
    x, inf = torch.randn(n, c, 4, device=DEVICE), float("inf")
    ones, half = torch.ones(n, c, device=DEVICE), torch.full((n, c), 0.5, device=DEVICE)
    sums = torch.ones(2, n, c, device=DEVICE).double()
    first_tap = torch.tensor([[[inf, 1.0, 1.0]]], device=DEVICE)
    args = half, None, None, ones, *NO_NORM
    dmean = coefficients.tail_totals(x, sums, first_tap, *args, False, False, False, False)[3]
    assert dmean[:, -1].isfinite().all()  # no channel after the last reads it by its first tap
    assert dmean[:, :-1].isinf().all()
    sums[0] = inf
    taps = torch.ones(1, 1, 3, device=DEVICE)
    found = coefficients.tail_totals(x, sums, taps, *args, False, False, False, True)
    assert found[3].isfinite().all()
    assert found[4].isfinite().all()


def test_operators_between_the_passes_refuse_what_does_not_fit():
    n, c = 2, 4
    x, ones = torch.randn(n, c, 3, device=DEVICE), torch.ones(n, c, device=DEVICE)
    taps, wide = torch.ones(1, 1, 3, device=DEVICE), torch.ones(2, n, c, device=DEVICE).double()
    rest = *NO_NORM, *NO_NORM
    for message, call in {
        "expected planes": lambda: coefficients.batch_statistics(wide.float(), 3),
        "expected means of shape": lambda: coefficients.tail_coefficients(
            x, None, ones[:, 1:], None, None, *rest, False, True
        ),
        "expected the means of x for taps": lambda: coefficients.tail_coefficients(
            x, taps, None, None, None, *rest, False, True
        ),
        "expected gamma of shape": lambda: coefficients.tail_coefficients(
            x, None, None, None, None, None, None, ones, None, 0.0, *NO_NORM, False, True
        ),
        "got one of them": lambda: coefficients.tail_coefficients(
            x, None, None, None, None, ones[0], None, None, None, 0.0, *NO_NORM, False, True
        ),
        "expected sums of shape": lambda: coefficients.tail_totals(
            x, wide.float(), *(None,) * 5, *NO_NORM, False, False, False, False
        ),
        "expected the gate that the taps made": lambda: coefficients.tail_totals(
            x, wide, taps, None, None, None, ones, *NO_NORM, False, False, False, False
        ),
        "expected distance": lambda: coefficients.tail_totals(
            x, wide, None, None, None, ones, None, *NO_NORM, False, False, False, False
        ),
        "expected totals of shape": lambda: coefficients.tail_gradient_coefficients(
            x, wide[0], None, 0.0, 0.0, None, None, None, *rest, True
        ),
    }.items():
        with pytest.raises(ValueError, match=message):
            call()


# ---- the whole ----

C = 12
ATTENTIONS = {
    "none": lambda: None,
    "eca": lambda: ECALayer(C, backend="triton"),
    "circular": lambda: ECALayer(C, padding_mode="circular", backend="triton"),
    "ECA-NS": lambda: attention.ECANS(C, backend="triton"),
    "se": lambda: attention.SE(C, 4, backend="triton"),
}


@pytest.fixture
def by_triton(monkeypatch):
    """ "auto" means Triton, and calling a tail's modules one after the other is an error."""

    def fail(*_):
        raise AssertionError("the modules were called")

    with eca_fused.use_backend("triton"):
        twin = residual_tail.by_calling
        monkeypatch.setattr(residual_tail, "by_calling", fail)
        monkeypatch.setattr("helpers.tails.by_calling", twin)
        yield


def maps(layout: str, offset: float, dtype: torch.dtype, n: int = 3) -> list[Tensor]:
    """x, an identity with means far apart, and the gradient of y."""
    far = torch.linspace(-offset, offset, C, dtype=torch.float64, device="cpu")[:, None, None]
    g = torch.Generator("cpu").manual_seed(5)
    return [
        in_layout((normal((n, C, 5, 6), g) + o).to(dtype), layout).to(DEVICE)
        for o in (far, -far, 0)
    ]


@each_layout
@pytest.mark.parametrize("name", ATTENTIONS)
def test_values_gradients_and_statistics(name, layout, by_triton):
    for norm, other, activation in (
        (batch_norm(C), batch_norm(C).eval(), "relu"),
        (batch_norm(C).eval(), batch_norm(C), "silu"),
        (None, None, "none"),
    ):
        tail = ResidualTail(ATTENTIONS[name](), norm, other, activation).to(DEVICE, torch.float64)
        assert_same_step(tail, *maps(layout, 3, torch.float64)[:2])


@each_layout
def test_never_less_accurate_than_plain_pytorch(layout, by_triton):
    """Also for means of 1e4 standard deviations. The floor is one rounding to the dtype, and 8
    units of float32 for everything in it."""
    module = ResidualTail(ECALayer(C), batch_norm(C), batch_norm(C)).to(DEVICE)
    for dtype, offset in ((torch.bfloat16, 0.0), (torch.float32, 1e4)):
        x, identity, dy = maps(layout, offset, dtype)

        def step(module, function, given, dy=dy):
            given = [t.detach().requires_grad_() for t in given]
            y = function(module, *given)
            grads = torch.autograd.grad(y, [*given, *module.parameters()], dy.to(y.dtype))
            return [y.detach(), *grads]

        ours = step(copy.deepcopy(module), lambda m, *a: m(*a), (x, identity))
        usual = step(copy.deepcopy(module), called, (x, identity))
        wide = (x.double(), identity.double())
        exact = step(copy.deepcopy(module).double(), called, wide)
        for got, plain, want in zip(ours, usual, exact, strict=True):
            error, plain_error = ((t.double() - want).square().mean().sqrt() for t in (got, plain))
            size = want.square().mean().sqrt()
            eps = torch.finfo(got.dtype).eps / 2 + 8 * torch.finfo(torch.float32).eps
            assert error <= plain_error + eps * size
            if offset:
                assert error < 1e-5 * size


def test_no_compiled_library_is_needed(by_triton, monkeypatch):
    """A pure Python installation has Triton's tails too."""
    for name in ("batch_moments", "moments", "tail_training", "tail_totals", "tail_backward"):
        monkeypatch.setattr(native, name, None, raising=False)
    tail = ResidualTail(ECALayer(C), nn.BatchNorm2d(C)).to(DEVICE)
    x, identity, dy = maps("contiguous", 1, torch.float32)
    tail(x.requires_grad_(), identity).backward(dy)
    assert x.grad.shape == x.shape


@pytest.mark.skipif(DEVICE == "cpu", reason="needs a GPU")
class TestOnGpu:
    @each_layout
    @pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
    @pytest.mark.parametrize(
        "shape", [(4, 256, 3136), (4, 1024, 196), (4, 2048, 49), (2, 64, 50176)], ids=name_of
    )
    def test_shapes(self, shape, dtype, layout):
        for activation, identity in (("relu", True), ("gelu", False)):
            check(Case(shape, dtype, layout, activation, identity))

    @each_layout
    def test_bitwise_the_same_on_every_run(self, layout):
        case = Case((4, 64, 5000), torch.bfloat16, layout)
        given = {"identity": case.identity, "dy": case.dy, "mask": case.mask(case.kept)}
        given |= {"identity_sum": True} | case.arguments()
        results = [passes.run("tail_sums", case.x, layout, **given).tensors[3] for _ in range(3)]
        found = [passes.run("moments", case.x, layout).tensors[3][:2] for _ in range(3)]
        assert all(torch.equal(t, results[0]) for t in results)
        assert all(torch.equal(t, found[0]) for t in found)
