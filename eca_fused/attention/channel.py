"""The channel attention methods that ECA-Net compares. ECA itself is ECALayer.

Wang et al., "ECA-Net: Efficient Channel Attention for Deep Convolutional Neural Networks" (CVPR
2020), table 1 and equations 2 to 6; SE is Hu et al., "Squeeze-and-Excitation Networks" (CVPR 2018).
The layers have no biases, which matches the published numbers of parameters.
"""

import torch
from torch import Tensor, nn

from eca_fused.attention.base import BandAttention, ChannelAttention, size_of
from eca_fused.functional.convolution import as_it_takes, plain_taps
from eca_fused.ops.checks import check_kernel_size, is_circular
from eca_fused.ops.graph import padded
from eca_fused.ops.taps import adaptive_kernel_size
from eca_fused.torch_state import is_scripting

__all__ = ["ECANS", "SE", "SEGroups", "SEVar1", "SEVar2"]


class SE(ChannelAttention):
    """Squeeze and excitation, gate = sigmoid(W2 relu(W1 mean)): 2 C^2 / r parameters.

    Args:
        channels: C, from 1 up.
        reduction: r; there are C // r hidden channels, at least one.
        fused, backend: see ChannelAttention.
        device, dtype: of the weights; the dtype of x, except under autocast.

    Raises:
        ValueError: reduction is less than 1.
    """

    def __init__(
        self,
        channels: int,
        reduction: int = 16,
        *,
        fused: bool = True,
        backend: str = "auto",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(channels, fused=fused, backend=backend)
        if reduction < 1:
            raise ValueError(f"expected reduction from 1 up, got {reduction}; the paper has 16")
        hidden = max(channels // reduction, 1)
        self.fc = nn.Sequential(
            nn.Linear(channels, hidden, bias=False, device=device, dtype=dtype),
            nn.ReLU(inplace=True),
            nn.Linear(hidden, channels, bias=False, device=device, dtype=dtype),
        )

    def width(self) -> int:
        if is_scripting():
            size = self.fc[0].weight.shape[1]  # type: ignore[index]
            return int(size)
        return size_of(self.fc[0], 1, self.channels)

    def gate(self, mean: Tensor) -> Tensor:
        return torch.sigmoid(self.fc(mean))


class SEGroups(ChannelAttention):
    """One fully connected layer in G groups, gate = sigmoid(GC_G(mean)): C^2 / G parameters.

    SE-Var3 has one group, SE-GC1 sixteen, SE-GC2 C / 16 and SE-GC3 C / 8.

    Args:
        channels: C, a multiple of groups.
        groups: G.
        fused, backend: see ChannelAttention.
        device, dtype: of the weights; the dtype of x, except under autocast.

    Raises:
        ValueError: groups does not divide channels.
    """

    def __init__(
        self,
        channels: int,
        groups: int = 1,
        *,
        fused: bool = True,
        backend: str = "auto",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(channels, fused=fused, backend=backend)
        if groups < 1 or channels % groups:
            raise ValueError(
                f"expected groups from 1 up that divide the channels, got {groups} for {channels} "
                "channels; SE-GC1, in 16 groups, needs a multiple of 16"
            )
        # A convolution over one position is a fully connected layer that supports groups.
        self.fc = nn.Conv1d(
            channels, channels, 1, groups=groups, bias=False, device=device, dtype=dtype
        )

    def width(self) -> int:
        if is_scripting():
            return self.fc.weight.shape[0]
        return size_of(self.fc, 0, self.channels)

    def gate(self, mean: Tensor) -> Tensor:
        return torch.sigmoid(self.fc(mean.unsqueeze(-1)).squeeze(-1))


class SEVar1(BandAttention):
    """gate = sigmoid(mean): a band of one tap fixed at one, without parameters.

    Args:
        channels, fused, backend: see BandAttention.
        device, dtype: of the tap, which state dicts leave out; float32 or the dtype of x.
    """

    fixed: Tensor  # (1, 1, 1)

    def __init__(
        self,
        channels: int,
        *,
        fused: bool = True,
        backend: str = "auto",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(channels, fused=fused, backend=backend)
        one = torch.ones(1, 1, 1, device=device, dtype=dtype)
        self.register_buffer("fixed", one, persistent=False)

    def taps(self) -> Tensor:
        return self.fixed


class ECANS(BandAttention):
    """ECA with separate taps for each channel: k C parameters, `conv.weight` (C, 1, k).

    The name and the shape are those of the authors' layer.

    Args:
        channels, padding_mode, fused, backend: see BandAttention.
        kernel_size: k, odd, from 1 up; None for adaptive_kernel_size().
        device, dtype: of the taps, which may stay in float32 for a half precision x.
    """

    def __init__(
        self,
        channels: int,
        kernel_size: int | None = None,
        *,
        padding_mode: str = "zeros",
        fused: bool = True,
        backend: str = "auto",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(channels, padding_mode=padding_mode, fused=fused, backend=backend)
        k = adaptive_kernel_size(channels) if kernel_size is None else kernel_size
        check_kernel_size(k)
        self.kernel_size = k
        # The kernels take its weight. It is called only if it does more, for example has hooks.
        self.conv = nn.Conv1d(
            channels, channels, k, groups=channels, bias=False, device=device, dtype=dtype
        )

    def width(self) -> int:
        if is_scripting():
            return self.conv.weight.shape[0]
        return size_of(self.conv, 0, self.channels)

    def taps(self) -> Tensor:
        return self.conv.weight

    def gate(self, mean: Tensor) -> Tensor:
        """The gates (N, C) for the means (N, C), by calling the convolution on their windows."""
        k, channels = self.kernel_size, mean.shape[1]
        rows = padded(mean, k // 2, is_circular(self.padding_mode))
        # ONNX lacks unfold().
        windows = torch.stack([rows.narrow(1, j, channels) for j in range(k)], 2)  # (N, C, k)
        found = self.conv(as_it_takes(self.conv, windows)).squeeze(-1)
        return torch.sigmoid(found).to(mean.dtype)

    def has_taps(self) -> bool:
        return plain_taps(self.conv, True, False) is not None


class SEVar2(ECANS):
    """gate = sigmoid(w * mean): a band of one tap for each channel, C parameters.

    Args:
        channels, fused, backend: see BandAttention.
        device, dtype: of the taps, which may stay in float32 for a half precision x.
    """

    def __init__(
        self,
        channels: int,
        *,
        fused: bool = True,
        backend: str = "auto",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(channels, 1, fused=fused, backend=backend, device=device, dtype=dtype)
