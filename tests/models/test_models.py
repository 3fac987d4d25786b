"""ECA-ResNet: names and shapes of its parameters, kernel sizes, outputs, errors."""

import copy

import pytest
import torch

from eca_fused import ECALayer, models
from eca_fused.models import BasicBlock, Bottleneck, ResNet, eca_resnet50, set_fused

pytestmark = pytest.mark.every_torch


def kernel_sizes(model: torch.nn.Module) -> list[list[int]]:
    """k of every ECA layer, a list for each stage."""
    return [
        [m.conv.weight.shape[2] for m in model.get_submodule(stage).modules() if is_eca(m)]
        for stage in ("layer1", "layer2", "layer3", "layer4")
    ]


def is_eca(module: torch.nn.Module) -> bool:
    return isinstance(module, ECALayer)


def small(**arguments: object) -> ResNet:
    """A ResNet with every kind of block, quick to run."""
    return ResNet(Bottleneck, (2, 1, 1, 1), "3557", 10, **arguments)  # type: ignore[arg-type]


def test_keys_and_shapes_are_torchvisions_and_the_taps() -> None:
    torchvision = pytest.importorskip("torchvision", reason="the names are compared with its own")
    with torch.device("meta"):
        ours, theirs = eca_resnet50().state_dict(), torchvision.models.resnet50().state_dict()
    taps = {key for key in ours if key.endswith(".eca.conv.weight")}
    blocks = {f"layer{i}.{j}" for i, n in enumerate((3, 4, 6, 3), 1) for j in range(n)}
    assert taps == {f"{block}.eca.conv.weight" for block in blocks}
    assert [key for key in ours if key not in taps] == list(theirs)
    assert all(ours[key].shape == theirs[key].shape for key in theirs)


def test_with_open_gates_it_is_torchvisions_network() -> None:
    torchvision = pytest.importorskip("torchvision", reason="the outputs are compared with its own")
    theirs = torchvision.models.resnet50().eval()
    ours = eca_resnet50(fused=False).eval()
    missing, unexpected = ours.load_state_dict(theirs.state_dict(), strict=False)
    assert len(missing) == 16
    assert unexpected == []
    for module in ours.modules():
        if isinstance(module, ECALayer):
            # Taps of zero make every gate a half; doubling the batch norm before makes up for it.
            torch.nn.init.zeros_(module.conv.weight)
    for block in ours.modules():
        if isinstance(block, Bottleneck):
            with torch.no_grad():
                block.bn3.weight *= 2
                block.bn3.bias *= 2
    x = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        torch.testing.assert_close(ours(x), theirs(x))


def test_parameter_count() -> None:
    taps = 3 * 3 + 4 * 5 + 6 * 5 + 3 * 7
    count = sum(p.numel() for p in eca_resnet50(device="meta").parameters())
    assert count == 25_557_032 + taps


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ("3557", [3, 5, 5, 7]),
        ("1111", [1, 1, 1, 1]),
        ([3, 5, 11, 13], [3, 5, 11, 13]),
        ((9, 9, 9, 9), [9, 9, 9, 9]),
        (None, [5, 5, 5, 7]),  # the adaptive rule for 256, 512, 1024 and 2048 channels
    ],
)
def test_kernel_sizes_of_each_stage(given: object, expected: list[int]) -> None:
    model = eca_resnet50(given, device="meta")  # type: ignore[arg-type]
    assert kernel_sizes(model) == [[k] * n for k, n in zip(expected, (3, 4, 6, 3), strict=True)]


def test_adaptive_kernel_sizes_follow_the_output_channels() -> None:
    model = ResNet(BasicBlock, (2, 2, 2, 2), None, device="meta")
    assert kernel_sizes(model) == [[3, 3], [5, 5], [5, 5], [5, 5]]


