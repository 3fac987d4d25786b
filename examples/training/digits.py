"""The handwritten digits that scikit-learn ships, and the order in which a run sees them."""

import importlib
from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from .options import UsageError

__all__ = ["CLASSES", "Digits", "load_digits", "portions", "shifted", "training_batch"]

CLASSES = 10
HELD_OUT = 360  # of 1797 images
SIZE = 32  # of the images, enlarged from 8x8 for the five strides of a ResNet
SHIFT = 2  # the most pixels by which a training image moves


@dataclass(frozen=True)
class Digits:
    """Images (N, 3, 32, 32), float32 with mean 0 and deviation 1, and labels (N,), int64."""

    images: Tensor
    labels: Tensor

    def __len__(self) -> int:
        return len(self.labels)


def load_digits(samples: int | None = None) -> tuple[Digits, Digits]:
    """The training images, or the first `samples` of them, and the held-out images.

    The held-out images are the same for every seed and every number of samples.

    Raises:
        UsageError: more samples were requested than there are.
        ImportError: scikit-learn is not installed.
    """
    found = importlib.import_module("sklearn.datasets").load_digits()
    small = torch.from_numpy(found.images).float().unsqueeze(1)  # (1797, 1, 8, 8), 0 to 16
    large = F.interpolate(small, (SIZE, SIZE), mode="bilinear", align_corners=False)
    images = ((large - large.mean()) / large.std()).expand(-1, 3, -1, -1)
    labels = torch.from_numpy(found.target).long()
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))
    kept = order[HELD_OUT:]
    if samples is not None and samples > len(kept):
        raise UsageError(f"--samples {samples}: expected at most {len(kept)}, as many as there are")
    kept = kept[:samples]
    held_out = order[:HELD_OUT]
    return Digits(images[kept], labels[kept]), Digits(images[held_out], labels[held_out])


def training_batch(samples: int, batch: int, seed: int, epoch: int, number: int) -> Tensor:
    """The images of batch `number` of an epoch: (batch,) indices.

    They depend only on the arguments, so a resumed run sees the same images as an unbroken one.
    Each epoch has its own order. Images that do not fill a batch are left out.
    """
    generator = torch.Generator().manual_seed(mixed(seed, epoch))
    order = torch.randperm(samples, generator=generator)
    return order[number * batch : (number + 1) * batch]


def mixed(*numbers: int) -> int:
    """A seed from several numbers, different for different numbers."""
    value = 0
    for number in numbers:
        # The multiplier of Knuth's 64-bit generator; neighbouring seeds must not share streams.
        value = ((value ^ number) * 6364136223846793005 + 1442695040888963407) % 2**64
    return value % 2**63


def shifted(images: Tensor) -> Tensor:
    """Images (N, 3, H, W), each moved at random by up to SHIFT pixels; edge pixels repeat."""
    height, width = images.shape[2:]
    dy, dx = torch.randint(-SHIFT, SHIFT + 1, (2, len(images), 1))
    rows = (torch.arange(height) + dy).clamp(0, height - 1)  # (N, H)
    columns = (torch.arange(width) + dx).clamp(0, width - 1)  # (N, W)
    number = torch.arange(len(images))
    # Indexing on both sides of the slice moves the channels last.
    return images[number[:, None, None], :, rows[:, :, None], columns[:, None, :]].movedim(3, 1)


def portions(count: int, batch: int, rank: int, world: int) -> Iterator[tuple[Tensor, bool]]:
    """The indices below count that a process evaluates; each index is in exactly one process.

    Args:
        count: number of images.
        batch: images per step, over all processes.
        rank, world: of the process, and the number of processes.

    Yields:
        (n,) indices, n from 1 up, and whether they count. If a process's share of the last batch is
        empty, it gets one image that does not: under FSDP all must run the network equally often.
    """
    for begin in range(0, count, batch):
        whole = torch.arange(begin, min(begin + batch, count))
        mine = whole[rank::world]
        yield (mine, True) if len(mine) else (whole[:1], False)
