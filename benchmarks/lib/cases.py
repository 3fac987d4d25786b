"""What is measured: the ECA layers of known networks, by dtype, memory layout and batch."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product

import torch
from torch import Tensor

from eca_fused.cli.common.timing import RESNET50

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
LAYOUTS = ("contiguous", "channels_last")
DIRECTIONS = ("forward", "backward", "forward and backward")

Layer = tuple[int, int, int, int]  # channels, height, width, taps

# ResNets: behind each stage, with the taps of the authors' checkpoints (k=3557 for ResNet-50, 3577
# for ResNet-18). MobileNetV2: one block for each size of its maps, with one tap below 96 channels
# and three above, as the authors have it. Detection: ResNet-50 on 800x1333 pixels.
NETWORKS: dict[str, list[Layer]] = {
    "resnet50": RESNET50,
    "mobilenetv2": [(24, 56, 56, 1), (32, 28, 28, 1), (96, 14, 14, 3), (320, 7, 7, 3)],
    "resnet18": [(64, 56, 56, 3), (128, 28, 28, 5), (256, 14, 14, 7), (512, 7, 7, 7)],
    "detection": [(256, 200, 334, 3), (512, 100, 167, 5), (1024, 50, 84, 5), (2048, 25, 42, 7)],
    "sweep": [
        (64, 224, 224, 3),
        (64, 112, 112, 3),
        (128, 56, 56, 5),
        (256, 28, 28, 5),
        (512, 14, 14, 5),
        (2048, 1, 1, 7),
    ],
}


@dataclass(frozen=True)
class Case:
    """One layer."""

    shape: tuple[int, int, int, int]
    k: int
    dtype: str
    layout: str

    @property
    def map_bytes(self) -> int:
        n, c, h, w = self.shape
        return n * c * h * w * DTYPES[self.dtype].itemsize

    def ideal_bytes(self, direction: str) -> int:
        """x read and y written forward; dy and x read and dx written backward; both for both."""
        return dict(zip(DIRECTIONS, (2, 3, 5), strict=True))[direction] * self.map_bytes

    def random_map(self, device: str) -> Tensor:
        """(N, C, H, W), random normal."""
        x = torch.randn(self.shape, device=device, dtype=DTYPES[self.dtype])
        if self.layout == "channels_last":
            return x.contiguous(memory_format=torch.channels_last)
        return x

    def __str__(self) -> str:
        return f"{self.dtype} {self.layout} {'x'.join(map(str, self.shape))} k={self.k}"


@dataclass(frozen=True)
class TailCase(Case):
    """A tail behind a stage of a network; the batch norm is in training in a norm tail."""

    tail: str

    def ideal_bytes(self, direction: str) -> int:
        mask = self.map_bytes // DTYPES[self.dtype].itemsize // 8
        forward, backward = (4, 6) if self.tail == "norm" else (3, 4)
        if direction == "forward":  # in inference no mask is kept
            return forward * self.map_bytes
        masks = 3 if self.tail == "norm" else 2  # written once, read in each pass
        return (forward + backward) * self.map_bytes + masks * mask


def grid(
    layers: Sequence[Layer],
    batches: Sequence[int],
    dtypes: Sequence[str] = ("bfloat16",),
    layouts: Sequence[str] = LAYOUTS,
) -> list[Case]:
    return [
        Case((n, c, h, w), k, dtype, layout)
        for dtype, n, layout, (c, h, w, k) in product(dtypes, batches, layouts, layers)
    ]


def cpu_cases() -> list[Case]:
    return grid(NETWORKS["resnet50"], [32], ["float32"], ["contiguous"])


def gpu_cases() -> list[Case]:
    """The most important first: a GPU is often lent for minutes."""
    resnet50, resnet18 = NETWORKS["resnet50"], NETWORKS["resnet18"]
    large, one_pixel = [(64, 224, 224, 3), (256, 200, 334, 3)], [(2048, 1, 1, 7)]
    # These come first: there is time to compile for them too.
    first = [*grid(resnet50[:1], [256]), *grid(resnet50[2:3], [32])]
    rest = [
        *grid(resnet50, [256, 32, 1]),
        *grid(large, [32]),
        *grid(resnet50, [32], ["float32", "float16"]),
        *grid(resnet18, [32, 1]),
        *grid(one_pixel, [32, 256]),
        *grid(NETWORKS["mobilenetv2"], [32]),
        *grid(large, [1]),
        *grid(resnet18, [256]),
        *grid(NETWORKS["mobilenetv2"], [256, 1]),
    ]
    return list(dict.fromkeys([*first, *rest]))


def all_cases() -> list[Case]:
    """Every network in every dtype, layout and batch; first what a paper's reader asks for."""
    first, rest = ["resnet50", "mobilenetv2"], ["detection", "resnet18", "sweep"]
    found = []
    for names, dtypes, batches in (
        (first, ["float32", "bfloat16"], [32, 1, 256]),
        (first, ["float16"], [32]),
        (rest, ["float32", "bfloat16"], [32]),
        (first, ["float16"], [1, 256]),
        (rest, ["float16"], [32]),
        (rest, list(DTYPES), [1, 256]),
    ):
        for batch, dtype, name in product(batches, dtypes, names):
            # A detector's batch is a few images, of maps as large as a classifier's 32.
            n = max(1, batch // 16) if name == "detection" else batch
            found += grid(NETWORKS[name], [n], [dtype])
    return list(dict.fromkeys(found))
