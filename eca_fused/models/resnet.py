"""The residual networks of He et al. (2016) with channel attention in their blocks.

Parameters have torchvision's names, and the taps of each block are `eca.conv.weight`, so the
authors' checkpoints load.
"""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from eca_fused.attention.residual_tail import TailParts, compute
from eca_fused.models.parts import BlockAttention, before_norm, block_kernel_sizes, conv
from eca_fused.torch_state import is_scripting

__all__ = ["BasicBlock", "Bottleneck", "ResNet"]

PLANES = (64, 128, 256, 512)  # of the four stages, before a block's expansion
POSITIONS = ("all", "last")


class _Block(nn.Module):
    """A block with its attention under the name `key`, as in checkpoints of that method."""

    if TYPE_CHECKING:  # TorchScript would read annotations
        key: str
        tails: bool
        relu: nn.ReLU
        downsample: nn.Module | None

    def _tail(self, x: Tensor, bn: nn.Module, identity: Tensor) -> Tensor:
        """The block's end as one operation: batch norm, attention, addition, ReLU.

        Args:
            x: what the last convolution gives.
            bn: the batch norm after it.
            identity: the block's input.
        """
        norm = None
        if self.downsample is not None:
            identity, norm = before_norm(self.downsample, identity)
        parts = TailParts(bn, getattr(self, self.key), None, norm, self.relu)
        return compute(parts, x, identity, self)

    def _attend(self, x: Tensor) -> Tensor:
        # TorchScript knows attributes by constant names only.
        if is_scripting():
            for name, module in self.named_children():
                if name == self.key:
                    x = module(x)
            return x
        return getattr(self, self.key)(x)  # type: ignore[no-any-return]


