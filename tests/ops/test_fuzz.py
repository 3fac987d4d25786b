"""Random views: sizes, strides, dtypes, taps and paddings nobody thought of, from fixed seeds."""

import os
import random
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from support import BACKENDS, DEVICE, Case, assert_as_accurate, run, shifted

import eca_fused
from eca_fused.ops.results import output_strides


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


def check_writing(write, target, wanted, what):
    """write(target) makes it what is wanted, and touches nothing beside this view."""
    rest = target._base.clone() if target._base is not None else None
    write(target)
    torch.testing.assert_close(target, wanted, rtol=1e-2, atol=1e-6, msg=what)
    if rest is None:
        return
    changed = torch.zeros_like(rest, dtype=torch.bool)
    changed.as_strided(target.shape, target.stride(), target.storage_offset()).fill_(True)
    same = (target._base == rest) | target._base.isnan()
    assert bool((same | changed).all()), what


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("start", range(0, 600, 60))
def test_random_views(start, backend):
    for seed in range(start, start + 60):
        case = random_case(seed)
        what = f"seed {seed}: x {tuple(case.x.shape)} {case.x.stride()}, dy {case.dy.stride()}"

        def fused(x, w, mode=case.padding_mode):
            return eca_fused.eca(x, w, padding_mode=mode, backend=backend)

        results = run(fused, case)
        try:
            assert_as_accurate(results, case)
        except AssertionError as error:
            raise AssertionError(what) from error
        assert results[0].stride() == results[1].stride() == output_strides(case.x), what
        mode = case.padding_mode
        with torch.no_grad():
            if torch._debug_has_internal_overlap(case.dy) == 0:  # memory for a result
                check_writing(
                    lambda out, x=case.x, w=case.weight, mode=mode: eca_fused.eca(
                        x, w, padding_mode=mode, backend=backend, out=out
                    ),
                    case.dy,
                    results[0],
                    what,
                )
            if torch._debug_has_internal_overlap(case.x) == 0:
                check_writing(
                    lambda x, w=case.weight, mode=mode: eca_fused.eca_(
                        x, w, padding_mode=mode, backend=backend
                    ),
                    case.x,
                    results[0],
                    what,
                )


@pytest.mark.skipif(DEVICE != "cpu", reason="the CPU's: run it without ECA_FUSED_TEST_DEVICE")
@pytest.mark.parametrize("backend", BACKENDS)
def test_random_views_stored_around_the_caches(backend):
    """As maps are that are larger than the caches, here however small: one pointer that is not
    aligned, and a store of a whole vector ends the process."""
    if backend != "native" or "ECA_FUSED_CPU_CACHE_BYTES" in os.environ:
        pytest.skip("the compiled kernels do so: run it without ECA_FUSED_CPU_CACHE_BYTES")
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", "-k", "native"]
    done = subprocess.run(
        [*command, "test_fuzz.py", "test_kernels.py"],
        cwd=Path(__file__).parent,
        env={**os.environ, "ECA_FUSED_CPU_CACHE_BYTES": "0"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout[-3000:]
    assert " passed" in done.stdout
