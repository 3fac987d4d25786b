"""What is done to models: copies, torch.fx, meta tensors, parametrization, quantization, swaps."""

import copy
import io
import pickle

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental import optimization
from torch.nn.utils import fusion, parametrize

import eca_fused
from eca_fused import ECALayer, attention
from eca_fused.models import Bottleneck, ResNet
from helpers.cases import LAYOUTS, make_case, needs_extension
from helpers.optional import needs_timm, timm_eca

pytestmark = pytest.mark.every_torch


class Net(nn.Module):
    """ECA in both its forms, as a module and as a function."""

    def __init__(self, **arguments):
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3)
        self.eca = ECALayer(8, **arguments)

    def forward(self, x):
        y = self.eca(self.conv(x))
        return eca_fused.eca(y, self.eca.conv.weight, padding_mode="circular")


def image():
    return torch.randn(2, 3, 7, 9)


def saved_and_loaded(module):
    file = io.BytesIO()
    torch.save(module, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


COPIES = {
    "deepcopy": copy.deepcopy,
    "pickle": lambda module: pickle.loads(pickle.dumps(module)),
    "torch.save": saved_and_loaded,
}


def calls(graph_module):
    return [n.target for n in graph_module.graph.nodes if n.op == "call_function"]


@pytest.mark.parametrize("how", COPIES)
def test_copies_of_a_network_compute_and_learn_alone(how):
    net, x = Net(), image()
    other = COPIES[how](net)
    assert torch.equal(other(x), net(x))
    other(x).sum().backward()
    assert net.eca.conv.weight.grad is None
    assert other.eca.conv.weight.grad is not None


@pytest.mark.parametrize("how", ["as it is", *COPIES])
@pytest.mark.parametrize("fused", [True, False])
def test_symbolic_trace(fused, how):
    net, x = Net(fused=fused), image()
    traced = torch.fx.symbolic_trace(net)
    assert calls(traced) == [eca_fused.eca, eca_fused.eca]
    traced.recompile()
    traced = COPIES.get(how, lambda module: module)(traced)
    y, want = traced(x), net(x)
    assert torch.equal(y, want)
    (got,) = torch.autograd.grad(y.sum(), traced.eca.conv.weight)
    (want,) = torch.autograd.grad(want.sum(), net.eca.conv.weight)
    assert torch.equal(got, want)


def test_symbolic_trace_of_in_place_inference():
    layer, x = ECALayer(8, inplace=True), make_case((2, 8, 5, 7)).x
    traced = torch.fx.symbolic_trace(layer)
    assert calls(traced) == [eca_fused.eca_]
    with torch.no_grad():
        want = layer(x.clone())
        assert traced(x) is x
    assert torch.equal(x, want)


@pytest.mark.parametrize("function", [eca_fused.eca, eca_fused.eca_])
def test_symbolic_trace_where_the_taps_alone_are_traced(function):
    class Fixed(nn.Module):
        def __init__(self):
            super().__init__()
            self.register_buffer("x", make_case((2, 8, 5, 7)).x)

        def forward(self, weight):
            return function(self.x, weight, padding_mode="circular")

    net = Fixed()
    before = net.x.clone()
    traced = torch.fx.symbolic_trace(net)
    assert calls(traced) == [function]
    for taps in (3, 5):
        weight = torch.randn(1, 1, taps)
        with torch.no_grad():
            traced.x.copy_(before)
            want = eca_fused.eca(before, weight, padding_mode="circular")
            assert torch.equal(traced(weight), want)


def test_symbolic_trace_of_eca_resnet():
    net = ResNet(Bottleneck, (1, 1, 1, 1), "3557", 10).eval()
    traced = torch.fx.symbolic_trace(net)
    assert calls(traced).count(eca_fused.eca) == 4
    x = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        assert torch.equal(traced(x), net(x))


def test_symbolic_trace_with_the_layer_as_a_leaf():
    class Tracer(torch.fx.Tracer):
        def is_leaf_module(self, module, name):
            return isinstance(module, ECALayer) or super().is_leaf_module(module, name)

    net = nn.Sequential(nn.Conv2d(3, 8, 3), ECALayer(8))
    traced = torch.fx.GraphModule(net, Tracer().trace(net))
    assert [n.target for n in traced.graph.nodes if n.op == "call_module"] == ["0", "1"]
    x = image()
    assert torch.equal(traced(x), net(x))


def test_from_meta_to_memory():
    want = Net()
    with torch.device("meta"):
        net = Net()
    assert net(torch.empty(2, 3, 7, 9, device="meta")).shape == (2, 8, 5, 7)
    net = net.to_empty(device="cpu")
    net.load_state_dict(want.state_dict())
    x = image()
    assert torch.equal(net(x), want(x))


def test_assigned_parameters():
    want = Net()
    with torch.device("meta"):
        net = Net()
    net.load_state_dict(want.state_dict(), assign=True)
    assert net.eca.conv.weight.data_ptr() == want.eca.conv.weight.data_ptr()
    x = image()
    assert torch.equal(net(x), want(x))


@needs_extension
@pytest.mark.parametrize("layout", LAYOUTS)
def test_fake_tensors(layout):
    case = make_case((2, 8, 5, 7), layout=layout)
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        x = mode.from_tensor(case.x).requires_grad_()
        weight = mode.from_tensor(case.weight).requires_grad_()
        y = eca_fused.eca(x, weight)
        dx, dweight = torch.autograd.grad(y.sum(), (x, weight))
    assert (y.shape, y.stride()) == (case.x.shape, case.x.stride())
    assert (dx.shape, dx.stride()) == (case.x.shape, case.x.stride())
    assert dweight.shape == case.weight.shape


def test_convolution_and_batch_norm_before_the_layer_fuse():
    net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), ECALayer(8)).double()
    net(image().double())  # gives the batch norm statistics
    net.eval()
    fused = nn.Sequential(fusion.fuse_conv_bn_eval(net[0], net[1]), net[2])
    x = image().double()
    torch.testing.assert_close(fused(x), net(x))
    traced = optimization.fuse(net)
    assert not any(isinstance(m, nn.BatchNorm2d) for m in traced.modules())
    torch.testing.assert_close(traced(x), net(x))


