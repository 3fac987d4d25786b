"""Parts that the networks share: convolutions, a block's attention, its kernel size."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from eca_fused import attention
from eca_fused.ops.checks import check_kernel_size
from eca_fused.ops.taps import adaptive_kernel_size
from eca_fused.torch_state import BatchNorm, does_more

__all__ = ["BlockAttention", "before_norm", "block_kernel_sizes", "conv"]


@dataclass(frozen=True)
class BlockAttention:
    """The attention of a network's blocks: a method and its options.

    Args:
        name: of the method, a key of attention.METHODS.
        fused, backend: for methods that run on the fused kernels.
        options: other options of the method, such as reduction.
        device, dtype: of the parameters.

    Raises:
        ValueError: there is no such method.
    """

    name: str
    fused: bool = True
    backend: str = "auto"
    options: Mapping[str, Any] = field(default_factory=dict)
    device: torch.device | str | None = None
    dtype: torch.dtype | None = None

    def __post_init__(self) -> None:
        attention.method(self.name)

    @property
    def key(self) -> str:
        """The name of the module in a block."""
        return attention.METHODS[self.name].key

    def make(self, channels: int, k: int) -> nn.Module:
        """The module for a block with this many channels, with k taps if the method has taps."""
        method = attention.METHODS[self.name]
        given: dict[str, Any] = {"device": self.device, "dtype": self.dtype}
        if method.sized:
            given["kernel_size"] = k
        if method.fused:
            given |= {"fused": self.fused, "backend": self.backend}
        return method.build(channels, **given, **self.options)


def conv(
    channels: int,
    out_channels: int,
    size: int,
    stride: int = 1,
    groups: int = 1,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
) -> nn.Conv2d:
    """A size x size convolution without a bias that keeps height and width at stride 1."""
    return nn.Conv2d(
        channels,
        out_channels,
        size,
        stride=stride,
        padding=size // 2,
        groups=groups,
        bias=False,
        device=device,
        dtype=dtype,
    )


def before_norm(downsample: nn.Module, x: Tensor) -> tuple[Tensor, nn.Module | None]:
    """What a shortcut gives before its batch norm, and that norm, for a tail that computes it.

    A shortcut that does more than call a convolution and then a batch norm is called, without a
    norm left.
    """
    if type(downsample) is nn.Sequential and not does_more(downsample):
        parts: list[nn.Module] = list(downsample)
        if len(parts) == 2 and isinstance(parts[1], BatchNorm):
            return parts[0](x), parts[1]
    return downsample(x), None


def block_kernel_sizes(
    name: str,
    kernel_sizes: str | Sequence[int] | None,
    channels: Sequence[int],
    blocks: Sequence[int],
    example: str,
) -> list[list[int]]:
    """The kernel size of each block's attention, a list for each stage.

    Args:
        name: of the method.
        kernel_sizes: a string of odd digits or odd ints, one for each stage or one for each block;
            None for the adaptive rule, and for methods without a kernel size.
        channels: of each stage's output.
        blocks: their number in each stage.
        example: for messages, a string of kernel sizes.

    Raises:
        TypeError: kernel_sizes is neither a string, a sequence of ints nor None.
        ValueError: their number or one of them does not fit, or the method has none.
    """
    if kernel_sizes is None:
        return [[adaptive_kernel_size(c)] * n for c, n in zip(channels, blocks, strict=True)]
    if not attention.METHODS[name].sized:
        raise ValueError(
            f"expected kernel_sizes None with attention {name!r}, which has no kernel size, "
            f"got {kernel_sizes!r}"
        )
    if not isinstance(kernel_sizes, Sequence):
        number = {4: "four", 7: "seven"}.get(len(blocks), str(len(blocks)))
        raise TypeError(
            f"expected kernel_sizes as a string of {number} odd digits such as {example!r}, as "
            f"{number} ints, one int for each block, or as None, got {kernel_sizes!r}"
        )
    if len(kernel_sizes) not in (len(blocks), sum(blocks)):
        raise ValueError(
            f"expected kernel_sizes for {len(blocks)} stages, such as {example!r} or "
            f"({', '.join(example)}), or for each of {sum(blocks)} blocks, got {kernel_sizes!r}"
        )
    if isinstance(kernel_sizes, str):
        if not all(digit in "13579" for digit in kernel_sizes):
            raise ValueError(
                f"expected a string of kernel_sizes as odd digits such as {example!r}, got "
                f"{kernel_sizes!r}; use a sequence of ints for sizes from 11 up"
            )
        kernel_sizes = [int(digit) for digit in kernel_sizes]
    for size in kernel_sizes:
        check_kernel_size(size)
    if len(kernel_sizes) == len(blocks):
        return [[size] * n for size, n in zip(kernel_sizes, blocks, strict=True)]
    ends = [sum(blocks[: i + 1]) for i in range(len(blocks))]
    return [list(kernel_sizes[end - n : end]) for end, n in zip(ends, blocks, strict=True)]
