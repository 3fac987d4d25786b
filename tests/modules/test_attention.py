"""Channel attention methods: their formulas, parameters, gradients, errors and state dicts."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from eca_fused import ECALayer, attention
from helpers.cases import (
    BACKENDS,
    DEVICE,
    DTYPES,
    Case,
    assert_as_accurate,
    make_case,
    name_of,
    run,
)
from helpers.optional import needs_timm, timm_eca

pytestmark = pytest.mark.every_torch

# The number of parameters of one module of C channels: Wang et al., table 1.
PARAMETERS: dict[str, Callable[[int], int]] = {
    "none": lambda c: 0,
    "se": lambda c: 2 * c * c // 16,
    "se_var1": lambda c: 0,
    "se_var2": lambda c: c,
    "se_var3": lambda c: c * c,
    "se_gc1": lambda c: c * c // 16,
    "se_gc2": lambda c: 16 * c,
    "se_gc3": lambda c: 8 * c,
    "eca_ns": lambda c: 3 * c,
    "eca": lambda c: 3,
}
FUSED = [name for name, method in attention.METHODS.items() if method.fused]
SIZED = {name: {"kernel_size": 3} for name, method in attention.METHODS.items() if method.sized}


def make(name: str, channels: int, **options: object) -> nn.Module:
    """A module in float64 on the device of the cases, three taps where there are taps."""
    torch.manual_seed(0)
    given = {"device": DEVICE, "dtype": torch.float64} | SIZED.get(name, {}) | options
    return attention.make(name, channels, **given)


def band(taps: Tensor, channels: int) -> Tensor:
    """The matrix (C, C) whose row c has the taps of channel c around its diagonal."""
    rows = taps.shape[0]
    k = taps.shape[2]
    matrix = taps.new_zeros(channels, channels)
    for c in range(channels):
        for j in range(k):
            if 0 <= (other := c + j - k // 2) < channels:
                matrix[c, other] = taps[c if rows > 1 else 0, 0, j]
    return matrix


def blocks(weight: Tensor, groups: int) -> Tensor:
    """The block-diagonal matrix (C, C) of a layer in groups, of weight (C, C / G, 1)."""
    return torch.block_diag(*weight.squeeze(-1).chunk(groups))


def gates(name: str, module: nn.Module, mean: Tensor) -> Tensor:
    """The gates (N, C) by the formulas of the paper's table 1, with whole matrices."""
    c = mean.shape[1]
    if name == "none":
        return torch.ones_like(mean)
    if name == "se":
        first, second = module.parameters()
        return torch.sigmoid(torch.relu(mean @ first.T) @ second.T)
    if name == "se_var1":
        return torch.sigmoid(mean)
    if name == "se_var2":
        return torch.sigmoid(module.conv.weight.flatten() * mean)
    if name in ("eca", "eca_ns"):
        return torch.sigmoid(mean @ band(module.conv.weight, c).T)
    groups = {"se_var3": 1, "se_gc1": 16, "se_gc2": c // 16, "se_gc3": c // 8}[name]
    return torch.sigmoid(mean @ blocks(module.fc.weight, groups).T)


@pytest.mark.parametrize("channels", [64, 256, 2048])
@pytest.mark.parametrize("name", PARAMETERS)
def test_parameters_are_those_of_the_formula(name: str, channels: int) -> None:
    module = make(name, channels, device="meta")
    assert sum(p.numel() for p in module.parameters()) == PARAMETERS[name](channels)


@pytest.mark.parametrize("spatial", [(), (5,), (4, 3), (2, 3, 2)], ids=name_of)
@pytest.mark.parametrize("name", PARAMETERS)
def test_result_and_gradients_are_the_formulas(name: str, spatial: tuple[int, ...]) -> None:
    module = make(name, 32)
    case = make_case((2, 32, *spatial), dtype=torch.float64)

    def definition(x: Tensor) -> Tensor:
        mean = x.flatten(2).mean(2) if spatial else x
        return x * gates(name, module, mean).reshape(2, 32, *(1 for _ in spatial))

    def results(function: Callable[[Tensor], Tensor]) -> list[Tensor]:
        x = case.x.clone().requires_grad_()
        y = function(x)
        return [y.detach(), *torch.autograd.grad(y, [x, *module.parameters()], case.dy)]

    for got, want in zip(results(module), results(definition), strict=True):
        torch.testing.assert_close(got, want)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
@pytest.mark.parametrize(("name", "k"), [("se_var2", 1), ("eca_ns", 5)])
def test_own_taps_are_as_accurate_as_plain(
    name: str, k: int, dtype: torch.dtype, backend: str
) -> None:
    case = make_case((2, 24, 7, 5), k, dtype, own_taps=True)
    options = {"kernel_size": k} if name == "eca_ns" else {}
    module = make(name, 24, backend=backend, dtype=dtype, **options)

    def function(x: Tensor, weight: Tensor) -> Tensor:
        return torch.func.functional_call(module, {"conv.weight": weight}, x)

    assert_as_accurate(run(function, case), case)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
def test_the_fixed_tap_is_as_accurate_as_plain(dtype: torch.dtype, backend: str) -> None:
    case = make_case((2, 24, 7, 5), 1, dtype)
    case = Case(case.x, torch.ones_like(case.weight), case.dy)
    module = make("se_var1", 24, backend=backend, dtype=dtype)

    def function(x: Tensor, weight: Tensor) -> Tensor:
        module.fixed = weight
        return module(x)

    assert_as_accurate(run(function, case), case)


@pytest.mark.parametrize("name", FUSED)
def test_fused_and_plain_are_the_same_module(name: str) -> None:
    case = make_case((2, 16, 6, 6), dtype=torch.float64)
    fused = make(name, 16, fused=True)
    plain = make(name, 16, fused=False)
    plain.load_state_dict(fused.state_dict(), strict=True)
    torch.testing.assert_close(fused(case.x), plain(case.x))
    if isinstance(fused, attention.BandAttention):
        mean = attention.pool(case.x)
        torch.testing.assert_close(attention.rescale(case.x, fused.gate(mean)), fused(case.x))


def test_the_kernels_run_where_a_band_is_fused(monkeypatch: pytest.MonkeyPatch) -> None:
    from eca_fused.attention import base

    calls: list[tuple[tuple[int, ...], str]] = []

    def eca(x: Tensor, weight: Tensor, *, padding_mode: str, backend: str) -> Tensor:
        calls.append((tuple(weight.shape), backend))
        return x

    def plain(x: Tensor, weight: Tensor, padding_mode: str, inplace: bool) -> Tensor:
        return eca(x, weight, padding_mode=padding_mode, backend="reference")

    monkeypatch.setattr(base, "eca", eca)
    monkeypatch.setattr(base, "plain", plain)
    x = make_case((1, 8, 4, 4), dtype=torch.float64).x
    for name in ("se_var1", "se_var2", "eca_ns"):
        make(name, 8)(x)
    make("eca_ns", 8, fused=False)(x)
    assert calls == [
        ((1, 1, 1), "auto"),
        ((8, 1, 1), "auto"),
        ((8, 1, 3), "auto"),
        ((8, 1, 3), "reference"),
    ]


def test_circular_taps_of_each_channel() -> None:
    x = make_case((1, 6, 2, 2), dtype=torch.float64).x
    module = make("eca_ns", 6, padding_mode="circular")
    taps, mean = module.conv.weight[:, 0], x.mean((2, 3))
    rows = sum(taps[:, j] * mean.roll(1 - j, 1) for j in range(3))
    torch.testing.assert_close(module(x), x * torch.sigmoid(rows)[..., None, None])


# ---- CBAM and GSoP ----


def test_cbam_is_the_formula() -> None:
    x = make_case((2, 32, 9, 8), dtype=torch.float64).x
    module = make("cbam", 32).eval()
    module.bn.running_mean.fill_(0.1)
    module.bn.running_var.fill_(2.0)
    w1, b1, w2, b2 = module.mlp.parameters()
    pooled = (x.mean((2, 3)), x.flatten(2).max(2).values)
    z = sum(torch.relu(p @ w1.T + b1) @ w2.T + b2 for p in pooled)
    x1 = x * torch.sigmoid(z)[..., None, None]
    seen = torch.stack((x1.max(1).values, x1.mean(1)), 1)
    pixels = (nn.functional.conv2d(seen, module.conv.weight, padding=3) - 0.1) / (2 + 1e-5) ** 0.5
    torch.testing.assert_close(module(x), x1 * torch.sigmoid(pixels))


@pytest.mark.parametrize(("bias", "extra"), [(True, 64 + 4), (False, 0)])
def test_cbam_parameters(bias: bool, extra: int) -> None:
    module = make("cbam", 64, bias=bias, device="meta")
    assert sum(p.numel() for p in module.parameters()) == 2 * 64 * 4 + 2 * 49 + 2 + extra


def test_gsop_is_the_formula() -> None:
    x = make_case((2, 32, 6, 5), dtype=torch.float64).x
    module = make("gsop", 32, reduced=8).eval()
    small = module.reduce_bn(module.reduce(torch.relu(x)))
    assert small.shape == (2, 8, 3, 3)  # stride 2 up to 256 channels
    flat = torch.relu(small).flatten(2)
    rows = torch.stack([torch.cov(sample, correction=0) for sample in flat])  # (N, d, d)
    rows = rows / (1 + module.row_bn.eps) ** 0.5
    taps = module.row_conv.weight.reshape(8, 4, 8)
    hidden = torch.einsum("nij,ioj->nio", rows, taps).flatten(1) + module.row_conv.bias
    z = hidden @ module.fc.weight.flatten(1).T + module.fc.bias
    torch.testing.assert_close(module(x), x * torch.sigmoid(z)[..., None, None])


def test_gsop_parameters_and_stride() -> None:
    module = make("gsop", 512, device="meta")
    reduction = 512 * 128 + 128 + 2 * 128
    rows = 2 * 128 + 4 * 128 * 128 + 4 * 128
    assert sum(p.numel() for p in module.parameters()) == reduction + rows + 512 * 512 + 512
    assert module.reduce.stride == (1, 1)
    assert make("gsop", 512, stride=2, device="meta").reduce.stride == (2, 2)


@pytest.mark.parametrize("name", ["cbam", "gsop"])
def test_comparators_have_gradients_of_all_parameters(name: str) -> None:
    module = make(name, 32)
    module(make_case((4, 32, 6, 6), dtype=torch.float64).x).square().sum().backward()
    for key, parameter in module.named_parameters():
        assert parameter.grad is not None, key
        assert parameter.grad.isfinite().all(), key
    assert any(p.grad.abs().max() > 0 for p in module.parameters())


# ---- every method ----


@pytest.mark.parametrize("name", attention.METHODS)
def test_shape_and_dtype_are_kept_under_autocast(name: str) -> None:
    module = make(name, 32, dtype=torch.float32)
    x = make_case((2, 32, 6, 6)).x
    with torch.autocast(DEVICE, torch.bfloat16):
        y = module(x)
    assert (y.shape, y.dtype) == (x.shape, x.dtype)


@pytest.mark.parametrize("name", ["se", "se_var3", "eca_ns", "se_var2", "cbam"])
def test_widths_come_from_the_weights(name: str) -> None:
    """Pruning by hand leaves new weights, and layers with their old sizes."""
    module, kept = make(name, 32, dtype=torch.float32), slice(0, 24)
    part = {"se": "fc", "cbam": "mlp", "se_var3": "fc"}.get(name, "conv")
    layer = module.get_submodule(part)
    if name in ("se", "cbam"):
        layer[0].weight = nn.Parameter(layer[0].weight.detach()[:, kept])
        layer[2].weight = nn.Parameter(layer[2].weight.detach()[kept])
        if name == "cbam":
            layer[2].bias = nn.Parameter(layer[2].bias.detach()[kept])
    elif name == "se_var3":
        layer.weight = nn.Parameter(layer.weight.detach()[kept, kept])
    else:
        layer.weight = nn.Parameter(layer.weight.detach()[kept])
        layer.in_channels = layer.out_channels = layer.groups = 24
    assert module(torch.randn(2, 24, 4, 4)).shape == (2, 24, 4, 4)
    with pytest.raises(ValueError, match=r"expected x of shape \(N, 24, \*spatial\)"):
        module(torch.randn(2, 32, 4, 4))


@pytest.mark.parametrize("make_any", [attention.SEVar1, attention.ECAVariant])
def test_gates_without_a_width_take_any_number_of_channels(make_any: type[nn.Module]) -> None:
    assert make_any(16)(torch.randn(2, 12, 4, 4)).shape == (2, 12, 4, 4)


ANY_CHANNELS = ("none", "eca", "se_var1")  # their gates fit any number of channels


@pytest.mark.parametrize("name", [n for n in attention.METHODS if n not in ANY_CHANNELS])
def test_a_map_that_does_not_fit(name: str) -> None:
    module = make(name, 32)
    with pytest.raises(
        ValueError, match=r"expected x of shape \(N, 32, \*spatial\).*\(2, 1, 4, 4\)"
    ):
        module(torch.zeros(2, 1, 4, 4, dtype=torch.float64))
    with pytest.raises(ValueError, match="spatial dimensions, got"):
        module(torch.zeros(2, 32, 1, 1, 4, 4, dtype=torch.float64))
    with pytest.raises(TypeError, match=r"expected x as a torch.Tensor, got list"):
        module([1.0])


@pytest.mark.parametrize(
    ("name", "channels", "options", "error", "message"),
    [
        ("senet", 8, {}, ValueError, "attention as one of none, se, .*gsop, got 'senet'"),
        ("se", 0, {}, ValueError, "channels from 1 up, got 0"),
        ("none", 0, {}, ValueError, "channels from 1 up, got 0"),
        ("se", 8.0, {}, TypeError, r"channels as an int, got 8\.0"),
        ("se", 8, {"reduction": 0}, ValueError, "reduction from 1 up, got 0; the paper has 16"),
        ("cbam", 8, {"reduction": 0}, ValueError, "reduction from 1 up, got 0; the paper has 16"),
        ("se", 8, {"kernel_size": 3}, TypeError, "kernel_size"),
        ("se_gc1", 24, {}, ValueError, "divide the channels, got 16 for 24 .*SE-GC1"),
        ("se_gc2", 24, {}, ValueError, "multiple of 16, for groups of 16, got 24"),
        ("se_gc3", 12, {}, ValueError, "multiple of 8, for groups of 8, got 12"),
        ("eca_ns", 8, {"kernel_size": 2}, ValueError, "odd kernel_size from 1 up, got 2"),
        ("eca_ns", 8, {"padding_mode": "same"}, ValueError, "padding_mode 'zeros' or 'circular'"),
        ("eca_ns", 8, {"backend": "cudnn"}, ValueError, "expected backend as one of"),
        ("gsop", 8, {"reduced": 0}, ValueError, "reduced and stride from 1 up, got 0 and 2"),
    ],
)
def test_errors(
    name: str, channels: int, options: dict[str, object], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        attention.make(name, channels, **options)


def test_reduction_leaves_one_hidden_channel() -> None:
    assert [p.shape for p in make("se", 8, device="meta").parameters()] == [(1, 8), (8, 1)]


def test_eca_is_the_drop_in_layer() -> None:
    assert isinstance(make("eca", 8), ECALayer)
    assert make("eca", 2048, kernel_size=None).conv.weight.shape == (1, 1, 7)
    assert make("eca_ns", 2048, kernel_size=None).conv.weight.shape == (2048, 1, 7)


def test_taps_of_each_channel_have_the_authors_name() -> None:
    authors = nn.Module()
    authors.conv = nn.Conv1d(12, 12, 3, groups=12, bias=False)  # their eca_ns
    make("eca_ns", 12).load_state_dict(authors.state_dict(), strict=True)


def test_public_names() -> None:
    assert set(attention.__all__) <= set(dir(attention))


# ---- timm's options ----


@needs_timm
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"gate_layer": "hard_sigmoid"},
        {"use_mlp": True},
        {"use_mlp": True, "act_layer": nn.SiLU, "gate_layer": "hard_sigmoid"},
        {"use_mlp": True, "rd_channels": 3},
    ],
)
@pytest.mark.parametrize("channels", [24, 88, 96])
def test_variant_is_timms(channels: int, options: dict[str, object]) -> None:
    theirs = timm_eca.EcaModule(channels, **options).double().to(DEVICE)
    ours = attention.ECAVariant(channels, **options, device=DEVICE, dtype=torch.float64)
    ours.load_state_dict(theirs.state_dict(), strict=True)
    x = make_case((2, channels, 5, 4), dtype=torch.float64).x
    torch.testing.assert_close(ours(x), theirs(x))


