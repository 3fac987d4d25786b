"""Layout and dtypes of results, by the rules of csrc/ops.cpp, also for fake tensors."""

import math

import torch
from torch import Tensor


def sums_dtype(x: Tensor) -> torch.dtype:
    """The dtype of sums over x, and of mean and gate: float64 for float64, else float32."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def mask_bytes(x: Tensor, planes: bool) -> int:
    """Bytes of a bit for each element of x (N, C, *spatial), if each row begins with a new byte.

    Args:
        x: the map.
        planes: the rows are planes, else pixels.
    """
    n, c, s = *x.shape[:2], math.prod(x.shape[2:])
    return n * (c * ((s + 7) // 8) if planes else s * ((c + 7) // 8))


def mask_size(x: Tensor) -> int:
    """Bytes of ReLU's mask: enough for either layout, as in csrc/tail_ops.cpp."""
    return max(mask_bytes(x, True), mask_bytes(x, False))


def dense_strides(shape: tuple[int, ...], channels_inside: bool) -> tuple[int, ...]:
    """Strides of a dense tensor of this shape, contiguous or with the channels innermost."""
    strides = [0] * len(shape)
    run = 1
    if channels_inside:
        strides[1], run = 1, shape[1]
    for i in range(len(shape) - 1, 1, -1):
        strides[i] = run
        run *= shape[i]
    if not channels_inside:
        strides[1] = run
        run *= shape[1]
    strides[0] = run
    return tuple(strides)


def output_strides(x: Tensor) -> tuple[int, ...]:
    """Strides of eca(x), for x of shape (N, C, *spatial): those of x if x is dense.

    A slice of the batch or of the channels gives a dense result of the same memory format. Any
    other x is read through a copy: channels_last if the channels are innermost, else contiguous.
    """
    shape, strides = tuple(x.shape), x.stride()
    n, c = shape[:2]
    pixels = math.prod(shape[2:])
    pixel_stride, run = None, 0
    even = True  # the pixels lie in order, at equal distances
    for size, stride in zip(reversed(shape[2:]), reversed(strides[2:]), strict=True):
        if size == 1:
            continue
        if pixel_stride is None:
            pixel_stride = stride
        else:
            even = even and stride == run
        run = stride * size
    if pixel_stride is None:
        pixel_stride = c  # one pixel
    packed = n == 1 or strides[0] == c * pixels
    channels_inside = strides[1] == 1 and (pixels == 1 or c > 1)
    if channels_inside and even and pixel_stride >= c:
        dense = packed and pixel_stride == c
        return strides if dense else dense_strides(shape, pixels != 1)
    if even and (pixels == 1 or pixel_stride == 1):
        dense = packed and (c == 1 or strides[1] == pixels)
        return strides if dense else dense_strides(shape, False)
    return dense_strides(shape, channels_inside)
