"""pool() and rescale(), and attention on them: values, gradients, memory, errors, compilers."""

import copy
import pickle
import warnings

import pytest
import torch
import torch._dynamo.compiled_autograd
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

import eca_fused
from eca_fused import attention
from eca_fused.functional import choice
from eca_fused.ops import native
from eca_fused.ops.backend import select
from eca_fused.ops.results import output_strides
from helpers.cases import (
    BACKENDS,
    DEVICE,
    DTYPES,
    LAYOUTS,
    SHAPES,
    VIEWS,
    Case,
    assert_near,
    in_layout,
    make_case,
    name_of,
    needs_extension,
    normal,
)
from helpers.programs import called, needs_onnx, onnx_session
from helpers.random_views import random_case

pytestmark = pytest.mark.any_device

NAMES = [*BACKENDS, "reference"]
each_backend = pytest.mark.parametrize("backend", BACKENDS)


def sums_dtype(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def spread(values: Tensor, x: Tensor) -> Tensor:
    return values.reshape(values.shape + (1,) * (x.dim() - 2))


def total(x: Tensor) -> Tensor:
    return x.sum(tuple(range(2, x.dim()))) if x.dim() > 2 else x


def make_gate(case: Case, dtype: torch.dtype | None = None) -> Tensor:
    g = torch.Generator().manual_seed(1)
    return normal(tuple(case.x.shape[:2]), g).sigmoid().to(dtype or case.x.dtype).to(DEVICE)


def check(case: Case, gate: Tensor, backend: str) -> None:
    """Both functions and their gradients, each as close to float64 as its dtype allows.

    A sum has about 8 roundings, relative to its terms, as in assert_as_accurate(). The result has
    one, and dmean / S one more, as it is computed in the dtype of x.
    """
    x, dy = case.x.detach().requires_grad_(), case.dy
    gate = gate.detach().requires_grad_()
    v, g, a = x.detach().double(), dy.double(), gate.detach().double()
    pixels = max(v[0, 0].numel(), 1) if v.shape[0] and v.shape[1] else 1

    mean = eca_fused.pool(x, backend=backend)
    (from_mean,) = torch.autograd.grad(mean, x, gate.detach().to(mean.dtype))
    y = eca_fused.rescale(x, gate, backend=backend)
    dx, dgate = torch.autograd.grad(y, (x, gate), dy)
    assert mean.is_contiguous()
    assert y.stride() == dx.stride() == output_strides(x)

    near = {"accumulator": sums_dtype(x)}
    assert_near("mean", mean, total(v) / pixels, total(v.abs()) / pixels, x.dtype, **near)
    assert_near("y", y, spread(a, v) * v, v, x.dtype, **near)
    assert_near("dx", dx, spread(a, v) * g, g, x.dtype, **near)
    assert_near("dgate", dgate, total(g * v), total((g * v).abs()), gate.dtype, **near)
    given = gate.detach().to(mean.dtype).double() / pixels
    want = spread(given, v).expand_as(v)
    # A GPU multiplies by the rounded reciprocal of the pixels, as plain PyTorch does there.
    usual = eca_fused.reference.pool(x)
    (usual_from_mean,) = torch.autograd.grad(usual, x, gate.detach().to(usual.dtype))
    near["more"] = float((usual_from_mean.double() - want).abs().max()) if v.numel() else 0.0
    assert_near("dx of the mean", from_mean, want, v * 0, x.dtype, **near)
    with torch.no_grad():
        assert torch.equal(eca_fused.pool(x, backend=backend), mean)
        assert torch.equal(eca_fused.rescale(x, gate, backend=backend), y)


# ---- values and gradients ----


@each_backend
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
@pytest.mark.parametrize("shape", SHAPES, ids=name_of)
def test_shapes(shape, dtype, layout, backend):
    case = make_case(shape, dtype=dtype, layout=layout)
    check(case, make_gate(case), backend)


@each_backend
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("gate_dtype", DTYPES, ids=name_of)
@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
def test_a_gate_of_any_dtype(dtype, gate_dtype, layout, backend):
    case = make_case((2, 12, 6, 5), dtype=dtype, layout=layout)
    check(case, make_gate(case, gate_dtype), backend)
    check(case, make_gate(case, gate_dtype).t().contiguous().t(), backend)  # as after a transpose


@each_backend
@pytest.mark.parametrize("start", range(0, 200, 50))
def test_random_views(start, backend):
    for seed in range(start, start + 50):
        case = random_case(seed)
        if output_strides(case.dy) != output_strides(case.x):
            case.dy = in_layout(case.dy, "contiguous").expand_as(case.x)
        try:
            check(case, make_gate(case), backend)
        except AssertionError as error:
            what = f"seed {seed}: x {tuple(case.x.shape)} {case.x.stride()}, dy {case.dy.stride()}"
            raise AssertionError(what) from error


@each_backend
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=name_of)
@pytest.mark.parametrize(
    "shape", [(1, 16, 128, 128), (3, 40, 37, 41), (16, 6, 50, 50)], ids=name_of
)
def test_any_number_of_threads(shape, dtype, layout, backend, threads):
    assert torch.get_num_threads() == threads
    case = make_case(shape, dtype=dtype, layout=layout)
    check(case, make_gate(case), backend)


