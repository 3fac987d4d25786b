"""residual_tail(): values, gradients of any order, memory, errors, compilers, transforms."""

import itertools

import pytest
import torch
from torch import Tensor

import eca_fused
from eca_fused.autograd.tail import Saved, backward_in_steps
from eca_fused.ops import native
from eca_fused.ops.results import output_strides
from eca_fused.ops.tail import WITH_GRADIENT, TailOptions, TailTensors
from helpers.cases import (
    BACKENDS,
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
)
from helpers.tails import TailCase, fused, make_tail, plain, run_tail

pytestmark = pytest.mark.any_device

NAMES = [*BACKENDS, "reference"]
ACTIVATIONS = ("none", "relu", "silu", "gelu")
GATES = ("taps", "given", "one")
ops = torch.ops.eca_fused
each_backend = pytest.mark.parametrize("backend", NAMES)
# Triton's interpreter takes minutes for calls that repeat so often.
but_triton = pytest.mark.parametrize("backend", [n for n in NAMES if n != "triton"])


def assert_same(case: TailCase, backend: str = "auto") -> None:
    """In float64 the results are plain PyTorch's."""
    for got, want in zip(run_tail(fused(backend), case), run_tail(plain, case), strict=True):
        torch.testing.assert_close(got, want)


# ---- values and gradients ----


@each_backend
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("gate", GATES)
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_every_shape(activation, gate, layout, backend):
    for shape, with_identity, with_scale in itertools.product(SHAPES, (True, False), (False, True)):
        assert_same(
            make_tail(shape, torch.float64, layout, gate, with_identity, with_scale, activation),
            backend,
        )


@each_backend
@pytest.mark.parametrize("layout", LAYOUTS)
def test_taps(layout, backend):
    for mode, own in itertools.product(("zeros", "circular"), (False, True)):
        case = make_tail((3, 40, 5, 6), layout=layout, padding_mode=mode, own_taps=own)
        assert_same(case, backend)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("shape", [(3, 24, 7, 7), (2, 300, 3, 3), (5, 7, 40, 40)], ids=name_of)
def test_any_number_of_threads_gives_the_same_bits(shape, layout, threads):
    case = make_tail(shape, torch.float32, layout, with_scale=True)
    ours = run_tail(fused(), case)
    torch.set_num_threads(1)
    for got, want in zip(ours, run_tail(fused(), case), strict=True):
        assert torch.equal(got, want)


def terms(case: TailCase) -> tuple[Tensor, Tensor]:
    """The magnitude of the terms of v, and of dx: the scale of their rounding errors."""
    x, dy = case.x.double().abs(), case.dy.double().abs()
    gate = 1.0 if case.gate is None else case.gate.double().abs()[:, :, None, None]
    scale = 1.0 if case.scale is None else case.scale.double().abs()[:, None, None, None]
    v = gate * scale * x + (0 if case.identity is None else case.identity.double().abs())
    g = dy * 1.13  # the largest slope of an activation, GELU's
    return v, gate * scale * (g + (g * x).mean((2, 3), keepdim=True) / 4 * 3)


@needs_extension
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("gate", GATES)
def test_rounds_once(gate, activation, dtype, layout):
    """The floor of assert_near(): one rounding to the dtype, everything else in float32.

    GELU's cumulative distribution is within 1e-7, about one unit of float32 more.
    """
    case = make_tail((3, 20, 9, 9), dtype, layout, gate, True, True, activation)
    ours, exact = run_tail(fused("native"), case), run_tail(plain, case, torch.float64)
    accumulator = torch.float64 if dtype == torch.float64 else torch.float32
    of_v, of_dx = terms(case)
    assert_near("y", ours[0], exact[0], of_v, dtype, accumulator)
    kept = exact[0] != 0 if activation == "relu" else torch.ones_like(of_v, dtype=torch.bool)
    # At a kink the sign of v decides, and it is rounded.
    sure = (ours[0] != 0) == kept if activation == "relu" else kept
    assert sure.float().mean() > 0.999
    assert_near("dx", ours[1][sure], exact[1][sure], of_dx[sure], dtype, accumulator)


@pytest.mark.parametrize("name", READ_IN_PLACE)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_slices_are_read_in_place(layout, name):
    case = make_tail((5, 12, 6, 7), torch.float64, layout)
    view = READ_IN_PLACE[name]
    sliced = TailCase(
        view(case.x), view(case.identity), case.weight, None, None, view(case.dy), "relu"
    )
    assert_same(sliced)


