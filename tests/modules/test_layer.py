"""ECALayer as a module: kernel sizes, state dicts of other implementations, everyday use."""

import copy
import pickle

import pytest
import torch
from torch import nn

import eca_fused
from eca_fused import ECALayer, kernel_size
from helpers.cases import BACKENDS, make_case
from helpers.eca_modules import eca_layer
from helpers.optional import needs_timm, timm_eca

pytestmark = pytest.mark.any_device


@pytest.mark.parametrize(
    ("channels", "k"),
    [(1, 3), (16, 3), (64, 3), (128, 5), (256, 5), (512, 5), (1024, 5), (2048, 7)],
)
def test_adaptive_kernel_size(channels, k):
    assert kernel_size(channels) == k
    assert ECALayer(channels).conv.weight.shape == (1, 1, k)


@needs_timm
@pytest.mark.parametrize("channels", [1, 3, 24, 64, 100, 960, 4096])
@pytest.mark.parametrize(("gamma", "beta"), [(2, 1), (1, 1), (3, 0.5), (2, -1)])
def test_adaptive_kernel_size_is_timms(channels, gamma, beta):
    theirs = timm_eca.EcaModule(channels, gamma=gamma, beta=beta).conv.weight.shape[-1]
    assert kernel_size(channels, gamma, beta) == theirs


def test_which_argument_gives_the_kernel_size():
    assert ECALayer().conv.weight.shape[-1] == 3
    assert ECALayer(kernel_size=9).conv.weight.shape[-1] == 9
    assert ECALayer(2048, 1).conv.weight.shape[-1] == 1
    assert ECALayer(2048, gamma=1).conv.weight.shape[-1] == 13


OTHERS = {
    "timm EcaModule": (lambda k: timm_eca.EcaModule(kernel_size=k), "zeros"),
    "timm CecaModule": (lambda k: timm_eca.CecaModule(kernel_size=k), "circular"),
    "the authors' eca_layer": (lambda k: eca_layer(8, k), "zeros"),
}


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("k", [3, 5, 7])
@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=needs_timm) if "timm" in n else n for n in OTHERS]
)
def test_weights_of_other_implementations(name, k, fused):
    make, padding_mode = OTHERS[name]
    theirs = make(k)
    ours = ECALayer(kernel_size=k, padding_mode=padding_mode, fused=fused)
    ours.load_state_dict(theirs.state_dict(), strict=True)
    theirs.load_state_dict(ours.state_dict(), strict=True)
    x = torch.randn(2, 24, 7, 7)
    got, want = ours(x), theirs(x)
    torch.testing.assert_close(got, want)
    got.sum().backward()
    want.sum().backward()
    torch.testing.assert_close(ours.conv.weight.grad, theirs.conv.weight.grad, rtol=1e-4, atol=1e-4)


def test_initialisation_is_that_of_the_authors_layer():
    torch.manual_seed(3)
    theirs = eca_layer(8, 5)
    torch.manual_seed(3)
    assert torch.equal(ECALayer(kernel_size=5).conv.weight, theirs.conv.weight)


def test_state_dict_has_the_taps_alone():
    assert {k: tuple(v.shape) for k, v in ECALayer(256).state_dict().items()} == {
        "conv.weight": (1, 1, 5)
    }
    assert [name for name, _ in ECALayer(256).named_parameters()] == ["conv.weight"]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("padding_mode", ["zeros", "circular"])
def test_fused_and_plain_layers_agree(padding_mode, backend):
    fused = ECALayer(48, padding_mode=padding_mode, backend=backend)
    plain = ECALayer(48, padding_mode=padding_mode, fused=False, backend=backend)
    plain.load_state_dict(fused.state_dict())
    x = torch.randn(2, 48, 9, 9)
    torch.testing.assert_close(fused(x), plain(x))
    # An attribute of the layer swaps the form, too.
    plain.fused = True
    assert torch.equal(fused(x), plain(x))