@each_backend
@pytest.mark.parametrize(
    ("dtype", "layout"),
    [(torch.float32, "contiguous"), (torch.bfloat16, "channels_last")],
    ids=name_of,
)
def test_map_larger_than_the_caches(dtype, layout, backend):
    # With the usual caches, outputs are streamed from 16 MB on. Rows are not whole lines.
    samples = 20 // dtype.itemsize
    case = make_case((samples, 96, 99, 101), dtype=dtype, layout=layout)
    check(case, make_gate(case), backend)


@each_backend
@pytest.mark.parametrize("layout", LAYOUTS)
def test_bitwise_the_same_on_every_run(layout, backend):
    case = make_case((4, 24, 30, 31), layout=layout)
    x, gate = case.x.requires_grad_(), make_gate(case).requires_grad_()

    def results():
        y = eca_fused.rescale(x, gate, backend=backend)
        return eca_fused.pool(x, backend=backend), y, *torch.autograd.grad(y, (x, gate), case.dy)

    first = results()
    for _ in range(3):
        assert all(torch.equal(a, b) for a, b in zip(first, results(), strict=True))


@each_backend
@pytest.mark.parametrize("shape", [(0, 4, 3, 3), (2, 0, 3, 3), (2, 4, 0, 3), (0, 4)], ids=name_of)
def test_empty_maps(shape, backend):
    x = torch.ones(shape, requires_grad=True)
    gate = torch.ones(shape[:2], requires_grad=True)
    mean, y = eca_fused.pool(x, backend=backend), eca_fused.rescale(x, gate, backend=backend)
    dx, dgate = torch.autograd.grad(y, (x, gate), torch.ones_like(y))
    assert y.shape == dx.shape == shape
    assert torch.equal(dgate, torch.zeros(shape[:2]))
    torch.testing.assert_close(mean, eca_fused.reference.pool(x), equal_nan=True)
    mean.sum().backward()
    assert x.grad.shape == shape


@each_backend
@pytest.mark.parametrize("layout", LAYOUTS)
def test_infinities_and_nan_stay_in_their_channels(layout, backend):
    case = make_case((2, 20, 7, 9), layout=layout)
    case.x[0, 3, 2, 2], case.x[1, 17, 6, 8] = torch.inf, torch.nan
    gate = make_gate(case)
    gate[1, 0] = torch.nan
    mean, y = (
        eca_fused.pool(case.x, backend=backend),
        eca_fused.rescale(case.x, gate, backend=backend),
    )
    torch.testing.assert_close(mean, eca_fused.reference.pool(case.x), equal_nan=True)
    torch.testing.assert_close(y, eca_fused.reference.rescale(case.x, gate), equal_nan=True)


@each_backend
def test_the_mean_is_new_memory_even_without_pixels(backend):
    x = torch.ones(2, 3)
    eca_fused.pool(x, backend=backend).zero_()
    assert torch.equal(x, torch.ones(2, 3))


# ---- derivatives of every kind ----


def small(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, requires_grad=True)


