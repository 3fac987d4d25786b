"""ResNets and MobileNetV2 with ECA, with another channel attention, or with none.

Each network has one definition. Parameters have the names of torchvision and the ECA-Net authors.
The detectors need torchvision and are imported from detection.py.
"""

from collections.abc import Sequence
from typing import Any

from torch import nn

from eca_fused import attention as methods
from eca_fused.layer import ECALayer
from eca_fused.models.mobilenetv2 import InvertedResidual, MobileNetV2
from eca_fused.models.resnet import BasicBlock, Bottleneck, ResNet

__all__ = [
    "BasicBlock",
    "Bottleneck",
    "InvertedResidual",
    "MobileNetV2",
    "ResNet",
    "eca_mobilenetv2",
    "eca_resnet18",
    "eca_resnet34",
    "eca_resnet50",
    "eca_resnet101",
    "eca_resnet152",
    "mobilenetv2",
    "resnet",
    "set_fused",
]

# Blocks of each stage, and the kernel sizes of the authors' checkpoint.
RESNETS: dict[int, tuple[type[BasicBlock] | type[Bottleneck], tuple[int, ...], str]] = {
    18: (BasicBlock, (2, 2, 2, 2), "3577"),
    34: (BasicBlock, (3, 4, 6, 3), "3357"),
    50: (Bottleneck, (3, 4, 6, 3), "3557"),
    101: (Bottleneck, (3, 4, 23, 3), "3357"),
    152: (Bottleneck, (3, 8, 36, 3), "3357"),
}
MOBILENETV2 = "1111333"


def resnet(
    depth: int,
    attention: str = "eca",
    kernel_sizes: str | Sequence[int] | None = "authors",
    num_classes: int = 1000,
    **options: Any,
) -> ResNet:
    """A ResNet with random weights, with any channel attention.

    "gsop" is GSoP-Net1 (Gao et al., CVPR 2019): attention in the last block of each stage, and a
    fourth stage of stride 1.

    Args:
        depth: 18, 34, 50, 101 or 152.
        attention: the method, a key of attention.METHODS; "none" for none.
        kernel_sizes: "authors" for those of the authors' checkpoint of this depth, if the method
            has kernel sizes; or as for ResNet: a digit for each stage, an int for each block, None
            for the adaptive rule.
        num_classes: number of logits, from 1 up.
        options: other options of ResNet: options, fused, backend, tails, device, dtype.

    Returns:
        A ResNet from images (N, 3, H, W) to logits (N, num_classes).

    Raises:
        TypeError: kernel_sizes is neither a string, a sequence of ints nor None.
        ValueError: there is no such depth or method, or another argument does not fit.
    """
    if depth not in RESNETS:
        raise ValueError(f"expected depth as one of {', '.join(map(str, RESNETS))}, got {depth!r}")
    block, layers, authors = RESNETS[depth]
    sizes = _resolved(attention, kernel_sizes, authors)
    if attention == "gsop":
        options = {"positions": "last", "last_stride": 1} | options
    return ResNet(block, layers, sizes, num_classes, attention=attention, **options)


def mobilenetv2(
    attention: str = "eca",
    kernel_sizes: str | Sequence[int] | None = "authors",
    num_classes: int = 1000,
    **options: Any,
) -> MobileNetV2:
    """A MobileNetV2 with random weights, with any channel attention but SE-GC1 and SE-GC2.

    Those two need multiples of 16 channels, but the second stage has 24.

    The numbers that ECA-Net publishes for MobileNetV2 with SE are for reduction 8:
    `mobilenetv2("se", options={"reduction": 8})`.

    Args:
        attention: the method, a key of attention.METHODS; "none" for none.
        kernel_sizes: "authors" for those of the authors' checkpoint, if the method has kernel
            sizes: 1 below 96 output channels, else 3; or as for MobileNetV2: a digit for each
            stage, an int for each block, None for the adaptive rule.
        num_classes: number of logits, from 1 up.
        options: other options of MobileNetV2: options, dropout, fused, backend, tails, device,
            dtype.

    Returns:
        A MobileNetV2 from images (N, 3, H, W) to logits (N, num_classes).

    Raises:
        TypeError: kernel_sizes is neither a string, a sequence of ints nor None.
        ValueError: there is no such method, or another argument does not fit.
    """
    sizes = _resolved(attention, kernel_sizes, MOBILENETV2)
    return MobileNetV2(sizes, num_classes, attention=attention, **options)


def eca_resnet18(
    kernel_sizes: str | Sequence[int] | None = "3577", num_classes: int = 1000, **options: Any
) -> ResNet:
    """ECA-ResNet-18 with the kernel sizes of the authors' checkpoint; see resnet()."""
    return resnet(18, "eca", kernel_sizes, num_classes, **options)


def eca_resnet34(
    kernel_sizes: str | Sequence[int] | None = "3357", num_classes: int = 1000, **options: Any
) -> ResNet:
    """ECA-ResNet-34 with the kernel sizes of the authors' checkpoint; see resnet()."""
    return resnet(34, "eca", kernel_sizes, num_classes, **options)


def eca_resnet50(
    kernel_sizes: str | Sequence[int] | None = "3557", num_classes: int = 1000, **options: Any
) -> ResNet:
    """ECA-ResNet-50, 24.37 * 2**20 parameters, with the authors' kernel sizes; see resnet()."""
    return resnet(50, "eca", kernel_sizes, num_classes, **options)


def eca_resnet101(
    kernel_sizes: str | Sequence[int] | None = "3357", num_classes: int = 1000, **options: Any
) -> ResNet:
    """ECA-ResNet-101 with the kernel sizes of the authors' checkpoint; see resnet()."""
    return resnet(101, "eca", kernel_sizes, num_classes, **options)


def eca_resnet152(
    kernel_sizes: str | Sequence[int] | None = "3357", num_classes: int = 1000, **options: Any
) -> ResNet:
    """ECA-ResNet-152 with the kernel sizes of the authors' checkpoint; see resnet()."""
    return resnet(152, "eca", kernel_sizes, num_classes, **options)


def eca_mobilenetv2(
    kernel_sizes: str | Sequence[int] | None = MOBILENETV2, num_classes: int = 1000, **options: Any
) -> MobileNetV2:
    """ECA-MobileNetV2 with the kernel sizes of the authors' checkpoint; see mobilenetv2()."""
    return mobilenetv2("eca", kernel_sizes, num_classes, **options)


def set_fused(model: nn.Module, fused: bool) -> int:
    """Switch the attention of a model between the fused kernels and plain PyTorch.

    Args:
        model: any module that holds ECALayers, or other layers of eca_fused.attention.
        fused: True for the fused kernels.

    Returns:
        The number of these layers.

    Raises:
        ValueError: the model has none.
    """
    kinds = (ECALayer, methods.ChannelAttention)
    layers = [module for module in model.modules() if isinstance(module, kinds)]
    if not layers:
        raise ValueError(f"expected a model with ECALayers, found none in {type(model).__name__}")
    for layer in layers:
        layer.fused = fused
    return len(layers)


def _resolved(
    attention: str, kernel_sizes: str | Sequence[int] | None, authors: str
) -> str | Sequence[int] | None:
    """The kernel sizes that "authors" stands for; any other value unchanged."""
    if kernel_sizes != "authors":
        return kernel_sizes
    return authors if methods.method(attention).sized else None
