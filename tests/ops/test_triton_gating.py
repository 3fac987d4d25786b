"""Triton's attention after an activation where it runs: on a GPU, or in Triton's interpreter."""

import copy
import math

import pytest
import torch
from torch import nn

import eca_fused
from eca_fused import ECALayer, NormActAttention, ResidualTail, attention
from eca_fused.attention import norm_act
from eca_fused.ops import native
from eca_fused.ops.gating import ACTIVATIONS
from helpers.cases import DEVICE, DTYPES, LAYOUTS, in_layout, name_of, normal
from helpers.gating import FUNCTIONS, Exact
from helpers.gating_passes import Case, check_all, check_gated, check_gradients, check_sums
from helpers.tails import assert_same_step, batch_norm, called

_status = eca_fused.backends()["triton"]
if DEVICE not in (_status.devices or ()):
    pytest.skip(
        f"needs a GPU, or TRITON_INTERPRET=1 before Python starts: {_status}",
        allow_module_level=True,
    )

from eca_fused.ops import triton  # noqa: E402
from eca_fused.ops.triton import launch, plan  # noqa: E402
from helpers.triton_gating import TritonGating  # noqa: E402

pytestmark = pytest.mark.any_device

passes = TritonGating()
each_layout = pytest.mark.parametrize("layout", LAYOUTS)
each_activation = pytest.mark.parametrize("activation", ACTIVATIONS)

# ---- the passes, against a model in float64 ----


@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
@each_layout
def test_all_passes(layout, dtype):
    """Rows below a tile and above one; no multiples of a vector, and whole vectors."""
    for shape, activation in (
        ((2, 5, 3), "hardswish"),
        ((2, 12, 49), "silu"),
        ((1, 24, 64), "hardswish"),
        ((1, 3, 1500), "hardswish"),
        ((1, 300, 9), "silu"),
        ((3, 8, 1), "relu"),
    ):
        check_all(passes, Case(shape, dtype, layout, activation))


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=name_of)
@each_activation
@each_layout
def test_options(layout, activation, dtype):
    case = Case((2, 10, 9), dtype, layout, activation)
    check_gated(passes, case)
    for gradient, for_norm in ((False, False), (True, False), (True, True)):
        check_sums(passes, case, gradient, for_norm)
    for by_x in (False, True):
        check_gradients(passes, case, by_x)


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
        check_all(passes, Case((3, 32, pixels), torch.bfloat16, layout, view=view))


@each_layout
def test_a_gradient_of_another_layout_than_x(layout):
    case = Case((2, 10, 9), torch.float32, layout, "gelu")
    case.dy = in_layout(case.dy, LAYOUTS[1 - LAYOUTS.index(layout)])
    check_all(passes, case)


@pytest.fixture
def small_tiles(monkeypatch):
    for name, number in {"TAIL": 64, "ROW_MOST": 16, "PROGRAMS": 1, "LINE_BYTES": 16}.items():
        monkeypatch.setattr(plan, name, number)


@each_layout
def test_many_tiles_and_parts(layout, small_tiles):
    found = plan.tail(plan.Shape(1, 9, 150, 1, layout == "contiguous", 4))
    assert found.blocks > 1
    assert found.splits > 1
    assert found.tile.channels < 9
    check_all(passes, Case((1, 9, 150), torch.float32, layout, "hardswish"))


@each_layout
@pytest.mark.parametrize("name", ["x", "dy"])
def test_maps_of_another_alignment_than_the_others(name, layout):
    """Rows of 16 channels or pixels, and of 17, of which 16 are read."""
    case = Case((2, 16, 16), torch.float32, layout, "silu")
    whole = normal((2, 17, 17), torch.Generator("cpu").manual_seed(1)).float()
    setattr(case, name, in_layout(whole, layout)[:, 1:, 1:])
    case.exact = Exact(case.x, case.channels, case.activation)
    check_all(passes, case)


@each_layout
def test_indices_of_64_bits(layout, monkeypatch):
    monkeypatch.setattr(launch, "WIDE_FROM", 1)
    check_all(passes, Case((2, 9, 35), torch.float32, layout, "hardswish"))


@each_layout
def test_parts_are_added_up_in_float64(layout, small_tiles):
    """The whole sum is not a number of float32."""
    x = torch.zeros(1, 9, 300, device=DEVICE)
    x[..., 0], x[..., -1] = 2**24, 1.0
    channels = torch.tensor([1.0, 0.0, 0.0], device=DEVICE)[:, None].expand(3, 9).contiguous()
    sums = triton.activated_sums(None, in_layout(x, layout), channels, 0, False)
    assert (sums == 2**24 + 1).all()


