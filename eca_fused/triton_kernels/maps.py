"""How the kernels see a map: rows of consecutive elements, as in csrc/eca.h.

Planes (contiguous): a row is a channel's pixels.
Pixels (channels_last): a row is a pixel's channels.
"""

import math

from torch import Tensor

from eca_fused.layout import dense_strides, output_strides


def in_planes(x: Tensor) -> bool:
    """Whether eca(x) is made of planes; either reading fits where there is one pixel or channel."""
    if math.prod(x.shape[2:]) == 1:
        return bool(x.stride(1) != 1)
    return bool(x.shape[1] == 1 or output_strides(x)[1] != 1)


def rows(x: Tensor, planes: bool) -> tuple[int, int] | None:
    """Strides of a sample and of a row of x, or None where x cannot be read in place this way."""
    channels, pixels = x.shape[1], math.prod(x.shape[2:])
    step, run = 0, None  # between pixels; what the next dimension's stride must be
    for size, stride in zip(reversed(x.shape[2:]), reversed(x.stride()[2:]), strict=True):
        if size == 1:
            continue
        if run is None:
            step = stride
        elif stride != run:
            return None
        run = stride * size
    sample = x.stride(0) if x.shape[0] != 1 else channels * pixels
    if planes:
        if run is not None and step != 1:
            return None
        return sample, x.stride(1) if channels != 1 else pixels
    if channels != 1 and x.stride(1) != 1:
        return None
    return sample, step if run is not None else channels


def apart(x: Tensor, planes: bool) -> bool:
    """Whether x can be written in place: its rows can be read so, and share no memory."""
    strides = rows(x, planes)
    if strides is None:
        return False
    channels, pixels = x.shape[1], math.prod(x.shape[2:])
    count, length = (channels, pixels) if planes else (pixels, channels)
    sample, row = strides
    return (count <= 1 or row >= length) and (
        x.shape[0] <= 1 or sample >= (count - 1) * row + length
    )


def alias(a: Tensor, b: Tensor) -> bool:
    """Whether they are views of one storage; by its identity, as tensors in traces have no data."""
    return bool(a.untyped_storage()._cdata == b.untyped_storage()._cdata)


def same_memory(a: Tensor, b: Tensor) -> bool:
    """Whether maps of one shape are the same elements in the same order."""
    strides = (
        size == 1 or i == j for size, i, j in zip(a.shape, a.stride(), b.stride(), strict=True)
    )
    return alias(a, b) and bool(a.storage_offset() == b.storage_offset()) and all(strides)


def as_dense(x: Tensor, planes: bool) -> Tensor:
    """A dense copy of x in this layout."""
    shape = tuple(x.shape)
    return x.new_empty_strided(shape, dense_strides(shape, not planes)).copy_(x)


def readable(x: Tensor, planes: bool) -> Tensor:
    """x, or a copy of it that can be read in this layout."""
    return as_dense(x, planes) if rows(x, planes) is None else x