def squeeze(backend: str, x: Tensor, w: Tensor) -> Tensor:
    gate = torch.sigmoid(eca_fused.pool(x, backend=backend) @ w)
    return eca_fused.rescale(x, gate, backend=backend)


@pytest.mark.parametrize("backend", NAMES)
def test_finite_differences(backend):
    x, gate = small(2, 3, 2, 3), small(2, 3)
    for check_grad in (torch.autograd.gradcheck, torch.autograd.gradgradcheck):
        assert check_grad(lambda x: eca_fused.pool(x, backend=backend), x)
        assert check_grad(lambda *t: eca_fused.rescale(*t, backend=backend), (x, gate))
        assert check_grad(lambda *t: squeeze(backend, *t), (x, small(3, 3)))


@pytest.mark.parametrize("backend", NAMES)
def test_transforms(backend):
    x, w, t = small(2, 3, 2, 3).detach(), small(3, 3).detach(), small(2, 3, 2, 3).detach()

    def results(backend):
        def f(x, w):
            return squeeze(backend, x, w)

        batch = torch.stack((x, t))
        return (
            torch.func.grad(lambda x: f(x, w).pow(2).sum())(x),
            torch.func.jvp(lambda x: f(x, w), (x,), (t,))[1],
            torch.vmap(f, (0, None))(batch, w),
            torch.vmap(torch.func.grad(lambda x, w: f(x, w).sum(), 1), (0, None))(batch, w),
            torch.func.hessian(lambda w: f(x, w).sum())(w),
        )

    for ours, want in zip(results(backend), results("reference"), strict=True):
        torch.testing.assert_close(ours, want)
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(x, t)
        y = torch.autograd.forward_ad.unpack_dual(squeeze(backend, dual, w))
    torch.testing.assert_close(y.tangent, results("reference")[1])


@each_backend
def test_gradients_in_batches(backend):
    x, w = small(2, 3, 2, 3), small(3, 3)
    dy = torch.randn(4, 2, 3, 2, 3, dtype=torch.float64)
    se = attention.SE(3, 1, backend=backend, dtype=torch.float64)
    for function in (lambda: squeeze(backend, x, w), lambda: se(x)):
        y = function()
        ours = torch.autograd.grad(y, x, dy, is_grads_batched=True, retain_graph=True)[0]
        want = torch.stack([torch.autograd.grad(y, x, g, retain_graph=True)[0] for g in dy])
        torch.testing.assert_close(ours, want)


@each_backend
@pytest.mark.parametrize("layer", [False, True], ids=["functions", "layer"])
def test_transforms_around_a_backward_pass_alone(layer, backend):
    case = make_case((2, 3, 4, 3), dtype=torch.float64)
    x = case.x.requires_grad_()
    se = attention.SE(3, 1, backend=backend, device=DEVICE, dtype=torch.float64)
    w = torch.rand(3, 3, device=DEVICE, dtype=torch.float64)
    y = se(x) if layer else squeeze(backend, x, w)
    tangent = torch.randn_like(y)

    def dx(dy):
        return torch.autograd.grad(y, x, dy, retain_graph=True)[0]

    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(case.dy, tangent)
        got = torch.autograd.forward_ad.unpack_dual(dx(dual))
    torch.testing.assert_close(got.primal, dx(case.dy))
    torch.testing.assert_close(got.tangent, dx(tangent))  # linear in dy
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # such as of a batch that runs one by one
        batch = torch.func.vmap(dx)(torch.stack([case.dy, tangent]))
    torch.testing.assert_close(batch, torch.stack([dx(case.dy), dx(tangent)]))


@each_backend
@pytest.mark.parametrize("frozen", ["x", "gate"])
def test_one_input_frozen(frozen, backend):
    case = make_case((2, 8, 5, 4))
    x, gate = case.x.requires_grad_(), make_gate(case).requires_grad_()
    want = torch.autograd.grad(eca_fused.rescale(x, gate, backend=backend), (x, gate), case.dy)
    {"x": x, "gate": gate}[frozen].requires_grad_(False)
    other, index = (gate, 1) if frozen == "x" else (x, 0)
    y = eca_fused.rescale(x, gate, backend=backend)
    assert torch.equal(torch.autograd.grad(y, other, case.dy)[0], want[index])