def test_parametrized_taps():
    class Symmetric(nn.Module):
        def forward(self, weight):
            return (weight + weight.flip(-1)) / 2

    layer, x = ECALayer(8), make_case((2, 8, 5, 7)).x
    parametrize.register_parametrization(layer.conv, "weight", Symmetric())
    weight = layer.conv.weight
    assert torch.equal(weight, weight.flip(-1))
    y = layer(x)
    assert torch.equal(y, eca_fused.eca(x, weight))
    y.sum().backward()
    grad = layer.conv.parametrizations.weight.original.grad
    torch.testing.assert_close(grad, grad.flip(-1))
    parametrize.remove_parametrizations(layer.conv, "weight")
    assert torch.equal(layer(x), y)


def test_functional_call():
    layer, case = ECALayer(8), make_case((2, 8, 5, 7))
    y = torch.func.functional_call(layer, {"conv.weight": case.weight}, (case.x,))
    assert torch.equal(y, eca_fused.eca(case.x, case.weight))
    assert not torch.equal(y, layer(case.x))


@needs_timm
@pytest.mark.parametrize("padding_mode", ["zeros", "circular"])
def test_timms_layers_are_replaced_and_put_back(padding_mode):
    kind = timm_eca.EcaModule if padding_mode == "zeros" else timm_eca.CecaModule
    net = nn.Sequential(nn.Conv2d(3, 8, 3), kind(8), nn.ReLU(), kind(8))
    x = image()
    want, before = net(x), copy.deepcopy(net.state_dict())
    for name, module in list(net.named_children()):
        if isinstance(module, kind):
            layer = ECALayer(kernel_size=module.conv.kernel_size[0], padding_mode=padding_mode)
            layer.load_state_dict(module.state_dict())
            setattr(net, name, layer)
    torch.testing.assert_close(net(x), want)
    assert list(net.state_dict()) == list(before)
    for name, module in list(net.named_children()):
        if isinstance(module, ECALayer):
            theirs = kind(kernel_size=module.conv.kernel_size[0])
            theirs.load_state_dict(module.state_dict())
            setattr(net, name, theirs)
    assert torch.equal(net(x), want)


def test_shared_memory():
    net, x = Net(), image()
    want = net(x)
    assert net.share_memory().eca.conv.weight.is_shared()
    assert torch.equal(net(x), want)


def test_quantization_leaves_the_layer_alone():
    quantization = pytest.importorskip(
        "torch.ao.quantization", reason="this torch has no torch.ao.quantization; torchao has it"
    )
    net = nn.Sequential(nn.Flatten(2), ECALayer(8), nn.Flatten(), nn.Linear(8 * 35, 4)).eval()
    x = make_case((2, 8, 5, 7)).x
    quantized = quantization.quantize_dynamic(net, {nn.Linear}, dtype=torch.qint8)
    assert type(quantized[1]) is ECALayer
    assert type(quantized[3]) is not nn.Linear
    assert torch.equal(quantized[1].conv.weight, net[1].conv.weight)
    # The weights of the linear layer have 8 bits.
    torch.testing.assert_close(quantized(x), net(x), rtol=0.05, atol=0.05)


def test_static_quantization_with_a_float_layer_in_between():
    quantization = pytest.importorskip(
        "torch.ao.quantization", reason="this torch has no torch.ao.quantization; torchao has it"
    )
    net = nn.Sequential(
        quantization.QuantWrapper(nn.Conv2d(3, 8, 3)), ECALayer(8), nn.ReLU()
    ).eval()
    # The default would quantize the convolution that holds the taps, which is never called.
    net[0].qconfig = quantization.get_default_qconfig(torch.backends.quantized.engine)
    x = image()
    prepared = quantization.prepare(net)
    prepared(x)
    converted = quantization.convert(prepared)
    assert type(converted[1].conv) is nn.Conv1d
    torch.testing.assert_close(converted(x), net(x), rtol=0.05, atol=0.1)


class Annotated(torch.Tensor):
    """A subclass without methods, as MONAI's MetaTensor is for our functions."""


@pytest.mark.parametrize("grad", [False, True], ids=["inference", "training"])
@pytest.mark.parametrize("name", ["layer", "eca_", "out", "pool", "rescale", "se"])
def test_subclasses_of_tensor_stay_themselves(name, grad):
    x = torch.randn(2, 8, 4, 4)
    weight, gate = torch.randn(1, 1, 3), torch.rand(2, 8)
    layer, se = ECALayer(8), attention.SE(8, 2)
    functions = {
        "layer": layer, "se": se, "pool": eca_fused.pool,
        "rescale": lambda x: eca_fused.rescale(x, gate),
        "eca_": lambda x: eca_fused.eca_(x * 1, weight),
        "out": lambda x: eca_fused.eca(x, weight, out=torch.empty_like(x)),
    }  # fmt: skip
    function = functions[name]
    if grad and name in ("eca_", "out"):
        with pytest.raises(RuntimeError, match="no_grad"):
            function(x.as_subclass(Annotated).requires_grad_())
        return
    with torch.set_grad_enabled(grad):
        y, want = function(x.clone().as_subclass(Annotated)), function(x.clone())
        assert type(y) is Annotated
        y += 1
    torch.testing.assert_close(y.as_subclass(torch.Tensor), want + 1)
