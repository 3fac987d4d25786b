"""Mixed precision, and other settings of PyTorch: autocast, loss scaling, determinism."""

import itertools
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from torch import Tensor, nn

import eca_fused
from eca_fused import ECALayer
from helpers.cases import (
    BACKENDS,
    DEVICE,
    DTYPES,
    LAYOUTS,
    Case,
    Results,
    assert_as_accurate,
    make_case,
    name_of,
    run,
)

HALVES = [torch.bfloat16, torch.float16]

pytestmark = [pytest.mark.any_device, pytest.mark.parametrize("backend", BACKENDS)]


def fused(backend):
    return lambda x, w: eca_fused.eca(x, w, backend=backend)


def same(ours: Results, want: Results) -> bool:
    return all(torch.equal(a, b) for a, b in zip(ours, want, strict=True))


# ---- autocast ----


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("dtype", HALVES, ids=name_of)
def test_autocast_keeps_the_dtype_of_x(backend, dtype, fused):
    layer = ECALayer(16, fused=fused, backend=backend)
    with torch.autocast(DEVICE, dtype=dtype):
        single = layer(torch.randn(2, 16, 5, 5))
        half = layer(torch.randn(2, 16, 5, 5, dtype=dtype))
    assert (single.dtype, half.dtype) == (torch.float32, dtype)


@pytest.mark.parametrize("x_dtype", [torch.float32, *HALVES], ids=name_of)
@pytest.mark.parametrize("taps_dtype", HALVES, ids=name_of)
@pytest.mark.parametrize("own_taps", [False, True], ids=["shared", "own"])
def test_taps_in_half_precision_under_autocast(backend, taps_dtype, x_dtype, own_taps):
    """As in a half precision model where something before ECA works in float32."""
    case = make_case((2, 16, 5, 5), dtype=x_dtype, taps_dtype=torch.float32, own_taps=own_taps)
    case.weight = case.weight.to(taps_dtype)
    want = run(fused(backend), Case(case.x, case.weight.to(x_dtype), case.dy))
    with torch.autocast(DEVICE, dtype=torch.bfloat16):
        ours = run(fused(backend), case)
        with torch.no_grad():
            out = torch.empty_like(case.x)
            eca_fused.eca(case.x, case.weight, backend=backend, out=out)
            written = eca_fused.eca_(case.x.clone(), case.weight, backend=backend)
    assert ours[2].dtype == taps_dtype
    assert same(ours[:2], want[:2])
    torch.testing.assert_close(ours[2], want[2].to(taps_dtype))
    torch.testing.assert_close(out, want[0])
    torch.testing.assert_close(written, want[0])
    if x_dtype != taps_dtype:
        with pytest.raises(TypeError, match=r"expected taps of dtype torch\.float32"):
            fused(backend)(case.x, case.weight)


@pytest.mark.parametrize("taps_dtype", [torch.float64, torch.int32], ids=name_of)
def test_taps_that_autocast_leaves_alone(backend, taps_dtype):
    with torch.autocast(DEVICE, dtype=torch.bfloat16), pytest.raises(TypeError, match="taps"):
        fused(backend)(torch.randn(2, 8, 5, 5), torch.ones(1, 1, 3, dtype=taps_dtype))


@pytest.mark.parametrize("x_dtype", DTYPES, ids=name_of)
@pytest.mark.parametrize("dtype", HALVES, ids=name_of)
def test_autocast_changes_no_bit(backend, dtype, x_dtype):
    # Taps in float32 under a half precision x, as in training, stay in float32.
    taps_dtype = torch.float64 if x_dtype == torch.float64 else torch.float32
    case = make_case((2, 16, 5, 5), dtype=x_dtype, taps_dtype=taps_dtype)
    with torch.autocast(DEVICE, dtype=dtype):
        ours = run(fused(backend), case)
    assert same(ours, run(fused(backend), case))
    assert_as_accurate(ours, case)


