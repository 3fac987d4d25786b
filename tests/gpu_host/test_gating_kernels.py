"""The CUDA kernels of attention after an activation, run on the CPU, against float64.

As in test_cuda_kernels.py, the program ends at an access out of bounds, at a race, or at a read of
what was never written.
"""

import math

import pytest
import torch

from eca_fused.ops.gating import ACTIVATIONS
from helpers.cases import DTYPES, LAYOUTS, name_of
from helpers.gating_passes import Case, check_all, check_gated, check_gradients, check_sums
from helpers.gpu_host import SANITIZED, missing
from helpers.gpu_host_gating import GatingGpu
from helpers.tail_passes import PASS_SHAPES, PASS_VIEWS, RESNET50, moved

pytestmark = [
    pytest.mark.xdist_group("gating_kernels"),
    pytest.mark.skipif(missing is not None, reason=str(missing)),
]


@pytest.fixture(scope="module")
def gpu(tmp_path_factory):
    host = GatingGpu(tmp_path_factory.mktemp("gating"), SANITIZED)
    yield host
    host.close()


@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("shape", PASS_SHAPES, ids=name_of)
def test_all_passes(gpu, dtype, layout, shape):
    for seed, activation in enumerate(("hardswish", "silu")):
        check_all(gpu, Case(shape, dtype, layout, activation), seed=seed)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_options(gpu, layout, activation):
    for shape in ((2, 16, 49), (2, 16, 64), (2, 5, 2049)):
        case = Case(shape, torch.bfloat16, layout, activation)
        check_gated(gpu, case)
        for gradient, for_norm in ((False, False), (True, False), (True, True)):
            check_sums(gpu, case, gradient, for_norm)
        for by_x in (False, True):
            check_gradients(gpu, case, by_x)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=name_of)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("pixels", [49, 64])
@pytest.mark.parametrize("name", PASS_VIEWS)
def test_views(gpu, dtype, layout, pixels, name):
    check_all(gpu, Case((3, 32, pixels), dtype, layout, "silu", PASS_VIEWS[name]))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_coefficients_that_are_not_in_lines(gpu, layout):
    check_all(gpu, Case((2, 32, 64), torch.bfloat16, layout), misplaced=1)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_values_that_are_not_finite(gpu, layout, activation):
    """NaN stays NaN, and an infinite gradient is lost where the activation is flat."""
    case = Case((1, 8, 16), torch.float32, layout, activation)
    case.channels.copy_(torch.tensor([1.0, 0.0, 0.0])[:, None])
    case.planes.copy_(torch.tensor([1.0, 0.0])[:, None, None])
    case.x[0, 3, 5], case.x[0, 3, 6] = math.nan, -8
    y, _ = gpu.run("gated", case.x, layout, **case.arguments()).tensors
    assert y[0, 3, 5].isnan()
    if activation not in ("relu", "hardswish"):
        return
    case.dy[0, 3, 6] = math.inf
    dx, _ = gpu.run("gated_gradients", case.x, layout, dy=case.dy, **case.arguments()).tensors
    assert dx[0, 3, 6] == 0
    sums = gpu.run(
        "activated_sums", case.x[:, :, 6:], layout, dy=case.dy[:, :, 6:], for_norm=True,
        **case.arguments(),
    ).tensors[1]  # fmt: skip
    assert sums[1:].isfinite().all()


@pytest.mark.parametrize("layout", LAYOUTS)
def test_results_do_not_depend_on_the_order_of_blocks(gpu, layout):
    case = Case((2, 16, 3136), torch.float32, layout, "gelu")
    found = [
        gpu.run(
            "activated_sums", case.x, layout, dy=case.dy, for_norm=True, seed=seed,
            **case.arguments(),
        ).tensors[1]
        for seed in (1, 2)
    ]  # fmt: skip
    assert torch.equal(*found)


# ---- memory traffic ----


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=name_of)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("shape", RESNET50, ids=name_of)
def test_traffic(gpu, shape, layout, dtype):
    """A pass reads each map once and writes each result once.

    Partial sums and coefficients come to some percent, where planes are small.
    """
    case = Case((1, *shape), dtype, layout, "silu")
    c = shape[0]
    one = case.x.numel() * case.x.element_size()
    backward = {"dy": case.dy}
    for operation, given, model in (
        ("activated_sums", {}, one),
        ("activated_sums", backward | {"for_norm": True}, 2 * one),
        ("gated", {}, 2 * one),
        ("gated_gradients", backward | {"by_x": True}, 3 * one),
    ):
        # One multiprocessor: a sample alone is then in few parts, as in a large batch.
        outcome = gpu.run(
            operation, case.x, layout, count=True, multiprocessors=1, **given, **case.arguments()
        )
        maps, others = moved(outcome, ("x", "dy", "result"))
        assert outcome.plan["vectors"] or outcome.plan["way"] == "small", (operation, outcome.plan)
        assert abs(maps / model - 1) <= 0.02, (operation, outcome.plan)
        # Coefficients, of float32, and sums, of float64, for each plane; twice for parts.
        parts, kinds = outcome.plan["parts"], len(outcome.tensors[1])
        numbers = 7 * 4 * c + 8 * kinds * c * (1 if parts == 1 else 2 * parts + 1)
        assert others <= numbers + 256 * 32, (operation, outcome.plan)
