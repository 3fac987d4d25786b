"""Random views: sizes, strides, dtypes, taps and paddings nobody thought of, from fixed seeds."""

import os

import pytest
import torch

import eca_fused
from eca_fused.ops.results import output_strides
from helpers.cases import BACKENDS, DEVICE, assert_as_accurate, run
from helpers.processes import run_tests
from helpers.random_views import random_case

pytestmark = pytest.mark.any_device


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
            if torch._debug_has_internal_overlap(case.dy) == 0:  # it can take a result
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
    """Small maps are stored like maps larger than the caches: a store of a whole vector through a
    pointer that is not aligned ends the process."""
    if backend != "native" or "ECA_FUSED_CPU_CACHE_BYTES" in os.environ:
        pytest.skip("the compiled kernels do so: run it without ECA_FUSED_CPU_CACHE_BYTES")
    files = ("tests/ops/test_fuzz.py", "tests/ops/test_kernels.py")
    run_tests("-x", "-k", "native", *files, ECA_FUSED_CPU_CACHE_BYTES="0")
