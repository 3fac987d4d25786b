"""What the operations accept, in one place, with messages that say what to do.

torch.jit.script compiles check(), check_map() and what they call. It understands only a part of
Python: no module constants, no tensor types and no names of dtypes.
"""

import torch
from torch import Tensor
from torch.overrides import has_torch_function

from eca_fused.ops.results import sums_dtype
from eca_fused.torch_state import is_scripting, is_tracing

DTYPES = (torch.float32, torch.float64, torch.float16, torch.bfloat16)
PADDING_MODES = ("zeros", "circular")
ACTIVATIONS = ("none", "relu", "silu", "gelu")  # their order is that of csrc/eca.h
MAX_SPATIAL_DIMS = 3


# ---- options ----


def is_circular(padding_mode: str) -> bool:
    """Whether the taps wrap around; ValueError unless padding_mode is "zeros" or "circular"."""
    if padding_mode == "zeros":
        return False
    if padding_mode != "circular":
        raise ValueError(f"expected padding_mode 'zeros' or 'circular', got '{padding_mode}'")
    return True


def check_activation(activation: str) -> None:
    """Raise ValueError unless activation is one of ACTIVATIONS."""
    if activation not in ACTIVATIONS:
        raise ValueError(
            f"expected activation as one of {', '.join(ACTIVATIONS)}, got {activation!r}"
        )


