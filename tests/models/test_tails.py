"""Networks whose blocks end in one operation, against the same networks without it."""

import copy

import pytest
import torch
from torch import nn

from eca_fused import convert, models
from eca_fused.attention import residual_tail
from helpers.cases import needs_extension

NETWORKS = {
    "ECA-ResNet-18": lambda **o: models.resnet(18, num_classes=10, **o),
    "SE-ResNet-50": lambda **o: models.resnet(50, "se", num_classes=10, **o),
    "ResNet-18": lambda **o: models.resnet(18, "none", num_classes=10, **o),
    "ECA-MobileNetV2": lambda **o: models.mobilenetv2(num_classes=10, dropout=0.0, **o),
}


def pair(name):
    """A network with tails and one without, of the same parameters, in float64."""
    torch.manual_seed(0)
    with_tails, without = (NETWORKS[name](tails=tails).double() for tails in (True, False))
    without.load_state_dict(with_tails.state_dict(), strict=True)
    return with_tails, without


@pytest.mark.parametrize("name", NETWORKS)
def test_training_follows_the_network_without_tails(name, one_thread):
    """Values, parameters and running statistics over some steps, then evaluation."""
    networks = pair(name)
    optimizers = [torch.optim.SGD(n.parameters(), 1e-4, momentum=0.9) for n in networks]
    for step in range(4):
        x = torch.randn(2, 3, 40, 40, dtype=torch.float64)
        losses = []
        for network, optimizer in zip(networks, optimizers, strict=True):
            loss = network(x).square().mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.detach())
        torch.testing.assert_close(*losses, msg=lambda m, s=step: f"step {s}: {m}")
    states = [network.state_dict() for network in networks]
    for key, got in states[0].items():
        torch.testing.assert_close(got, states[1][key], msg=lambda m, k=key: f"{k}: {m}")
    with torch.no_grad():
        torch.testing.assert_close(*(network.eval()(x) for network in networks))


def losses_of(network, images, labels, batches, rate):
    """The losses of a run of SGD over slices of images (N, 3, H, W) and labels (N,)."""
    optimizer = torch.optim.SGD(network.train().parameters(), rate, momentum=0.9)
    losses = []
    for batch in batches:
        loss = torch.nn.functional.cross_entropy(network(images[batch]), labels[batch])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.detach())
    return torch.stack(losses)


def test_a_training_run_follows_the_loss_curve_of_the_plain_one(one_thread):
    """From the first loss to a fifth of it. In float32, rounding alone takes runs apart."""
    torch.manual_seed(0)
    images, labels = torch.randn(24, 3, 24, 24, dtype=torch.float64), torch.randint(8, (24,))
    batches = [slice(8 * i, 8 * i + 8) for i in range(3)] * 8
    curves = [losses_of(n, images, labels, batches, 0.02) for n in pair("ECA-ResNet-18")]
    torch.testing.assert_close(*curves, rtol=1e-6, atol=1e-8)
    assert curves[0][-3:].mean() < 0.2 * curves[0][:3].mean()


@needs_extension
def test_a_run_on_digits_follows_the_plain_one(one_thread):
    """Converted, in float32, on photographs of handwriting, until most of them are read.

    A third run, whose images differ in the last bits, shows how far roundings take runs apart.
    """
    datasets = pytest.importorskip("sklearn.datasets", reason="needs scikit-learn: make test")
    found = datasets.load_digits()
    images = torch.tensor(found.images, dtype=torch.float32)[:512, None].repeat(1, 3, 2, 2) / 16
    labels = torch.tensor(found.target)[:512]
    torch.manual_seed(0)
    plain = models.ResNet(models.BasicBlock, (1, 1, 1, 1), num_classes=10)
    ours = copy.deepcopy(plain)
    assert len(convert(ours, tails=True).tails) == 4
    nudge = 1 + 4 * torch.finfo(torch.float32).eps
    batches = [slice(64 * i, 64 * i + 64) for i in range(8)] * 4
    runs = ((copy.deepcopy(plain), images), (plain, images * nudge), (ours, images))
    want, other, got = (losses_of(n, x, labels, batches, 0.01) for n, x in runs)
    assert (want - other).abs().max() < 1e-4  # 1.4e-5 was seen
    assert (want - got).abs().max() < 1e-3  # likewise
    assert want[-8:].mean() < 0.2 * want[0]


