"""Channel attention methods by name: ECA, the methods ECA-Net compares it with, and none.

All have one interface: built for a number of channels, map in, map of the same shape out.

>>> import torch
>>> from eca_fused import attention
>>> attention.make("se", 64)(torch.randn(2, 64, 7, 7)).shape
torch.Size([2, 64, 7, 7])
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from eca_fused.attention.base import BandAttention, ChannelAttention, pool, rescale
from eca_fused.attention.channel import ECANS, SE, SEGroups, SEVar1, SEVar2
from eca_fused.attention.comparators import CBAM, GSoP
from eca_fused.attention.variant import ECAVariant
from eca_fused.layer import ECALayer
from eca_fused.ops.checks import check_channels

__all__ = [
    "CBAM",
    "ECANS",
    "METHODS",
    "SE",
    "BandAttention",
    "ChannelAttention",
    "ECALayer",
    "ECAVariant",
    "GSoP",
    "Method",
    "SEGroups",
    "SEVar1",
    "SEVar2",
    "make",
    "method",
    "pool",
    "rescale",
]


@dataclass(frozen=True)
class Method:
    """A row of METHODS.

    Args:
        title: as the papers write it.
        build: makes the module from channels and keyword options.
        key: the name of the module in the blocks of a network, and so in state dicts.
        fused: has the options fused and backend. SE-Var1, SE-Var2, ECA-NS and ECA run as one fused
            operation; the others use the kernels' pooling and rescaling.
        sized: has the option kernel_size.
    """

    title: str
    build: Callable[..., nn.Module]
    key: str = "se"
    fused: bool = True
    sized: bool = False


def _none(
    channels: int,
    *,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
) -> nn.Module:
    check_channels(channels)
    return nn.Identity()


def _var3(channels: int, **options: Any) -> nn.Module:
    return SEGroups(channels, 1, **options)


def _gc1(channels: int, **options: Any) -> nn.Module:
    return SEGroups(channels, 16, **options)


def _gc2(channels: int, **options: Any) -> nn.Module:
    return _groups_of(16, channels, options)


def _gc3(channels: int, **options: Any) -> nn.Module:
    return _groups_of(8, channels, options)


def _groups_of(size: int, channels: int, options: dict[str, Any]) -> nn.Module:
    check_channels(channels)
    if channels % size:
        raise ValueError(
            f"expected channels as a multiple of {size}, for groups of {size}, got {channels}"
        )
    return SEGroups(channels, channels // size, **options)


METHODS = {
    "none": Method("Vanilla", _none, key="attention", fused=False),
    "se": Method("SE", SE),
    "se_var1": Method("SE-Var1", SEVar1),
    "se_var2": Method("SE-Var2", SEVar2),
    "se_var3": Method("SE-Var3", _var3),
    "se_gc1": Method("SE-GC1", _gc1),
    "se_gc2": Method("SE-GC2", _gc2),
    "se_gc3": Method("SE-GC3", _gc3),
    "eca_ns": Method("ECA-NS", ECANS, key="eca", sized=True),
    "eca": Method("ECA", ECALayer, key="eca", sized=True),
    "cbam": Method("CBAM", CBAM, key="cbam"),
    "gsop": Method("GSoP", GSoP, key="gsop"),
}


def method(name: str) -> Method:
    """The method with a name.

    Raises:
        ValueError: unknown name; the message lists the known ones.
    """
    if name not in METHODS:
        raise ValueError(f"expected attention as one of {', '.join(METHODS)}, got {name!r}")
    return METHODS[name]


def make(name: str, channels: int, **options: Any) -> nn.Module:
    """A module of the method with a name.

    Args:
        name: a key of METHODS.
        channels: C of the maps, from 1 up.
        options: of the method's class, such as reduction, kernel_size, backend, device and dtype.

    Returns:
        A module from maps (N, C, *spatial) to maps of the same shape and dtype; CBAM and GSoP need
        two spatial dimensions.

    Raises:
        TypeError: channels is not an int, or the method has no such option.
        ValueError: an unknown name, or a value that does not fit.
    """
    return method(name).build(channels, **options)
