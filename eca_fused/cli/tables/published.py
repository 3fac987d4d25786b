"""The tables of the ECA-Net poster (Wang et al., CVPR 2020), and builders of the networks in them.

Accuracy is Top-1 and Top-5 on ImageNet-1K and AP on MS-COCO as reported there. None of it was
measured here.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from eca_fused.models import mobilenetv2, resnet

__all__ = ["BACKBONES", "DETECTORS", "METHODS", "TITLES", "Backbone", "Detector", "Method"]

MEGA, GIGA = 2**20, 2**30  # the poster's M and G: 25,557,032 parameters are 24.37 M
RESNET_TOLERANCE, MOBILENET_TOLERANCE = 0.005, 0.025  # of FLOPs; thop's rules have changed since
DETECTOR_TOLERANCE = 0.0002  # small, because the rules of MMDetection's counter are known
DETECTOR_DEPTH = 101
TITLES = {"faster_rcnn": "Faster R-CNN", "mask_rcnn": "Mask R-CNN", "retinanet": "RetinaNet"}


@dataclass(frozen=True)
class Method:
    """A row of the table of methods, on ResNet-50.

    Args:
        name: a key of attention.METHODS.
        gate: of the pooled vector y, as printed; s is the sigmoid.
        formula: the parameters of one module as printed.
        parameters: the same as a function of C.
        top1, top5: as reported.
    """

    name: str
    gate: str
    formula: str
    parameters: Callable[[int], int]
    top1: str
    top5: str


@dataclass(frozen=True)
class Backbone:
    """A row of the table of backbones.

    Args:
        depth: of the ResNet; None for MobileNetV2.
        method: as printed.
        attention: a key of attention.METHODS.
        parameters: in 2**20, as printed.
        flops: as printed: in 2**30 for a ResNet, in 2**20 for MobileNetV2.
        top1, top5: as reported.
        options: of the attention.
        note: a remark for the reader.
        held: whether a difference is an error.
    """

    depth: int | None
    method: str
    attention: str
    parameters: str
    flops: str
    top1: str
    top5: str
    options: Mapping[str, Any] = field(default_factory=dict)
    note: str = ""
    held: bool = True

    @property
    def network(self) -> str:
        return "MobileNetV2" if self.depth is None else f"ResNet-{self.depth}"

    @property
    def flops_unit(self) -> int:
        return MEGA if self.depth is None else GIGA

    @property
    def tolerance(self) -> float:
        """The allowed relative difference of FLOPs."""
        return MOBILENET_TOLERANCE if self.depth is None else RESNET_TOLERANCE

    def build(self) -> nn.Module:
        """The network on the meta device, without memory."""
        arguments: dict[str, Any] = {"options": self.options, "device": "meta", "fused": False}
        if self.depth is None:
            return mobilenetv2(self.attention, **arguments)
        return resnet(self.depth, self.attention, **arguments)


@dataclass(frozen=True)
class Detector:
    """A row of the table of detectors on MS-COCO, all on ResNet-101.

    Args:
        name: a key of eca_fused.models.detection.DETECTORS.
        method: as printed.
        attention: a key of attention.METHODS.
        parameters: trainable ones, in 10**6, as printed.
        flops: in 10**9, as printed.
        ap: average precision, as reported.
        note: a remark for the reader.
    """

    name: str
    method: str
    attention: str
    parameters: str
    flops: str
    ap: str
    note: str = ""

    @property
    def title(self) -> str:
        return TITLES[self.name]

    def build(self) -> tuple[nn.Module, nn.Module]:
        """The detector, and the module that FLOPs are counted on, both on the meta device.

        Raises:
            ImportError: torchvision is missing.
        """
        from eca_fused.models.detection import FixedRegions, detector

        made = detector(
            self.name, DETECTOR_DEPTH, self.attention, body={"fused": False}, device="meta"
        )
        return made, FixedRegions(made)


METHODS = (
    Method("none", "none", "0", lambda c: 0, "75.20", "92.25"),
    Method(
        "se", "s(f_{w1,w2}(y))", "2 C^2 / r, r = 16", lambda c: 2 * c * c // 16, "76.71", "93.38"
    ),
    Method("se_var1", "s(y)", "0", lambda c: 0, "76.00", "92.90"),
    Method("se_var2", "s(w * y)", "C", lambda c: c, "77.07", "93.31"),
    Method("se_var3", "s(W y)", "C^2", lambda c: c * c, "77.42", "93.64"),
    Method("se_gc1", "s(GC_16(y))", "C^2 / 16", lambda c: c * c // 16, "76.95", "93.47"),
    Method("se_gc2", "s(GC_{C/16}(y))", "16 C", lambda c: 16 * c, "76.98", "93.31"),
    Method("se_gc3", "s(GC_{C/8}(y))", "8 C", lambda c: 8 * c, "76.96", "93.38"),
    Method("eca_ns", "s(own k taps)", "k C, k = 3", lambda c: 3 * c, "77.35", "93.61"),
    Method("eca", "s(C1D_k(y))", "k = 3", lambda c: 3, "77.43", "93.65"),
)

NO_BIAS = {"bias": False}
NO_BIAS_NOTE = (
    "the printed parameters are those of CBAM without biases in its MLP, unlike ResNet-34's"
)
GSOP_NOTE = (
    "GSoP-Net1 as in its authors' code has 28.29 * 10^6 parameters; the printed row fits that in "
    "neither unit, and how it was counted is not known, so it is not held to a tolerance"
)
SE_MOBILE_NOTE = "the printed parameters are those of SE with reduction 8, on each block's output"

BACKBONES = (
    Backbone(18, "vanilla", "none", "11.148", "1.699", "70.40", "89.45"),
    Backbone(18, "SENet", "se", "11.231", "1.700", "70.59", "89.78"),
    Backbone(18, "ECA", "eca", "11.148", "1.700", "70.78", "89.92"),
    Backbone(34, "vanilla", "none", "20.788", "3.427", "73.31", "91.40"),
    Backbone(34, "SENet", "se", "20.938", "3.428", "73.87", "91.65"),
    Backbone(34, "CBAM", "cbam", "20.943", "3.428", "74.01", "91.76"),
    Backbone(34, "ECA", "eca", "20.788", "3.428", "74.21", "91.83"),
    Backbone(50, "vanilla", "none", "24.37", "3.86", "75.20", "92.52"),
    Backbone(50, "SENet", "se", "26.77", "3.87", "76.71", "93.38"),
    Backbone(50, "CBAM", "cbam", "26.77", "3.87", "77.34", "93.69", NO_BIAS, NO_BIAS_NOTE),
    Backbone(50, "GSoP-Net", "gsop", "28.05", "6.18", "77.68", "93.98", {}, GSOP_NOTE, held=False),
    Backbone(50, "ECA", "eca", "24.37", "3.86", "77.48", "93.68"),
    Backbone(101, "vanilla", "none", "42.49", "7.34", "76.83", "93.48"),
    Backbone(101, "SENet", "se", "47.01", "7.35", "77.62", "93.93"),
    Backbone(101, "CBAM", "cbam", "47.01", "7.35", "78.49", "94.31", NO_BIAS, NO_BIAS_NOTE),
    Backbone(101, "ECA", "eca", "42.49", "7.35", "78.65", "94.34"),
    Backbone(None, "vanilla", "none", "3.34", "319.4", "71.64", "90.20"),
    Backbone(
        None, "SENet", "se", "3.40", "320.1", "72.42", "90.67", {"reduction": 8}, SE_MOBILE_NOTE
    ),
    Backbone(None, "ECA", "eca", "3.34", "319.9", "72.56", "90.81"),
)

RELU_NOTE = (
    "counted higher by 0.02 G: in torchvision the ReLU of the region proposals is a module, which "
    "counts, and those of the box head are functions, which do not; in MMDetection it is reversed"
)

DETECTORS = (
    Detector("faster_rcnn", "vanilla", "none", "60.52", "283.14", "38.7", RELU_NOTE),
    Detector("faster_rcnn", "SENet", "se", "65.24", "283.33", "39.6", RELU_NOTE),
    Detector("faster_rcnn", "ECA", "eca", "60.52", "283.32", "40.3", RELU_NOTE),
    Detector("mask_rcnn", "vanilla", "none", "63.17", "351.65", "39.4", RELU_NOTE),
    Detector("mask_rcnn", "SENet", "se", "67.89", "351.84", "40.7", RELU_NOTE),
    Detector("mask_rcnn", "ECA", "eca", "63.17", "351.83", "41.3", RELU_NOTE),
    Detector("retinanet", "vanilla", "none", "56.74", "315.39", "37.7"),
    Detector("retinanet", "SENet", "se", "61.45", "315.58", "38.7"),
    Detector("retinanet", "ECA", "eca", "56.74", "315.57", "39.1"),
)