@pytest.mark.parametrize("name", VIEWS)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("which", ["x", "identity", "dy"])
def test_views(which, layout, name):
    case = make_tail((3, 8, 6, 6), torch.float64, layout, activation="silu")
    of = VIEWS[name]
    like = of(case.x)
    maps = {
        key: of(t) if key == which else in_layout(of(t).clone(), "channels_last")
        for key, t in (("x", case.x), ("identity", case.identity), ("dy", case.dy))
    }
    sliced = TailCase(maps["x"], maps["identity"], case.weight, None, None, maps["dy"], "silu")
    assert_same(sliced)
    y = eca_fused.residual_tail(maps["x"], maps["identity"], case.weight)
    assert y.shape == like.shape
    assert y.stride() == output_strides(maps["x"])


@each_backend
def test_empty_maps(backend):
    for shape in [(0, 4, 3, 3), (2, 4, 0, 3)]:
        x = torch.randn(shape, device=DEVICE, requires_grad=True)
        y = eca_fused.residual_tail(x, x.detach(), torch.ones(1, 1, 3), backend=backend)
        (dx,) = torch.autograd.grad(y.sum(), x)
        assert y.shape == dx.shape == shape


@pytest.mark.parametrize("activation", ["none", "relu"])
def test_nan_and_infinity_spread_as_in_plain_pytorch(activation):
    for value in (float("nan"), float("inf"), -float("inf")):
        for place in ("x", "identity", "dy"):
            case = make_tail((2, 5, 4, 4), torch.float32, activation=activation)
            getattr(case, place)[1, 2, 3, 0] = value
            for got, want in zip(run_tail(fused(), case), run_tail(plain, case), strict=True):
                assert torch.equal(got.isnan(), want.isnan())
                assert torch.equal(got.isinf(), want.isinf())


def test_a_number_as_scale():
    case = make_tail((3, 6, 4, 4))
    same = eca_fused.residual_tail(case.x, case.identity, case.weight, scale=0.25)
    want = plain(case.x, case.identity, case.weight, scale=torch.full((3,), 0.25).double())
    torch.testing.assert_close(same, want)


@each_backend
def test_the_identity_may_be_what_x_was_computed_from(backend):
    case = make_tail((2, 6, 5, 5))

    def gradient(function):
        source = case.x.detach().requires_grad_()
        y = function(source.sin(), source, case.weight)
        return torch.autograd.grad(y, source, case.dy)[0]

    torch.testing.assert_close(gradient(fused(backend)), gradient(plain))


# ---- gradients of gradients, transforms ----


def smooth(gate: str) -> TailCase:
    return make_tail((2, 4, 3, 3), gate=gate, with_scale=True, activation="silu")


@but_triton
@pytest.mark.parametrize("gate", GATES)
def test_gradcheck(gate, backend):
    case = smooth(gate)

    def function(*tensors):
        given = dict(zip(("x", "identity", *names), tensors, strict=True))
        return eca_fused.residual_tail(
            given["x"],
            given["identity"],
            given.get("weight"),
            gate=given.get("gate"),
            scale=given["scale"],
            activation="silu",
            backend=backend,
        )

    names = [n for n in ("weight", "gate", "scale") if getattr(case, n) is not None]
    tensors = tuple(t.requires_grad_() for t in case.tensors())
    assert torch.autograd.gradcheck(function, tensors)
    assert torch.autograd.gradgradcheck(function, tensors)


@each_backend
@pytest.mark.parametrize("gate", GATES)
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_second_order(activation, gate, backend):
    """Also where the identity is not kept, and where it needs no gradient."""
    for with_identity, needs in ((False, False), (True, False), (True, True)):
        case = make_tail((2, 4, 3, 3), gate=gate, with_scale=True, activation=activation)
        names = ["x", "weight", "gate", "scale"] + ["identity"] * needs

        def second(function, case=case, names=names, with_identity=with_identity):
            given = {n: getattr(case, n) for n in ("x", "identity", "weight", "gate", "scale")}
            if not with_identity:
                given["identity"] = None
            given = {
                n: t if t is None else t.detach().requires_grad_(n in names)
                for n, t in given.items()
            }
            asked = [t for n, t in given.items() if t is not None and n in names]
            rest = {n: given[n] for n in ("gate", "scale")}
            maps = (given["x"], given["identity"], given["weight"])
            y = function(*maps, **rest, activation=case.activation)
            first = torch.autograd.grad(y, asked, case.dy, create_graph=True)
            two = torch.stack([case.dy, case.x])
            both = torch.autograd.grad(y, asked, two, is_grads_batched=True, retain_graph=True)
            loss = sum(g.square().sum() for g in first)
            return [*first, *both, *torch.autograd.grad(loss, asked, materialize_grads=True)]

        results = second(fused(backend)), second(plain)
        for got, want in zip(*results, strict=True):
            torch.testing.assert_close(got, want)