@each_layout
def test_bitwise_the_same_on_every_run(layout, small_tiles):
    case = Case((1, 9, 150), torch.bfloat16, layout, "gelu")
    given = {"dy": case.dy, "for_norm": True, **case.arguments()}
    found = [passes.run("activated_sums", case.x, layout, **given).tensors[1] for _ in range(2)]
    assert torch.equal(*found)


# ---- values that are not finite ----


@each_activation
@each_layout
def test_values_that_are_not_finite(layout, activation):
    """NaN stays NaN, and an infinite gradient is lost where the activation is flat."""
    x = torch.tensor([-8.0, 8.0, math.nan, math.inf]).expand(1, 3, 4)
    x = in_layout(x, layout).to(DEVICE)
    channels = torch.tensor([1.0, 0.0, 0.0], device=DEVICE)[:, None].expand(3, 3).contiguous()
    ones, zeros = torch.ones(1, 3, device=DEVICE), torch.zeros(2, 3, device=DEVICE)
    number = ACTIVATIONS.index(activation)
    y = triton.gated(x, ones, channels, number)
    known = slice(3 if activation == "gelu" else 4)  # PyTorch's GELU of infinity is NaN
    want = FUNCTIONS[activation](x)
    torch.testing.assert_close(y[..., known], want[..., known], equal_nan=True)
    sums = triton.activated_sums(x, x, channels, number, True)
    assert sums[:1].isnan().all()
    if activation not in ("relu", "hardswish"):
        return
    dy = torch.full_like(x, math.inf)
    planes = torch.stack([ones, torch.zeros_like(ones)])
    dx = triton.gated_gradients(dy, x, planes, channels, zeros, number, False)
    assert (dx[..., 0] == 0).all()
    assert (dx[..., 1:] == math.inf).all()  # NaN is not where they are flat
    flat, steep = (t.contiguous() for t in (x[..., :1], x[..., 1:2]))
    sums = triton.activated_sums(torch.full_like(flat, math.inf), flat, channels, number, True)
    assert not sums[1:].any()
    sums = triton.activated_sums(torch.full_like(steep, math.inf), steep, channels, number, True)
    assert (sums[:3] == math.inf).all()


@each_layout
def test_what_is_outside_of_the_map_adds_nothing(layout):
    """There zero times an infinite coefficient would be NaN."""
    x = in_layout(torch.ones(2, 5, 3, device=DEVICE), layout)
    infinite = torch.tensor([math.inf, 0.0, 0.0], device=DEVICE)[:, None].expand(3, 5).contiguous()
    for number in range(len(ACTIVATIONS)):
        if ACTIVATIONS[number] == "gelu":
            continue  # of infinity it is NaN
        assert (triton.activated_sums(None, x, infinite, number, False) == math.inf).all()
        assert (triton.activated_sums(x, x, infinite, number, False) == math.inf).all()
    # v is 0 in the map, and outside of it too large for float32.
    x *= 1e20
    large = torch.tensor([1e20, 0.0, 1e20], device=DEVICE)[:, None].expand(3, 5).contiguous()
    for activation in ("silu", "hardswish"):
        number, dy = ACTIVATIONS.index(activation), torch.ones_like(x)
        sums = triton.activated_sums(dy, x, large, number, True)
        assert (sums[[0, 2, 4]] == 0).all()
        assert (sums[[1, 3]] == 1.5).all()  # half of three pixels


def test_what_is_not_asked_for_is_not_read():
    case = Case((2, 5, 9), torch.float32, "contiguous", "silu")
    case.gradient_channels.fill_(math.nan)
    given = {"dy": case.dy, **case.arguments()}
    for by_x in (False, True):
        dx, _ = passes.run("gated_gradients", case.x, case.layout, by_x=by_x, **given).tensors
        assert dx.isnan().all() == by_x
        assert dx.isfinite().all() != by_x


@pytest.mark.parametrize("shape", [(0, 4, 3, 3), (2, 4, 0, 3), (2, 0, 3, 3)])
def test_empty_maps(shape):
    x = torch.randn(shape, device=DEVICE)
    n, c = shape[:2]
    channels, gate, planes, rest = (
        torch.ones(sizes, device=DEVICE) for sizes in ((3, c), (n, c), (2, n, c), (2, c))
    )
    assert triton.gated(x, gate, channels, 1).shape == shape
    assert triton.gated_gradients(x, x, planes, channels, rest, 1, True).shape == shape
    for dy, for_norm in ((None, False), (x, True)):
        sums = triton.activated_sums(dy, x, channels, 1, for_norm)
        assert sums.shape == (5 if for_norm else 1, n, c)
        assert sums.dtype == torch.float64
        assert not sums.any()


