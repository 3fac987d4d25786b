"""Faster R-CNN, Mask R-CNN and RetinaNet on our ResNets, built from torchvision's parts.

This module alone needs torchvision, so eca_fused.models does not import it:

>>> from eca_fused.models.detection import faster_rcnn  # doctest: +SKIP
>>> model = faster_rcnn(50, "eca")  # doctest: +SKIP

Choices that torchvision leaves open follow MMDetection (Chen et al., 2019), which the authors of
ECA-Net used. State dicts have torchvision's names, with the attention in the blocks.
"""

import contextlib
import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from eca_fused.models import resnet
from eca_fused.torch_state import BatchNorm

try:
    from torchvision.models import detection as library
    from torchvision.models.detection.backbone_utils import BackboneWithFPN
    from torchvision.models.detection.transform import GeneralizedRCNNTransform
    from torchvision.ops.feature_pyramid_network import LastLevelP6P7
except Exception as error:  # a torchvision that does not fit torch raises a RuntimeError
    raise ImportError(
        "the detectors need torchvision, in the release that belongs to torch "
        f"{torch.__version__}: pip install 'eca-fused[detection]'"
    ) from error

__all__ = [
    "DETECTORS",
    "Detector",
    "FixedRegions",
    "detector",
    "faster_rcnn",
    "mask_rcnn",
    "retinanet",
]

COCO = 80  # classes
STAGES = ("layer1", "layer2", "layer3", "layer4")
# Kernel sizes of the authors' detectors that differ from those of the ImageNet network.
AUTHORS = {("faster_rcnn", 50): "5555", ("mask_rcnn", 50): "3377"}


@dataclass(frozen=True)
class Detector:
    """A row of DETECTORS.

    Args:
        build: torchvision's class.
        stages: of the ResNet, from which the pyramid starts.
        first_label: of the classes in targets and detections; a lower label is the background.
    """

    build: Any
    stages: tuple[str, ...] = STAGES
    first_label: int = 1


DETECTORS = {
    "faster_rcnn": Detector(library.FasterRCNN),
    "mask_rcnn": Detector(library.MaskRCNN),
    "retinanet": Detector(library.RetinaNet, STAGES[1:], first_label=0),
}


class Pyramid(BackboneWithFPN):  # type: ignore[misc]
    """torchvision's feature pyramid over a ResNet, whose batch norms may keep their statistics.

    Args:
        norm_eval: keep the batch norms of the ResNet in evaluation mode while it trains. Those with
            frozen parameters always stay in it.
        arguments: of BackboneWithFPN.
    """

    def __init__(self, *arguments: Any, norm_eval: bool) -> None:
        super().__init__(*arguments)
        self.norm_eval = norm_eval
        self.train()  # a new module is in training mode; this also sets its batch norms

    def train(self, mode: bool = True) -> "Pyramid":
        super().train(mode)
        for module in self.body.modules():
            if isinstance(module, BatchNorm) and (
                self.norm_eval or not module.weight.requires_grad
            ):
                module.eval()
        return self


def detector(
    name: str,
    depth: int = 50,
    attention: str = "eca",
    kernel_sizes: str | Sequence[int] | None = "authors",
    num_classes: int = COCO,
    *,
    channels: int = 256,
    trainable_layers: int = 3,
    norm_eval: bool = True,
    body: Mapping[str, Any] | None = None,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
    **options: Any,
) -> nn.Module:
    """A detector with random weights, on a ResNet with any channel attention.

    Faster R-CNN (Ren et al., 2015), Mask R-CNN (He et al., 2017) and RetinaNet (Lin et al., 2017),
    on a feature pyramid (Lin et al., 2017). To load a ResNet trained on ImageNet, call
    `model.backbone.body.load_state_dict(weights, strict=False)`; only fc.* stays unused.

    Args:
        name: "faster_rcnn", "mask_rcnn" or "retinanet".
        depth: of the ResNet: 18, 34, 50, 101 or 152.
        attention: the method, a key of attention.METHODS; "none" for none.
        kernel_sizes: "authors" for those of the authors' detector or, if they published none, of
            their ImageNet network of this depth; or as for ResNet.
        num_classes: of objects, without the background.
        channels: of the pyramid's maps.
        trainable_layers: how many parts of the ResNet train, counted from the last: 3 freezes its
            stem and its first stage, 5 trains all, 0 none.
        norm_eval: use the running statistics of the ResNet's batch norms in training too, because
            batches of detectors are small; their weights and biases still train.
        body: other options of resnet(): options, fused, backend.
        device, dtype: of the parameters.
        options: other options of torchvision's class, such as min_size, max_size and
            box_score_thresh.

    Returns:
        torchvision's FasterRCNN, MaskRCNN or RetinaNet: in training from lists of images (3, H, W)
        in 0 to 1 and of targets to a dict of losses, else from images to a list of dicts of boxes
        (D, 4), labels (D,), scores (D,) and masks (D, 1, H, W). Labels count from 1 with the R-CNNs
        and from 0 with RetinaNet: DETECTORS[name].first_label.

    Raises:
        TypeError: kernel_sizes is neither a string, a sequence of ints nor None; an unknown option.
        ValueError: there is no such detector, depth or method, or another argument does not fit.
    """
    if name not in DETECTORS:
        raise ValueError(f"expected a detector as one of {', '.join(DETECTORS)}, got {name!r}")
    if num_classes < 1 or channels < 1:
        raise ValueError(
            f"expected num_classes and channels from 1 up, got {num_classes} and {channels}"
        )
    kind = DETECTORS[name]
    _check_options(kind.build, options)
    if kernel_sizes == "authors" and attention == "eca":
        kernel_sizes = AUTHORS.get((name, depth), kernel_sizes)
    network = resnet(depth, attention, kernel_sizes, device=device, dtype=dtype, **(body or {}))
    _freeze(network, trainable_layers)
    widest = network.fc.in_features  # of the fourth stage; each stage has twice those of the last
    widths = [widest >> (len(kind.stages) - 1 - i) for i in range(len(kind.stages))]
    # torchvision's parts take no device.
    with contextlib.nullcontext() if device is None else torch.device(device):
        # From the ResNet's last map, as in the paper and in MMDetection.
        extra = LastLevelP6P7(widest, channels) if name == "retinanet" else None
        names = {stage: str(i) for i, stage in enumerate(kind.stages)}
        pyramid = Pyramid(network, names, widths, channels, extra, norm_eval=norm_eval)
        model: nn.Module = kind.build(pyramid, num_classes + kind.first_label, **options)
    return model if dtype is None else model.to(dtype)