# ---- layers, whose backward pass has both ends in one ----


class Pair(attention.ChannelAttention):
    """The same layer as another, without the token."""

    def __init__(self, other: attention.ChannelAttention) -> None:
        super().__init__(other.channels, backend=other.backend)
        self.other = other

    def forward(self, x: Tensor) -> Tensor:
        mean = eca_fused.pool(x, backend=self.backend)
        return eca_fused.rescale(x, self.other.gate(mean), backend=self.backend)


def layer_of(dtype: torch.dtype, backend: str, **options: object) -> attention.SE:
    torch.manual_seed(0)
    return attention.SE(8, 2, backend=backend, dtype=dtype, device=DEVICE, **options)


def gradients(layer: nn.Module, case: Case, create_graph: bool = False) -> list[Tensor]:
    x = case.x.detach().requires_grad_()
    y = layer(x)
    inputs = [x, *layer.parameters()]
    return [y, *torch.autograd.grad(y, inputs, case.dy, create_graph=create_graph)]


@each_backend
@pytest.mark.parametrize("create_graph", [False, True])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("spatial", [(), (5,), (6, 7), (2, 3, 4)], ids=name_of)
def test_a_layer_is_its_parts(spatial, layout, create_graph, backend):
    case = make_case((2, 8, *spatial), dtype=torch.float64, layout=layout)
    layer = layer_of(torch.float64, backend)
    ours = gradients(layer, case, create_graph)
    for other in (Pair(layer), layer_of(torch.float64, "reference")):
        for a, b in zip(ours, gradients(other, case, create_graph), strict=True):
            torch.testing.assert_close(a, b)


@each_backend
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
def test_a_layer_rounds_its_gradient_once(dtype, layout, backend):
    """dx = gate dy + dmean / S, of the gate and dmean that the layer's own network gives."""

    class Remembers(attention.ChannelAttention):
        def gate(self, mean: Tensor) -> Tensor:
            self.mean = mean
            self.made = torch.sigmoid(mean)
            mean.register_hook(lambda dmean: 64 * dmean)  # so that its share is as large as dy
            mean.retain_grad()
            return self.made

    layer = Remembers(8, backend=backend)
    case = make_case((2, 8, 9, 7), dtype=dtype, layout=layout)
    x = case.x.requires_grad_()
    layer(x).backward(case.dy)
    gate, dmean, g = layer.made.double(), layer.mean.grad.double(), case.dy.double()
    share = spread(dmean / 63, g)
    scale = g.abs() + share.abs()
    assert_near("dx", x.grad, spread(gate, g) * g + share, scale, dtype, accumulator=sums_dtype(x))


@each_backend
def test_finite_differences_of_a_layer(backend):
    layer = attention.SE(3, 1, backend=backend, dtype=torch.float64)
    x = small(2, 3, 2, 3)
    for check_grad in (torch.autograd.gradcheck, torch.autograd.gradgradcheck):
        assert check_grad(lambda x, *w: layer(x), (x, *layer.parameters()))


@each_backend
@pytest.mark.parametrize(
    "gate",
    [
        lambda mean: torch.sigmoid(mean.detach()),
        lambda mean: torch.full_like(mean, 0.5),
        lambda mean: torch.full_like(mean, 0.5).requires_grad_(),
        lambda mean: torch.sigmoid(mean.flip(1) * mean).float(),
        lambda mean: mean,
    ],
    ids=["detached", "constant", "of its own", "float32", "the mean"],
)
def test_gates_of_every_kind(gate, backend):
    case = make_case((2, 8, 5, 4), dtype=torch.float64)

    def results(backend):
        class Layer(attention.ChannelAttention):
            def gate(self, mean):
                self.mean = mean
                return gate(mean)

        layer = Layer(8, backend=backend)
        x = case.x.detach().requires_grad_()
        y = layer(x)
        found = [torch.autograd.grad(y, x, case.dy, retain_graph=True)[0]]
        found += torch.autograd.grad(layer.mean.sum(), x, retain_graph=True)  # the mean alone
        found += torch.autograd.grad((y * case.dy).sum() + layer.mean.sum(), x, retain_graph=True)
        found += torch.autograd.grad(y, x, case.dy)
        return found

    tolerance = (
        {"rtol": 1e-5, "atol": 1e-6} if gate(case.x[:, :, 0, 0]).dtype == torch.float32 else {}
    )
    for ours, want in zip(results(backend), results("reference"), strict=True):
        torch.testing.assert_close(ours, want, **tolerance)


