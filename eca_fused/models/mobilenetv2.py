"""MobileNetV2 of Sandler et al. (2018) with channel attention in its blocks.

Parameters have torchvision's names. Attention comes last in the `conv` of each block, as in the
code of ECA-Net, so checkpoints of both load.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from eca_fused.attention.residual_tail import TailParts, compute
from eca_fused.models.parts import BlockAttention, block_kernel_sizes, conv
from eca_fused.torch_state import does_more, is_scripting

__all__ = ["InvertedResidual", "MobileNetV2"]

# Expansion, output channels, number of blocks and stride of each stage: table 2 of the paper.
STAGES = (
    (1, 16, 1, 1),
    (6, 24, 2, 2),
    (6, 32, 3, 2),
    (6, 64, 4, 2),
    (6, 96, 3, 1),
    (6, 160, 3, 2),
    (6, 320, 1, 1),
)
FIRST, LAST = 32, 1280  # channels before the first block and after the last


class InvertedResidual(nn.Module):
    """A 1x1 expansion, a 3x3 depthwise convolution, a 1x1 convolution, then attention.

    If the shapes are the same, the input is added.

    Args:
        inplanes, planes: channels of input and output.
        stride: of the depthwise convolution.
        expansion: of the hidden channels; 1 leaves the first convolution out.
        attention: a module from map to map, applied after the last batch norm.
        tails: compute the end of the block as one operation, see ResidualTail.
        device, dtype: of the parameters.

    Shape:
        (N, inplanes, H, W) to (N, planes, H / stride, W / stride), rounded up.
    """

    def __init__(
        self,
        inplanes: int,
        planes: int,
        stride: int,
        expansion: int,
        attention: nn.Module,
        *,
        tails: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        hidden = inplanes * expansion
        layers: list[nn.Module] = []
        if expansion != 1:
            layers.append(_conv_norm(inplanes, hidden, 1, device=device, dtype=dtype))
        layers += [
            _conv_norm(hidden, hidden, 3, stride, hidden, device=device, dtype=dtype),
            conv(hidden, planes, 1, device=device, dtype=dtype),
            nn.BatchNorm2d(planes, device=device, dtype=dtype),
            attention,
        ]
        self.conv = nn.Sequential(*layers)
        self.added = stride == 1 and inplanes == planes
        self.tails = tails

    def forward(self, x: Tensor) -> Tensor:
        if not is_scripting():  # noqa: SIM102  # TorchScript compiles both sides of an "and"
            if self.tails and not does_more(self.conv):
                return self._with_tail(x)
        out: Tensor = self.conv(x)
        return x + out if self.added else out

    def _with_tail(self, x: Tensor) -> Tensor:
        *before, bn, attention = self.conv
        out = x
        for module in before:
            out = module(out)
        parts = TailParts(bn, attention, None, None, "none")
        return compute(parts, out, x if self.added else None, self)


class MobileNetV2(nn.Module):
    """MobileNetV2 (Sandler et al., CVPR 2018), of width 1, with channel attention in every block.

    Attention comes after a block's last batch norm and before the residual addition, as in the code
    of ECA-Net (Wang et al., CVPR 2020). Weights are initialised as in torchvision.

    Args:
        kernel_sizes: k of the ECA layers: a string of seven odd digits, one for each stage
            ("1111333"), seven odd ints, or one for each of the 17 blocks; None for the adaptive
            rule on each block's output channels, and for methods without a kernel size.
        num_classes: number of logits, from 1 up.
        attention: the method, a key of attention.METHODS; "none" is torchvision's network.
        options: of the method, such as {"reduction": 8}.
        dropout: probability before the classifier.
        fused, backend: for methods that run on the fused kernels, see ECALayer.
        tails: compute the end of each block as one operation, see ResidualTail.
        device, dtype: of the parameters.

    Shape:
        (N, 3, H, W) to logits (N, num_classes); ImageNet's H and W are 224.

    Raises:
        TypeError: kernel_sizes is neither a string, a sequence of ints nor None.
        ValueError: a kernel size, num_classes, attention or dropout does not fit.
    """

    def __init__(
        self,
        kernel_sizes: str | Sequence[int] | None = None,
        num_classes: int = 1000,
        *,
        attention: str = "eca",
        options: Mapping[str, Any] | None = None,
        dropout: float = 0.2,
        fused: bool = True,
        backend: str = "auto",
        tails: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if num_classes < 1:
            raise ValueError(f"expected num_classes from 1 up, got {num_classes}")
        method = BlockAttention(attention, fused, backend, options or {}, device, dtype)
        channels = [c for _, c, _, _ in STAGES]
        blocks = [n for _, _, n, _ in STAGES]
        sizes = block_kernel_sizes(attention, kernel_sizes, channels, blocks, "1111333")
        features: list[nn.Module] = [_conv_norm(3, FIRST, 3, 2, device=device, dtype=dtype)]
        inplanes = FIRST
        for (expansion, planes, _, stride), stage in zip(STAGES, sizes, strict=True):
            for i, k in enumerate(stage):
                made = method.make(planes, k)
                features.append(
                    InvertedResidual(
                        inplanes,
                        planes,
                        1 if i else stride,
                        expansion,
                        made,
                        tails=tails,
                        device=device,
                        dtype=dtype,
                    )
                )
                inplanes = planes
        features.append(_conv_norm(inplanes, LAST, 1, device=device, dtype=dtype))
        self.features = nn.Sequential(*features)
        self.avgpool = nn.AdaptiveAvgPool2d((1, 1))
        classifier = nn.Linear(LAST, num_classes, device=device, dtype=dtype)
        self.classifier = nn.Sequential(nn.Dropout(dropout), classifier)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out")
        nn.init.normal_(classifier.weight, 0, 0.01)
        nn.init.zeros_(classifier.bias)

    def forward(self, x: Tensor) -> Tensor:
        x = self.avgpool(self.features(x))
        return self.classifier(torch.flatten(x, 1))  # type: ignore[no-any-return]


def _conv_norm(
    channels: int,
    out_channels: int,
    size: int,
    stride: int = 1,
    groups: int = 1,
    *,
    device: torch.device | str | None,
    dtype: torch.dtype | None,
) -> nn.Sequential:
    return nn.Sequential(
        conv(channels, out_channels, size, stride, groups, device=device, dtype=dtype),
        nn.BatchNorm2d(out_channels, device=device, dtype=dtype),
        nn.ReLU6(inplace=True),
    )
