"""What eca() accepts, in one place, with messages that say what to do."""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.overrides import has_torch_function

from eca_fused.ops.results import sums_dtype
from eca_fused.torch_state import is_tracing

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


def check_map(x: Tensor, channels: int, spatial: int | None = None) -> None:
    """Raise TypeError or ValueError unless x is a map of so many channels and spatial dimensions.

    For gates of so many channels, whose network would give an error of its own, or broadcast. None
    is any number of spatial dimensions from 0 to 3.
    """
    if is_tracing():  # by torch.jit.trace, which would record none of this, and warns of it
        return
    if not isinstance(x, Tensor):
        if has_torch_function((x,)):  # a proxy of torch.fx, which has no shape yet
            return
        raise TypeError(f"expected x as a torch.Tensor, got {type(x).__name__}")
    least, most = (0, MAX_SPATIAL_DIMS) if spatial is None else (spatial, spatial)
    if not least <= x.dim() - 2 <= most or x.shape[1] != channels:
        dims = f"{least}" if least == most else f"{least} to {most}"
        raise ValueError(
            f"expected x of shape (N, {channels}, *spatial) with {dims} spatial dimensions, got "
            f"{tuple(x.shape)}; build the layer for the channels of x, or reshape x"
        )


def _scripted_check_map() -> Callable[..., None]:
    from eca_fused.functional import torchscript as scripting

    return scripting.check_map


check_map.__prepare_scriptable__ = _scripted_check_map  # type: ignore[attr-defined]


def check_kernel_size(k: int) -> None:
    """Raise TypeError or ValueError unless k is an odd int from 1 up."""
    if isinstance(k, bool) or not isinstance(k, int):
        raise TypeError(f"expected kernel_size as an int, got {k!r}")
    if k < 1 or k % 2 == 0:
        raise ValueError(
            f"expected an odd kernel_size from 1 up, got {k}: the kernel is centred on its "
            f"channel, so use {max(k - 1, 1)} or {max(k + 1, 1)}"
        )


def _check_tensor(name: str, tensor: Tensor) -> None:
    if not isinstance(tensor, Tensor):
        raise TypeError(f"expected {name} as a torch.Tensor, got {type(tensor).__name__}")
    if tensor.layout != torch.strided:
        raise TypeError(
            f"expected {name} as a dense tensor, got layout {tensor.layout}; use to_dense()"
        )


def _check_floating(name: str, tensor: Tensor) -> None:
    if tensor.dtype not in DTYPES:
        raise TypeError(
            f"expected {name} of dtype float32, float64, float16 or bfloat16, "
            f"got {tensor.dtype}; convert it, for example with {name}.float()"
        )


def _check_dims(x: Tensor) -> None:
    if not 2 <= x.dim() <= 2 + MAX_SPATIAL_DIMS:
        raise ValueError(
            f"expected x of shape (N, C, *spatial) with 0 to {MAX_SPATIAL_DIMS} spatial "
            f"dimensions, got {tuple(x.shape)}; add or merge dimensions with reshape()"
        )


def check_x(x: Tensor) -> None:
    """Check the argument of pool().

    Raises:
        TypeError: x is no tensor, or has an unsupported dtype.
        ValueError: it has no shape of a map.
    """
    _check_tensor("x", x)
    _check_dims(x)
    _check_floating("x", x)


def check_gate(x: Tensor, gate: Tensor, shift: Tensor | None = None) -> None:
    """Check the arguments of rescale().

    Raises:
        TypeError: x, gate or shift is no tensor, or has an unsupported dtype.
        ValueError: a shape or the device of the gate or the shift does not fit.
    """
    check_x(x)
    given = {"gate": gate} if shift is None else {"gate": gate, "shift": shift}
    for name, t in given.items():
        _check_tensor(name, t)
        if t.shape != x.shape[:2]:
            raise ValueError(
                f"expected a {name} of shape (N, C) = {tuple(x.shape[:2])} for x "
                f"{tuple(x.shape)}, got {tuple(t.shape)}; bring it to that with flatten(1) or "
                "expand()"
            )
        _check_floating(name, t)
        if t.device != x.device:
            raise ValueError(
                f"expected the {name} on the device of x, {x.device}, got {t.device}; "
                f"move it with {name}.to(x.device)"
            )


def _check_same(name: str, t: Tensor, x: Tensor, dims: int, dtype: torch.dtype) -> None:
    if t.shape != x.shape[:dims] or t.dtype != dtype or t.device != x.device:
        raise ValueError(
            f"expected {name} of shape {tuple(x.shape[:dims])}, {dtype}, on {x.device}, "
            f"got {tuple(t.shape)}, {t.dtype}, on {t.device}"
        )


def check_dy(x: Tensor, dy: Tensor) -> None:
    """Raise ValueError unless dy has the shape, the dtype and the device of x."""
    _check_same("dy", dy, x, x.dim(), x.dtype)


def check_kept(x: Tensor, mean: Tensor, gate: Tensor) -> None:
    """Raise ValueError unless mean and gate are what a forward pass of x keeps: (N, C)."""
    _check_same("mean", mean, x, 2, sums_dtype(x))
    _check_same("gate", gate, x, 2, sums_dtype(x))


def check_out(x: Tensor, out: Tensor) -> None:
    """Check the memory for a result that is like x.

    Raises:
        TypeError: out is no tensor, or has not the dtype of x.
        ValueError: it has not the shape of x, or is on another device.
    """
    _check_tensor("out", out)
    found, wanted = ((tuple(t.shape), t.device) for t in (out, x))
    if found != wanted:
        raise ValueError(
            f"expected out of the shape and on the device of x, {wanted[0]} on {wanted[1]}, got "
            f"{found[0]} on {found[1]}; make it with torch.empty_like(x)"
        )
    if out.dtype != x.dtype:
        raise TypeError(
            f"expected out of {x.dtype}, the dtype of x, got {out.dtype}; "
            "make it with torch.empty_like(x)"
        )


def check(x: Tensor, weight: Tensor, padding_mode: str) -> None:
    """Check the arguments of eca().

    Raises:
        TypeError: x or weight is no tensor, or has an unsupported dtype.
        ValueError: a shape, the padding mode or the device of the taps does not fit.
    """
    check_padding_mode(padding_mode)
    _check_tensor("x", x)
    _check_tensor("weight", weight)
    _check_dims(x)
    _check_floating("x", x)
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
