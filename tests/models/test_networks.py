"""Every network with every attention: names, kernel sizes, torchvision's weights, gradients."""

import copy

import pytest
import torch

from eca_fused import attention
from eca_fused.models import (
    BasicBlock,
    Bottleneck,
    MobileNetV2,
    ResNet,
    eca_mobilenetv2,
    eca_resnet18,
    eca_resnet34,
    eca_resnet50,
    eca_resnet101,
    eca_resnet152,
    mobilenetv2,
    resnet,
    set_fused,
)

pytestmark = pytest.mark.usefixtures("one_thread")

BLOCKS = {18: (2, 2, 2, 2), 34: (3, 4, 6, 3), 50: (3, 4, 6, 3), 101: (3, 4, 23, 3)}
BLOCKS[152] = (3, 8, 36, 3)
FUSED = ["se", "se_var1", "se_var2", "eca_ns", "eca", "cbam"]
# Stage two has 24 channels, which is no multiple of 16.
MOBILE = [name for name in attention.METHODS if name not in ("se_gc1", "se_gc2")]


def taps(model: torch.nn.Module) -> dict[str, int]:
    """k of every ECA layer by the name of its weight."""
    state = model.state_dict()
    return {key: value.shape[2] for key, value in state.items() if value.dim() == 3}


def stages(sizes: str, blocks: tuple[int, ...]) -> list[int]:
    return [int(k) for k, n in zip(sizes, blocks, strict=True) for _ in range(n)]


# ---- weights of others ----


@pytest.mark.parametrize("depth", BLOCKS)
def test_torchvisions_resnet_loads(depth: int) -> None:
    torchvision = pytest.importorskip("torchvision", reason="its state dict is loaded: make test")
    with torch.device("meta"):
        theirs = getattr(torchvision.models, f"resnet{depth}")().state_dict()
    ours = resnet(depth, "none", device="meta")
    ours.load_state_dict(theirs, strict=True, assign=True)
    assert list(ours.state_dict()) == list(theirs)


def test_torchvisions_mobilenetv2_loads() -> None:
    torchvision = pytest.importorskip("torchvision", reason="its state dict is loaded: make test")
    with torch.device("meta"):
        theirs = torchvision.models.mobilenet_v2().state_dict()
    ours = mobilenetv2("none", device="meta")
    ours.load_state_dict(theirs, strict=True, assign=True)
    assert list(ours.state_dict()) == list(theirs)


@pytest.mark.parametrize("name", ["resnet18", "mobilenet_v2"])
def test_without_attention_it_is_torchvisions_network(name: str) -> None:
    torchvision = pytest.importorskip("torchvision", reason="the outputs are compared: make test")
    theirs = getattr(torchvision.models, name)().eval().double()
    options = {"dtype": torch.float64}
    ours = resnet(18, "none", **options) if name == "resnet18" else mobilenetv2("none", **options)
    ours.load_state_dict(theirs.state_dict(), strict=True)
    x = torch.randn(2, 3, 65, 33, dtype=torch.float64)
    with torch.no_grad():
        torch.testing.assert_close(ours.eval()(x), theirs(x))


def test_the_authors_mobilenetv2_has_these_taps() -> None:
    # Attention is the last module of a block's conv, which has one convolution less in the first.
    found = taps(mobilenetv2(device="meta"))
    places = [f"features.{i}.conv.{3 if i == 1 else 4}.conv.weight" for i in range(1, 18)]
    assert found == dict(zip(places, [1] * 10 + [3] * 7, strict=True))


# ---- names and kernel sizes ----


@pytest.mark.parametrize("name", [name for name in attention.METHODS if name != "gsop"])
def test_names_of_the_attention_in_state_dicts(name: str) -> None:
    with_it = resnet(18, name, device="meta").state_dict()
    key = attention.METHODS[name].key
    added = set(with_it) - set(resnet(18, "none", device="meta").state_dict())
    own = attention.make(name, 64, device="meta").state_dict()
    assert {k for k in added if k.startswith("layer1.0.")} == {f"layer1.0.{key}.{k}" for k in own}
    assert len(added) == 8 * len(own)


@pytest.mark.parametrize(
    ("make", "depth", "sizes"),
    [
        (eca_resnet18, 18, "3577"),
        (eca_resnet34, 34, "3357"),
        (eca_resnet50, 50, "3557"),
        (eca_resnet101, 101, "3357"),
        (eca_resnet152, 152, "3357"),
    ],
)
def test_kernel_sizes_of_the_authors(make: object, depth: int, sizes: str) -> None:
    for model in (make(device="meta"), resnet(depth, device="meta")):  # type: ignore[operator]
        assert list(taps(model).values()) == stages(sizes, BLOCKS[depth])


def test_kernel_sizes_for_each_block() -> None:
    sizes = [3, 1, 5, 3, 7, 9, 11, 3]
    assert list(taps(resnet(18, "eca", sizes, device="meta")).values()) == sizes
    assert list(taps(resnet(18, "eca", "31537913", device="meta")).values()) == [
        *(3, 1, 5, 3, 7, 9, 1, 3)
    ]
    assert list(taps(resnet(18, "eca_ns", sizes, device="meta")).values()) == sizes
    own = eca_mobilenetv2([3] * 16 + [13], device="meta")
    assert list(taps(own).values()) == [3] * 16 + [13]


