"""Other kinds of attention in ECA-Net's tables: CBAM and the block of GSoP-Net.

Their gates are plain PyTorch. Pooling and rescaling by channels are fused, as in the other methods.
"""

import torch
from torch import Tensor, nn

from eca_fused.attention.base import ChannelAttention, size_of
from eca_fused.functional import (
    linked_pool,
    linked_rescale,
    plain_pool,
    plain_rescale,
    rescale,
)
from eca_fused.ops.checks import check_map
from eca_fused.torch_state import is_scripting

__all__ = ["CBAM", "GSoP"]


class CBAM(ChannelAttention):
    """A gate for each channel, then one for each pixel.

    Woo et al., "CBAM: Convolutional Block Attention Module" (ECCV 2018), equations 2 and 3: the
    channels' gates are sigmoid(mlp(mean) + mlp(max)), the pixels' sigmoid(bn(conv7x7([max, mean
    over channels]))). The authors' code has the batch norm.

    Args:
        channels: C, from 1 up.
        reduction: r; the MLP has C // r hidden channels, at least one.
        bias: whether the MLP has biases, as in the authors' code.
        fused, backend: see ChannelAttention.
        device, dtype: of the parameters; the dtype of x, except under autocast.

    Shape:
        x (N, C, H, W); the same shape and dtype out.

    Raises:
        ValueError: reduction is less than 1, or x does not fit.
    """

    def __init__(
        self,
        channels: int,
        reduction: int = 16,
        *,
        bias: bool = True,
        fused: bool = True,
        backend: str = "auto",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(channels, fused=fused, backend=backend)
        if reduction < 1:
            raise ValueError(f"expected reduction from 1 up, got {reduction}; the paper has 16")
        hidden = max(channels // reduction, 1)
        self.mlp = nn.Sequential(
            nn.Linear(channels, hidden, bias=bias, device=device, dtype=dtype),
            nn.ReLU(inplace=True),
            nn.Linear(hidden, channels, bias=bias, device=device, dtype=dtype),
        )
        self.conv = nn.Conv2d(2, 1, 7, padding=3, bias=False, device=device, dtype=dtype)
        self.bn = nn.BatchNorm2d(1, device=device, dtype=dtype)

    def width(self) -> int:
        if is_scripting():
            size = self.mlp[0].weight.shape[1]  # type: ignore[index]
            return int(size)
        return size_of(self.mlp[0], 1, self.channels)

    def channel_gate(self, mean: Tensor, peak: Tensor) -> Tensor:
        """The gates (N, C) for the means and maxima (N, C)."""
        return torch.sigmoid(self.mlp(mean) + self.mlp(peak))

    def pixel_gate(self, x: Tensor) -> Tensor:
        """The gates (N, 1, H, W) for x (N, C, H, W)."""
        seen = torch.cat((x.amax(1, keepdim=True), x.mean(1, keepdim=True)), 1)
        return torch.sigmoid(self.bn(self.conv(seen)))

    def forward(self, x: Tensor) -> Tensor:
        check_map(x, self.width(), 2)
        peak = x.amax((2, 3))
        if self.fused:
            mean, token = linked_pool(x, self.backend)
            x = linked_rescale(x, self.channel_gate(mean, peak), token, self.backend)
        else:
            x = plain_rescale(x, self.channel_gate(plain_pool(x), peak))
        return x * self.pixel_gate(x).to(x.dtype)


class GSoP(ChannelAttention):
    """Gates from the covariance of the channels, as in the blocks of GSoP-Net1.

    Gao et al., "Global Second-order Pooling Convolutional Networks" (CVPR 2019), section 3.2: the
    channels are reduced to d, a convolution takes each row of their covariance (d, d), and a fully
    connected layer makes C gates from the result.

    Args:
        channels: C, from 1 up.
        reduced: d.
        stride: of the reduction; None for 2 up to 256 channels, else 1, because GSoP-Net halves the
            maps of its first stage, the largest.
        fused, backend: see ChannelAttention.
        device, dtype: of the parameters; the dtype of x, except under autocast.

    Shape:
        x (N, C, H, W); the same shape and dtype out.

    Raises:
        ValueError: reduced or stride is less than 1, or x does not fit.
    """

    def __init__(
        self,
        channels: int,
        reduced: int = 128,
        *,
        stride: int | None = None,
        fused: bool = True,
        backend: str = "auto",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(channels, fused=fused, backend=backend)
        stride = (2 if channels <= 256 else 1) if stride is None else stride
        if reduced < 1 or stride < 1:
            raise ValueError(
                f"expected reduced and stride from 1 up, got {reduced} and {stride}; "
                "the paper has 128, and 2 in the first stage"
            )
        self.reduce = nn.Conv2d(channels, reduced, 1, stride, device=device, dtype=dtype)
        self.reduce_bn = nn.BatchNorm2d(reduced, device=device, dtype=dtype)
        self.row_bn = nn.BatchNorm2d(reduced, device=device, dtype=dtype)
        self.row_conv = nn.Conv2d(
            reduced, 4 * reduced, (reduced, 1), groups=reduced, device=device, dtype=dtype
        )
        self.fc = nn.Conv2d(4 * reduced, channels, 1, device=device, dtype=dtype)

    def width(self) -> int:
        if is_scripting():
            return self.reduce.weight.shape[1]
        return size_of(self.reduce, 1, self.channels)

    def channel_gate(self, x: Tensor) -> Tensor:
        """The gates (N, C) for x (N, C, H, W)."""
        small = torch.relu(self.reduce_bn(self.reduce(torch.relu(x)))).flatten(2)  # (N, d, S)
        centred = small - small.mean(2, keepdim=True)
        covariance = centred @ centred.transpose(1, 2) / small.shape[2]  # (N, d, d)
        rows = self.row_conv(self.row_bn(covariance.unsqueeze(-1)))  # (N, 4d, 1, 1)
        return torch.sigmoid(self.fc(rows)).flatten(1)

    def forward(self, x: Tensor) -> Tensor:
        check_map(x, self.width(), 2)
        if not self.fused:
            return plain_rescale(x, self.channel_gate(x))
        return rescale(x, self.channel_gate(x), backend=self.backend)