@pytest.mark.parametrize("transform", ["grad", "vmap", "jvp", "hessian", "batched gradients"])
def test_transforms(transform):
    case = make_tail((3, 4, 3, 3), activation="silu")

    def loss(function, x):
        return (function(x, case.identity, case.weight, activation="silu") * case.dy).sum()

    def result(function):
        if transform == "grad":
            return torch.func.grad(lambda x: loss(function, x))(case.x)
        if transform == "vmap":
            maps = torch.stack([case.x, case.x * 2])
            return torch.vmap(lambda x: function(x, case.identity, case.weight))(maps)
        if transform == "jvp":
            return torch.func.jvp(
                lambda x: function(x, case.identity, case.weight), (case.x,), (case.dy,)
            )
        if transform == "hessian":
            one = case.x[:1]
            return torch.func.hessian(
                lambda x: function(x, None, case.weight, activation="silu").sum()
            )(one)
        x = case.x.detach().requires_grad_()
        y = function(x, case.identity, case.weight, activation="silu")
        return torch.autograd.grad(y, x, torch.stack([case.dy, case.x]), is_grads_batched=True)

    torch.testing.assert_close(result(fused()), result(plain))


def test_per_sample_gradients():
    case = make_tail((4, 6, 5, 5))

    def gradients(function):
        def loss(weight, x, identity):
            return function(x[None], identity[None], weight).square().sum()

        return torch.vmap(torch.func.grad(loss), (None, 0, 0))(case.weight, case.x, case.identity)

    torch.testing.assert_close(gradients(fused()), gradients(plain))


# ---- memory ----


def kept_bytes(function, case: TailCase) -> int:
    storages = {}

    def pack(t: Tensor) -> Tensor:
        storages[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
        return t

    given = [t.detach().requires_grad_() for t in (case.x, case.identity, case.weight)]
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        y = function(*given)
    assert y.requires_grad
    return sum(storages.values())


@needs_extension
@pytest.mark.parametrize("layout", LAYOUTS)
def test_keeps_x_and_one_bit_for_each_element(layout):
    case = make_tail((4, 16, 32, 32), torch.float32, layout)
    planes = 4 * 16
    one_map = planes * 32 * 32 * 4
    # x, the mask, and per plane: mean, gate and at most 16 bytes of other numbers
    assert kept_bytes(fused("native"), case) <= one_map + one_map // 32 + planes * 24 + 1024
    assert kept_bytes(plain, case) >= 2 * one_map


def test_nothing_is_written_without_a_gradient():
    case = make_tail((2, 8, 4, 4), torch.float32)
    with torch.no_grad():
        y = fused()(case.x, case.identity, case.weight)
    assert not y.requires_grad
    torch.testing.assert_close(y, fused()(case.x, case.identity, case.weight))


# ---- out ----


@each_backend
@pytest.mark.parametrize("layout", LAYOUTS)
def test_out(layout, backend):
    case = make_tail((3, 8, 6, 6), torch.float32, layout)
    want = plain(case.x, case.identity, case.weight)
    larger = torch.zeros(3, 12, 6, 6, device=DEVICE)
    for out in (torch.empty_like(want), larger[:, 2:10], case.x.clone()):
        with torch.no_grad():
            got = eca_fused.residual_tail(
                case.x, case.identity, case.weight, backend=backend, out=out
            )
        assert got is out
        torch.testing.assert_close(out, want)
    x, identity = case.x.clone(), case.identity.clone()
    for target in (x, identity):
        own = {"x": x.clone(), "identity": identity.clone()}
        name = "x" if target is x else "identity"
        eca_fused.residual_tail(
            own["x"], own["identity"], case.weight, backend=backend, out=own[name]
        )
        torch.testing.assert_close(own[name], want)


def test_out_has_no_gradient():
    case = make_tail((2, 4, 3, 3))
    for name in ("x", "identity", "weight"):
        given = {n: getattr(case, n).detach() for n in ("x", "identity", "weight")}
        given[name].requires_grad_()
        with pytest.raises(RuntimeError, match="out= has no gradient"):
            eca_fused.residual_tail(*given.values(), out=torch.empty_like(case.x))


# ---- errors ----


@each_backend
@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"identity": lambda c: c.identity[:, :3]}, ValueError, "identity of the shape"),
        ({"identity": lambda c: c.identity.double()}, TypeError, "identity of torch.float32"),
        ({"identity": lambda c: 1.0}, TypeError, "identity as a torch.Tensor"),
        ({"gate": lambda c: c.x[:, :, 0, 0]}, ValueError, "taps or gates, got both"),
        ({"weight": lambda c: c.weight[:, :, :2]}, ValueError, "odd number of taps"),
        ({"scale": lambda c: c.x[:, 0, 0, 0][:1]}, ValueError, r"scale of shape \(N,\) = \(2,\)"),
        ({"scale": lambda c: torch.ones(2, dtype=torch.int64)}, TypeError, "scale of dtype"),
        ({"activation": lambda c: "tanh"}, ValueError, "activation as one of none, relu, silu"),
        ({"padding_mode": lambda c: "same"}, ValueError, "padding_mode 'zeros' or 'circular'"),
        ({"x": lambda c: c.x[0, 0, 0], "identity": lambda c: None}, ValueError, "x of shape"),
        ({"out": lambda c: c.x[:, :2]}, ValueError, "out of the shape"),
    ],
    ids=lambda v: next(iter(v)) if isinstance(v, dict) else None,
)
def test_errors(change, error, message, backend):
    case = make_tail((2, 4, 3, 3), torch.float32)
    given = {"x": case.x, "identity": case.identity, "weight": case.weight}
    given |= {name: make(case) for name, make in change.items()}
    with pytest.raises(error, match=message):
        eca_fused.residual_tail(**given, backend=backend)