def test_adaptive_kernel_sizes() -> None:
    assert list(taps(eca_resnet50(None, device="meta")).values()) == stages("5557", BLOCKS[50])
    # Channels 16, 24, 32, 64, 96, 160 and 320.
    blocks = (1, 2, 3, 4, 3, 3, 1)
    assert list(taps(eca_mobilenetv2(None, device="meta")).values()) == stages("3333355", blocks)


def test_gsop_net_has_attention_in_the_last_blocks_and_large_last_maps() -> None:
    model = resnet(50, "gsop", device="meta")
    places = {key.split(".gsop.")[0] for key in model.state_dict() if ".gsop." in key}
    assert places == {"layer1.2", "layer2.3", "layer3.5", "layer4.2"}
    shapes = []
    model.layer4.register_forward_hook(lambda m, i, o: shapes.append(tuple(o.shape)))
    assert model(torch.empty(1, 3, 224, 224, device="meta")).shape == (1, 1000)
    assert shapes == [(1, 2048, 14, 14)]


# ---- computing ----


def small(kind: str, name: str, **options: object) -> ResNet | MobileNetV2:
    """A network in float64 that is quick to run; the same weights each time."""
    torch.manual_seed(0)
    if kind == "mobilenetv2":
        return mobilenetv2(name, num_classes=5, dtype=torch.float64, **options)
    block = BasicBlock if kind == "basic" else Bottleneck
    return ResNet(block, (1, 1, 1, 1), None, 5, attention=name, dtype=torch.float64, **options)


@pytest.mark.parametrize(
    ("kind", "name"),
    [("basic", name) for name in attention.METHODS]
    + [("mobilenetv2", name) for name in ("eca", "se", "cbam")],
)
def test_every_parameter_has_a_gradient(kind: str, name: str) -> None:
    model = small(kind, name).train()
    logits = model(torch.randn(2, 3, 33, 33, dtype=torch.float64))
    assert logits.shape == (2, 5)
    logits.square().sum().backward()
    for key, parameter in model.named_parameters():
        assert parameter.grad is not None, key
        assert parameter.grad.isfinite().all(), key


@pytest.mark.parametrize("kind", ["bottleneck", "mobilenetv2"])
@pytest.mark.parametrize("name", FUSED)
def test_fused_is_plain(kind: str, name: str) -> None:
    plain = small(kind, name, fused=False).eval()
    fused = copy.deepcopy(plain)
    assert set_fused(fused, True) == (4 if kind == "bottleneck" else 17)
    x = torch.randn(2, 3, 33, 33, dtype=torch.float64)
    for model in (plain, fused):
        model(x).square().sum().backward()
    for a, b in zip(plain.parameters(), fused.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad)


@pytest.mark.parametrize("name", MOBILE)
def test_mobilenetv2_with_every_method(name: str) -> None:
    model = mobilenetv2(name, device="meta").eval()
    assert model(torch.empty(2, 3, 224, 224, device="meta")).shape == (2, 1000)


def test_options_reach_the_method() -> None:
    model = mobilenetv2("se", options={"reduction": 8}, device="meta")
    assert model.state_dict()["features.17.conv.4.fc.0.weight"].shape == (40, 320)
    layers = [
        m
        for m in mobilenetv2("eca_ns", backend="reference", fused=False, device="meta").modules()
        if isinstance(m, attention.ECANS)
    ]
    assert [(m.backend, m.fused) for m in layers] == [("reference", False)] * 17


# ---- errors ----


@pytest.mark.parametrize(
    ("arguments", "options", "error", "message"),
    [
        ((26,), {}, ValueError, "depth as one of 18, 34, 50, 101, 152, got 26"),
        ((50, "senet"), {}, ValueError, "attention as one of none, se, .*got 'senet'"),
        ((50, "se", "3557"), {}, ValueError, "None with attention 'se', which has no kernel size"),
        ((50, "eca", [3] * 15), {}, ValueError, r"for 4 stages, .* or for each of 16 blocks, got"),
        ((50, "eca", [3] * 15 + [4]), {}, ValueError, "odd kernel_size from 1 up, got 4"),
        ((18,), {"positions": "first"}, ValueError, "positions 'all' or 'last', got 'first'"),
        ((18,), {"last_stride": 3}, ValueError, "last_stride 1 or 2, got 3"),
    ],
)
def test_errors(
    arguments: tuple[object, ...], options: dict[str, object], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        resnet(*arguments, device="meta", **options)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("given", "error", "message"),
    [
        (1111333, TypeError, "string of seven odd digits such as '1111333'.*got 1111333"),
        ("3557", ValueError, r"for 7 stages, such as '1111333' .*each of 17 blocks, got '3557'"),
        ("1111334", ValueError, "odd digits such as '1111333', got '1111334'"),
    ],
)
def test_mobilenetv2_errors(given: object, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        eca_mobilenetv2(given, device="meta")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="num_classes from 1 up, got 0"):
        eca_mobilenetv2(num_classes=0, device="meta")
