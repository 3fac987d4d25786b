"""Scenes for detection: discs and rectangles painted over photographs, at known places."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from eca_fused.cli.common.photographs import Photograph, crop

__all__ = ["CLASSES", "SMALLEST", "Scene", "make_scene", "matched"]

CLASSES = ("disc", "rectangle")
# Okabe and Ito's. Each class has its own colours, because a few steps learn colour, not shape.
COLOURS = (((0.90, 0.62, 0.0), (0.94, 0.89, 0.26)), ((0.0, 0.62, 0.45), (0.0, 0.45, 0.70)))
SHAPES = 3  # in a scene at most
COVER = 0.85  # opacity of a shape
TRIES = 20  # to place shapes that touch no other
SMALLEST = 64  # side of a scene in pixels


@dataclass(frozen=True)
class Scene:
    """An image and the shapes in it.

    Attributes:
        image: (3, size, size), float32 from 0 to 1.
        boxes: (n, 4), float32, n from 1 up: left, top, right and bottom in pixels.
        classes: (n,), int64, into CLASSES.
        masks: (n, size, size), uint8, 1 where the shape is.
    """

    image: Tensor
    boxes: Tensor
    classes: Tensor
    masks: Tensor

    def target(self, first_label: int, device: torch.device) -> dict[str, Tensor]:
        """The target for torchvision's detectors; first_label is the label of the first class."""
        found = {"boxes": self.boxes, "labels": self.classes + first_label, "masks": self.masks}
        return {name: value.to(device) for name, value in found.items()}


def make_scene(photographs: Sequence[Photograph], size: int, generator: torch.Generator) -> Scene:
    """A random part of one of the photographs with one to SHAPES shapes, which do not touch.

    Args:
        photographs: one or more.
        size: side of the image in pixels, from SMALLEST up.
        generator: the source of all randomness.
    """

    def draw(low: int, high: int) -> int:
        return int(torch.randint(low, high + 1, (), generator=generator))

    pixels = photographs[draw(0, len(photographs) - 1)].pixels  # (H, W, 3)
    height, width = pixels.shape[:2]
    side = draw(min(height, width) // 2, min(height, width))
    top, left = draw(0, height - side), draw(0, width - side)
    image = crop(pixels[top : top + side, left : left + side], size).clamp(0, 1)
    if draw(0, 1):
        image = image.flip(2)

    boxes: list[list[int]] = []
    classes, masks = [], []
    wanted = draw(1, SHAPES)
    for _ in range(TRIES):
        kind = draw(0, len(CLASSES) - 1)
        w, h = draw(size // 6, size // 2), draw(size // 6, size // 2)
        if CLASSES[kind] == "disc":
            h = w
        x, y = draw(0, size - w), draw(0, size - h)
        box = [x, y, x + w, y + h]
        if any(touch(box, other) for other in boxes):
            continue
        mask = painted(CLASSES[kind], box, size)
        colour = torch.tensor(COLOURS[kind][draw(0, 1)]).view(3, 1, 1)
        image = torch.where(mask, COVER * colour + (1 - COVER) * image, image)
        boxes.append(box)
        classes.append(kind)
        masks.append(mask.byte())
        if len(boxes) == wanted:
            break
    return Scene(
        image.contiguous(), torch.tensor(boxes).float(), torch.tensor(classes), torch.stack(masks)
    )


def touch(a: Sequence[int], b: Sequence[int]) -> bool:
    """Whether two boxes have a pixel or an edge in common."""
    return a[0] <= b[2] and b[0] <= a[2] and a[1] <= b[3] and b[1] <= a[3]


def painted(kind: str, box: Sequence[int], size: int) -> Tensor:
    """The mask (size, size), bool, of a shape that fills its box."""
    left, top, right, bottom = box
    centres = torch.arange(size) + 0.5
    x, y = centres, centres.view(-1, 1)
    if kind == "rectangle":
        return (x > left) & (x < right) & (y > top) & (y < bottom)
    radius = (right - left) / 2
    return (x - left - radius) ** 2 + (y - top - radius) ** 2 <= radius**2


def matched(scene: Scene, boxes: Tensor, classes: Tensor, overlap: float = 0.5) -> int:
    """How many shapes of a scene were found; each box counts for one shape at most.

    Args:
        scene: the shapes.
        boxes, classes: (d, 4) and (d,), the detections, the surest first.
        overlap: the least intersection over union of a box and its shape.
    """
    left = set(range(len(scene.boxes)))
    for box, kind in zip(boxes, classes, strict=True):
        # Each box belongs to the remaining shape that it overlaps most.
        best = max(left, key=lambda i: intersection_over_union(box, scene.boxes[i]), default=None)
        if best is None:
            break
        same = int(kind) == int(scene.classes[best])
        if same and intersection_over_union(box, scene.boxes[best]) >= overlap:
            left.remove(best)
    return len(scene.boxes) - len(left)


def intersection_over_union(a: Tensor, b: Tensor) -> float:
    """Intersection over union of two boxes (4,)."""
    sides = (torch.minimum(a[2:], b[2:]) - torch.maximum(a[:2], b[:2])).clamp(min=0)
    both = float(sides.prod())
    either = float((a[2:] - a[:2]).prod() + (b[2:] - b[:2]).prod()) - both
    return both / either
