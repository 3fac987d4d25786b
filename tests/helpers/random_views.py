"""Random views: sizes, strides, dtypes, taps and paddings nobody thought of."""

import random

import torch

from helpers.cases import DEVICE, Case, shifted


def random_view(rng: random.Random, shape: list[int], dtype: torch.dtype) -> torch.Tensor:
    """A tensor of this shape out of a larger one: permuted, sliced, expanded, oddly strided."""
    dims = list(range(len(shape)))
    order = {
        "contiguous": dims,
        "channels inside": [0, *dims[2:], 1],
        "any": rng.sample(dims, len(dims)),
    }[rng.choice(["contiguous", "contiguous", "channels inside", "channels inside", "any"])]
    whole, slices = [], []
    for size in shape:
        if rng.random() < 0.15:
            whole.append(1)
            slices.append(slice(0, 1))
            continue
        start, step, more = rng.choice([0, 0, 1]), rng.choice([1, 1, 1, 2]), rng.choice([0, 0, 2])
        whole.append(start + size * step + more)
        slices.append(slice(start, start + size * step, step))
    buffer = torch.randn([whole[d] for d in order]).to(dtype)
    if DEVICE == "cpu" and buffer.numel() and rng.random() < 0.15:
        buffer = shifted(buffer, rng.choice([1, dtype.itemsize // 2, dtype.itemsize + 1]))
    view = buffer.permute([order.index(d) for d in dims])[tuple(slices)].expand(shape)
    if rng.random() < 0.3:  # strides of dimensions of one element mean nothing
        strides = [
            rng.choice([0, 1, 7, 100]) if size == 1 else stride
            for size, stride in zip(shape, view.stride(), strict=True)
        ]
        view = view.as_strided(shape, strides)
    return view


def random_case(seed: int) -> Case:
    rng = random.Random(seed)
    torch.manual_seed(seed)
    shape = [rng.choice([1, 1, 2, 3, 5, 17]) for _ in range(rng.randint(2, 5))]
    shape[1] = rng.choice([1, 2, 3, 8, 40])
    dtype = rng.choice([torch.float64, torch.float64, torch.float32, torch.bfloat16, torch.float16])
    padding_mode = rng.choice(["zeros", "circular"])
    k = rng.choice([1, 3, 5, 7, 9])
    if padding_mode == "circular":
        k = min(k, 2 * shape[1] + 1)
    rows = rng.choice([1, shape[1]])
    weight = (
        torch.randn(k, 1, rows).transpose(0, 2) if rng.random() < 0.3 else torch.randn(rows, 1, k)
    )
    return Case(
        random_view(rng, shape, dtype),
        weight.to(rng.choice([dtype, torch.float32])),
        random_view(rng, shape, dtype),
        padding_mode,
    )