# ---- as operators ----


@each_layout
def test_opcheck(layout):
    check = torch.library.opcheck
    case = Case((2, 9, 20), torch.float32, layout)
    x, dy, planes, channels, rest = (
        t.to(DEVICE) for t in (case.x, case.dy, case.planes, case.channels, case.gradient_channels)
    )
    check(triton.activated_sums, (None, x, channels, 1, False))
    check(triton.activated_sums, (dy, x, channels, 4, False))
    check(triton.activated_sums, (dy, x, channels, 4, True))
    check(triton.gated, (x, planes[0], channels, 4))
    for by_x in (True, False):
        check(triton.gated_gradients, (dy, x, planes, channels, rest, 4, by_x))


CHANGES = [
    ("gated", {"gate": lambda t: t[:1]}, "expected gate contiguous, of shape"),
    ("gated", {"gate": lambda t: t.T.contiguous().T}, "expected gate contiguous, of shape"),
    ("gated", {"channels": lambda t: t.double()}, "expected channels contiguous, of shape"),
    ("gated", {"activation": lambda _: 5}, r"expected activation from 0 to 4 \(none, relu, silu"),
    ("gated", {"activation": lambda _: -1}, "expected activation from 0 to 4"),
    ("gated", {"x": lambda t: t[0, 0, 0]}, "expected x of shape"),
    ("activated_sums", {"channels": lambda t: t[:2]}, "expected channels contiguous, of shape"),
    ("activated_sums", {"dy": lambda t: t[:1]}, "expected dy of shape"),
    ("activated_sums", {"dy": lambda _: None}, "expected dy for the sums of a norm's gradients"),
    ("gated_gradients", {"planes": lambda t: t[:1]}, "expected planes contiguous, of shape"),
    ("gated_gradients", {"gradient_channels": lambda t: t[0]}, "expected gradient_channels"),
    ("gated_gradients", {"dy": lambda t: t[..., 1:]}, "expected dy of shape"),
]


@pytest.mark.parametrize(
    ("operator", "change", "message"),
    CHANGES,
    ids=lambda v: next(iter(v)) if isinstance(v, dict) else v if v in dir(triton) else "",
)
def test_operators_refuse_what_does_not_fit(operator, change, message):
    x = torch.randn(2, 4, 3, 3, device=DEVICE)
    sizes = {"gate": (2, 4), "planes": (2, 2, 4), "channels": (3, 4), "gradient_channels": (2, 4)}
    args = {name: torch.ones(shape, device=DEVICE) for name, shape in sizes.items()}
    args |= {"x": x, "dy": x, "activation": 1, "for_norm": True, "by_x": True}
    names = {
        "gated": ("x", "gate", "channels", "activation"),
        "activated_sums": ("dy", "x", "channels", "activation", "for_norm"),
        "gated_gradients": (
            *("dy", "x", "planes", "channels", "gradient_channels", "activation", "by_x"),
        ),
    }[operator]
    ((name, make),) = change.items()
    getattr(triton, operator)(*(args[n] for n in names))
    args[name] = make(args[name])
    with pytest.raises(ValueError, match=message):
        getattr(triton, operator)(*(args[n] for n in names))


# ---- the whole ----

C = 12
ATTENTIONS = {
    "eca": lambda: ECALayer(C),
    "circular": lambda: ECALayer(C, padding_mode="circular"),
    "ECA-NS": lambda: attention.ECANS(C),
    "se": lambda: attention.SE(C, 4),
}


def by_modules(module, x):
    return norm_act.by_calling(module.parts(), x)


@pytest.fixture
def by_triton(monkeypatch):
    """ "auto" means Triton, and calling the modules one after the other is an error."""
    own = norm_act.by_calling

    def fail(*_):
        raise AssertionError("the modules were called")

    monkeypatch.setattr(norm_act, "by_calling", fail)
    monkeypatch.setitem(globals(), "by_modules", lambda module, x: own(module.parts(), x))
    with eca_fused.use_backend("triton"):
        yield


def a_map(layout="contiguous", offset=3.0, dtype=torch.float64, n=3):
    """A map whose channels have means far apart."""
    far = torch.linspace(-offset, offset, C, dtype=torch.float64, device="cpu")[:, None, None]
    g = torch.Generator("cpu").manual_seed(5)
    return in_layout((normal((n, C, 5, 6), g) + far).to(dtype), layout).to(DEVICE)


