"""convert(): which modules compute ECA, what is left, and why."""

import collections
import copy
import pickle
import sys
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import prune

import eca_fused
from eca_fused import ECALayer, convert, revert
from eca_fused.conversion import recognise as recognition
from eca_fused.models import Bottleneck, ResNet
from helpers.eca_modules import Functional, eca_layer, pooled_to_the_largest

pytestmark = pytest.mark.every_torch


# ---- what is left, and why ----


class Logging(eca_layer):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x)


class WithMethods(eca_layer):
    def gate_of(self, x: Tensor) -> Tensor:
        return x


class Parts(nn.Module):
    """The parts of ECA, for derived classes to use."""

    def __init__(self, k: int = 3, bias: bool = False) -> None:
        super().__init__()
        self.avg_pool = nn.AdaptiveAvgPool2d((1, 1))
        self.conv = nn.Conv1d(1, 1, k, padding=k // 2, bias=bias)
        self.act: nn.Module = nn.Sigmoid()


def parts(forward: Any, **arguments: Any) -> nn.Module:
    """A module with the parts of ECA and this forward."""
    return type("Other", (Parts,), {"forward": forward})(**arguments)  # type: ignore[no-any-return]


def gated(module: Any, x: Tensor, mean_of: Tensor) -> Tensor:
    gate: Tensor = module.act(module.conv(module.avg_pool(mean_of).flatten(2).mT))
    return x * gate.mT[..., None]


def plain(module: Any, x: Tensor) -> Tensor:
    return gated(module, x, x)


def storing(module: Any, x: Tensor) -> Tensor:
    module.last = x
    return plain(module, x)


def appending(module: Any, x: Tensor) -> Tensor:
    module.seen.append(x)
    return plain(module, x)


def counting(module: Any, x: Tensor) -> Tensor:
    module.log.count += 1
    return plain(module, x)


def calling(module: Any, x: Tensor) -> Tensor:
    module.log(1)
    return plain(module, x)


def adding(module: Any, x: Tensor) -> Tensor:
    module.log += 1
    return plain(module, x)


def asking(module: Any, x: Tensor) -> Tensor:
    return plain(module, x) if module.log is None or isinstance(module.log, Log) else x


def gate_in_float32(module: Any, x: Tensor) -> Tensor:
    gate = module.act(module.conv(module.avg_pool(x).flatten(2).mT)).float()
    return x * gate.mT[..., None]


class Log:
    """An object of a user's."""

    def __init__(self) -> None:
        self.count = 0


class OverRows(nn.Module):
    """ECA by a Conv2d over a row of means, or by a function of the module's own taps."""

    def __init__(self, function: bool) -> None:
        super().__init__()
        self.pool = nn.AdaptiveAvgPool2d(1)
        if function:
            self.taps = nn.Parameter(torch.randn(1, 1, 3))
        else:
            self.conv = nn.Conv2d(1, 1, (1, 3), padding=(0, 1), bias=False)

    def forward(self, x: Tensor) -> Tensor:
        row = self.pool(x).flatten(1).unsqueeze(1)
        if hasattr(self, "taps"):
            return x * F.conv1d(row, self.taps, padding=1).sigmoid().mT[..., None]
        return x * self.conv(row.unsqueeze(1)).squeeze(1).sigmoid().mT[..., None]


class InSequence(nn.Module):
    """ECA whose convolution is inside a Sequential."""

    def __init__(self, *pools: nn.Module) -> None:
        super().__init__()
        self.pools = nn.ModuleList(pools)
        self.conv = nn.Sequential(nn.Conv1d(1, 1, 3, padding=1, bias=False), nn.Sigmoid())

    def forward(self, x: Tensor) -> Tensor:
        return x * self.conv(x.mean((2, 3)).unsqueeze(1)).mT[..., None]


def appending_inside(module: Any, x: Tensor) -> Tensor:
    module.log["all"][0].append(x)
    return plain(module, x)


class Recorder(nn.Module):
    def forward(self, gate: Tensor) -> Tensor:
        return gate


def recorded(module: Any, x: Tensor) -> Tensor:
    return plain(module, module.record(x))


def with_a_mask(module: Any, x: Tensor, mask: Tensor | None = None) -> Tensor:
    return plain(module, x if mask is None else x * mask)


def without_gradient(module: Any, x: Tensor) -> Tensor:
    return gated(module, x, x.detach())


def dropping(module: Any, x: Tensor) -> Tensor:
    return nn.functional.dropout(plain(module, x), training=module.training)


def of_64_channels(module: Any, x: Tensor) -> Tensor:
    assert x.shape[1] == 64, "64 channels only"
    return plain(module, x)


def changed(change: Any, module: nn.Module) -> nn.Module:
    change(module)
    return module


def with_a_scale(self: Any) -> None:
    self.scale = nn.Parameter(torch.zeros(1))


LEFT = {
    "residual": (lambda: parts(lambda m, x: x + plain(m, x)), "computes something other than sig"),
    "other gate": (
        lambda: changed(lambda m: setattr(m, "act", nn.Hardsigmoid()), parts(plain)),
        r"computes something other .*\(its gate is Hardsigmoid\)",
    ),
    "other gradient": (lambda: parts(without_gradient), "computes something other"),
    "dropout": (lambda: parts(dropping), "computes something other"),
    "stores": (lambda: parts(storing), "its forward stores last, which"),
    "appends": (
        lambda: changed(lambda m: setattr(m, "seen", []), parts(appending)),
        "its forward stores seen, which",
    ),
    "functional maximum": (
        lambda: Functional(pooled_to_the_largest),
        "computes something other than sigmoid",
    ),
    "appends to a deque": (
        lambda: changed(lambda m: setattr(m, "seen", collections.deque()), parts(appending)),
        "its forward stores seen, which",
    ),
    "appends inside": (
        lambda: changed(lambda m: setattr(m, "log", {"all": ([],)}), parts(appending_inside)),
        "its forward stores log, which",
    ),
    "counts in an object": (
        lambda: changed(lambda m: setattr(m, "log", Log()), parts(counting)),
        r"its forward uses log \(Log\), which its fused form would not",
    ),
    "counts in a tensor": (
        lambda: changed(lambda m: setattr(m, "log", torch.zeros(1)), parts(adding)),
        r"its forward uses log \(Tensor\)",
    ),
    "calls a method of a list": (
        lambda: changed(lambda m: setattr(m, "log", [].append), parts(calling)),
        r"its forward uses log \(builtin_function_or_method\)",
    ),
    "a gate in float32": (
        lambda: parts(gate_in_float32),
        "its forward returns torch.float32 for a map of torch.bfloat16",
    ),
    "over rows": (lambda: OverRows(False), "has no Conv1d of one channel among its direct"),
    "by a function": (lambda: OverRows(True), "has no Conv1d of one channel among its direct"),
    "in a Sequential": (InSequence, "has no Conv1d of one channel among its direct children"),
    "many taps": (lambda: parts(plain, k=5001), "has 5001 taps; a trial takes at most 4095"),
    "records in a child": (
        lambda: changed(lambda m: setattr(m, "record", Recorder()), parts(recorded)),
        r"has record \(Recorder\), which the fused layer would not call",
    ),
    "single precision": (
        lambda: parts(lambda m, x: plain(m, x).float()),
        "its forward returns torch.float32 for a map of torch.float64",
    ),
    "double precision": (
        lambda: parts(lambda m, x: plain(m, x).double()),
        "its forward returns torch.float64 for a map of torch.float32",
    ),
    "slots": (
        lambda: type("Slots", (Parts,), {"forward": plain, "__slots__": ("__extra__",)})(),
        "its class cannot be exchanged",
    ),
    "arguments": (lambda: parts(with_a_mask), r"its forward takes \(x, mask\), not one map alone"),
    "any arguments": (lambda: parts(lambda m, *x: plain(m, *x)), r"its forward takes \(\*x\), not"),
    "no function": (lambda: parts(partial(plain)), r"its forward takes \(\*\), not"),
    "fails": (
        lambda: parts(of_64_channels),
        r"fails on maps of shape \(2, 8, 4, 3\) in float64 .*: 64 channels",
    ),
    "over x": (lambda: parts(lambda m, x: x.mul_(plain(m, x))), "its forward fails on maps"),
    "bias": (lambda: parts(plain, bias=True), "has conv.bias besides its taps"),
    "even": (lambda: parts(plain, k=4), "not of one channel and an odd kernel size"),
    "scale": (lambda: changed(with_a_scale, parts(plain)), "has scale besides its taps"),
    "methods": (lambda: WithMethods(8), "its class has gate_of of its own, which ECALayer lacks"),
    "subclass": (lambda: Logging(8), "its class has forward of its own"),
    "our subclass": (
        lambda: type("Mine", (ECALayer,), {"forward": plain})(8, fused=False),
        "its class has forward of its own",
    ),
    "hook on the gate": (
        lambda: changed(lambda m: m.sigmoid.register_full_backward_hook(print), eca_layer(8)),
        "has hooks on sigmoid",
    ),
    "instance": (
        lambda: changed(lambda m: setattr(m, "forward", lambda x: x), eca_layer(8)),
        "has a forward of its own on the instance",
    ),
    "compiled": (lambda: changed(lambda m: m.compile(), eca_layer(8)), r"compiled by its compile"),
    "scripted": (lambda: torch.jit.script(eca_layer(8)), "is compiled by TorchScript"),
}


@pytest.mark.parametrize("case", LEFT)
def test_left_with_the_reason(case: str) -> None:
    make, reason = LEFT[case]
    module, other = make(), eca_layer(8)
    model = nn.Sequential(module, other)
    cls, names = type(module), dict(vars(module))
    lists = {name: list(value) for name, value in names.items() if isinstance(value, list)}
    report = convert(model)
    assert report.converted == {"1": "eca_layer"}
    assert list(report.left) == ["0"]
    with pytest.raises(AssertionError, match=reason):
        raise AssertionError(report.left["0"])
    assert type(module) is cls
    assert dict(vars(module)) == names
    assert {name: names[name] for name in lists} == lists
    assert revert(model) == 1


@pytest.mark.parametrize(
    ("forward", "log"),
    [(counting, Log()), (adding, torch.zeros(1)), (appending_inside, {"all": ([],)})],
    ids=["object", "tensor", "list"],
)
def test_what_a_forward_writes_to_is_not_reached_by_the_trial(forward: Any, log: Any) -> None:
    module: Any = parts(forward)
    module.log = log
    before = copy.deepcopy(vars(log) if isinstance(log, Log) else log)
    assert convert(module).left
    assert (vars(log) if isinstance(log, Log) else log) == before


@pytest.mark.parametrize("log", [None, Log(), torch.sigmoid, 3, "text"])
def test_what_a_forward_only_asks_for_is_no_obstacle(log: Any) -> None:
    module: Any = parts(asking if log is None else plain)
    module.log = log
    assert convert(module).converted


def test_random_numbers_of_a_forward_are_not_drawn_by_the_trial() -> None:
    module = parts(lambda m, x: plain(m, x + 0 * torch.rand(1, dtype=x.dtype)))
    state = torch.get_rng_state()
    assert convert(module).converted
    assert torch.equal(torch.get_rng_state(), state)


class Audio(nn.Module):
    """No attention: a filter over samples, and layers after it."""

    def __init__(self) -> None:
        super().__init__()
        self.emphasis = nn.Conv1d(1, 1, 3, padding=1, bias=False)
        self.body = nn.Conv1d(1, 64, 80)


class Block(nn.Module):
    """ECA among the layers of a block."""

    def __init__(self) -> None:
        super().__init__()
        self.cv = nn.Conv2d(8, 8, 3)
        self.bn = nn.BatchNorm2d(8)
        self.conv = nn.Conv1d(1, 1, 3, padding=1, bias=False)


@pytest.mark.parametrize("kind", [Audio, Block])
def test_models_with_a_convolution_of_one_channel_among_others(kind: Any) -> None:
    model = nn.Sequential(kind(), eca_layer(8))
    report = convert(model)
    assert list(report.converted) == ["1"]
    assert type(model[0]) is kind


def test_what_a_forward_appends_to_holds_nothing_of_the_trial() -> None:
    module: Any = parts(appending_inside)
    module.log = {"all": ([],)}
    assert convert(module).left
    assert module.log == {"all": ([],)}


def test_an_unexpected_failure_leaves_the_model_as_it_was(monkeypatch: Any) -> None:
    model = nn.Sequential(eca_layer(8), eca_layer(8), eca_layer(8))
    seen = []

    def fails_at_the_third(module: nn.Module) -> str:
        seen.append(module)
        if len(seen) == 3:
            raise MemoryError("no more")
        return "zeros"

    monkeypatch.setattr(recognition, "padding_mode", fails_at_the_third)
    with pytest.raises(MemoryError, match="no more"):
        convert(model)
    assert [type(m) for m in model] == 3 * [eca_layer]


def test_the_parts_alone_are_eca() -> None:
    assert convert(parts(plain)).converted == {"": "Other"}


def test_what_is_not_eca_is_not_spoken_of() -> None:
    model = nn.Sequential(
        nn.Conv1d(1, 1, 3),
        nn.AdaptiveAvgPool2d(1),
        eca_fused.attention.make("se", 8),
        eca_fused.attention.make("cbam", 8),
        nn.Sequential(nn.AdaptiveAvgPool1d(1), nn.Conv1d(1, 1, 3)),
    )
    assert convert(model) == eca_fused.Conversion({}, {})
    assert str(convert(model)) == "no ECA modules found"


def test_revert_refuses_a_class_that_is_not_its_own() -> None:
    model = nn.Sequential(eca_layer(8), eca_layer(8))
    convert(model)
    model[1].__class__ = type("Sharded", (ECALayer,), {})
    with pytest.raises(RuntimeError, match=r"expected 1 as the ECALayer .* got Sharded"):
        revert(model)
    assert type(model[0]) is ECALayer


def test_report() -> None:
    model = ResNet(Bottleneck, (2, 2, 1, 1), fused=False, device="meta")
    model.layer4[0].eca.forward = print
    model.add_module("last", ECALayer())
    assert str(convert(model)).splitlines() == [
        "converted 5, left 1",
        "  ECALayer: layer1.0.eca, layer1.1.eca, layer2.0.eca, layer2.1.eca and 1 more",
        "  left ECALayer: has a forward of its own on the instance, as some wrappers give it: "
        "layer4.0.eca",
        "  fused before: last",
    ]


# ---- taps under other names, and convolutions that are called ----


class Named(nn.Module):
    """ECA as in copies of the authors' code, with its convolution under another name."""

    def __init__(self, name: str, functional: bool = False) -> None:
        super().__init__()
        if not functional:
            self.pool = nn.AdaptiveAvgPool2d(1)
        setattr(self, name, nn.Conv1d(1, 1, 3, padding=1, bias=False))
        self.name, self.functional = name, functional

    def forward(self, x: Tensor) -> Tensor:
        mean = nn.functional.adaptive_avg_pool2d(x, 1) if self.functional else self.pool(x)
        rows = getattr(self, self.name)(mean.squeeze(-1).transpose(-1, -2))
        return x * torch.sigmoid(rows.transpose(-1, -2).unsqueeze(-1))


@pytest.mark.parametrize("name", ["conv1", "conv1d", "fc", "k_conv"])
@pytest.mark.parametrize("functional", [False, True])
def test_taps_under_another_name(name: str, functional: bool) -> None:
    module = Named(name, functional)
    model, x = nn.Sequential(module, eca_layer(8)), torch.randn(2, 8, 5, 5)
    state, want = model.state_dict(), model(x)
    report = convert(model)
    assert report.converted == {"0": "Named", "1": "eca_layer"}
    assert type(module) is ECALayer
    assert list(model.state_dict()) == list(state)
    for run in (model, copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        torch.testing.assert_close(run(x), want)
    if sys.version_info < (3, 14):  # TorchScript needs an older one
        torch.testing.assert_close(torch.jit.trace(model, x)(x), want)
        with pytest.raises(RuntimeError, match=r"named conv, .*revert\(\) before torch"):
            torch.jit.script(model)
    model(x).sum().backward()
    assert getattr(module, name).weight.grad is not None
    assert "kernel_size=3" in repr(module)
    assert revert(model) == 2
    assert type(module) is Named
    torch.testing.assert_close(model(x), want)


@pytest.mark.parametrize(
    "change",
    [
        lambda m: m.conv.register_forward_hook(lambda _, __, y: y + 1),
        lambda m: m.conv.register_forward_pre_hook(lambda _, args: (args[0] * 2,)),
        lambda m: prune.l1_unstructured(m.conv, "weight", 1),
        lambda m: nn.utils.weight_norm(m.conv),
        lambda m: nn.utils.parametrizations.weight_norm(m.conv),
    ],
    ids=["hook", "hook before", "prune", "weight_norm, old", "weight_norm, new"],
)
@pytest.mark.filterwarnings("ignore:.*weight_norm.* is deprecated")
def test_a_convolution_that_has_to_be_called_is(change: Any) -> None:
    model, x = eca_layer(8), torch.randn(2, 8, 5, 5)
    change(model)
    want = model(x)
    assert convert(model).converted == {"": "eca_layer"}
    torch.testing.assert_close(model(x), want)
    revert(model)
    torch.testing.assert_close(model(x), want)


@pytest.mark.parametrize("k", [1, 3, 63, 65, 255, 2001])
@pytest.mark.parametrize("padding_mode", ["zeros", "circular"])
def test_the_trial_does_not_grow_with_the_taps(k: int, padding_mode: str) -> None:
    seen = []

    def forward(self: Any, x: Tensor) -> Tensor:
        seen.append(x.shape[1])
        return eca_fused.reference.eca(x, self.conv.weight, padding_mode=padding_mode)

    module = parts(forward, k=k)
    report = convert(module)
    assert max(seen) <= 130
    assert max(seen) >= min(k, 130)
    if (padding_mode, k) != ("circular", 2001):  # which ECA refuses with so few channels
        assert list(report.converted) == [""]
        assert module.padding_mode == (padding_mode if k > 1 else "zeros")
