"""What eca() accepts, in one place, with messages that say what to do."""

import torch
from torch import Tensor

DTYPES = (torch.float32, torch.float64, torch.float16, torch.bfloat16)
PADDING_MODES = ("zeros", "circular")
MAX_SPATIAL_DIMS = 3


def check_padding_mode(padding_mode: str) -> None:
    """Raise ValueError unless padding_mode is "zeros" or "circular"."""
    if padding_mode not in PADDING_MODES:
        raise ValueError(f"expected padding_mode 'zeros' or 'circular', got {padding_mode!r}")


def check_channels(channels: int) -> None:
    """Raise TypeError or ValueError unless channels is an int from 1 up."""
    if isinstance(channels, bool) or not isinstance(channels, int):
        raise TypeError(f"expected channels as an int, got {channels!r}")
    if channels < 1:
        raise ValueError(f"expected channels from 1 up, got {channels}; give the C of x")


def check_map(x: Tensor, channels: int, spatial: tuple[int, ...] = (0, 1, 2, 3)) -> None:
    """Raise TypeError or ValueError unless x is a map of so many channels and spatial dimensions.

    For the methods in plain PyTorch, which would broadcast a map that does not fit.
    """
    if not isinstance(x, Tensor):
        raise TypeError(f"expected x as a torch.Tensor, got {type(x).__name__}")
    if x.dim() - 2 not in spatial or x.shape[1] != channels:
        dims = str(spatial[0]) if len(spatial) == 1 else f"{spatial[0]} to {spatial[-1]}"
        raise ValueError(
            f"expected x of shape (N, {channels}, *spatial) with {dims} spatial dimensions, got "
            f"{tuple(x.shape)}; build the layer for the channels of x, or reshape x"
        )


def check_kernel_size(k: int) -> None:
    """Raise TypeError or ValueError unless k is an odd int from 1 up."""
    if isinstance(k, bool) or not isinstance(k, int):
        raise TypeError(f"expected kernel_size as an int, got {k!r}")
    if k < 1 or k % 2 == 0:
        raise ValueError(
            f"expected an odd kernel_size from 1 up, got {k}: the kernel is centred on its "
            f"channel, so use {max(k - 1, 1)} or {max(k + 1, 1)}"
        )


def check(x: Tensor, weight: Tensor, padding_mode: str) -> None:
    """Check the arguments of eca().

    Raises:
        TypeError: x or weight is no tensor, or has an unsupported dtype.
        ValueError: a shape, the padding mode or the device of the taps does not fit.
    """
    check_padding_mode(padding_mode)
    for name, tensor in (("x", x), ("weight", weight)):
        if not isinstance(tensor, Tensor):
            raise TypeError(f"expected {name} as a torch.Tensor, got {type(tensor).__name__}")
        if tensor.layout != torch.strided:
            raise TypeError(
                f"expected {name} as a dense tensor, got layout {tensor.layout}; use to_dense()"
            )
    if not 2 <= x.dim() <= 2 + MAX_SPATIAL_DIMS:
        raise ValueError(
            f"expected x of shape (N, C, *spatial) with 0 to {MAX_SPATIAL_DIMS} spatial "
            f"dimensions, got {tuple(x.shape)}; add or merge dimensions with reshape()"
        )
    if x.dtype not in DTYPES:
        raise TypeError(
            "expected x of dtype float32, float64, float16 or bfloat16, "
            f"got {x.dtype}; convert it, for example with x.float()"
        )
    channels = x.shape[1]
    if weight.dim() != 3 or weight.shape[1] != 1 or weight.shape[0] not in (1, channels):
        raise ValueError(
            f"expected taps of shape (1, 1, k), or (C, 1, k) = ({channels}, 1, k) for taps of each "
            f"channel's own, got {tuple(weight.shape)}; bring them to one of these with reshape()"
        )
    k = weight.shape[2]
    if k % 2 == 0:
        raise ValueError(
            f"expected an odd number of taps k, got {k} in a weight of shape "
            f"{tuple(weight.shape)}: the kernel is centred on its channel; use {k + 1}"
        )
    if weight.dtype not in (torch.float32, x.dtype):
        own = "" if x.dtype == torch.float32 else f" or {x.dtype}, the dtype of x"
        raise TypeError(
            f"expected taps of dtype torch.float32{own}, got {weight.dtype}; "
            "convert them, for example with layer.to(x.dtype)"
        )
    if weight.device != x.device:
        raise ValueError(
            f"expected the taps on the device of x, {x.device}, got {weight.device}; "
            "move them, for example with layer.to(x.device)"
        )
    if padding_mode == "circular" and k // 2 > channels:
        raise ValueError(
            f"circular padding would wrap around more than once: k = {k} needs {k // 2} channels "
            f"or more, x has {channels}; use fewer taps or padding_mode='zeros'"
        )