def test_gates_and_scales_of_a_subclass():
    class Named(torch.Tensor):
        pass

    x, gate, scale = torch.randn(2, 4, 3, 3), torch.rand(2, 4), torch.rand(2)
    want = eca_fused.residual_tail(x, None, None, gate=gate, scale=scale)
    for given in ({"gate": gate.as_subclass(Named)}, {"scale": scale.as_subclass(Named)}):
        y = eca_fused.residual_tail(x, None, None, **{"gate": gate, "scale": scale, **given})
        assert type(y) is Named
        torch.testing.assert_close(y.as_subclass(torch.Tensor), want)


def test_gates_of_another_shape():
    case = make_tail((2, 4, 3, 3), torch.float32)
    with pytest.raises(ValueError, match=r"gate of shape \(N, C\)"):
        eca_fused.residual_tail(case.x, None, None, gate=case.x[:1, :, 0, 0])


# ---- compilers, autocast ----


@pytest.mark.parametrize("gate", GATES)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_compile_in_one_graph(layout, gate):
    case = make_tail((2, 16, 8, 8), torch.float32, layout, gate, True, True)
    exact = run_tail(plain, case, torch.float64)
    torch._dynamo.reset()
    compiled = torch.compile(fused(), fullgraph=True)
    for got, ours, want in zip(
        run_tail(compiled, case), run_tail(fused(), case), exact, strict=True
    ):
        error = (ours.double() - want).abs().max()
        # In another order of additions; as in assert_near(), 8 units of float32.
        floor = 8 * torch.finfo(torch.float32).eps * want.abs().max()
        assert (got.double() - want).abs().max() <= 2 * error + floor


@needs_extension
@pytest.mark.skipif(DEVICE != "cpu", reason='"auto" differs on the CPU')
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("backend", ["auto", "native"])
def test_compiled_training_calls_the_kernels(backend, layout):
    """Without gradients, or with contiguous maps, "auto" leaves the tail to the compiler."""
    case = make_tail((2, 16, 8, 8), torch.float32, layout)
    torch._dynamo.reset()
    compiled = torch.compile(fused(backend), fullgraph=True, backend="aot_eager")

    def called(run):
        run()  # compiles
        with torch.profiler.profile() as profile:
            run()
        return {e.key for e in profile.key_averages() if e.key.startswith("eca_fused::")}

    trained = called(lambda: run_tail(compiled, case))
    if backend == "native" or layout == "channels_last":
        assert trained >= {"eca_fused::block_tail", "eca_fused::block_tail_backward"}
    else:
        assert not any("tail" in name for name in trained)
    with torch.no_grad():
        found = called(lambda: compiled(case.x, case.identity, case.weight))
    assert found == ({"eca_fused::tail_inference"} if backend == "native" else set())