@each_layout
@pytest.mark.parametrize("name", ATTENTIONS)
def test_values_gradients_and_statistics(name, layout, by_triton):
    for norm, activation in (
        (batch_norm(C), "hardswish"),
        (batch_norm(C, affine=False), "gelu"),
        (batch_norm(C).eval(), "silu"),
        (None, "relu"),
    ):
        module = NormActAttention(ATTENTIONS[name](), norm, activation).to(DEVICE, torch.float64)
        assert_same_step(module, a_map(layout), by=by_modules)


def test_gradients_of_some_tensors(by_triton):
    """One gradient at a time, as torch.autograd.grad(y, inputs) asks for it."""
    module = NormActAttention(ECALayer(C), batch_norm(C)).to(DEVICE, torch.float64)
    twin = copy.deepcopy(module)
    x = a_map().requires_grad_()
    dy = torch.randn_like(x)
    for parameter in [None, *dict(module.named_parameters())]:
        found = [
            torch.autograd.grad(
                function(m, x), x if parameter is None else m.get_parameter(parameter), dy
            )[0]
            for m, function in ((module, lambda m, a: m(a)), (twin, by_modules))
        ]
        torch.testing.assert_close(*found)


@pytest.mark.parametrize("name", ["eca", "se"])
def test_without_gradients(name, by_triton):
    module = NormActAttention(ATTENTIONS[name](), batch_norm(C)).to(DEVICE, torch.float64)
    twin = copy.deepcopy(module)
    x = a_map("channels_last")
    with torch.no_grad():
        torch.testing.assert_close(module(x), by_modules(twin, x))
    torch.testing.assert_close(module.bn.running_var, twin.bn.running_var)


def test_means_for_the_gate_network_of_a_tail(by_triton):
    """Without gradients, they are sums of activated_sums()."""
    tail = ResidualTail(attention.SE(C, 4), batch_norm(C), None).to(DEVICE, torch.float64).eval()
    x = a_map()
    with torch.no_grad():
        torch.testing.assert_close(tail(x, x), called(tail, x, x))


@each_layout
def test_never_less_accurate_than_plain_pytorch(layout, by_triton):
    """Also for means of 1e4 standard deviations. The floor is one rounding to the dtype, and 8
    units of float32 for everything in it."""
    module = NormActAttention(ECALayer(C), batch_norm(C), "silu").to(DEVICE)
    for dtype, offset in ((torch.bfloat16, 0.0), (torch.float32, 1e4)):
        x, dy = a_map(layout, offset, dtype), a_map(layout, 0.0, dtype).roll(1, 0)

        def step(module, function, given, dy=dy):
            given = given.detach().requires_grad_()
            y = function(module, given)
            grads = torch.autograd.grad(y, [given, *module.parameters()], dy.to(y.dtype))
            return [y.detach(), *grads]

        ours = step(copy.deepcopy(module), lambda m, a: m(a), x)
        usual = step(copy.deepcopy(module), by_modules, x)
        exact = step(copy.deepcopy(module).double(), by_modules, x.double())
        for got, plain, want in zip(ours, usual, exact, strict=True):
            error, plain_error = ((t.double() - want).square().mean().sqrt() for t in (got, plain))
            size = want.square().mean().sqrt()
            eps = torch.finfo(got.dtype).eps / 2 + 8 * torch.finfo(torch.float32).eps
            assert error <= plain_error + eps * size
            if offset:
                assert error < 1e-5 * size


def test_no_compiled_library_is_needed(by_triton, monkeypatch):
    """A pure Python installation has it too."""
    for name in ("batch_moments", "activated_sums", "gated", "gated_gradients", "gated_block"):
        monkeypatch.setattr(native, name, None, raising=False)
    module = NormActAttention(ECALayer(C), nn.BatchNorm2d(C)).to(DEVICE)
    x = a_map(dtype=torch.float32).requires_grad_()
    module(x).sum().backward()
    assert x.grad.shape == x.shape


@pytest.mark.skipif(DEVICE == "cpu", reason="needs a GPU")
class TestOnGpu:
    @each_layout
    @pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
    @pytest.mark.parametrize(
        "shape", [(4, 256, 3136), (4, 1024, 196), (4, 2048, 49), (2, 64, 50176)], ids=name_of
    )
    def test_shapes(self, shape, dtype, layout):
        for activation in ("hardswish", "gelu"):
            check_all(passes, Case(shape, dtype, layout, activation))