@each_backend
def test_gradients_of_the_gates_network_alone_keep_nothing(backend):
    layer, case = layer_of(torch.float32, backend), make_case((2, 8, 5, 4))
    x = case.x.requires_grad_()
    y = layer(x)
    want = torch.autograd.grad(y, [*layer.parameters(), x], case.dy, retain_graph=True)
    ours = torch.autograd.grad(y, list(layer.parameters()), case.dy, retain_graph=True)
    again = torch.autograd.grad(y, x, case.dy)
    for a, b in zip((*ours, *again), want, strict=True):
        assert torch.equal(a, b)


@each_backend
@pytest.mark.parametrize("use_reentrant", [True, False])
def test_checkpoints_and_hooks(use_reentrant, backend):
    layer, case = layer_of(torch.float64, backend), make_case((2, 8, 5, 4), dtype=torch.float64)
    want = gradients(layer, case)
    x = case.x.detach().requires_grad_()
    checkpoint(layer, x, use_reentrant=use_reentrant).backward(case.dy)
    assert torch.equal(x.grad, want[1])
    with torch.autograd.graph.saved_tensors_hooks(torch.clone, lambda t: t):
        for a, b in zip(gradients(layer, case), want, strict=True):
            assert torch.equal(a, b)


# ---- memory ----


class Maps(TorchDispatchMode):
    """Notes the operators that make a tensor of a whole map."""

    def __init__(self, x: Tensor) -> None:
        super().__init__()
        self.bytes, self.made = x.numel() * x.element_size(), []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        given = {t.untyped_storage().data_ptr() for t in args if isinstance(t, Tensor)}
        for t in result if isinstance(result, tuple) else (result,):
            storage = t.untyped_storage() if isinstance(t, Tensor) else None
            if storage and storage.nbytes() >= self.bytes and storage.data_ptr() not in given:
                self.made.append(function)
        return result


@each_backend
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("view", ["whole", "batch slice", "channel slice"])
def test_a_step_makes_y_and_dx_and_no_other_map(view, layout, backend):
    case = make_case((3, 12, 20, 20), dtype=torch.bfloat16, layout=layout)
    x, dy = VIEWS[view](case.x).requires_grad_(), VIEWS[view](case.dy)
    layer = attention.SE(x.shape[1], backend=backend, dtype=torch.bfloat16, device=DEVICE)
    kernels = select(x, backend)
    with Maps(x) as maps:
        torch.autograd.grad(layer(x), [x, *layer.parameters()], dy)
    assert maps.made == [kernels.rescale, kernels.rescale]


@each_backend
def test_the_gradient_of_the_mean_is_a_view(backend):
    x = make_case((2, 8, 20, 20)).x.requires_grad_()
    with Maps(x) as maps:
        (dx,) = torch.autograd.grad(eca_fused.pool(x, backend=backend).sum(), x)
    assert maps.made == []
    assert dx.stride()[2:] == (0, 0)


@each_backend
@pytest.mark.parametrize("needed", ["neither", "x", "gate", "both"])
def test_x_is_kept_for_the_gates_gradient_alone(needed, backend):
    case = make_case((2, 8, 5, 4))
    x = case.x.requires_grad_(needed in ("x", "both"))
    gate = make_gate(case).requires_grad_(needed in ("gate", "both"))
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        eca_fused.pool(x, backend=backend)
        eca_fused.rescale(x, gate, backend=backend)
    sizes = {"neither": [], "x": [gate], "gate": [x, gate], "both": [x, gate]}[needed]
    assert [t.shape for t in kept] == [t.shape for t in sizes]


@each_backend
def test_a_layer_with_a_frozen_gate_keeps_the_gate_alone(backend):
    class Frozen(attention.ChannelAttention):
        def gate(self, mean: Tensor) -> Tensor:
            return torch.sigmoid(mean.detach())

    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        Frozen(8, backend=backend)(make_case((2, 8, 5, 4)).x.requires_grad_())
    assert [t.shape for t in kept] == [(2, 8)]