def test_autocast_takes_half_precision_taps():
    case = make_tail((2, 8, 6, 6), torch.float32)
    with torch.autocast(DEVICE, torch.bfloat16):
        y = eca_fused.residual_tail(case.x, case.identity, case.weight.bfloat16())
    want = plain(case.x, case.identity, case.weight.bfloat16().float())
    torch.testing.assert_close(y, want)


def test_export():
    case = make_tail((2, 8, 6, 6), torch.float32)

    class Module(torch.nn.Module):
        def forward(self, x, identity, weight):
            return eca_fused.residual_tail(x, identity, weight)

    given = (case.x, case.identity, case.weight)
    exported = torch.export.export(Module(), given)
    torch.testing.assert_close(exported.module()(*given), plain(*given))


@needs_extension
def test_trace():
    case = make_tail((2, 8, 6, 6), torch.float32)
    given = (case.x, case.identity, case.weight)
    traced = torch.jit.trace(lambda *a: eca_fused.residual_tail(*a, backend="native"), given)
    other = make_tail((2, 8, 6, 6), torch.float32, seed=1)
    again = (other.x, other.identity, other.weight)
    torch.testing.assert_close(traced(*again), plain(*again))


# ---- the operators ----


@needs_extension
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("activation", range(4))
def test_opcheck(activation, layout):
    for shape, dtype in (((2, 8), torch.float64), ((2, 9, 4, 5), torch.float32)):
        case = make_case(shape, dtype=dtype, layout=layout)
        x, n, c = case.x, *shape[:2]
        planes, channels = x.new_ones(2, n, c), x.new_ones(3, c)
        check = torch.library.opcheck
        check(ops.moments, (x,))
        check(ops.tail, (x, x, planes, channels, activation, True))
        _, mask = ops.tail(x, x, planes, channels, activation, True)
        args = (case.dy, x, x, mask, planes, channels)
        check(ops.tail_sums, (*args, activation, True))
        rest = (x.new_ones(2, n, c), x.new_ones(4, c), activation)
        for flags in itertools.product((True, False), repeat=2):
            check(ops.tail_gradients, (*args, *rest, True, True, *flags))
        if DEVICE not in native.one_pass_tail_devices:
            continue
        block = (case.weight, x.new_ones(n), x.new_ones(6, c))
        check(ops.block_tail, (x, x, *block, False, activation, True))
        _, mask, distance, gate = ops.block_tail(x, x, *block, False, activation, True)
        backward = (case.dy, x, x, mask, *block, distance, gate, False, activation)
        check(ops.block_tail_backward, (*backward, True, True, True, True))


@needs_extension
@pytest.mark.skipif(DEVICE not in native.one_pass_tail_devices, reason="needs tails in one pass")
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("shape", [(2, 16, 7, 7), (1, 256, 56, 56)], ids=str)
def test_saved_numbers_may_begin_anywhere(shape, layout):
    """Kernels may read 16 bytes of gates and of numbers of channels at a time."""
    case = make_case(shape, dtype=torch.bfloat16, layout=layout)
    channels = torch.randn(6, shape[1], device=DEVICE)
    block = (case.weight, None, channels)
    _, mask, distance, gate = ops.block_tail(case.x, case.x, *block, False, 1, True)

    def moved(t):
        return t.new_empty(t.numel() + 1)[1:].view(t.shape).copy_(t)

    def gradients(move):
        given = (case.weight, None, move(channels), distance, move(gate))
        rest = (False, 1, False, True, True, True)
        return ops.block_tail_backward(case.dy, case.x, case.x, mask, *given, *rest)

    for got, want in zip(gradients(moved), gradients(lambda t: t), strict=True):
        assert torch.equal(got, want)


def operands_between_passes(
    n: int, c: int, dtype: torch.dtype
) -> tuple[Tensor, Tensor, dict[str, Tensor], tuple[object, ...], tuple[object, ...]]:
    """x, the moments, tensors of planes, and the norms of x and the identity."""
    x = torch.randn(n, c, 3, 5).to(dtype)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    planes = {
        "weight": torch.randn(1, 1, 3).to(wide),
        "means": torch.randn(n, c, dtype=torch.float64),
        "gate": torch.rand(n, c).to(dtype),
        "scale": torch.rand(n).to(wide),
        "distance": torch.randn(n, c).to(wide),
        "dmean": torch.randn(n, c).to(wide),
    }
    norms = [
        (torch.randn(c), torch.rand(c) + 1, torch.randn(c).to(dtype), torch.randn(c), 1e-5)
        for _ in range(2)
    ]
    return x, torch.rand(2, n, c, dtype=torch.float64), planes, *norms


