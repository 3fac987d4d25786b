"""ECA-ResNet: the residual networks of He et al. (2016) with the ECA of Wang et al. (2020).

Parameters are named as torchvision's, and the taps of each block `eca.conv.weight`, so that the
authors' checkpoints load.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from eca_fused.checks import check_kernel_size
from eca_fused.layers import ECALayer, kernel_size

__all__ = ["BasicBlock", "Bottleneck", "ResNet", "eca_resnet50", "set_fused"]

PLANES = (64, 128, 256, 512)  # of the four stages, before a block's expansion


class BasicBlock(nn.Module):
    """Two 3x3 convolutions, ECA and the addition of the input (ResNet-18 and -34).

    Args:
        inplanes: channels of the input.
        planes: channels of the convolutions; the output has planes * expansion channels.
        stride: of the first 3x3 convolution.
        eca: the attention layer, applied after the last batch norm.
        downsample: brings the input to the shape of the output; None where it has it already.
        device, dtype: of the parameters.

    Shape:
        (N, inplanes, H, W) to (N, planes * expansion, H / stride, W / stride), rounded up.
    """

    expansion = 1

    def __init__(
        self,
        inplanes: int,
        planes: int,
        stride: int,
        eca: ECALayer,
        downsample: nn.Module | None = None,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.conv1 = _conv(inplanes, planes, 3, stride, device, dtype)
        self.bn1 = nn.BatchNorm2d(planes, device=device, dtype=dtype)
        self.relu = nn.ReLU(inplace=True)
        self.conv2 = _conv(planes, planes, 3, 1, device, dtype)
        self.bn2 = nn.BatchNorm2d(planes, device=device, dtype=dtype)
        self.eca = eca
        self.downsample = downsample

    def forward(self, x: Tensor) -> Tensor:
        identity: Tensor = x if self.downsample is None else self.downsample(x)
        out = self.relu(self.bn1(self.conv1(x)))
        out = self.eca(self.bn2(self.conv2(out)))
        out += identity
        return self.relu(out)  # type: ignore[no-any-return]


class Bottleneck(nn.Module):
    """A 1x1, a 3x3 and a 1x1 convolution, ECA and the addition of the input (ResNet-50 and up).

    The stride is on the 3x3 convolution, as in torchvision and in the authors' code.

    Args, shape: as of BasicBlock, with the stride on the second convolution.
    """

    expansion = 4

    def __init__(
        self,
        inplanes: int,
        planes: int,
        stride: int,
        eca: ECALayer,
        downsample: nn.Module | None = None,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.conv1 = _conv(inplanes, planes, 1, 1, device, dtype)
        self.bn1 = nn.BatchNorm2d(planes, device=device, dtype=dtype)
        self.conv2 = _conv(planes, planes, 3, stride, device, dtype)
        self.bn2 = nn.BatchNorm2d(planes, device=device, dtype=dtype)
        self.conv3 = _conv(planes, planes * self.expansion, 1, 1, device, dtype)
        self.bn3 = nn.BatchNorm2d(planes * self.expansion, device=device, dtype=dtype)
        self.relu = nn.ReLU(inplace=True)
        self.eca = eca
        self.downsample = downsample

    def forward(self, x: Tensor) -> Tensor:
        identity: Tensor = x if self.downsample is None else self.downsample(x)
        out = self.relu(self.bn1(self.conv1(x)))
        out = self.relu(self.bn2(self.conv2(out)))
        out = self.eca(self.bn3(self.conv3(out)))
        out += identity
        return self.relu(out)  # type: ignore[no-any-return]


class ResNet(nn.Module):
    """ResNet (He et al., "Deep Residual Learning", CVPR 2016) with ECA in every block.

    ECA (Wang et al., "ECA-Net", CVPR 2020) comes after a block's last batch norm and before the
    residual addition, as in the authors' code. Weights start as torchvision's do: convolutions
    from Kaiming's normal distribution (fan-out), batch norms at 1 and 0.

    Args:
        block: BasicBlock or Bottleneck.
        layers: number of blocks of each of the four stages, such as (3, 4, 6, 3).
        kernel_sizes: k of each stage's ECA layers: a string of four odd digits as in the names of
            the authors' checkpoints ("3557"), four odd ints, or None for the adaptive rule on each
            block's output channels (eca_fused.kernel_size()).
        num_classes: number of logits, from 1 up.
        fused, backend: of the ECA layers, see ECALayer.
        device, dtype: of the parameters.

    Shape:
        (N, 3, H, W) to logits (N, num_classes); ImageNet's H and W are 224.

    Raises:
        TypeError: kernel_sizes is neither a string, a sequence of ints nor None.
        ValueError: the number of stages, a kernel size or num_classes does not fit.
    """

    def __init__(
        self,
        block: type[BasicBlock] | type[Bottleneck],
        layers: Sequence[int],
        kernel_sizes: str | Sequence[int] | None = None,
        num_classes: int = 1000,
        *,
        fused: bool = True,
        backend: str = "auto",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if len(layers) != len(PLANES):
            raise ValueError(
                f"expected layers as four numbers of blocks, one per stage, got {layers!r}"
            )
        if num_classes < 1:
            raise ValueError(f"expected num_classes from 1 up, got {num_classes}")
        channels = [planes * block.expansion for planes in PLANES]  # of each stage's output
        sizes = _stage_kernel_sizes(kernel_sizes, channels)

        self.conv1 = _conv(3, 64, 7, 2, device, dtype)
        self.bn1 = nn.BatchNorm2d(64, device=device, dtype=dtype)
        self.relu = nn.ReLU(inplace=True)
        self.maxpool = nn.MaxPool2d(kernel_size=3, stride=2, padding=1)

        def stage(number: int) -> nn.Sequential:
            inplanes = channels[number - 1] if number else 64
            blocks = []
            for i in range(layers[number]):
                stride = 2 if number and not i else 1
                downsample = None
                if stride != 1 or inplanes != channels[number]:
                    downsample = nn.Sequential(
                        _conv(inplanes, channels[number], 1, stride, device, dtype),
                        nn.BatchNorm2d(channels[number], device=device, dtype=dtype),
                    )
                eca = ECALayer(
                    kernel_size=sizes[number],
                    fused=fused,
                    backend=backend,
                    device=device,
                    dtype=dtype,
                )
                blocks.append(
                    block(
                        inplanes,
                        PLANES[number],
                        stride,
                        eca,
                        downsample,
                        device=device,
                        dtype=dtype,
                    )
                )
                inplanes = channels[number]
            return nn.Sequential(*blocks)

        self.layer1 = stage(0)
        self.layer2 = stage(1)
        self.layer3 = stage(2)
        self.layer4 = stage(3)
        self.avgpool = nn.AdaptiveAvgPool2d((1, 1))
        self.fc = nn.Linear(channels[3], num_classes, device=device, dtype=dtype)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, x: Tensor) -> Tensor:
        x = self.maxpool(self.relu(self.bn1(self.conv1(x))))
        x = self.layer4(self.layer3(self.layer2(self.layer1(x))))
        return self.fc(torch.flatten(self.avgpool(x), 1))  # type: ignore[no-any-return]


def eca_resnet50(
    kernel_sizes: str | Sequence[int] | None = "3557",
    num_classes: int = 1000,
    *,
    fused: bool = True,
    backend: str = "auto",
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
) -> ResNet:
    """ECA-ResNet-50 with random weights, 24.37 * 2**20 parameters; see ResNet for the arguments.

    The default kernel sizes are those of the authors' ImageNet checkpoint.

    Returns:
        A ResNet from images (N, 3, H, W) to logits (N, num_classes).

    Raises:
        TypeError: kernel_sizes is neither a string, a sequence of ints nor None.
        ValueError: kernel_sizes, num_classes or backend does not fit.
    """
    return ResNet(
        Bottleneck,
        (3, 4, 6, 3),
        kernel_sizes,
        num_classes,
        fused=fused,
        backend=backend,
        device=device,
        dtype=dtype,
    )


def set_fused(model: nn.Module, fused: bool) -> int:
    """Switch every ECALayer of a model between the fused operation and plain PyTorch.

    Args:
        model: any module that holds ECALayers.
        fused: True for the fused operation.

    Returns:
        The number of ECALayers.

    Raises:
        ValueError: the model has no ECALayer.
    """
    layers = [module for module in model.modules() if isinstance(module, ECALayer)]
    if not layers:
        raise ValueError(f"expected a model with ECALayers, found none in {type(model).__name__}")
    for layer in layers:
        layer.fused = fused
    return len(layers)


def _conv(
    channels: int,
    out_channels: int,
    size: int,
    stride: int,
    device: torch.device | str | None,
    dtype: torch.dtype | None,
) -> nn.Conv2d:
    return nn.Conv2d(
        channels,
        out_channels,
        size,
        stride=stride,
        padding=size // 2,
        bias=False,
        device=device,
        dtype=dtype,
    )


def _stage_kernel_sizes(
    kernel_sizes: str | Sequence[int] | None, channels: Sequence[int]
) -> list[int]:
    """The kernel size of each stage, of which `channels` are the output channels."""
    if kernel_sizes is None:
        return [kernel_size(c) for c in channels]
    if not isinstance(kernel_sizes, Sequence):
        raise TypeError(
            "expected kernel_sizes as a string of four odd digits such as '3557', as four ints or "
            f"as None, got {kernel_sizes!r}"
        )
    if len(kernel_sizes) != len(channels):
        raise ValueError(
            f"expected kernel_sizes for {len(channels)} stages, such as '3557' or (3, 5, 5, 7), "
            f"got {kernel_sizes!r}"
        )
    if isinstance(kernel_sizes, str):
        if not all(digit in "13579" for digit in kernel_sizes):
            raise ValueError(
                "expected a string of kernel_sizes as odd digits such as '3557', got "
                f"{kernel_sizes!r}; use a sequence of ints for sizes from 11 up"
            )
        return [int(digit) for digit in kernel_sizes]
    for size in kernel_sizes:
        check_kernel_size(size)
    return list(kernel_sizes)