# ---- errors ----


@pytest.mark.parametrize("backend", [*NAMES, "auto"])
@pytest.mark.parametrize(
    ("x", "gate", "error", "message"),
    [
        ([1.0], torch.ones(1, 1), TypeError, "expected x as a torch.Tensor, got list"),
        (torch.ones(2, 4, dtype=torch.int32), torch.ones(2, 4), TypeError, "x of dtype .*int32"),
        (torch.ones(4), torch.ones(4, 1), ValueError, r"\(N, C, \*spatial\).*got \(4,\); add"),
        (torch.ones(1, 1, 1, 1, 1, 1), torch.ones(1, 1), ValueError, "0 to 3 spatial dimensions"),
        (torch.ones(2, 4).to_sparse(), torch.ones(2, 4), TypeError, "x as a dense tensor"),
        (torch.ones(2, 4, 3), [1.0], TypeError, "expected gate as a torch.Tensor, got list"),
        (
            torch.ones(2, 4, 3),
            torch.ones(2, 4, 1),
            ValueError,
            r"gate of shape \(N, C\) = \(2, 4\).*got \(2, 4, 1\); bring it to that with flatten",
        ),
        (torch.ones(2, 4, 3), torch.ones(1, 4), ValueError, r"a gate of .*got \(1, 4\)"),
        (
            torch.ones(2, 4, 3),
            torch.ones(2, 4, dtype=torch.int64),
            TypeError,
            "gate of dtype .*int64; convert",
        ),
        (
            torch.ones(2, 4, 3),
            torch.ones(2, 4, device="meta"),
            ValueError,
            f"gate on the device of x, {DEVICE}.*got meta; move",
        ),
    ],
)
def test_errors(x, gate, error, message, backend):
    for needs in (False, True):
        if isinstance(x, Tensor) and x.is_floating_point():
            x = x.detach().requires_grad_(needs)
        with pytest.raises(error, match=message):
            eca_fused.rescale(x, gate, backend=backend)
        if "gate" not in message:
            with pytest.raises(error, match=message):
                eca_fused.pool(x, backend=backend)


@pytest.mark.parametrize("backend", NAMES)
@pytest.mark.parametrize("needs", [False, True])
def test_a_gate_that_does_not_fit_its_layer(needs, backend):
    class Wrong(attention.ChannelAttention):
        def gate(self, mean):
            return mean[:, :2]

    x = make_case((2, 4, 3, 3)).x.requires_grad_(needs)
    with pytest.raises(ValueError, match=r"gate of shape \(N, C\) = \(2, 4\).*got \(2, 2\)"):
        Wrong(4, backend=backend)(x)
    with pytest.raises(TypeError, match=r"expected x of dtype .*got torch\.complex64"):
        Wrong(4, backend=backend)(x.detach().to(torch.complex64).requires_grad_(needs))


def test_unknown_backend():
    x, gate = torch.ones(2, 4, 3), torch.ones(2, 4)
    for call in (
        lambda: eca_fused.pool(x, backend="cudnn"),
        lambda: eca_fused.rescale(x, gate, backend="cudnn"),
        lambda: attention.SE(4, backend="cudnn"),
    ):
        with pytest.raises(ValueError, match="expected backend as one of auto, native, triton"):
            call()


def test_use_backend_reaches_both(monkeypatch):
    asked = []
    monkeypatch.setattr(choice, "select", lambda x, backend: asked.append(backend))
    attention.SE(4, backend="native")(torch.ones(2, 4, 3, requires_grad=True))
    assert asked == ["native", "native"]
    monkeypatch.undo()
    with eca_fused.use_backend("reference"):
        y = eca_fused.rescale(x := torch.ones(2, 4, 3, requires_grad=True), torch.ones(2, 4))
        assert "Rescale" not in type(y.grad_fn).__name__
        assert "Pool" not in type(eca_fused.pool(x).grad_fn).__name__


