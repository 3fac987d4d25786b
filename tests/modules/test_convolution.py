"""A layer whose convolution has hooks, a wrapper or a bias: the layer calls the convolution."""

import copy
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrizations, prune, spectral_norm, weight_norm

import eca_fused
from eca_fused.attention import ECANS, ECAVariant, SEVar2
from eca_fused.functional.convolution import plain_taps
from helpers.cases import MODES, needs_extension

pytestmark = pytest.mark.every_torch

C = 8


def doubled(_: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return (inputs[0] * 2,)


def shifted(_: nn.Module, __: object, found: Tensor) -> Tensor:
    return found + 1


class Lora(nn.Module):
    """As peft wraps a layer: the base, and a product of rank one beside it."""

    def __init__(self, base: nn.Module) -> None:
        super().__init__()
        self.base = base
        self.down, self.up = nn.Conv1d(1, 2, 3, padding=1, bias=False), nn.Conv1d(2, 1, 1)

    @property
    def weight(self) -> Tensor:
        weight: Tensor = self.base.weight  # type: ignore[assignment]
        return weight

    def forward(self, x: Tensor) -> Tensor:
        found: Tensor = self.base(x) + self.up(self.down(x))
        return found


class Wrapper(nn.Module):
    """Without a weight."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        found: Tensor = 3 * self.inner(x)
        return found


def replace(layer: nn.Module, by: nn.Module) -> None:
    layer.conv = by


def offload(layer: nn.Module) -> None:
    """As accelerate's cpu_offload: weights on the meta device, and a forward that fetches them."""
    conv: nn.Conv1d = layer.conv  # type: ignore[assignment]
    kept = conv.weight.detach().clone()
    original = conv.forward
    conv.weight = nn.Parameter(torch.empty_like(kept, device="meta"), requires_grad=False)

    def forward(x: Tensor) -> Tensor:
        conv.weight = nn.Parameter(kept, requires_grad=False)
        try:
            return original(x)
        finally:
            conv.weight = nn.Parameter(torch.empty_like(kept, device="meta"), requires_grad=False)

    conv.forward = forward  # type: ignore[method-assign]


WAYS: dict[str, Callable[[nn.Module], object]] = {
    "a hook": lambda m: m.conv.register_forward_hook(shifted),
    "a hook before": lambda m: m.conv.register_forward_pre_hook(doubled),
    "spectral_norm, old": lambda m: spectral_norm(m.conv),
    "spectral_norm, new": lambda m: parametrizations.spectral_norm(m.conv),
    "weight_norm, old": lambda m: weight_norm(m.conv),
    "weight_norm, new": lambda m: parametrizations.weight_norm(m.conv),
    "prune": lambda m: prune.l1_unstructured(m.conv, "weight", amount=1),
    "LoRA": lambda m: replace(m, Lora(m.conv)),
    "a wrapper": lambda m: replace(m, Wrapper(m.conv)),
    "a bias": lambda m: replace(m, nn.Conv1d(1, 1, 3, padding=1)),
    "dilation": lambda m: replace(m, nn.Conv1d(1, 1, 3, padding=2, dilation=2, bias=False)),
    "an own forward": offload,
    "a class of one's own": lambda m: replace(m, type("Own", (nn.Conv1d,), {})(1, 1, 3, padding=1)),
}


def patch(layer: nn.Module, name: str) -> None:
    """Replace a method on the instance alone."""
    original = getattr(layer.conv, name)
    setattr(layer.conv, name, lambda *args: 2 * original(*args))


class Doubling(Tensor):
    """A tensor whose class says that convolutions with it count twice."""

    @classmethod
    def __torch_function__(cls, function, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        found = super().__torch_function__(function, types, args, kwargs or {})  # type: ignore[no-untyped-call]
        return 2 * found if function is torch.conv1d else found


def double(layer: nn.Module) -> None:
    weight: Tensor = layer.conv.weight.detach()  # type: ignore[operator,assignment,union-attr]
    layer.conv.weight = nn.Parameter(weight.as_subclass(Doubling))  # type: ignore[union-attr]


WAYS |= {
    "another _conv_forward": lambda m: patch(m, "_conv_forward"),
    "another _call_impl": lambda m: patch(m, "_call_impl"),
    "a weight of a class of its own": double,
}
# A parametrization of torch computes the weight itself.
STILL_TAPS = {"spectral_norm, new", "weight_norm, new"}


def by_hand(layer: eca_fused.ECALayer, x: Tensor) -> Tensor:
    """What the authors' layer computes, by calling the convolution."""
    mean = x.mean((2, 3)).unsqueeze(1)
    if layer.padding_mode == "circular":
        rows = layer.conv(torch.cat([mean, mean, mean], 2))[..., C : 2 * C]
    else:
        rows = layer.conv(mean)
    return x * torch.sigmoid(rows).reshape(x.shape[0], C, 1, 1)


def made(name: str, **options: object) -> eca_fused.ECALayer:
    torch.manual_seed(0)
    layer = eca_fused.ECALayer(C, 3, **options)  # type: ignore[arg-type]
    WAYS[name](layer)
    return layer


def gradients(function: Callable[[Tensor], Tensor], layer: nn.Module, x: Tensor) -> list[Tensor]:
    x = x.clone().requires_grad_()
    y = function(x)
    # An offloaded weight has no gradient.
    leaves = [p for p in layer.parameters() if p.requires_grad]
    return [y, *torch.autograd.grad(y.square().sum(), [x, *leaves])]


@pytest.mark.parametrize("name", WAYS)
@pytest.mark.parametrize("padding_mode", MODES)
@pytest.mark.parametrize("fused", [True, False])
def test_what_the_convolution_does_counts(name: str, padding_mode: str, fused: bool) -> None:
    layer = made(name, padding_mode=padding_mode, fused=fused)
    # In training, each call of a spectral norm continues its iteration.
    twin = copy.deepcopy(layer) if "spectral" in name else layer
    x = torch.randn(2, C, 5, 4)
    for _ in range(2):  # with a kept weight, prune fails at the second backward pass
        ours = gradients(layer, layer, x)
        theirs = gradients(lambda x: by_hand(twin, x), twin, x)
        assert len(ours) == len(theirs)
        for a, b in zip(ours, theirs, strict=True):
            torch.testing.assert_close(a, b)


@pytest.mark.parametrize("name", WAYS)
def test_which_are_called(name: str) -> None:
    assert (plain_taps(made(name).conv, False, True) is not None) == (name in STILL_TAPS)


@pytest.mark.parametrize("name", WAYS)
def test_for_inference_and_in_place(name: str) -> None:
    layer = made(name, inplace=True).eval()
    x = torch.randn(2, C, 5, 4)
    with torch.no_grad():
        want = by_hand(layer, x)
        assert layer(x) is x
    torch.testing.assert_close(x, want)
    if any(p.requires_grad for p in layer.parameters()):
        with pytest.raises(RuntimeError, match="would overwrite the x that"):
            layer(x)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_taps_in_float32_under_half_precision(dtype: torch.dtype) -> None:
    layer = made("a bias")
    x = torch.randn(2, C, 5, 4)
    y = layer(x.to(dtype))
    assert y.dtype == dtype
    torch.testing.assert_close(y.float(), by_hand(layer, x), rtol=0.02, atol=0.02)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        torch.testing.assert_close(layer(x), by_hand(layer, x), rtol=0.02, atol=0.02)


@pytest.mark.parametrize("name", ["a hook", "a bias", "prune"])
@pytest.mark.parametrize("mode", ["script", "trace", "compile"])
@needs_extension
def test_compiled_and_scripted(name: str, mode: str) -> None:
    if mode == "script":
        layer = made(name)
        with pytest.raises(RuntimeError, match=r"without hooks.*call torch\.jit\.trace instead"):
            torch.jit.script(nn.Sequential(layer))
        return
    layer = made(name).eval()
    x = torch.randn(2, C, 5, 4)
    want = by_hand(layer, x)
    if mode == "compile":
        run = torch.compile(layer, backend="eager", fullgraph=name != "prune")
    else:
        run = torch.jit.trace(layer, x)
    with torch.no_grad():
        torch.testing.assert_close(run(x), want)


def test_hooks_for_every_module() -> None:
    layer = eca_fused.ECALayer(C, 3)
    x = torch.randn(2, C, 5, 4)
    called = []
    handle = nn.modules.module.register_module_forward_hook(lambda m, *_: called.append(m))
    try:
        y = layer(x)
    finally:
        handle.remove()
    assert called == [layer.conv, layer]
    torch.testing.assert_close(layer(x), y)


def test_gradients_of_each_sample_by_hooks() -> None:
    """As opacus takes them: what goes into the convolution, and the gradient of what comes out."""
    layer = eca_fused.ECALayer(C, 3)
    seen: dict[str, Tensor] = {}
    layer.conv.register_forward_hook(lambda _, given, __: seen.update(given=given[0].detach()))
    layer.conv.register_full_backward_hook(lambda _, __, out: seen.update(out=out[0].detach()))
    x = torch.randn(4, C, 5, 4)
    layer(x.requires_grad_()).square().sum().backward()
    rows = F.pad(seen["given"], (1, 1)).unfold(2, 3, 1)  # (N, 1, C, 3)
    of_each = torch.einsum("noc,nock->nk", seen["out"], rows)
    assert layer.conv.weight.grad is not None
    torch.testing.assert_close(of_each.sum(0), layer.conv.weight.grad.flatten())
    alone = torch.autograd.grad(layer(x[:1]).square().sum(), layer.conv.weight)[0]
    torch.testing.assert_close(of_each[0], alone.flatten())


@pytest.mark.parametrize(
    ("conv", "wrong"),
    [
        (nn.Conv1d(1, 1, 5, padding=1), r"to return \(2, 1, 8\).*got \(2, 1, 6\)"),
        (nn.Conv1d(1, 1, 3, padding=2), r"to return \(2, 1, 8\).*got \(2, 1, 10\)"),
        (nn.Conv1d(1, 1, 3, stride=2, padding=1), r"to return \(2, 1, 8\).*got \(2, 1, 4\)"),
        (nn.Conv1d(1, 2, 3, padding=1), r"got \(2, 2, 8\).*one channel in and out"),
    ],
)
def test_convolutions_that_do_not_fit(conv: nn.Module, wrong: str) -> None:
    layer = eca_fused.ECALayer(C, 3)
    layer.conv = conv  # type: ignore[assignment]
    with pytest.raises(ValueError, match=wrong):
        layer(torch.randn(2, C, 5, 4))


# ---- attention's bands ----


def band_by_hand(layer: ECANS, x: Tensor) -> Tensor:
    mean = x.mean((2, 3))
    r = layer.kernel_size // 2
    if layer.padding_mode == "circular" and r:
        rows = torch.cat([mean[:, -r:], mean, mean[:, :r]], 1)
    else:
        rows = F.pad(mean, (r, r))
    found = layer.conv(rows.unfold(1, layer.kernel_size, 1))
    return x * torch.sigmoid(found).reshape(x.shape[0], C, 1, 1)


BAND_WAYS = {name: WAYS[name] for name in ("a hook", "a hook before", "prune", "weight_norm, old")}
BAND_WAYS["a wrapper"] = WAYS["a wrapper"]
BAND_WAYS["a bias"] = lambda m: replace(m, nn.Conv1d(C, C, m.kernel_size, groups=C))
BAND_WAYS["plain"] = lambda _: None


@pytest.mark.parametrize("name", BAND_WAYS)
@pytest.mark.parametrize("padding_mode", MODES)
@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("kind", [ECANS, SEVar2])
def test_bands(name: str, padding_mode: str, fused: bool, kind: type[ECANS]) -> None:
    options = {"padding_mode": padding_mode} if kind is ECANS else {}
    layer = kind(C, fused=fused, **options)  # type: ignore[arg-type]
    BAND_WAYS[name](layer)
    x = torch.randn(2, C, 5, 4)
    for _ in range(2):
        ours = gradients(layer, layer, x)
        theirs = gradients(lambda x: band_by_hand(layer, x), layer, x)
        for a, b in zip(ours, theirs, strict=True):
            torch.testing.assert_close(a, b)


def test_no_script_of_a_band_with_a_hook() -> None:
    layer = ECANS(C)
    layer.conv.register_forward_hook(shifted)
    with pytest.raises(RuntimeError, match=r"without hooks or bias.*torch\.jit\.trace"):
        torch.jit.script(layer)


@pytest.mark.parametrize("padding_mode", MODES)
def test_the_variant_calls_its_convolution(padding_mode: str) -> None:
    layer = ECAVariant(C, 3, gate_layer="hard_sigmoid", padding_mode=padding_mode)
    x = torch.randn(2, C, 5, 4)
    before = layer(x)
    layer.conv.register_forward_pre_hook(doubled)
    once = 6 * (before / x - 0.5)  # what the convolution makes, as the gate is 1 / 2 + that / 6
    twice = 0.5 + 2 * once / 6
    torch.testing.assert_close(layer(x), x * twice.clamp(0, 1), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_taps_of_a_called_convolution_have_a_dtype_that_plain_ones_may_have(
    dtype: torch.dtype,
) -> None:
    layer = made("a hook")
    layer.conv.to(dtype)
    with pytest.raises(TypeError, match=f"expected taps of dtype torch.float32, got {dtype}"):
        layer(torch.randn(2, C, 5, 4))
    with torch.autocast("cpu", torch.bfloat16):
        assert layer(torch.randn(2, C, 5, 4)).dtype == torch.float32


@pytest.mark.parametrize("name", ["a hook", "weight_norm, new"])
def test_symbolic_traces(name: str) -> None:
    layer, x = made(name), torch.randn(2, C, 5, 4)
    torch.testing.assert_close(torch.fx.symbolic_trace(layer)(x), layer(x))
