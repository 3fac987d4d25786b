"""Infers the network of a state dict from the names and shapes of its tensors alone.

It knows the networks of models/ and, if timm is installed, timm's own ECA networks.
"""

import importlib
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from eca_fused.models import BasicBlock, Bottleneck, MobileNetV2, ResNet

__all__ = ["Architecture", "infer", "infer_timm"]

RESNET_BLOCK = re.compile(r"layer([1-4])\.(\d+)\.")
BLOCKS = 17  # of MobileNetV2; the first has no expansion, so its attention comes one place earlier


@dataclass(frozen=True)
class Architecture:
    """A network that a state dict may belong to.

    Args:
        title: for messages.
        build: makes the network from keyword options (fused, backend, device, dtype).
        tensors: of the state dict, under their names in the network.
        blocks: the number of the network's blocks.
        dtype: of its first convolution.
    """

    title: str
    build: Callable[..., nn.Module]
    tensors: Mapping[str, Tensor]
    blocks: int
    dtype: torch.dtype


def infer(tensors: Mapping[str, Tensor]) -> Architecture | None:
    """The network that the tensors belong to, or None if it is not known. Not all need fit.

    Known are ResNets of any depth, with torchvision's names and ECA under `eca` (the authors) or
    `se` (timm), and MobileNetV2 with the names of torchvision and the authors. Every layer's k is
    that of its taps. Without ECA, attention is "none".

    Args:
        tensors: by name, without prefixes of wrappers.
    """
    if {"conv1.weight", "layer1.0.conv1.weight"} <= tensors.keys():
        return _resnet(_timms_names(tensors))
    if {"features.0.0.weight", "features.1.conv.0.0.weight"} <= tensors.keys():
        return _mobilenetv2(tensors)
    return None


def infer_timm(tensors: Mapping[str, Tensor]) -> tuple[str, Callable[[], nn.Module]] | None:
    """The name of timm's ECA network with exactly these names and shapes, and its builder.

    None if there is no such network or no timm. k follows timm's rule; the shapes check it.

    Args:
        tensors: by name, without prefixes of wrappers.
    """
    try:
        timm: Any = importlib.import_module("timm")
    except Exception:  # not installed, or with a torchvision that does not fit torch
        return None
    shapes = {name: tensor.shape for name, tensor in tensors.items()}
    for name in timm.list_models("*eca*"):
        config = timm.get_pretrained_cfg(name)
        if config is None:  # a network that someone else registered
            continue
        first, last = (shapes.get(f"{m}.weight") for m in (config.first_conv, config.classifier))
        if not first or not last or len(first) < 2:
            continue
        build = partial(timm.create_model, name, num_classes=last[0], in_chans=first[1])
        with torch.device("meta"):
            wanted = {n: t.shape for n, t in build().state_dict().items()}
        if wanted == shapes:
            return name, build
    return None


def _resnet(tensors: Mapping[str, Tensor]) -> Architecture:
    blocks = {(int(m[1]), int(m[2])) for m in map(RESNET_BLOCK.match, tensors) if m}
    # A stage without tensors counts as one block, whose names are then reported as missing.
    layers = [max(sum(s == stage for s, _ in blocks), 1) for stage in (1, 2, 3, 4)]
    block = Bottleneck if "layer1.0.conv3.weight" in tensors else BasicBlock
    taps = [f"layer{s}.{i}.eca.conv.weight" for s in (1, 2, 3, 4) for i in range(layers[s - 1])]
    name, sizes = _attention(tensors, taps)
    classes = _classes(tensors, "fc.weight")
    dtype = _dtype(tensors["conv1.weight"])
    build = partial(ResNet, block, layers, sizes, classes, attention=name, dtype=dtype)
    depth = sum(layers) * (3 if block is Bottleneck else 2) + 2
    title = f"ResNet-{depth} with attention {name!r}"
    return Architecture(title, build, tensors, sum(layers), tensors["conv1.weight"].dtype)


def _mobilenetv2(tensors: Mapping[str, Tensor]) -> Architecture:
    taps = [f"features.{i}.conv.{3 if i == 1 else 4}.conv.weight" for i in range(1, BLOCKS + 1)]
    name, sizes = _attention(tensors, taps)
    classes = _classes(tensors, "classifier.1.weight")
    dtype = _dtype(tensors["features.0.0.weight"])
    build = partial(MobileNetV2, sizes, classes, attention=name, dtype=dtype)
    title = f"MobileNetV2 with attention {name!r}"
    return Architecture(title, build, tensors, BLOCKS, tensors["features.0.0.weight"].dtype)


def _attention(tensors: Mapping[str, Tensor], taps: list[str]) -> tuple[str, list[int] | None]:
    """The method, and the kernel size of each block's taps if it is ECA."""
    if not any(name in tensors for name in taps):
        return "none", None
    return "eca", [_kernel_size(tensors.get(name)) for name in taps]


def _kernel_size(taps: Tensor | None) -> int:
    """k of taps (1, 1, k); 3 for tensors that are not taps, which then do not fit."""
    return taps.shape[-1] if taps is not None and taps.dim() and taps.shape[-1] % 2 else 3


def _classes(tensors: Mapping[str, Tensor], name: str) -> int:
    """Rows of the classifier; 1000 if there is none, which is then reported as missing."""
    weight = tensors.get(name)
    return weight.shape[0] if weight is not None and weight.dim() and weight.shape[0] else 1000


def _dtype(weight: Tensor) -> torch.dtype | None:
    return weight.dtype if weight.is_floating_point() else None


def _timms_names(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors with timm's `se.conv.weight` of ECA renamed to `eca.conv.weight`."""
    timms = re.compile(r"(layer[1-4]\.\d+)\.se\.conv\.weight")
    return {timms.sub(r"\1.eca.conv.weight", name): tensor for name, tensor in tensors.items()}