@needs_timm
def test_circular_variant_is_timms() -> None:
    theirs = timm_eca.CecaModule(24, gate_layer="hard_sigmoid").double().to(DEVICE)
    ours = attention.ECAVariant(
        24, gate_layer="hard_sigmoid", padding_mode="circular", device=DEVICE, dtype=torch.float64
    )
    ours.load_state_dict(theirs.state_dict(), strict=True)
    x = make_case((2, 24, 5, 4), dtype=torch.float64).x
    torch.testing.assert_close(ours(x), theirs(x))


def test_variant_errors() -> None:
    with pytest.raises(ValueError, match=r"as one of sigmoid, hard_sigmoid .*got 'tanh'"):
        attention.ECAVariant(8, gate_layer="tanh")
    with pytest.raises(ValueError, match="padding_mode 'zeros' with use_mlp, got 'circular'"):
        attention.ECAVariant(8, use_mlp=True, padding_mode="circular")
    with pytest.raises(ValueError, match="rd_channels from 1 up, got 0"):
        attention.ECAVariant(8, use_mlp=True, rd_channels=0)


def test_what_a_module_is_shows():
    for name in ("se", "cbam", "gsop"):
        shown = repr(attention.make(name, 64, backend="reference"))
        assert "channels=64, fused=True, backend='reference'" in shown


