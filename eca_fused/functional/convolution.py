"""Whether a layer's convolution does no more than apply its taps; attention that calls it if not.

The kernels take the taps alone. Some features take effect only if the convolution is called: hooks,
a wrapper such as LoRA's, a bias, a dilation, weights made in a hook (spectral norm, pruning), and
weights that are elsewhere until the call (sharded or offloaded).
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrize import is_parametrized

from eca_fused.functional import linked_pool, linked_rescale
from eca_fused.ops.checks import autocasts, check_overwrites, is_circular, wrong_taps_dtype
from eca_fused.torch_state import (
    does_more,
    is_tracing,
    overrides_torch,
    own_parameters,
)

__all__ = ["as_it_takes", "by_calling", "plain_taps"]


def plain_taps(conv: Any, own: bool, padded: bool) -> Tensor | None:
    """The taps of a convolution that only applies them; None if it does more and must be called.

    Args:
        conv: a layer's convolution, or a module that replaced it.
        own: accept separate taps per channel, in as many groups; else only shared taps.
        padded: accept padding that keeps the length; else only no padding.

    Returns:
        Its weight, plain or parametrized.
    """
    kind = type(conv)
    # A parametrized module has a class of its own, derived from the original one.
    if kind is not nn.Conv1d and not (kind.__bases__ == (nn.Conv1d,) and is_parametrized(conv)):
        return None
    if (
        does_more(conv)
        or not (own or conv.groups == 1)
        or not conv.in_channels == conv.out_channels == conv.groups
        or conv.stride != (1,)
        or conv.dilation != (1,)
        or conv.padding_mode != "zeros"
    ):
        return None
    if conv.padding != (0,) and not (padded and conv.padding == (conv.kernel_size[0] // 2,)):
        return None
    if kind is nn.Conv1d:
        parameters = own_parameters(conv)
        weight, bias = parameters.get("weight"), parameters.get("bias")
    else:
        weight, bias = conv.weight, conv.bias
    if weight is None or bias is not None:
        return None
    if type(weight) is not nn.Parameter and (
        hasattr(weight, "__tensor_flatten__") or overrides_torch(weight)
    ):
        return None
    return weight  # type: ignore[no-any-return]


def as_it_takes(conv: nn.Module, mean: Tensor) -> Tensor:
    """The means in the dtype of the weights, which may stay in float32 for a half precision x.

    Raises:
        TypeError: the weights have another dtype, and autocast is off.
    """
    for t in (getattr(conv, "weight", None), *conv.parameters()):
        if isinstance(t, Tensor) and t.is_floating_point():
            if t.dtype not in (torch.float32, mean.dtype) and not autocasts(mean):
                raise TypeError(wrong_taps_dtype(mean, t))
            return mean.to(t.dtype)
    return mean


def _pads(conv: Any) -> bool:
    """Whether the means must be padded, because conv does not pad, as in timm's CecaModule."""
    return getattr(conv, "padding", None) in ((0,), 0) and getattr(conv, "kernel_size", 1) != (1,)


def _around(mean: Tensor, circular: bool, pads: bool) -> Tensor:
    """The means (N, C) as (N, 1, C), or as (N, 1, 3 C) with enough padding for any tap."""
    if circular:
        return torch.cat([mean, mean, mean], 1).unsqueeze(1)
    if pads:
        zeros = torch.zeros_like(mean)
        return torch.cat([zeros, mean, zeros], 1).unsqueeze(1)
    return mean.unsqueeze(1)


def _own(rows: Tensor, channels: int) -> Tensor:
    """The convolution's result (N, 1, L) without the channels from padding: (N, C)."""
    return rows.squeeze(1).narrow(1, (rows.shape[2] - channels) // 2, channels)


def _rows(conv: nn.Module, mean: Tensor, circular: bool) -> Tensor:
    given = _around(as_it_takes(conv, mean), circular, _pads(conv))
    found = conv(given)
    channels = mean.shape[1]
    if isinstance(found, Tensor) and not is_tracing():  # not of a proxy of torch.fx
        lost = given.shape[2] - found.shape[2] if found.dim() == 3 else -1
        if (
            found.shape[:2] != given.shape[:2]
            or lost % 2
            or not 0 <= lost <= given.shape[2] - channels
        ):
            raise ValueError(
                f"expected the layer's convolution, {type(conv).__name__}, to return "
                f"{tuple(given.shape)} for that shape, got {tuple(found.shape)}; give it one "
                "channel in and out, stride 1 and padding that keeps the length"
            )
    return _own(found, channels)


def by_calling(
    x: Tensor, conv: nn.Module, padding_mode: str, backend: str, inplace: bool
) -> Tensor:
    """Attention that calls a convolution to make its gate: two passes over x instead of one.

    Args as for ECALayer.

    Raises:
        RuntimeError: inplace, where a gradient would need the x that is overwritten.
        ValueError: the convolution does not keep the length, or makes more than one channel.
    """
    mean, token = linked_pool(x, backend)
    gate = torch.sigmoid(_rows(conv, mean, is_circular(padding_mode)))
    if inplace:
        check_overwrites(x, gate)
    y = linked_rescale(x, gate, token, backend)
    if not inplace:
        return y
    x.copy_(y)
    return x
