"""Two photographs as a batch for an ImageNet network, in torch alone."""

import importlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["Photograph", "crop", "fill_batch", "load_photographs", "preprocess", "read_photograph"]

# The usual mean and standard deviation of ImageNet's red, green and blue.
MEAN = (0.485, 0.456, 0.406)
STD = (0.229, 0.224, 0.225)


@dataclass(frozen=True)
class Photograph:
    """A photograph.

    Attributes:
        name: the file's name without its ending.
        pixels: (H, W, 3), uint8, red, green and blue.
    """

    name: str
    pixels: Tensor


def load_photographs() -> list[Photograph]:
    """The photographs that scikit-learn ships, china.jpg and flower.jpg, each 427x640 pixels.

    Raises:
        ImportError: scikit-learn or Pillow is not installed.
    """
    samples = importlib.import_module("sklearn.datasets").load_sample_images()
    return [
        Photograph(Path(name).stem, torch.from_numpy(image.copy()))
        for name, image in zip(samples.filenames, samples.images, strict=True)
    ]


def read_photograph(file: Path) -> Photograph:
    """A photograph from a file that Pillow reads, rotated upright by its EXIF data.

    Raises:
        ImportError: Pillow is not installed.
        ValueError: the file is not an image, or is incomplete.
    """
    pillow, turn = importlib.import_module("PIL.Image"), importlib.import_module("PIL.ImageOps")
    try:
        with pillow.open(file) as opened:
            image = _eight_bits(turn.exif_transpose(opened)).convert("RGB")
    except Exception as error:  # a broken file may fail in any way
        raise ValueError(
            f"expected {file} as an image, cannot read it: {type(error).__name__}: {error}"
        ) from error
    width, height = image.size
    data = torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8)
    return Photograph(file.stem, data.reshape(height, width, 3))


def _eight_bits(image: Any) -> Any:
    """Scale 16-bit grey levels to 8 bits, because Pillow's convert() clips levels above 255."""
    if image.mode == "F":
        raise ValueError("its grey levels are floating-point numbers; save it with 8 or 16 bits")
    if not image.mode.startswith("I"):
        return image
    levels = image.convert("I")
    darkest, lightest = levels.getextrema()
    if darkest < 0 or lightest > 65535:
        raise ValueError(
            f"its grey levels go from {darkest} to {lightest}; save it with 8 or 16 bits"
        )
    return levels.point(lambda level: level * (1 / 257) + 0.5).convert("L")


def crop(pixels: Tensor, size: int = 224) -> Tensor:
    """The centre of a photograph, after resizing its shorter side to 8/7 of size (256 for 224).

    Args:
        pixels: (H, W, 3), uint8.
        size: side of the result, in pixels.

    Returns:
        (3, size, size), float32 in 0 to 1. Antialiased bilinear, as torchvision resizes.
    """
    if pixels.dim() != 3 or pixels.shape[2] != 3 or pixels.dtype != torch.uint8:
        raise ValueError(
            "expected the pixels of a photograph of shape (H, W, 3) and dtype uint8, "
            f"got {tuple(pixels.shape)}, {pixels.dtype}"
        )
    image = pixels.permute(2, 0, 1).unsqueeze(0).float() / 255  # (1, 3, H, W)
    short, long = sorted(image.shape[2:])
    resized = size * 8 // 7
    longer = resized * long // short
    shape = (resized, longer) if image.shape[2] == short else (longer, resized)
    image = F.interpolate(image, shape, mode="bilinear", antialias=True)
    top, left = ((side - size + 1) // 2 for side in shape)
    return image[0, :, top : top + size, left : left + size]


def preprocess(photographs: Sequence[Photograph], size: int = 224) -> Tensor:
    """The photographs as input of ImageNet networks, (P, 3, size, size), float32."""
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (MEAN, STD))
    return torch.stack([(crop(p.pixels, size) - mean) / std for p in photographs])


def fill_batch(images: Tensor, batch: int) -> Tensor:
    """A batch in which the images alternate: (P, ...) to (batch, ...)."""
    return images[torch.arange(batch) % images.shape[0]]