# ---- structural pruning ----


def prune_inputs(module, keep):
    """As torch-pruning does: a smaller weight, and the sizes that torch's modules declare."""
    module.weight = nn.Parameter(module.weight.detach()[:, keep].clone())
    name = "in_features" if isinstance(module, nn.Linear) else "in_channels"
    setattr(module, name, len(keep))


def prune_outputs(module, keep):
    module.weight = nn.Parameter(module.weight.detach()[keep].clone())
    if module.bias is not None:
        module.bias = nn.Parameter(module.bias.detach()[keep].clone())
    name = "out_features" if isinstance(module, nn.Linear) else "out_channels"
    setattr(module, name, len(keep))


def prune_depthwise(conv, keep):
    prune_outputs(conv, keep)
    conv.in_channels = conv.groups = len(keep)


def prune_groups(conv, keep):
    """Whole groups of two channels."""
    prune_outputs(conv, keep)
    conv.in_channels, conv.groups = len(keep), len(keep) // 2


def prune_ends(first, last, keep):
    prune_inputs(first, keep)
    prune_outputs(last, keep)


PRUNED = {
    "SE": (lambda: attention.SE(16, 4), lambda m, keep: prune_ends(m.fc[0], m.fc[2], keep)),
    "SE-Var3": (lambda: attention.SEGroups(16), lambda m, keep: prune_ends(m.fc, m.fc, keep)),
    "SE-GC3": (lambda: attention.SEGroups(16, 8), lambda m, keep: prune_groups(m.fc, keep)),
    "SE-Var2": (lambda: attention.SEVar2(16), lambda m, keep: prune_depthwise(m.conv, keep)),
    "ECA-NS": (lambda: attention.ECANS(16), lambda m, keep: prune_depthwise(m.conv, keep)),
    "CBAM": (lambda: attention.CBAM(16, 4), lambda m, keep: prune_ends(m.mlp[0], m.mlp[2], keep)),
    "GSoP": (lambda: attention.GSoP(16, 4), lambda m, keep: prune_ends(m.reduce, m.fc, keep)),
}


@pytest.mark.parametrize("name", PRUNED)
@pytest.mark.parametrize("fused", [True, False])
def test_pruned_widths_count(name, fused):
    """The parameters decide the numbers of channels, not what the layer was built for."""
    make, prune = PRUNED[name]
    layer = make().eval()
    layer.fused = fused
    keep = [0, 1, 4, 5, 6, 7, 10, 11, 12, 13]
    prune(layer, keep)
    x = torch.randn(2, len(keep), 5, 6)
    layer.fused = False
    want = layer(x)
    layer.fused = fused
    torch.testing.assert_close(layer(x), want)
    assert f"channels={len(keep)}, " in repr(layer)
    with pytest.raises(ValueError, match=r"expected x of shape \(N, 10, "):
        layer(torch.randn(2, 16, 5, 6))
