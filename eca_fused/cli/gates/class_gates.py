"""The gates of a network for images of different classes: `python -m eca_fused gates`."""

import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from eca_fused import attention, reference
from eca_fused.cli.common.networks import adapt, hooked
from eca_fused.cli.common.photographs import Photograph, preprocess, read_photograph
from eca_fused.models import InvertedResidual, MobileNetV2, ResNet

__all__ = [
    "Classes",
    "Stage",
    "find_classes",
    "gates_of",
    "last_layers",
    "mean_gates",
    "printable",
    "randomise",
]

SUFFIXES = (".bmp", ".gif", ".jpeg", ".jpg", ".png", ".ppm", ".tif", ".tiff", ".webp")
BATCH = 16  # images that the network sees at a time
MOST_CLASSES = 14  # pictures.py has seven colours, each in two forms

Image = Path | Photograph
Classes = Mapping[str, Sequence[Image]]


@dataclass(frozen=True)
class Stage:
    """The gates of the last block of a stage.

    Attributes:
        layer: the name of its attention in the network.
        gates: (classes, C), float64, the mean over the images of each class.
    """

    layer: str
    gates: Tensor

    @property
    def difference(self) -> float | None:
        """The largest minus the least gate of any class, mean over channels; None for one class."""
        if len(self.gates) == 1:
            return None
        return (self.gates.amax(0) - self.gates.amin(0)).mean().item()


# ---- images ----


def find_classes(arguments: Sequence[str]) -> dict[str, list[Path]]:
    """The images of each class.

    Args:
        arguments: files or folders, or CLASS=file and CLASS=folder. Without CLASS, the class is
            the name of the file or folder. A class may be given several times.

    Raises:
        ValueError: a path does not exist, a folder has no images, or there are too many classes.
    """
    found: dict[str, list[Path]] = {}
    for argument in arguments:
        name, path = "", Path(argument)
        if "=" in argument and not exists(path):
            name, _, rest = argument.partition("=")
            path = Path(rest)
            if not name or not rest:
                raise ValueError(f"expected an image or a folder as CLASS=path, got {argument!r}")
        if not exists(path):
            raise ValueError(f"expected an image or a folder of images, there is no {path}")
        name = printable(name or (path.resolve().name if path.is_dir() else path.stem))
        found.setdefault(name, []).extend(images_in(path) if path.is_dir() else [path])
    if len(found) > MOST_CLASSES:
        raise ValueError(
            f"expected at most {MOST_CLASSES} classes, as more lines cannot be told apart, got "
            f"{len(found)}; CLASS=path puts several images into one class"
        )
    return found


def exists(path: Path) -> bool:
    """Whether there is such a file or folder; exists() raises for too long a name."""
    try:
        return path.exists()
    except OSError:
        return False


def printable(name: str) -> str:
    """A name in Unicode. Bytes that are not UTF-8 are escaped, because they cannot be drawn."""
    return os.fsencode(name).decode("utf-8", "backslashreplace")


def images_in(folder: Path) -> list[Path]:
    """The images of a folder, sorted by name, without those in subfolders."""
    found = sorted(path for path in folder.iterdir() if path.suffix.lower() in SUFFIXES)
    if not found:
        raise ValueError(
            f"expected images in the folder {folder}, got none that ends with one of "
            f"{', '.join(SUFFIXES)}; a folder is one class, so give those inside it by themselves"
        )
    return found


def batches(images: Sequence[Image], side: int) -> Iterator[Tensor]:
    """The images as input of the network: (N, 3, side, side), N up to BATCH."""
    for start in range(0, len(images), BATCH):
        part = images[start : start + BATCH]
        yield preprocess(
            [i if isinstance(i, Photograph) else read_photograph(i) for i in part], side
        )


# ---- the network ----


def randomise(model: nn.Module, classes: Classes, side: int) -> None:
    """Give a model's batch norms random shifts, and the statistics of an image of each class.

    Without these, all gates are near a half; demo/network.py says why.
    """
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.normal_(module.bias)
    adapt(model, next(batches([images[0] for images in classes.values()], side)))


def last_layers(model: ResNet | MobileNetV2) -> dict[str, nn.Module]:
    """The attention of the last block of each stage, by its name in the network."""
    layers: list[nn.Module]
    if isinstance(model, ResNet):
        ends: list[Any] = [model.layer1[-1], model.layer2[-1], model.layer3[-1], model.layer4[-1]]
        layers = [block.get_submodule(block.key) for block in ends]
    else:
        # Each stage has a number of channels of its own.
        blocks: list[Any] = [m for m in model.features if isinstance(m, InvertedResidual)]
        layers = list({block.conv[-2].num_features: block.conv[-1] for block in blocks}.values())
    names = {module: name for name, module in model.named_modules()}
    return {names[layer]: layer for layer in layers}


@torch.no_grad()
def gates_of(layer: nn.Module, x: Tensor) -> Tensor:
    """The gates that a layer of eca_fused.attention computes for the channels of x.

    The fused operation does not return its gates, so those of ECA are computed again, by the
    definition. CBAM gives its channel gates alone, without its pixel gates.

    Args:
        layer: of any method but "none".
        x: (N, C, *spatial), the input of the layer.

    Returns:
        (N, C), each from 0 to 1.

    Raises:
        TypeError: the layer has no gates.
    """
    if isinstance(layer, attention.ECALayer):
        return reference.gate(x, layer.conv.weight, layer.padding_mode)
    if isinstance(layer, attention.CBAM):
        return layer.channel_gate(attention.pool(x), x.amax((2, 3)))
    if isinstance(layer, attention.GSoP):
        return layer.channel_gate(x)
    if isinstance(layer, attention.ChannelAttention):
        return layer.gate(attention.pool(x))
    raise TypeError(
        f"expected a layer of eca_fused.attention that has gates, got {type(layer).__name__}"
    )


def mean_gates(model: ResNet | MobileNetV2, classes: Classes, side: int) -> list[Stage]:
    """The gates of the last block of each stage, the mean over the images of each class.

    Args:
        model: in evaluation mode.
        classes: the images of each.
        side: of the network's input, in pixels.

    Raises:
        ValueError: an image cannot be read.
    """
    layers = last_layers(model)
    rows = [of_one_class(model, layers, images, side) for images in classes.values()]
    stages = zip(*rows, strict=True)
    return [Stage(name, torch.stack(gates)) for name, gates in zip(layers, stages, strict=True)]


def of_one_class(
    model: nn.Module, layers: Mapping[str, nn.Module], images: Sequence[Image], side: int
) -> list[Tensor]:
    """The mean gates (C,) of each layer."""
    sums = [torch.zeros((), dtype=torch.float64)] * len(layers)

    def add(index: int, layer: nn.Module, inputs: tuple[Tensor], output: Tensor) -> None:
        sums[index] = sums[index] + gates_of(layer, inputs[0]).double().sum(0)

    with hooked(list(layers.values()), add), torch.no_grad():
        for x in batches(images, side):
            model(x)
    return [total / len(images) for total in sums]
