"""convert() on every network of timm that has ECA: the same outputs and gradients, in float64."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from eca_fused import ECALayer, convert, revert

timm: Any = pytest.importorskip("timm", reason="needs timm: make test installs it")

from timm.layers import CecaModule, EcaModule  # noqa: E402

# All networks of timm that use the layer have "eca" in their names.
NAMES = timm.list_models("*eca*", exclude_filters="fused_*")
# The largest networks, at full depth but narrower, to save time. The others are unchanged.
QUARTER = (16, 32, 64, 128)
NFNET = {"channels": (64, 128, 256, 256), "group_size": 16, "num_features": 256}
NARROW: dict[str, dict[str, Any]] = {
    "ecaresnet101d": {"channels": QUARTER},
    "ecaresnet200d": {"channels": QUARTER},
    "ecaresnet269d": {"channels": QUARTER},
    "nf_ecaresnet101": {"channels": tuple(4 * c for c in QUARTER)},
    "eca_nfnet_l1": NFNET,
    "eca_nfnet_l2": NFNET,
    "eca_nfnet_l3": NFNET,
}
# Sizes that the networks' other attention needs.
FIXED: dict[str, dict[str, Any]] = {"eca_botnext26ts_256": {"img_size": 64}}
SHAPES = {"eca_halonext26ts": (1, 3, 256, 256)}


def build(name: str, **arguments: Any) -> Any:
    """A network of timm in which every path carries something: timm starts many at zero."""
    model = timm.create_model(name, num_classes=2, **arguments).double()
    with torch.no_grad():
        for parameter in model.parameters():
            if not parameter.any():
                parameter.uniform_(-0.5, 0.5)
    return model


def results(model: nn.Module, x: Tensor) -> tuple[Tensor, ...]:
    """The output of a model, and the gradients of x and of its parameters."""
    torch.manual_seed(1)  # of dropout
    x = x.detach().requires_grad_()
    y = model(x)
    return y.detach(), *torch.autograd.grad(y.square().sum(), (x, *model.parameters()))


@pytest.mark.parametrize("name", NAMES)
def test_every_network(name: str) -> None:
    model = build(name, **NARROW.get(name, {}), **FIXED.get(name, {}))
    layers = {n: m for n, m in model.named_modules() if isinstance(m, EcaModule | CecaModule)}
    state = list(model.state_dict())
    x = torch.randn(SHAPES.get(name, (2, 3, 64, 64)), dtype=torch.float64)
    want = results(model, x)
    report = convert(model)
    assert list(report.converted) == list(layers)
    assert layers
    assert (report.left, report.already_fused) == ({}, ())
    assert all(type(layer) is ECALayer for layer in layers.values())
    for got, expected in zip(results(model, x), want, strict=True):
        torch.testing.assert_close(got, expected)
    assert list(model.state_dict()) == state
    assert revert(model) == len(layers)
    assert all(type(layer) is EcaModule for layer in layers.values())


@pytest.mark.parametrize("name", NARROW)
def test_every_layer_of_the_largest_at_their_own_size(name: str) -> None:
    with torch.device("meta"):
        model = timm.create_model(name)
    number = sum(isinstance(m, EcaModule) for m in model.modules())
    report = convert(model)
    assert len(report.converted) == number > 20
    assert report.left == {}


@pytest.mark.parametrize(
    ("module", "padding_mode"),
    [
        (EcaModule(kernel_size=5), "zeros"),
        (EcaModule(64, gate_layer=nn.Sigmoid), "zeros"),
        (EcaModule(64, act_layer=nn.ReLU), "zeros"),  # timm takes it, and uses it in its MLP alone
        (CecaModule(kernel_size=5), "circular"),
        (CecaModule(64), "circular"),
    ],
)
def test_modules(module: Any, padding_mode: str) -> None:
    module.double()
    x = torch.randn(2, 16, 6, 5, dtype=torch.float64)
    want = results(module, x)
    convert(module)
    assert (type(module), module.padding_mode) == (ECALayer, padding_mode)
    for got, expected in zip(results(module, x), want, strict=True):
        torch.testing.assert_close(got, expected)


@pytest.mark.parametrize(
    ("module", "reason"),
    [
        (EcaModule(64, gate_layer="hard_sigmoid"), r"something other .*\(its gate is Hard"),
        (CecaModule(64, gate_layer="hard_sigmoid"), r"something other .*\(its gate is Hard"),
        (EcaModule(64, use_mlp=True), "has conv.bias, conv2.weight, conv2.bias besides its taps"),
        (CecaModule(64, act_layer=nn.ReLU), "has conv.bias besides its taps"),
        (type("Mine", (EcaModule,), {"forward": lambda m, x: x})(64), "its class has forward"),
    ],
)
def test_modules_that_are_left(module: Any, reason: str) -> None:
    model = nn.Sequential(module)
    cls = type(module)
    report = convert(model)
    assert report.converted == {}
    with pytest.raises(AssertionError, match=reason):
        raise AssertionError(report.left["0"])
    assert type(module) is cls


def test_subclasses_that_add_a_constructor_alone() -> None:
    class Mine(EcaModule):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__(64)

    module = Mine()
    assert convert(module).converted == {"": "Mine"}
    revert(module)
    assert type(module) is Mine


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_compiled_afterwards(layout: torch.memory_format) -> None:
    model = build("ecaresnet26t", layers=(1, 1, 1, 1), channels=QUARTER)
    x = torch.randn(2, 3, 32, 32, dtype=torch.float64).contiguous(memory_format=layout)
    want = results(model, x)
    convert(model)
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    for got, expected in zip(results(compiled, x), want, strict=True):
        torch.testing.assert_close(got, expected)
