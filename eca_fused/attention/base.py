"""What the methods share: pooling, rescaling, and a gate for each channel in between."""

import torch
from torch import Tensor, nn

from eca_fused import reference
from eca_fused.backend import check_backend
from eca_fused.checks import check_channels, check_map, check_padding_mode
from eca_fused.functional import eca

__all__ = ["BandAttention", "ChannelAttention", "pool", "rescale"]


def pool(x: Tensor) -> Tensor:
    """Mean over the spatial positions, in the dtype of x.

    Args:
        x: (N, C, *spatial).

    Returns:
        (N, C).
    """
    return x.mean(tuple(range(2, x.dim()))) if x.dim() > 2 else x


def rescale(x: Tensor, gate: Tensor) -> Tensor:
    """Every channel of x by its gate.

    Args:
        x: (N, C, *spatial).
        gate: (N, C), any floating dtype.

    Returns:
        A tensor of the shape and dtype of x.
    """
    return x * gate.to(x.dtype).reshape(gate.shape + (1,) * (x.dim() - 2))


class ChannelAttention(nn.Module):
    """y = gate(mean(x)) * x, with one gate for each sample and channel.

    A method overrides gate(); pooling and rescaling are the same for all.

    Args:
        channels: C, from 1 up.

    Shape:
        x (N, C, *spatial), 0 to 3 spatial dimensions; the same shape and dtype out.

    Raises:
        TypeError: channels is not an int, or x is no tensor.
        ValueError: channels < 1, or x has other channels or too many dimensions.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        check_channels(channels)
        self.channels = channels

    def gate(self, mean: Tensor) -> Tensor:
        """The gates (N, C), each in 0 to 1, of the means (N, C)."""
        raise NotImplementedError(f"{type(self).__name__} must define gate()")

    def forward(self, x: Tensor) -> Tensor:
        check_map(x, self.channels)
        return rescale(x, self.gate(pool(x)))


class BandAttention(ChannelAttention):
    """A gate that is the sigmoid of a band matrix times the means: one fused operation.

    The matrix has k taps in each row, so SE-Var1, SE-Var2, ECA-NS and ECA are all of this kind
    (Wang et al., "ECA-Net", CVPR 2020, equations 5 to 9), and run on the kernels of eca().

    Args:
        channels: C, from 1 up.
        padding_mode: "zeros", or "circular" to wrap around at the first and last channel.
        fused: False computes in plain PyTorch, with the same parameters.
        backend: "auto", "native", "triton" or "reference", see eca_fused.eca().

    Shape, raises: as ChannelAttention, and as eca().
    """

    def __init__(
        self,
        channels: int,
        *,
        padding_mode: str = "zeros",
        fused: bool = True,
        backend: str = "auto",
    ) -> None:
        super().__init__(channels)
        check_padding_mode(padding_mode)
        check_backend(backend)
        self.padding_mode = padding_mode
        self.fused = fused
        self.backend = backend

    def taps(self) -> Tensor:
        """The band, (1, 1, k) or (C, 1, k)."""
        raise NotImplementedError(f"{type(self).__name__} must define taps()")

    def gate(self, mean: Tensor) -> Tensor:
        taps = self.taps()
        rows = reference.convolve(mean.to(taps.dtype), taps, self.padding_mode)
        return torch.sigmoid(rows).to(mean.dtype)

    def forward(self, x: Tensor) -> Tensor:
        check_map(x, self.channels)
        backend = self.backend if self.fused else "reference"
        return eca(x, self.taps(), padding_mode=self.padding_mode, backend=backend)

    def extra_repr(self) -> str:
        return (
            f"channels={self.channels}, kernel_size={self.taps().shape[-1]}, "
            f"padding_mode={self.padding_mode!r}, fused={self.fused}, backend={self.backend!r}"
        )