class BasicBlock(_Block):
    """Two 3x3 convolutions, attention and the addition of the input (ResNet-18 and -34).

    Args:
        inplanes: channels of the input.
        planes: channels of the convolutions; the output has planes * expansion channels.
        stride: of the first 3x3 convolution.
        attention: a module from map to map, applied after the last batch norm.
        downsample: brings the input to the shape of the output; None if it already has that shape.
        key: the name of the attention in the block, and so in state dicts.
        tails: compute the end of the block as one operation, see ResidualTail.
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
        attention: nn.Module,
        downsample: nn.Module | None = None,
        *,
        key: str = "eca",
        tails: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.conv1 = conv(inplanes, planes, 3, stride, device=device, dtype=dtype)
        self.bn1 = nn.BatchNorm2d(planes, device=device, dtype=dtype)
        self.relu = nn.ReLU(inplace=True)
        self.conv2 = conv(planes, planes, 3, device=device, dtype=dtype)
        self.bn2 = nn.BatchNorm2d(planes, device=device, dtype=dtype)
        self.key = key
        self.tails = tails
        self.add_module(key, attention)
        self.downsample = downsample

    def forward(self, x: Tensor) -> Tensor:
        out = self.relu(self.bn1(self.conv1(x)))
        if not is_scripting():  # noqa: SIM102  # TorchScript compiles both sides of an "and"
            if self.tails:
                return self._tail(self.conv2(out), self.bn2, x)
        identity: Tensor = x if self.downsample is None else self.downsample(x)
        out = self._attend(self.bn2(self.conv2(out)))
        out += identity
        return self.relu(out)  # type: ignore[no-any-return]


class Bottleneck(_Block):
    """A 1x1, a 3x3 and a 1x1 convolution, attention and the addition (ResNet-50 and up).

    The stride is on the 3x3 convolution, as in torchvision and in the authors' code.

    Args, shape: as for BasicBlock, with the stride on the second convolution.
    """

    expansion = 4

    def __init__(
        self,
        inplanes: int,
        planes: int,
        stride: int,
        attention: nn.Module,
        downsample: nn.Module | None = None,
        *,
        key: str = "eca",
        tails: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.conv1 = conv(inplanes, planes, 1, device=device, dtype=dtype)
        self.bn1 = nn.BatchNorm2d(planes, device=device, dtype=dtype)
        self.conv2 = conv(planes, planes, 3, stride, device=device, dtype=dtype)
        self.bn2 = nn.BatchNorm2d(planes, device=device, dtype=dtype)
        self.conv3 = conv(planes, planes * self.expansion, 1, device=device, dtype=dtype)
        self.bn3 = nn.BatchNorm2d(planes * self.expansion, device=device, dtype=dtype)
        self.relu = nn.ReLU(inplace=True)
        self.key = key
        self.tails = tails
        self.add_module(key, attention)
        self.downsample = downsample

    def forward(self, x: Tensor) -> Tensor:
        out = self.relu(self.bn1(self.conv1(x)))
        out = self.relu(self.bn2(self.conv2(out)))
        if not is_scripting():  # noqa: SIM102  # TorchScript compiles both sides of an "and"
            if self.tails:
                return self._tail(self.conv3(out), self.bn3, x)
        identity: Tensor = x if self.downsample is None else self.downsample(x)
        out = self._attend(self.bn3(self.conv3(out)))
        out += identity
        return self.relu(out)  # type: ignore[no-any-return]


class ResNet(nn.Module):
    """ResNet (He et al., "Deep Residual Learning", CVPR 2016) with channel attention in its blocks.

    Attention comes after a block's last batch norm and before the residual addition, as in the code
    of ECA-Net (Wang et al., CVPR 2020). Weights are initialised as in torchvision: convolutions
    from Kaiming's normal distribution (fan-out), batch norms at 1 and 0.

    Args:
        block: BasicBlock or Bottleneck.
        layers: number of blocks of each of the four stages, such as (3, 4, 6, 3).
        kernel_sizes: k of the ECA layers: a string of four odd digits, one for each stage, as in
            the names of the authors' checkpoints ("3557"); four odd ints, or one for each block; or
            None for the adaptive rule on each block's output channels, adaptive_kernel_size().
            None for methods without a kernel size.
        num_classes: number of logits, from 1 up.
        attention: the method, a key of attention.METHODS; "none" is torchvision's network.
        options: of the method, such as {"reduction": 8}.
        positions: "all" blocks have attention, or the "last" of each stage.
        last_stride: of the fourth stage, 2 or, as in GSoP-Net1, 1.
        fused, backend: for methods that run on the fused kernels, see ECALayer.
        tails: compute the end of each block as one operation, see ResidualTail.
        device, dtype: of the parameters.

    Shape:
        (N, 3, H, W) to logits (N, num_classes); ImageNet's H and W are 224.

    Raises:
        TypeError: kernel_sizes is neither a string, a sequence of ints nor None.
        ValueError: the number of stages, a kernel size, num_classes, attention, positions or
            last_stride does not fit.
    """

    if TYPE_CHECKING:  # TorchScript would read annotations
        layer1: nn.Sequential
        layer2: nn.Sequential
        layer3: nn.Sequential
        layer4: nn.Sequential

    def __init__(
        self,
        block: type[BasicBlock] | type[Bottleneck],
        layers: Sequence[int],
        kernel_sizes: str | Sequence[int] | None = None,
        num_classes: int = 1000,
        *,
        attention: str = "eca",
        options: Mapping[str, Any] | None = None,
        positions: str = "all",
        last_stride: int = 2,
        fused: bool = True,
        backend: str = "auto",
        tails: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        _check(layers, num_classes, positions, last_stride)
        channels = [planes * block.expansion for planes in PLANES]  # of each stage's output
        method = BlockAttention(attention, fused, backend, options or {}, device, dtype)
        sizes = block_kernel_sizes(attention, kernel_sizes, channels, layers, "3557")

        self.conv1 = conv(3, 64, 7, 2, device=device, dtype=dtype)
        self.bn1 = nn.BatchNorm2d(64, device=device, dtype=dtype)
        self.relu = nn.ReLU(inplace=True)
        self.maxpool = nn.MaxPool2d(kernel_size=3, stride=2, padding=1)
        inplanes = 64
        for number, planes in enumerate(PLANES):
            strides = (1, 2, 2, last_stride)
            blocks = []
            for i, k in enumerate(sizes[number]):
                stride = 1 if i else strides[number]
                downsample = None
                if stride != 1 or inplanes != channels[number]:
                    downsample = nn.Sequential(
                        conv(inplanes, channels[number], 1, stride, device=device, dtype=dtype),
                        nn.BatchNorm2d(channels[number], device=device, dtype=dtype),
                    )
                here = positions == "all" or i == layers[number] - 1
                made = method.make(channels[number], k) if here else nn.Identity()
                blocks.append(
                    block(
                        inplanes,
                        planes,
                        stride,
                        made,
                        downsample,
                        key=method.key,
                        tails=tails,
                        device=device,
                        dtype=dtype,
                    )
                )
                inplanes = channels[number]
            self.add_module(f"layer{number + 1}", nn.Sequential(*blocks))
        self.avgpool = nn.AdaptiveAvgPool2d((1, 1))
        self.fc = nn.Linear(channels[3], num_classes, device=device, dtype=dtype)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, x: Tensor) -> Tensor:
        x = self.maxpool(self.relu(self.bn1(self.conv1(x))))
        x = self.layer4(self.layer3(self.layer2(self.layer1(x))))
        return self.fc(torch.flatten(self.avgpool(x), 1))  # type: ignore[no-any-return]


def _check(layers: Sequence[int], num_classes: int, positions: str, last_stride: int) -> None:
    if len(layers) != len(PLANES):
        raise ValueError(
            f"expected layers as four numbers of blocks, one per stage, got {layers!r}"
        )
    if num_classes < 1:
        raise ValueError(f"expected num_classes from 1 up, got {num_classes}")
    if positions not in POSITIONS:
        raise ValueError(f"expected positions 'all' or 'last', got {positions!r}")
    if last_stride not in (1, 2):
        raise ValueError(f"expected last_stride 1 or 2, got {last_stride}")