@needs_extension
@pytest.mark.skipif(DEVICE != "cpu", reason="the kernels of tails run on the CPU")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_opcheck_between_the_passes(dtype):
    x, found, t, own, other = operands_between_passes(2, 6, dtype)
    none, check = (None,) * 4, torch.library.opcheck
    check(ops.batch_statistics, (found, 15))
    taps = (t["weight"], t["means"], None, t["scale"])
    for given in (taps, (None, t["means"], t["gate"], None), none):
        for flags in ((True, True), (False, True)):
            check(ops.tail_coefficients, (x, *given, *own, *other, *flags))
    check(ops.tail_coefficients, (x, *none, *own, *other, False, False))
    sums = torch.randn(3, *x.shape[:2], dtype=torch.float64)
    with_taps = (t["weight"], t["gate"], t["scale"], None, t["distance"])
    with_gate = (None, t["gate"], t["scale"], t["dmean"], t["distance"])
    for given, flags in itertools.product((with_taps, with_gate), ((True,) * 3, (False,) * 3)):
        check(ops.tail_totals, (x, sums, *given, *own, False, *flags))
    totals = ops.tail_totals(x, sums, *with_gate, *own, *(False,) * 4)[0]
    for given in ((totals, None), (totals, totals), (None, None)):
        for needed in (True, False):
            rest = (5.0, 0.0, t["gate"], None, t["dmean"], *own, *other, needed)
            check(ops.tail_gradient_coefficients, (x, *given, *rest))


@needs_extension
@pytest.mark.skipif(DEVICE != "cpu", reason="the kernels of tails run on the CPU")
def test_no_samples_between_the_passes():
    x, _, t, own, other = operands_between_passes(0, 6, torch.float32)
    taps = (t["weight"], t["means"], None, t["scale"], *own, *other, False, True)
    assert ops.tail_coefficients(x, *taps)[0].shape == (2, 0, 6)
    given = (t["weight"], t["gate"], t["scale"], None, t["distance"], *own, False, *(True,) * 3)
    sums = torch.zeros(3, 0, 6, dtype=torch.float64)
    totals, _, _, _, dweight = ops.tail_totals(x, sums, *given)
    assert torch.equal(totals, torch.zeros(4, 6, dtype=torch.float64))
    assert not dweight.any()
    rest = (0.0, 0.0, None, None, None, *own, *other, True)
    for gradient in ops.tail_gradient_coefficients(x, totals, None, *rest)[2:]:
        assert not gradient.any()


@needs_extension
@pytest.mark.skipif(DEVICE != "cpu", reason="the operands are made on the CPU")
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("gate", ["taps", "given", "none"])
def test_the_operator_of_inference_equals_those_of_training(gate, dtype, layout):
    x, _, t, own, other = operands_between_passes(2, 9, dtype)
    x = in_layout(x, layout)
    identity = torch.randn_like(x)
    weight = t["weight"] if gate == "taps" else None
    given = t["gate"] if gate == "given" else None
    for norms, scale in itertools.product(
        ((own, other), (((None,) * 4 + (0.0,)),) * 2), (None, t["scale"])
    ):
        means = None if weight is None else ops.moments(x)[0]
        planes, channels, _, _ = ops.tail_coefficients(
            x, weight, means, given, scale, *norms[0], *norms[1], False, True
        )
        want = ops.tail(x, identity, planes, channels[3:], 1, True)[0]
        for found in {id(m): m for m in (means, None)}.values():
            args = (x, identity, weight, found, given, scale, *norms[0], *norms[1], False, 1)
            torch.library.opcheck(ops.tail_inference, args)
            y = ops.tail_inference(*args)
            assert y.stride() == want.stride()
            if found is not None or weight is None:
                assert torch.equal(y, want)
            else:  # means in float32, not in float64
                torch.testing.assert_close(y, want)