class Small(nn.Module):
    """Convolutions around an ECALayer, whose x, y and gradients it keeps."""

    def __init__(self, backend: str, fused: bool = True) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 16, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(16)
        self.eca = ECALayer(16, fused=fused, backend=backend)
        self.last = nn.Conv2d(16, 8, 3)
        self.head = nn.Linear(8, 2)
        self.kept: dict[str, Tensor] = {}

    def keep(self, name: str, t: Tensor) -> Tensor:
        self.kept[name] = t
        t.register_hook(lambda grad: self.kept.update({f"d{name}": grad}))
        return t

    def forward(self, x: Tensor) -> Tensor:
        x = self.keep("x", self.norm(self.first(x)).relu())
        y = self.keep("y", self.eca(x))
        return self.head(self.last(y).mean((2, 3)))


def network(backend: str, **kwargs: bool) -> Small:
    torch.manual_seed(0)
    return Small(backend, **kwargs)


@pytest.mark.parametrize("dtype", HALVES, ids=name_of)
def test_a_network_of_convolutions_under_autocast(backend, dtype):
    net = network(backend)
    images = torch.randn(4, 3, 12, 12)
    with torch.autocast(DEVICE, dtype=dtype):
        out = net(images)
    assert net.kept["x"].dtype == net.kept["y"].dtype == out.dtype == dtype
    (2**10 * out.float().pow(2).mean()).backward()  # no gradient too small for float16
    assert net.kept["dx"].dtype == net.kept["dy"].dtype == dtype
    assert net.eca.conv.weight.grad.dtype == torch.float32
    # On its own inputs the layer is as accurate as without autocast.
    case = make_case((1, 1))
    case.x, case.dy, case.weight = (
        net.kept["x"].detach(),
        net.kept["dy"],
        net.eca.conv.weight.detach(),
    )
    assert_as_accurate((net.kept["y"].detach(), net.kept["dx"], net.eca.conv.weight.grad), case)


@pytest.mark.parametrize("dtype", HALVES, ids=name_of)
def test_training_under_autocast_as_in_plain_pytorch(backend, dtype):
    def gradients(fused: bool) -> list[Tensor]:
        net = network(backend, fused=fused)
        torch.manual_seed(1)
        with torch.autocast(DEVICE, dtype=dtype):
            loss = net(torch.randn(4, 3, 12, 12)).float().pow(2).sum()
        loss.backward()
        return [p.grad for p in net.parameters()]

    for ours, plain in zip(gradients(True), gradients(False), strict=True):
        # Both round activations to the dtype, a few times over.
        assert (ours - plain).abs().max() <= 8 * torch.finfo(dtype).eps * plain.abs().max()


# ---- loss scaling ----


def test_training_with_a_gradient_scaler(backend):
    net = network(backend)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.5)
    scaler = torch.amp.GradScaler(DEVICE, init_scale=2.0**10)
    brightness = torch.randn(16, 1, 1, 1)
    images = torch.randn(16, 3, 12, 12) + brightness
    target = (brightness.flatten() > 0).long()
    taps = net.eca.conv.weight.detach().clone()
    losses = []
    for _ in range(30):
        with torch.autocast(DEVICE, dtype=torch.float16):
            loss = nn.functional.cross_entropy(net(images).float(), target)
        optimizer.zero_grad()
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        losses.append(loss.item())
    assert losses[-1] < losses[0] / 2
    assert not torch.equal(net.eca.conv.weight, taps)


def test_a_gradient_scaler_skips_what_overflows(backend):
    layer = ECALayer(8, backend=backend)
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.1)
    scaler = torch.amp.GradScaler(DEVICE, init_scale=2.0**17)
    taps = [layer.conv.weight.detach().clone()]
    x = torch.randn(2, 8, 4, 4, dtype=torch.float16)
    for _ in range(3):  # dy in half precision is infinite, infinite, and 2^15
        optimizer.zero_grad()
        scaler.scale(layer(x).sum()).backward()
        scaler.step(optimizer)
        scaler.update()
        taps.append(layer.conv.weight.detach().clone())
    assert [torch.equal(a, b) for a, b in itertools.pairwise(taps)] == [True, True, False]
    assert scaler.get_scale() == 2.0**15
    assert taps[-1].isfinite().all()