@needs_extension
@pytest.mark.parametrize("name", NETWORKS)
def test_no_tail_calls_its_modules(name, monkeypatch, one_thread):
    calls = []
    compute = residual_tail._compute
    monkeypatch.setattr(residual_tail, "_compute", lambda *a: calls.append(a) or compute(*a))
    network = NETWORKS[name](tails=True).eval()
    with torch.no_grad():
        network(torch.randn(2, 3, 40, 40))
    blocks = (models.BasicBlock, models.Bottleneck, models.InvertedResidual)
    assert len(calls) == sum(isinstance(m, blocks) for m in network.modules())


def test_a_hook_on_a_shortcut_is_called():
    network = models.resnet(18, num_classes=4, tails=True)
    block = network.layer2[0]
    seen = []
    block.downsample.register_forward_hook(lambda m, a, out: seen.append("all"))
    block.downsample[1].register_forward_hook(lambda m, a, out: seen.append("norm"))
    network(torch.randn(2, 3, 40, 40))
    assert seen == ["norm", "all"]


def test_set_fused_reaches_tails(monkeypatch, one_thread):
    network = models.resnet(18, num_classes=4, tails=True).eval()
    x = torch.randn(2, 3, 40, 40)
    with torch.no_grad():
        want = network(x)
        models.set_fused(network, False)
        monkeypatch.setattr(residual_tail, "_compute", lambda *a: pytest.fail("a fused tail"))
        torch.testing.assert_close(network(x), want)


@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated")
def test_torchscript_compiles_the_modules(one_thread):
    network = models.resnet(18, num_classes=4, tails=True).eval()
    scripted = torch.jit.script(network)
    x = torch.randn(2, 3, 40, 40)
    with torch.no_grad():
        torch.testing.assert_close(scripted(x), network(x))


# ---- memory ----


def kept(module, x):
    """MB of an image that autograd keeps for the backward pass, besides parameters and x."""
    own = {t.untyped_storage().data_ptr() for t in (x, *module.parameters())}
    storages = {}

    def pack(t):
        storage = t.untyped_storage()
        if storage.data_ptr() not in own:
            storages[storage.data_ptr()] = storage.nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        y = module(x)
    del y
    return sum(storages.values()) / x.shape[0] / 1e6


# docs/performance.md has these numbers, in MB for each image: of one block more in a row of blocks.
KEPT = {1: (12.9, 9.7), 2: (6.4, 4.9), 3: (3.2, 2.5), 4: (1.6, 1.3)}
KEPT_BY_ALL = (107.7, 86.2)


@needs_extension
@pytest.mark.parametrize("stage", KEPT)
def test_memory_of_a_block_of_resnet50(stage):
    block = getattr(models.resnet(50), f"layer{stage}")[1]
    channels, size = 128 << stage, 112 >> stage
    found = []
    for tails in (False, True):
        row = nn.Sequential(*(copy.deepcopy(block) for _ in range(2)))
        assert not tails or len(convert(row, tails=True).tails) == 2
        x = torch.randn(2, channels, size, size)
        found.append(kept(row, x) - kept(row[:1], x))
    assert found == pytest.approx(KEPT[stage], abs=0.06)
    one_map = 4 * channels * size**2 / 1e6
    assert found[0] - found[1] == pytest.approx(one_map, rel=0.15)


@needs_extension
def test_memory_of_resnet50():
    network, x = models.resnet(50), torch.randn(2, 3, 224, 224)
    found = [kept(network, x)]
    convert(network, tails=True)
    found.append(kept(network, x))
    assert found == pytest.approx(KEPT_BY_ALL, abs=0.06)