@needs_extension
def test_the_operators_say_what_was_expected():
    ops, x = torch.ops.eca_fused, torch.ones(2, 4, 3, 3)
    with pytest.raises(
        RuntimeError, match=r"expected a gate of shape \(N, C\) = \(2, 4\).*\(2, 3\)"
    ):
        ops.rescale(x, torch.ones(2, 3))
    with pytest.raises(RuntimeError, match="expected a shift of shape"):
        ops.rescale(x, torch.ones(2, 4), torch.ones(4))
    with pytest.raises(RuntimeError, match=r"expected dy of shape .*got .*torch\.float64"):
        ops.rescale_backward(x.double(), x, torch.ones(2, 4))
    with pytest.raises(RuntimeError, match=r"expected x of shape \(N, C, \*spatial\)"):
        ops.pool(torch.ones(3))


# ---- operators ----


@each_backend
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=name_of)
@pytest.mark.parametrize("view", VIEWS)
def test_opcheck(view, dtype, layout, backend):
    case = make_case((3, 8, 4, 3), dtype=dtype, layout=layout)
    kernels, x, dy = (
        select(case.x, backend),
        VIEWS[view](case.x),
        VIEWS[view](case.dy),
    )
    gate = make_gate(Case(x, case.weight, dy), torch.float32)
    for operator, arguments in (
        (kernels.pool, (x,)),
        (kernels.rescale, (x, gate)),
        (kernels.rescale, (x, gate, gate * 2)),
        (kernels.rescale_backward, (dy, x, gate)),
        (kernels.rescale_backward, (dy, x, gate, False)),
    ):
        torch.library.opcheck(operator, arguments)


@needs_extension
@pytest.mark.parametrize("shift_dtype", [torch.float32, torch.bfloat16], ids=name_of)
def test_the_operators_shift(shift_dtype):
    case = make_case((2, 6, 5, 5), dtype=torch.bfloat16)
    gate, shift = make_gate(case), make_gate(case, shift_dtype) * 3
    y = torch.ops.eca_fused.rescale(case.x, gate, shift)
    want = spread(gate.double(), y) * case.x.double() + spread(shift.double(), y)
    assert_near("y", y, want, want, torch.bfloat16, accumulator=torch.float32)


def test_meta():
    x, gate = torch.empty(2, 4, 3, 3, device="meta"), torch.empty(2, 4, device="meta")
    assert eca_fused.pool(x).shape == (2, 4)
    x = x.to(memory_format=torch.channels_last)
    assert eca_fused.rescale(x, gate).stride() == x.stride()


# ---- mixed precision ----


@pytest.mark.parametrize("backend", NAMES)
def test_autocast(backend):
    case = make_case((2, 8, 6, 6))
    layer = layer_of(torch.float32, backend)
    with torch.autocast(DEVICE, torch.bfloat16):
        x = case.x.requires_grad_()
        y = layer(x)
        half = layer(x.bfloat16())
    assert (y.dtype, half.dtype) == (torch.float32, torch.bfloat16)
    y.backward(case.dy)
    assert layer.fc[0].weight.grad.dtype == torch.float32
    torch.testing.assert_close(y, layer(case.x), rtol=0.02, atol=0.02)  # 2^-8 a few times over


# ---- compilers, tracers and surgery ----

METHODS = ["se", "se_var3", "se_gc1", "se_gc2", "se_gc3", "se_var1", "se_var2", "eca_ns"]


def module(name: str, **options: object) -> nn.Module:
    torch.manual_seed(0)
    return attention.make(name, 16, device=DEVICE, dtype=torch.float64, **options)


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("name", [*METHODS, "cbam", "gsop"])
def test_scripts(name, fused):
    layer = module(name, fused=fused).eval()
    case = make_case((2, 16, 5, 4), dtype=torch.float64)
    scripted = torch.jit.script(layer)
    with torch.no_grad():
        torch.testing.assert_close(scripted(case.x), layer(case.x))
    for a, b in zip(gradients(scripted, case), gradients(layer, case), strict=True):
        torch.testing.assert_close(a, b)
    if name != "se_var1":  # whose gate fits any number of channels
        with pytest.raises(torch.jit.Error, match=r"expected x of shape \(N, 16, \*spatial\)"):
            scripted(case.x[:, :3])
    assert ("eca_fused::" in str(scripted.inlined_graph)) is (
        fused and native.missing is None and name != "none"
    )


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("name", [*METHODS, "cbam", "gsop"])
def test_symbolic_traces(name, fused):
    layer = module(name, fused=fused).eval()
    traced = pickle.loads(pickle.dumps(torch.fx.symbolic_trace(layer)))
    case = make_case((2, 16, 5, 4), dtype=torch.float64)
    for a, b in zip(gradients(traced, case), gradients(layer, case), strict=True):
        assert torch.equal(a, b)


