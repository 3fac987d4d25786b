"""The arithmetic between a tail's passes: CUDA kernels on the host, against the CPU's."""

import pytest
import torch

from helpers import coefficient_passes
from helpers.cases import needs_extension
from helpers.gpu_host import SANITIZED, missing
from helpers.gpu_host_coefficients import CoefficientGpu

pytestmark = [
    pytest.mark.xdist_group("coefficients"),
    pytest.mark.skipif(missing is not None, reason=str(missing)),
    needs_extension,
]

DTYPES = [torch.float32, torch.float64, torch.float16, torch.bfloat16]
SHAPES = [
    (2, 6),
    (9, 33),
    (1, 70),
    (20, 64),
]  # with a part of a warp, of a block and of 32 channels


@pytest.fixture(scope="module")
def gpu(tmp_path_factory):
    host = CoefficientGpu(tmp_path_factory.mktemp("coefficients"), SANITIZED)
    yield host
    host.close()


@pytest.mark.parametrize("shape", SHAPES)
def test_statistics(gpu, shape):
    coefficient_passes.compare_statistics(gpu, shape)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_running_statistics(gpu, shape, dtype):
    coefficient_passes.compare_running_statistics(gpu, shape, dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_coefficients(gpu, dtype, shape):
    coefficient_passes.compare_coefficients(gpu, dtype, shape)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_totals(gpu, dtype, shape):
    coefficient_passes.compare_totals(gpu, dtype, shape)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_gradient_coefficients(gpu, dtype, shape):
    coefficient_passes.compare_gradient_coefficients(gpu, dtype, shape)


def test_infinite_taps_beyond_the_ends(gpu):
    """The transposed taps have no terms for the padding, as on the CPU."""
    x, (own, _), t = coefficient_passes.drawn((2, 6), torch.float32)
    weight = torch.tensor([[[torch.inf, 1.0, 2.0]]])
    given = (weight, t["made"], None, None, t["distance"])
    args = (x, torch.randn(2, 2, 6, dtype=torch.float64), *given, *own, *(False,) * 4)
    got, want = gpu.run("tail_totals", *args), torch.ops.eca_fused.tail_totals(*args)
    assert bool(got[3].isfinite().any())
    torch.testing.assert_close(got[3], want[3], equal_nan=True)