def check_channels(channels: int) -> None:
    """Raise TypeError or ValueError unless channels is an int from 1 up."""
    if isinstance(channels, bool) or not isinstance(channels, int):
        raise TypeError(f"expected channels as an int, got {channels!r}")
    if channels < 1:
        raise ValueError(
            f"expected channels from 1 up, got {channels}; give the number of channels of x"
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


def check_wraps_once(channels: int, k: int, circular: bool) -> None:
    """Raise ValueError if circular padding would wrap around more than once."""
    if circular and k // 2 > channels:
        raise ValueError(
            f"circular padding would wrap around more than once: k = {k} needs {k // 2} channels "
            f"or more, x has {channels}; use fewer taps or padding_mode='zeros'"
        )


# ---- tensors ----


def check_tensor(name: str, tensor: Tensor) -> None:
    """Raise TypeError unless it is a dense torch.Tensor."""
    if not is_scripting():
        if not isinstance(tensor, Tensor):
            raise TypeError(f"expected {name} as a torch.Tensor, got {type(tensor).__name__}")
        if tensor.layout != torch.strided:
            raise TypeError(
                f"expected {name} as a dense tensor, got layout {tensor.layout}; use to_dense()"
            )


def _shape(t: Tensor) -> str:
    if is_scripting():
        return f"{t.shape}"
    return f"{tuple(t.shape)}"


def _dtype(t: Tensor) -> str:
    if is_scripting():
        return f"dtype number {t.dtype}"
    return f"{t.dtype}"


def _check_floating(name: str, tensor: Tensor) -> None:
    if tensor.dtype not in [torch.float32, torch.float64, torch.float16, torch.bfloat16]:
        raise TypeError(
            f"expected {name} of dtype float32, float64, float16 or bfloat16, "
            f"got {_dtype(tensor)}; convert it, for example with {name}.float()"
        )


def check_x(x: Tensor) -> None:
    """Check the argument of pool().

    Raises:
        TypeError: x is not a tensor, or has an unsupported dtype.
        ValueError: x is not of shape (N, C, *spatial).
    """
    check_tensor("x", x)
    if x.dim() < 2 or x.dim() > 5:
        raise ValueError(
            "expected x of shape (N, C, *spatial) with 0 to 3 spatial dimensions, got "
            f"{_shape(x)}; add or merge dimensions with reshape()"
        )
    _check_floating("x", x)


def autocasts(x: Tensor) -> bool:
    """Whether autocast is on for x: then a convolution takes weights of another dtype."""
    return torch.is_autocast_enabled(x.device.type)


def wrong_taps_dtype(x: Tensor, weight: Tensor) -> str:
    """The error message for taps that are neither float32 nor of the dtype of x."""
    own = "" if x.dtype == torch.float32 else f" or {_dtype(x)}, the dtype of x"
    return (
        f"expected taps of dtype torch.float32{own}, got {_dtype(weight)}; "
        "convert them, for example with layer.to(x.dtype)"
    )


def check(x: Tensor, weight: Tensor, circular: bool) -> None:
    """Check the arguments of eca().

    Raises:
        TypeError: x or weight is not a tensor, or has an unsupported dtype.
        ValueError: a shape or the device of the taps does not fit.
    """
    check_tensor("x", x)
    check_tensor("weight", weight)
    check_x(x)
    channels = x.shape[1]
    if weight.dim() != 3 or weight.shape[1] != 1 or weight.shape[0] not in [1, channels]:
        raise ValueError(
            f"expected taps of shape (1, 1, k), or (C, 1, k) = ({channels}, 1, k) for separate "
            f"taps per channel, got {_shape(weight)}; bring them to one of these with reshape()"
        )
    k = weight.shape[2]
    if k % 2 == 0:
        raise ValueError(
            f"expected an odd number of taps k, got {k} in a weight of shape {_shape(weight)}: "
            f"the kernel is centred on its channel; use {k + 1}"
        )
    if weight.dtype not in [torch.float32, x.dtype]:
        raise TypeError(wrong_taps_dtype(x, weight))
    if weight.device != x.device:
        raise ValueError(
            f"expected the taps on the device of x, {x.device}, got {weight.device}; "
            "move them, for example with layer.to(x.device)"
        )
    check_wraps_once(channels, k, circular)


def check_gate(x: Tensor, gate: Tensor, shift: Tensor | None = None) -> None:
    """Check the arguments of rescale().

    Raises:
        TypeError: x, gate or shift is not a tensor, or has an unsupported dtype.
        ValueError: a shape or the device of the gate or the shift does not fit.
    """
    check_x(x)
    given = {"gate": gate} if shift is None else {"gate": gate, "shift": shift}
    for name, t in given.items():
        check_tensor(name, t)
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


def alike(a: Tensor, b: Tensor) -> bool:
    """Whether two maps have the same shape, dtype and device, as x and identity of a tail must."""
    return a.shape == b.shape and a.dtype == b.dtype and a.device == b.device


def check_identity(x: Tensor, identity: Tensor) -> None:
    """Raise TypeError or ValueError unless the identity has the shape, dtype and device of x."""
    check_tensor("identity", identity)
    if identity.shape != x.shape or identity.device != x.device:
        raise ValueError(
            f"expected identity of the shape and on the device of x, {_shape(x)} on {x.device}, "
            f"got {_shape(identity)} on {identity.device}; bring it to that, as a block's "
            "downsampling does"
        )
    if identity.dtype != x.dtype:
        raise TypeError(
            f"expected identity of {_dtype(x)}, the dtype of x, got {_dtype(identity)}; "
            "convert it with identity.to(x.dtype)"
        )


def check_tail(
    x: Tensor,
    identity: Tensor | None,
    weight: Tensor | None,
    gate: Tensor | None,
    scale: Tensor | None,
    circular: bool,
) -> None:
    """Check the tensors of residual_tail().

    Raises:
        TypeError: one of them is not a tensor, or has an unsupported dtype.
        ValueError: a shape or a device does not fit, or there are both taps and gates.
    """
    check_x(x)
    if identity is not None:
        check_identity(x, identity)
    if weight is not None and gate is not None:
        raise ValueError(
            "expected taps or gates, got both; leave out weight= where the gates are given"
        )
    if weight is not None:
        check(x, weight, circular)
    if gate is not None:
        check_gate(x, gate)
    if scale is not None:
        check_tensor("scale", scale)
        _check_floating("scale", scale)
        if scale.shape != x.shape[:1] or scale.device != x.device:
            raise ValueError(
                f"expected scale of shape (N,) = ({x.shape[0]},) on the device of x, {x.device}, "
                f"or a number, got {_shape(scale)} on {scale.device}; bring it to that with "
                "flatten()"
            )


def check_map(x: Tensor, channels: int, spatial: int | None = None) -> None:
    """Raise TypeError or ValueError unless x has these numbers of channels and spatial dimensions.

    For gates built for a number of channels: their network would raise an unrelated error, or
    broadcast. channels=0 accepts any number, spatial=None accepts 0 to 3 dimensions.
    """
    if not is_scripting():
        if is_tracing():  # torch.jit.trace would record none of this, and warn about it
            return
        if not isinstance(x, Tensor):
            if has_torch_function((x,)):  # a proxy of torch.fx, which has no shape yet
                return
            raise TypeError(f"expected x as a torch.Tensor, got {type(x).__name__}")
    least, most = 0, 3
    if spatial is not None:
        least, most = spatial, spatial
    if x.dim() - 2 < least or x.dim() - 2 > most or (channels > 0 and x.shape[1] != channels):
        wide = f"{channels}" if channels > 0 else "C"
        dims = f"{least}" if least == most else f"{least} to {most}"
        raise ValueError(
            f"expected x of shape (N, {wide}, *spatial) with {dims} spatial dimensions, got "
            f"{_shape(x)}; build the layer for the channels of x, or reshape x"
        )


def check_out(x: Tensor, out: Tensor) -> None:
    """Check the preallocated output for a result like x.

    Raises:
        TypeError: out is not a tensor, or does not have the dtype of x.
        ValueError: out does not have the shape of x, or is on another device.
    """
    check_tensor("out", out)
    if out.shape != x.shape or out.device != x.device:
        raise ValueError(
            f"expected out of the shape and on the device of x, {_shape(x)} on {x.device}, got "
            f"{_shape(out)} on {out.device}; make it with torch.empty_like(x)"
        )
    if out.dtype != x.dtype:
        raise TypeError(
            f"expected out of {_dtype(x)}, the dtype of x, got {_dtype(out)}; "
            "make it with torch.empty_like(x)"
        )


def _check_same(
    name: str, t: Tensor, x: Tensor, dims: int, dtype: torch.dtype, advice: str
) -> None:
    check_tensor(name, t)
    if t.shape != x.shape[:dims] or t.dtype != dtype or t.device != x.device:
        raise ValueError(
            f"expected {name} of shape {tuple(x.shape[:dims])}, {dtype}, on {x.device}, "
            f"got {tuple(t.shape)}, {t.dtype}, on {t.device}; {advice}"
        )


def check_dy(x: Tensor, dy: Tensor) -> None:
    """Raise ValueError unless dy has the shape, the dtype and the device of x."""
    _check_same("dy", dy, x, x.dim(), x.dtype, "the gradient of a result is like the result")


def check_saved(x: Tensor, mean: Tensor, gate: Tensor) -> None:
    """Raise ValueError unless mean and gate are (N, C) as a forward pass of x saves them."""
    advice = "take what the forward operator returned for x"
    _check_same("mean", mean, x, 2, sums_dtype(x), advice)
    _check_same("gate", gate, x, 2, sums_dtype(x), advice)


# ---- gradients ----


def check_writable(name: str, t: Tensor) -> None:
    """Raise RuntimeError if t was made in inference mode and the call is outside of it."""
    if t.is_inference() and not torch.is_inference_mode_enabled():
        raise RuntimeError(
            f"{name} was made in inference mode and cannot be written in place outside of it; "
            f"call this in torch.inference_mode(), or on {name}.clone()"
        )


def needs_grad(x: Tensor, other: Tensor) -> bool:
    """Whether autograd records an operation on these tensors."""
    return torch.is_grad_enabled() and (x.requires_grad or other.requires_grad)


def check_overwrites(x: Tensor, weight: Tensor) -> None:
    """Raise RuntimeError if a gradient would need the x that eca_() overwrites."""
    if needs_grad(x, weight):
        which = "x" if x.requires_grad else "the taps"
        raise RuntimeError(
            f"in-place ECA would overwrite the x that the gradient of {which} needs; "
            "use inplace=False, or torch.no_grad() for inference"
        )


def check_no_gradient(x: Tensor, weight: Tensor, out: Tensor) -> None:
    """Raise RuntimeError if the result written into out would need a gradient."""
    if needs_grad(x, weight) or (torch.is_grad_enabled() and out.requires_grad):
        raise RuntimeError(
            "what eca() writes into out= has no gradient; leave out= away, or call this in "
            "torch.no_grad()"
        )
