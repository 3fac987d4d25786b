"""The base classes of the methods: pooling, a gate for each channel, rescaling."""

import torch
from torch import Tensor, nn

from eca_fused import reference
from eca_fused.functional import (
    eca,
    linked_pool,
    linked_rescale,
    plain,
    plain_pool,
    plain_rescale,
    pool,
    rescale,
)
from eca_fused.ops.backend import check_backend
from eca_fused.ops.checks import check_channels, check_map, is_circular
from eca_fused.torch_state import is_scripting, own_parameters

__all__ = ["BandAttention", "ChannelAttention", "pool", "rescale", "size_of"]


def size_of(part: nn.Module, dim: int, otherwise: int) -> int:
    """A size of a layer's weight; `otherwise` if that is not such a tensor, as in a wrapper."""
    weight = own_parameters(part).get("weight")  # getattr() takes six times as long
    if weight is None:
        weight = getattr(part, "weight", None)
    return weight.shape[dim] if isinstance(weight, Tensor) and weight.dim() > dim else otherwise


class ChannelAttention(nn.Module):
    """y = gate(mean(x)) * x, with one gate for each sample and channel.

    A method overrides gate(). Pooling and rescaling are shared and fused, see eca_fused.pool() and
    eca_fused.rescale().

    Args:
        channels: C, from 1 up.
        fused: False computes in plain PyTorch, with the same parameters.
        backend: "auto", "native", "triton" or "reference", see eca_fused.eca().

    Shape:
        x (N, C, *spatial), 0 to 3 spatial dimensions; the same shape and dtype out.

    Raises:
        TypeError: channels is not an int, or x is not a tensor.
        ValueError: channels < 1, an unknown backend, or x has another number of channels or too
            many dimensions.
    """

    # With fused=False as a constant, TorchScript leaves out the compiled operators.
    __constants__ = ("fused",)

    def __init__(self, channels: int, *, fused: bool = True, backend: str = "auto") -> None:
        super().__init__()
        check_channels(channels)
        check_backend(backend)
        self.channels = channels
        self.fused = fused
        self.backend = backend

    def width(self) -> int:
        """The number of channels of the gate's weights, which pruning may change; 0 for any."""
        return 0

    def extra_repr(self) -> str:
        channels = self.width() or self.channels
        return f"channels={channels}, fused={self.fused}, backend={self.backend!r}"

    def gate(self, mean: Tensor) -> Tensor:
        """The gates (N, C), each from 0 to 1, for the means (N, C)."""
        raise NotImplementedError(f"{type(self).__name__} must define gate()")

    def by_gate(self, x: Tensor) -> Tensor:
        """gate(mean(x)) * x, in two passes over x."""
        if not self.fused:
            return plain_rescale(x, self.gate(plain_pool(x)))
        mean, token = linked_pool(x, self.backend)
        return linked_rescale(x, self.gate(mean), token, self.backend)

    def forward(self, x: Tensor) -> Tensor:
        check_map(x, self.width())
        return self.by_gate(x)


class BandAttention(ChannelAttention):
    """A gate that is the sigmoid of a band matrix times the means: one fused operation.

    The matrix has k taps in each row. SE-Var1, SE-Var2, ECA-NS and ECA are of this kind (Wang et
    al., "ECA-Net", CVPR 2020, equations 5 to 9) and run on the kernels of eca().

    Args:
        channels: C, from 1 up.
        padding_mode: "zeros", or "circular" to wrap around at the first and last channel.
        fused: False computes in plain PyTorch, with the same parameters.
        backend: "auto", "native", "triton" or "reference", see eca_fused.eca().

    Shape, raises: as for ChannelAttention and eca().
    """

    def __init__(
        self,
        channels: int,
        *,
        padding_mode: str = "zeros",
        fused: bool = True,
        backend: str = "auto",
    ) -> None:
        super().__init__(channels, fused=fused, backend=backend)
        is_circular(padding_mode)  # raises for others
        self.padding_mode = padding_mode

    def taps(self) -> Tensor:
        """The band, (1, 1, k) or (C, 1, k)."""
        raise NotImplementedError(f"{type(self).__name__} must define taps()")

    def gate(self, mean: Tensor) -> Tensor:
        taps = self.taps()
        rows = reference.convolve(mean.to(taps.dtype), taps, self.padding_mode)
        return torch.sigmoid(rows).to(mean.dtype)

    def has_taps(self) -> bool:
        """Whether taps() alone defines the gate, without hooks or a replaced module."""
        return True

    def __prepare_scriptable__(self) -> nn.Module:
        """Called by torch.jit.script, which would use the taps alone and ignore the rest."""
        if not self.has_taps():
            raise RuntimeError(
                "expected a convolution without hooks or bias for torch.jit.script, got "
                f"{type(self).__name__} with one that has them; call torch.jit.trace instead"
            )
        return self

    def forward(self, x: Tensor) -> Tensor:
        check_map(x, self.width())
        # TorchScript compiles both sides of an "and".
        if not is_scripting():  # noqa: SIM102
            if not self.has_taps():
                return self.by_gate(x)
        if not self.fused:
            return plain(x, self.taps(), self.padding_mode, False)
        return eca(x, self.taps(), padding_mode=self.padding_mode, backend=self.backend)

    def extra_repr(self) -> str:
        return (
            f"channels={self.width() or self.channels}, kernel_size={self.taps().shape[-1]}, "
            f"padding_mode={self.padding_mode!r}, fused={self.fused}, backend={self.backend!r}"
        )