# ---- layouts ----


@pytest.mark.parametrize("dtype", [torch.float32, *HALVES], ids=name_of)
def test_a_channels_last_network_stays_so(backend, dtype):
    net = network(backend).to(memory_format=torch.channels_last)
    images = torch.randn(4, 3, 12, 12).to(memory_format=torch.channels_last)
    with torch.autocast(DEVICE, dtype=dtype, enabled=dtype != torch.float32):
        net(images).float().pow(2).sum().backward()
    for name in ("x", "y", "dy", "dx"):
        assert net.kept[name].dtype == dtype
        assert net.kept[name].is_contiguous(memory_format=torch.channels_last), name


# ---- settings of the process ----


@contextmanager
def default_dtype(dtype: torch.dtype) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
@pytest.mark.parametrize("default", [torch.float64, *HALVES], ids=name_of)
def test_the_default_dtype_changes_no_bit(backend, default, dtype, layout):
    case = make_case((2, 12, 5, 4), k=5, dtype=dtype, layout=layout)
    want = run(fused(backend), case)
    with default_dtype(default):
        assert same(run(fused(backend), case), want)
        again = run(lambda x, w: eca_fused.eca(x, w, backend="reference"), case)
    assert same(again, run(lambda x, w: eca_fused.eca(x, w, backend="reference"), case))


@pytest.mark.parametrize("default", [torch.float64, *HALVES], ids=name_of)
def test_a_layer_has_taps_of_the_default_dtype(backend, default):
    with default_dtype(default):
        layer = ECALayer(8, backend=backend)
        assert layer.conv.weight.dtype == default
        assert layer(torch.randn(2, 8, 3, 3)).dtype == default


@contextmanager
def deterministic() -> Iterator[None]:
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("own_taps", [False, True], ids=["shared", "own"])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=name_of)
def test_deterministic_algorithms(backend, dtype, layout, own_taps):
    # In this mode new memory is filled with NaN: what the kernels do not write would show, too.
    case = make_case((3, 40, 9, 7), 5, dtype, layout, own_taps=own_taps)
    want = run(fused(backend), case)
    with deterministic(), warnings.catch_warnings():
        warnings.simplefilter("error")
        for _ in range(3):
            assert same(run(fused(backend), case), want)
        with torch.no_grad():
            assert torch.equal(eca_fused.eca(case.x, case.weight, backend=backend), want[0])


def test_deterministic_gradients_of_gradients(backend):
    case = make_case((3, 40, 9, 7), 5)

    def penalty() -> tuple[Tensor, ...]:
        x, w = case.x.clone().requires_grad_(), case.weight.clone().requires_grad_()
        y = eca_fused.eca(x, w, backend=backend)
        grads = torch.autograd.grad(y, (x, w), case.dy, create_graph=True)
        return torch.autograd.grad(sum(g.pow(2).sum() for g in grads), (x, w))

    with deterministic():
        first = penalty()
        assert same(penalty(), first)
    for got, want in zip(first, penalty(), strict=True):
        torch.testing.assert_close(got, want)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_tangents_and_second_derivatives_do_not_round_under_autocast(backend, dtype):
    case = make_case((2, 8, 5, 7))
    tangents = torch.randn_like(case.x), torch.randn_like(case.weight)

    def layer(x, w):
        return eca_fused.eca(x, w, backend=backend)

    def penalty(x, w):
        dx, dw = torch.autograd.grad(layer(x, w), (x, w), case.dy, create_graph=True)
        return torch.autograd.grad(dx.square().sum() + dw.square().sum(), (x, w))

    def both():
        x, w = case.x.clone().requires_grad_(), case.weight.clone().requires_grad_()
        _, tangent = torch.func.jvp(layer, (case.x, case.weight), tangents)
        return tangent, *penalty(x, w)

    want = both()
    with torch.autocast(DEVICE, dtype):
        got = both()
    for a, b in zip(got, want, strict=True):
        assert torch.equal(a, b)
