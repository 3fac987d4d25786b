"""The network of the main job, and hooks that observe it while it runs."""

import copy
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from eca_fused.cli.common.networks import adapt, hooked
from eca_fused.layer import ECALayer
from eca_fused.models import Bottleneck, ResNet, eca_resnet50, set_fused

__all__ = [
    "KERNEL_SIZES",
    "build",
    "fused_copy",
    "gates",
    "layer_inputs",
    "moved_gates",
    "outputs",
]

KERNEL_SIZES = "3557"
STAGES = ("layer1", "layer2", "layer3", "layer4")


def build(images: Tensor, seed: int) -> ResNet:
    """An ECA-ResNet-50 with random weights, in evaluation mode, with its ECA in plain PyTorch.

    Two things differ from the start of training. With random weights alone, activations grow from
    block to block past the range of float16, so the batch norms take their statistics from the
    images. Untrained batch norms do not shift, so all means would be near zero and all gates near a
    half; the batch norm before each ECA gets random shifts. All of this happens in float32 on the
    CPU, so the weights do not depend on the device and dtype of the run.

    Args:
        images: (P, 3, H, W), float32, at least two.
        seed: of the weights.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        network = eca_resnet50(KERNEL_SIZES, fused=False)
        for module in network.modules():
            if isinstance(module, Bottleneck):
                nn.init.normal_(module.bn3.bias)
    adapt(network, images)
    return network


def fused_copy(network: ResNet) -> ResNet:
    """The same weights with the fused ECA."""
    fused = copy.deepcopy(network)
    set_fused(fused, True)
    return fused


def eca_layers(network: nn.Module) -> list[tuple[int, ECALayer]]:
    """Every ECA layer with its stage, 1 to 4, in the order of the network."""
    return [
        (stage, module)
        for stage, name in enumerate(STAGES, 1)
        for module in network.get_submodule(name).modules()
        if isinstance(module, ECALayer)
    ]


def last_eca_layers(network: nn.Module) -> list[ECALayer]:
    """The last ECA layer of each stage."""
    return list(dict(eca_layers(network)).values())


def outputs(network: ResNet, x: Tensor) -> list[Tensor]:
    """The output of each of the four stages, and the logits: x (N, 3, H, W) to five tensors."""
    stages: list[Tensor] = []
    modules = [network.get_submodule(name) for name in STAGES]
    hook = hooked(modules, lambda index, module, inputs, output: stages.append(output))
    with hook, torch.no_grad():
        logits = network(x)
    return [*stages, logits]


def layer_inputs(network: ResNet, x: Tensor) -> list[Tensor]:
    """The inputs of the last ECA layer of each stage: four maps (N, C, H, W)."""
    maps: list[Tensor] = []
    hook = hooked(last_eca_layers(network), lambda index, m, inputs, output: maps.append(inputs[0]))
    with hook, torch.no_grad():
        network(x)
    return maps


def gates(network: ResNet, x: Tensor) -> list[Tensor]:
    """The gates that the last ECA layer of each stage applied: four matrices (N, C), float64.

    They are measured: the factor between the layer's input and output, by least squares over the
    pixels. So they are right for any backend that computes the layer.
    """
    found: list[Tensor] = []

    def record(index: int, module: nn.Module, inputs: tuple[Tensor], output: Tensor) -> None:
        x, y = inputs[0].double(), output.double()
        found.append((x * y).sum((2, 3)) / x.square().sum((2, 3)))

    with hooked(last_eca_layers(network), record), torch.no_grad():
        network(x)
    return found


@contextmanager
def moved_gates(network: ResNet, seed: int) -> Iterator[None]:
    """Move every gate by one unit in the last place, up or down at random, inside a with block."""
    generator = torch.Generator().manual_seed(seed)

    def move(index: int, module: nn.Module, inputs: tuple[Tensor], output: Tensor) -> Tensor:
        sign = torch.randint(0, 2, (*output.shape[:2], 1, 1), generator=generator) * 2 - 1
        factor = 1 + sign.double() * torch.finfo(output.dtype).eps
        return output * factor.to(output)

    with hooked([layer for _, layer in eca_layers(network)], move):
        yield