def faster_rcnn(
    depth: int = 50,
    attention: str = "eca",
    kernel_sizes: str | Sequence[int] | None = "authors",
    num_classes: int = COCO,
    **options: Any,
) -> nn.Module:
    """Faster R-CNN on a ResNet with a feature pyramid; see detector()."""
    return detector("faster_rcnn", depth, attention, kernel_sizes, num_classes, **options)


def mask_rcnn(
    depth: int = 50,
    attention: str = "eca",
    kernel_sizes: str | Sequence[int] | None = "authors",
    num_classes: int = COCO,
    **options: Any,
) -> nn.Module:
    """Mask R-CNN on a ResNet with a feature pyramid; see detector()."""
    return detector("mask_rcnn", depth, attention, kernel_sizes, num_classes, **options)


def retinanet(
    depth: int = 50,
    attention: str = "eca",
    kernel_sizes: str | Sequence[int] | None = "authors",
    num_classes: int = COCO,
    **options: Any,
) -> nn.Module:
    """RetinaNet on a ResNet with a feature pyramid; see detector()."""
    return detector("retinanet", depth, attention, kernel_sizes, num_classes, **options)


class FixedRegions(nn.Module):
    """A detector's convolutions and fully connected layers, on a given number of regions.

    The number of regions a detector looks at depends on the image. So FLOPs are counted on this
    module, with as many regions as in MMDetection. It selects nothing, so it runs without memory.

    Args:
        model: from detector().
        regions, masks: numbers of regions for the boxes and for the masks of an R-CNN.

    Shape:
        (N, 3, H, W) to the pyramid's maps (N, channels, h, w), the largest first.
    """

    def __init__(self, model: nn.Module, regions: int = 1000, masks: int = 100) -> None:
        super().__init__()
        self.model: Any = model
        self.regions, self.masks = regions, masks

    def forward(self, x: Tensor) -> list[Tensor]:
        maps = list(self.model.backbone(x).values())
        if isinstance(self.model, library.RetinaNet):
            self.model.head(maps)
            return maps
        self.model.rpn.head(maps)
        heads = self.model.roi_heads
        seen = self._pooled(heads.box_roi_pool, maps[0], self.regions)
        heads.box_predictor(heads.box_head(seen))
        if heads.has_mask():
            seen = self._pooled(heads.mask_roi_pool, maps[0], self.masks)
            heads.mask_predictor(heads.mask_head(seen))
        return maps

    @staticmethod
    def _pooled(pool: Any, like: Tensor, regions: int) -> Tensor:
        """Maps of zeros in place of the regions' maps: (regions, channels, side, side)."""
        return like.new_zeros(regions, like.shape[1], *pool.output_size)


def _check_options(kind: Any, options: Mapping[str, Any]) -> None:
    """Raise TypeError for options that torchvision's classes would accept and ignore."""
    # A detector passes unknown options on to its transform, which ignores those it does not know.
    known = {
        name
        for part in (kind, GeneralizedRCNNTransform)
        for name in inspect.signature(part).parameters
    }
    if unknown := sorted(set(options) - known):
        raise TypeError(
            f"expected options of {kind.__name__}, got {', '.join(unknown)}; "
            "pass those of the ResNet, such as fused and backend, in body="
        )


def _freeze(network: nn.Module, trainable_layers: int) -> None:
    """Freeze all but the given number of parts of a ResNet, counted from the last."""
    if trainable_layers not in range(len(STAGES) + 2):
        raise ValueError(f"expected trainable_layers from 0 to 5, got {trainable_layers!r}")
    if trainable_layers > len(STAGES):
        return
    trained = STAGES[len(STAGES) - trainable_layers :]
    for name, parameter in network.named_parameters():
        if name.partition(".")[0] not in trained:
            parameter.requires_grad_(False)