@needs_extension
@pytest.mark.skipif(DEVICE != "cpu", reason="the operands are made on the CPU")
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("gate", ["taps", "given", "none"])
@pytest.mark.parametrize("batch", [True, False], ids=["batch", "running"])
def test_the_operators_of_a_direction_equal_their_steps(batch, gate, dtype, layout):
    x, _, t, own, other = operands_between_passes(2, 9, dtype)
    x = in_layout(x, layout)
    identity, dy = torch.randn_like(x), torch.randn_like(x)
    means = ops.moments(x)[0]
    weight = t["weight"] if gate == "taps" else None
    given = t["gate"] if gate == "given" else None
    absent = ((None,) * 4 + (0.0,),) * 2
    for norms, scale in itertools.product(((own, other), absent), (None, t["scale"])):
        (mean, variance, gamma, beta, eps), (imean, ivariance, igamma, ibeta, ieps) = norms
        tensors = TailTensors(
            x, identity, weight, given, scale, gamma, beta, igamma, ibeta,
            mean, variance, imean, ivariance,
        )  # fmt: skip
        values = 30.0 if batch and mean is not None else None
        options = TailOptions("relu", False, eps, ieps, values, values)
        args = (x, identity, weight, None if weight is None else means, given, scale, *norms[0])
        args = (*args, *norms[1], False, 1)
        if scale is not None:
            torch.library.opcheck(ops.tail_training, args)
        y, *saved = ops.tail_training(*args)
        planes, channels, made, distance = ops.tail_coefficients(*args[:1], *args[2:-1], True)
        want = (*ops.tail(x, identity, planes, channels[3:], 1, True), planes, channels[3:])
        for ours, theirs in zip((y, *saved), (*want, made, distance), strict=True):
            assert torch.equal(ours, theirs)
            assert ours.stride() == theirs.stride()
        present = [s is not None for s in tensors[:WITH_GRADIENT]]
        for asked in (present, [*present[:2], *(False,) * 7], [False] * 2 + present[2:]):
            needed = tuple(asked)
            mask, planes, channels, made, distance = saved
            gates = made if weight is not None else given
            number = 0.0 if values is None else values
            call = (
                dy, x, identity, mask, planes, channels, weight,
                gates, scale, distance, *norms[0], *norms[1],
                number, number, False, 1, sum(need << i for i, need in enumerate(needed)),
            )  # fmt: skip
            if needed[0] and scale is not None:  # it takes long
                torch.library.opcheck(ops.tail_backward, call)
            steps = Saved(mask, planes, channels, gates, distance)
            wanted = backward_in_steps(dy, tensors, options, native, steps, needed)
            found = ops.tail_backward(*call)
            for ours, theirs, need in zip(found, wanted, needed, strict=True):
                if need:
                    assert torch.equal(ours, theirs)
                    assert ours.stride() == theirs.stride()


@needs_extension
@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_moments_of_a_batch(layout):
    x = in_layout(torch.randn(3, 9, 4, 5), layout).to(DEVICE)
    planes, mean, variance = ops.batch_moments(x)
    assert torch.equal(planes, ops.moments(x))
    for ours, theirs in zip((mean, variance), ops.batch_statistics(planes, 20), strict=True):
        assert torch.equal(ours, theirs)
    if DEVICE == "cpu":
        torch.library.opcheck(ops.batch_moments, (x,))
    with pytest.raises(RuntimeError, match="for a map with elements"):
        ops.batch_moments(x[:0])


@needs_extension
@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
def test_the_moments_update_running_statistics(dtype):
    """As torch.nn.functional.batch_norm() does; there in the dtype of x, here in float64."""
    x = torch.randn(3, 9, 4, 5).to(DEVICE)
    running = [torch.randn(9).to(DEVICE, dtype), torch.rand(9).to(DEVICE, dtype)]
    for factor in (0.0, 0.25, 1.0):
        wide = [t.double().clone() for t in running]
        torch.nn.functional.batch_norm(x.double(), *wide, training=True, momentum=factor)
        ours = [t.clone() for t in running]
        ops.batch_moments(x, *ours, factor)
        for got, want in zip(ours, wide, strict=True):
            torch.testing.assert_close(got, want.to(dtype))
        half = [running[0].clone(), None]
        ops.batch_moments(x, *half, factor)
        assert torch.equal(half[0], ours[0])
    if DEVICE == "cpu":
        torch.library.opcheck(ops.batch_moments, (x, *running, 0.25))
    before = running[1].clone()
    for mean, message in (
        (running[0][:8], r"expected running_mean of shape \(9\)"),
        (running[0].repeat_interleave(2)[::2], "expected running_mean contiguous"),
        (running[0].long(), "running_mean"),
    ):
        with pytest.raises(RuntimeError, match=message):
            ops.batch_moments(x, mean, running[1], 0.5)
    assert torch.equal(running[1], before)