@pytest.mark.parametrize("backend", BACKENDS)
def test_inplace_inference(backend):
    layer = ECALayer(48, inplace=True, backend=backend)
    x = torch.randn(2, 48, 9, 9)
    want = ECALayer(48, fused=False)
    want.load_state_dict(layer.state_dict())
    with torch.no_grad():
        expected = want(x)
        version = x._version
        assert layer(x) is x
    torch.testing.assert_close(x, expected)
    assert x._version > version


def test_taps_in_the_dtype_of_the_model():
    layer = ECALayer(16, dtype=torch.float64)
    assert layer.conv.weight.dtype == torch.float64
    assert layer(torch.randn(2, 16, 5, 5, dtype=torch.float64)).dtype == torch.float64
    assert layer.half().conv.weight.dtype == torch.float16
    assert layer(torch.randn(2, 16, 5, 5).half()).dtype == torch.float16
    assert ECALayer(16, device="meta").conv.weight.device.type == "meta"


@pytest.mark.parametrize("clone", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_copies(clone):
    layer = ECALayer(48, padding_mode="circular", backend="auto")
    other = clone(layer)
    assert other.conv.weight is not layer.conv.weight
    x = torch.randn(2, 48, 3, 3)
    assert torch.equal(layer(x), other(x))
    assert repr(other) == repr(layer)


def test_repr_says_what_the_layer_does():
    text = repr(ECALayer(256, padding_mode="circular", fused=False))
    assert "kernel_size=5" in text
    assert "padding_mode='circular'" in text
    assert "fused=False" in text


def test_hooks_and_freezing_work_as_on_any_module():
    layer = ECALayer(8)
    seen = []
    layer.register_forward_hook(lambda module, args, y: seen.append(y.shape))
    layer.requires_grad_(False)
    y = layer(torch.randn(2, 8, 3, 3))
    assert seen == [y.shape]
    assert not y.requires_grad


def test_meta_tensors():
    layer = ECALayer(8, device="meta")
    x = torch.empty(2, 8, 3, 3, device="meta").to(memory_format=torch.channels_last)
    y = layer(x)
    assert y.device.type == "meta"
    assert y.stride() == x.stride()


def test_a_layer_in_a_network_learns():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(1, 8, 3), ECALayer(8), nn.Flatten(), nn.Linear(8 * 36, 2))
    case = make_case((16, 1, 8, 8))
    target = (case.x.mean((1, 2, 3)) > case.x.mean()).long()
    optimizer = torch.optim.SGD(net.parameters(), lr=0.05)
    before = net[1].conv.weight.detach().clone()
    losses = []
    for _ in range(30):
        loss = nn.functional.cross_entropy(net(case.x), target)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0] / 2
    assert not torch.equal(before, net[1].conv.weight)


def test_doctest_of_the_package():
    import doctest

    assert doctest.testmod(eca_fused).attempted > 0
    assert doctest.testmod(eca_fused).failed == 0


# Frameworks set these on every module that has them; they mean activations.
SET_BY_FRAMEWORKS = ("inplace",)


@pytest.mark.parametrize("name", [name for name in eca_fused.attention.METHODS if name != "none"])
def test_no_attribute_that_frameworks_set_on_every_module(name):
    module = eca_fused.attention.make(name, 256)
    own = [m for m in module.modules() if type(m).__module__.startswith("eca_fused")]
    assert own
    assert not [m for m in own for attribute in SET_BY_FRAMEWORKS if hasattr(m, attribute)]


def test_a_framework_that_sets_inplace_changes_nothing():
    layer, x = eca_fused.ECALayer(8), torch.randn(2, 8, 5, 5)
    before, wanted = x.clone(), layer(x)
    for module in layer.modules():
        if hasattr(module, "inplace"):
            module.inplace = True
    assert torch.equal(layer(x), wanted)
    assert torch.equal(x, before)
