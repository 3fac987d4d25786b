"""How the kernels see a map: rows of consecutive elements, as in csrc/eca.h.

Planes (contiguous): a row is a channel's pixels.
Pixels (channels_last): a row is a pixel's channels.
"""

import math

from torch import Tensor

from eca_fused.ops.results import dense_strides, output_strides
from eca_fused.torch_state import is_fake, same_storage


def in_planes(x: Tensor) -> bool:
    """Whether the rows of eca(x) are planes. With one pixel or one channel, either view fits."""
    if math.prod(x.shape[2:]) == 1:
        return bool(x.stride(1) != 1)
    return bool(x.shape[1] == 1 or output_strides(x)[1] != 1)


def rows(x: Tensor, planes: bool) -> tuple[int, int] | None:
    """Strides of a sample and of a row of x, or None if x cannot be read in place this way."""
    channels, pixels = x.shape[1], math.prod(x.shape[2:])
    step, run = 0, None  # the stride between pixels; the stride that the next dimension must have
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
    """Whether x can be written in place: it has such rows, and they share no memory."""
    strides = rows(x, planes)
    if strides is None:
        return False
    channels, pixels = x.shape[1], math.prod(x.shape[2:])
    count, length = (channels, pixels) if planes else (pixels, channels)
    sample, row = strides
    return (count <= 1 or row >= length) and (
        x.shape[0] <= 1 or sample >= (count - 1) * row + length
    )


def overlap(a: Tensor, b: Tensor) -> bool:
    """Whether the memory ranges of a and b overlap, each from its first to its last element.

    Addresses decide, as two storages can be the same memory (DLPack). Fake tensors have none: for
    them, all views of one storage count as overlapping.
    """
    if is_fake(a) or is_fake(b):
        return same_storage(a, b)
    ranges = []
    for t in (a, b):
        last = sum((size - 1) * stride for size, stride in zip(t.shape, t.stride(), strict=True))
        ranges.append((t.data_ptr(), t.data_ptr() + (last + 1) * t.itemsize))
    return ranges[0][0] < ranges[1][1] and ranges[1][0] < ranges[0][1]


def same_memory(a: Tensor, b: Tensor) -> bool:
    """Whether maps that overlap() are the same elements in the same order."""
    strides = (
        size == 1 or i == j for size, i, j in zip(a.shape, a.stride(), b.stride(), strict=True)
    )
    if is_fake(a) or is_fake(b):
        start = bool(a.storage_offset() == b.storage_offset())
    else:
        start = a.data_ptr() == b.data_ptr()
    return start and all(strides)


def as_dense(x: Tensor, planes: bool) -> Tensor:
    """A dense copy of x in this layout."""
    shape = tuple(x.shape)
    return x.new_empty_strided(shape, dense_strides(shape, not planes)).copy_(x)


def readable(x: Tensor, planes: bool) -> Tensor:
    """x, or a copy of it that can be read in this layout."""
    return as_dense(x, planes) if rows(x, planes) is None else x