@needs_extension
def test_the_backward_operator_refuses_unknown_gradients():
    x = torch.randn(2, 6, 3, 5).to(DEVICE)
    none = (None,) * 4
    y, mask, planes, channels, *_ = ops.tail_training(x, x, *none, *none, 0.0, *none, 0.0, False, 1)
    args = (y, x, x, mask, planes, channels, *none, *none, 0.0, *none, 0.0, 0.0, 0.0, False, 1)
    for needed in (-1, 1 << WITH_GRADIENT):
        with pytest.raises(RuntimeError, match="expected needed as 9 bits"):
            ops.tail_backward(*args, needed)


@needs_extension
@pytest.mark.skipif(DEVICE != "cpu", reason="the kernels of tails run on the CPU")
def test_operators_between_the_passes_refuse_what_does_not_fit():
    x, found, t, own, other = operands_between_passes(2, 6, torch.float32)
    none = (None,) * 4
    with pytest.raises(RuntimeError, match=r"expected planes \(2, N, C\)"):
        ops.batch_statistics(found.float(), 15)
    gamma = (own[0], own[1], torch.ones(5), None, 1e-5)
    with pytest.raises(RuntimeError, match=r"expected gamma of shape \(6\)"):
        ops.tail_coefficients(x, *none, *gamma, *other, False, True)
    with pytest.raises(RuntimeError, match="expected a mean and a variance, or neither"):
        ops.tail_coefficients(x, *none, own[0], None, None, None, 0.0, *other, False, True)
    with pytest.raises(RuntimeError, match="expected the means of x for taps"):
        ops.tail_coefficients(x, t["weight"], None, None, None, *own, *other, False, True)
    with pytest.raises(RuntimeError, match=r"expected sums of dtype torch\.float64"):
        ops.tail_totals(x, torch.ones(2, 2, 6), None, None, None, None, None, *own, *(False,) * 4)
    both = (None, t["weight"], None, t["gate"], None)
    with pytest.raises(RuntimeError, match="expected taps or a gate, got both"):
        ops.tail_inference(x, *both, *own, *other, False, 1)
    rest = (t["dmean"], None, *own, *(False,) * 4)
    with pytest.raises(RuntimeError, match="expected distance, as the forward operator"):
        ops.tail_totals(x, found, None, t["gate"], None, *rest)


@needs_extension
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"planes": lambda t: t[:1]}, "expected planes contiguous, of shape"),
        ({"channels": lambda t: t.double()}, "expected channels contiguous, of shape"),
        ({"identity": lambda t: t[:, :2]}, "expected identity of shape"),
        ({"activation": lambda t: 7}, "expected activation from 0 to 3"),
    ],
    ids=lambda v: next(iter(v)) if isinstance(v, dict) else None,
)
def test_operators_refuse_what_does_not_fit(change, message):
    x = torch.randn(2, 4, 3, 3)
    args = {
        "x": x,
        "identity": x,
        "planes": torch.ones(2, 2, 4),
        "channels": torch.ones(3, 4),
        "activation": 1,
        "need_mask": True,
    }
    (name, make) = next(iter(change.items()))
    with pytest.raises(RuntimeError, match=message):
        ops.tail(**(args | {name: make(args[name])}))
    with pytest.raises(RuntimeError, match="expected mask as the forward operator returned it"):
        ops.tail_sums(
            x,
            x,
            None,
            torch.empty(1, dtype=torch.uint8),
            args["planes"],
            args["channels"],
            1,
            False,
        )


def test_the_ways_without_kernels_do_not_claim_them():
    assert native.one_pass_tail_devices <= native.tail_devices <= native.devices


@needs_extension
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("own", [False, True], ids=["shared", "own"])
def test_devices_without_the_operator_that_does_all_in_one_pass(
    monkeypatch, layout, activation, own
):
    case = make_tail((3, 12, 5, 6), layout=layout, activation=activation, own_taps=own)
    monkeypatch.setattr(native, "one_pass_tail_devices", frozenset())
    monkeypatch.setattr(native, "block_tail", None)
    assert_same(case, "native")
    with torch.no_grad():
        y = fused("native")(case.x, case.identity, case.weight, activation=activation)
    torch.testing.assert_close(y, plain(case.x, case.identity, case.weight, activation=activation))