@pytest.mark.parametrize(
    ("given", "error", "message"),
    [
        (3557, TypeError, r"string of four odd digits such as '3557'.*got 3557"),
        ("355", ValueError, r"kernel_sizes for 4 stages, such as '3557'.*got '355'"),
        ((3, 5, 5, 7, 7), ValueError, r"kernel_sizes for 4 stages.*got \(3, 5, 5, 7, 7\)"),
        ("3547", ValueError, r"odd digits such as '3557', got '3547'"),
        ("35 7", ValueError, r"odd digits such as '3557', got '35 7'"),
        ((3, 5, 4, 7), ValueError, r"odd kernel_size from 1 up, got 4: .*use 3 or 5"),
        ((3, 5, -1, 7), ValueError, r"odd kernel_size from 1 up, got -1"),
        ((3, 5, 5.0, 7), TypeError, r"kernel_size as an int, got 5.0"),
    ],
)
def test_kernel_size_errors(given: object, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        eca_resnet50(given, device="meta")  # type: ignore[arg-type]


def test_other_errors() -> None:
    with pytest.raises(ValueError, match="expected num_classes from 1 up, got 0"):
        eca_resnet50(num_classes=0, device="meta")
    with pytest.raises(ValueError, match=r"four numbers of blocks, one per stage, got \(3, 4\)"):
        ResNet(Bottleneck, (3, 4), device="meta")
    with pytest.raises(ValueError, match="expected backend as one of"):
        eca_resnet50(backend="cudnn", device="meta")


def test_initialisation() -> None:
    model = small()
    weight = model.layer3[0].conv2.weight  # 256 filters of 3x3
    assert weight.std().item() == pytest.approx((2 / (256 * 9)) ** 0.5, rel=0.01)
    norms = [m for m in model.modules() if isinstance(m, torch.nn.BatchNorm2d)]
    assert all((n.weight == 1).all() and (n.bias == 0).all() for n in norms)
    bound = 3**-0.5  # of Conv1d's uniform distribution for three taps
    taps = model.layer1[0].eca.conv.weight
    assert taps.abs().max() <= bound
    assert taps.unique().numel() == 3


@pytest.mark.parametrize("block", [BasicBlock, Bottleneck])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_shapes_and_dtypes(block: type[BasicBlock] | type[Bottleneck], dtype: torch.dtype) -> None:
    model = ResNet(block, (1, 1, 1, 1), "3557", 7, dtype=dtype).eval()
    assert {p.dtype for p in model.parameters()} == {dtype}
    x = torch.randn(2, 3, 65, 33, dtype=dtype)
    shapes = []
    for name in ("layer1", "layer2", "layer3", "layer4"):
        model.get_submodule(name).register_forward_hook(
            lambda module, inputs, output: shapes.append(tuple(output.shape))
        )
    with torch.no_grad():
        logits = model(x)
    e = block.expansion
    assert shapes == [
        (2, 64 * e, 17, 9),
        (2, 128 * e, 9, 5),
        (2, 256 * e, 5, 3),
        (2, 512 * e, 3, 2),
    ]
    assert logits.shape == (2, 7)
    assert logits.dtype == dtype


def test_eca_comes_after_the_last_norm_and_before_the_addition() -> None:
    order: list[str] = []
    block = small().layer1[0]
    for name, module in block.named_children():
        module.register_forward_hook(lambda m, i, o, name=name: order.append(name))
    x = torch.randn(1, 64, 8, 8)
    block(x)
    assert order[order.index("bn3") + 1] == "eca"
    assert order[-1] == "relu"
    # With taps of zero the block is relu(bn3 / 2 + identity): ECA sees nothing of the identity.
    torch.nn.init.zeros_(block.eca.conv.weight)
    seen: list[torch.Tensor] = []
    block.bn3.register_forward_hook(lambda m, i, o: seen.append(o))
    out = block(x)
    torch.testing.assert_close(out, torch.relu(seen[0] / 2 + block.downsample(x)))


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_fused_is_plain(memory_format: torch.memory_format) -> None:
    plain = small(fused=False, dtype=torch.float64).to(memory_format=memory_format)
    fused = copy.deepcopy(plain)
    assert set_fused(fused, True) == 5
    x = torch.randn(2, 3, 64, 64, dtype=torch.float64).to(memory_format=memory_format)
    for model in (plain, fused):
        model(x).square().sum().backward()
    for a, b in zip(plain.parameters(), fused.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad)
    with torch.no_grad():
        torch.testing.assert_close(plain.eval()(x), fused.eval()(x))


def test_arguments_reach_the_layers() -> None:
    layers = [m for m in small(fused=False, backend="reference").modules() if is_eca(m)]
    assert [(m.fused, m.backend) for m in layers] == [(False, "reference")] * 5


def test_set_fused() -> None:
    model = small()
    assert set_fused(model, False) == 5
    assert not any(m.fused for m in model.modules() if is_eca(m))
    assert set_fused(model, True) == 5
    assert all(m.fused for m in model.modules() if is_eca(m))
    with pytest.raises(ValueError, match="a model with ECALayers, found none in Linear"):
        set_fused(torch.nn.Linear(1, 1), True)


def test_public_names() -> None:
    assert set(models.__all__) <= set(dir(models))