@needs_extension
def test_traces():
    layer, case = layer_of(torch.float64, "native"), make_case((2, 8, 5, 4), dtype=torch.float64)
    traced = torch.jit.trace(layer, case.x)
    bigger = make_case((3, 8, 7, 2), dtype=torch.float64)
    for a, b in zip(gradients(traced, bigger), gradients(layer, bigger), strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("backend", ["auto", *NAMES])
def test_compiles_without_a_graph_break(backend):
    if backend == "triton" and DEVICE == "cpu":
        pytest.skip("needs a GPU: torch.compile cannot trace into the interpreter")
    torch.compiler.reset()
    layer, case = layer_of(torch.float32, backend), make_case((2, 8, 6, 6), layout="channels_last")
    compiled = torch.compile(copy.deepcopy(layer), fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        torch.testing.assert_close(compiled(case.x), layer(case.x))
    for a, b in zip(gradients(compiled, case), gradients(layer, case), strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("backend", NAMES)
def test_compiled_autograd(backend):
    layer, case = layer_of(torch.float64, backend), make_case((2, 8, 5, 4), dtype=torch.float64)
    want = gradients(layer, case)[1:]
    x = case.x.requires_grad_()
    y = layer(x)
    with torch._dynamo.compiled_autograd._enable(torch.compile(backend="eager")):
        y.backward(case.dy)
    for a, b in zip((x, *layer.parameters()), want, strict=True):
        torch.testing.assert_close(a.grad, b)


@needs_extension
@pytest.mark.skipif(DEVICE != "cpu", reason="the CPU's: run it without ECA_FUSED_TEST_DEVICE")
@pytest.mark.parametrize("backend", ["auto", "native"])
def test_only_a_backend_by_name_hides_operations_from_a_compiler(backend):
    torch.compiler.reset()
    graphs = []
    layer, x = layer_of(torch.float32, backend), make_case((2, 8, 6, 6)).x

    def keep(graph, inputs):
        graphs.append(graph)
        return graph

    with torch.no_grad():
        torch.compile(layer, fullgraph=True, backend=keep, dynamic=True)(x)
    (graph,) = graphs
    ours = {native.pool, native.rescale}
    assert called(graph) & ours == (ours if backend == "native" else set())


@needs_extension
@pytest.mark.parametrize("strict", [True, False])
def test_exports_with_the_operators(strict):
    layer, case = layer_of(torch.float32, "native").eval(), make_case((2, 8, 6, 6))
    batch = torch.export.Dim("batch", min=1, max=1000)
    program = torch.export.export(layer, (case.x,), dynamic_shapes={"x": {0: batch}}, strict=strict)
    assert {native.pool, native.rescale} <= called(program.graph_module)
    x = torch.cat([case.x, case.x])
    torch.testing.assert_close(program.module()(x), layer(x))


def test_surgery():
    layer, case = layer_of(torch.float32, "auto"), make_case((2, 8, 6, 6))
    want = gradients(layer, case)
    again = pickle.loads(pickle.dumps(copy.deepcopy(layer)))
    for a, b in zip(gradients(again, case), want, strict=True):
        assert torch.equal(a, b)
    y = torch.func.functional_call(layer, dict(again.named_parameters()), (case.x,))
    assert torch.equal(y, want[0])


@needs_onnx
def test_onnx_has_standard_operators_alone():
    layer, x = layer_of(torch.float32, "auto").eval(), make_case((2, 8, 5, 7)).x
    session = onnx_session(torch.onnx.export(layer, (x,), dynamo=True, verbose=False))
    (y,) = session.run(None, {session.get_inputs()[0].name: x.cpu().numpy()})
    torch.testing.assert_close(torch.from_numpy(y), layer(x).detach().cpu())
