"""The CUDA kernels of a residual block's tail, run on the CPU, against plain PyTorch in float64.

As in test_cuda_kernels.py, the program ends at an access out of bounds, at a race, or at a read of
what was never written.
"""

import math

import pytest
import torch

from helpers.cases import DTYPES, LAYOUTS, in_layout, name_of, normal
from helpers.gpu_host import SANITIZED, missing
from helpers.gpu_host_tails import ACTIVATIONS, TailGpu
from helpers.tail_passes import (
    PASS_SHAPES,
    PASS_VIEWS,
    RESNET50,
    Case,
    check_gradients,
    check_moments,
    check_sums,
    check_tail,
    moved,
)

pytestmark = [
    pytest.mark.xdist_group("tail_kernels"),
    pytest.mark.skipif(missing is not None, reason=str(missing)),
]


@pytest.fixture(scope="module")
def gpu(tmp_path_factory):
    host = TailGpu(tmp_path_factory.mktemp("tails"), SANITIZED)
    yield host
    host.close()


@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("shape", PASS_SHAPES, ids=name_of)
def test_all_passes(gpu, dtype, layout, shape):
    for seed, (activation, identity) in enumerate((("relu", True), ("gelu", False))):
        case = Case(shape, dtype, layout, activation, identity)
        check_tail(gpu, case, seed=seed)
        check_sums(gpu, case, identity, seed=seed)
        check_gradients(gpu, case, (True, identity), (True, True), seed=seed)
    check_moments(gpu, case.x, layout, case.wide)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("identity", [False, True], ids=["alone", "identity"])
def test_options(gpu, layout, activation, identity):
    for shape in ((2, 16, 49), (2, 16, 64)):
        case = Case(shape, torch.bfloat16, layout, activation, identity)
        check_tail(gpu, case)
        for identity_sum in {False, identity}:
            check_sums(gpu, case, identity_sum)
        for by_x in (False, True):
            for by_identity in {False, identity}:
                for wants in ((True, True), (True, False), (False, True)):
                    check_gradients(gpu, case, (by_x, by_identity), wants)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=name_of)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("pixels", [49, 64])
@pytest.mark.parametrize("name", PASS_VIEWS)
def test_views(gpu, dtype, layout, pixels, name):
    case = Case((3, 32, pixels), dtype, layout, view=PASS_VIEWS[name])
    check_tail(gpu, case)
    check_sums(gpu, case, True)
    check_gradients(gpu, case, (True, True), (True, True))
    check_moments(gpu, case.x, layout, case.wide)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_coefficients_that_are_not_in_lines(gpu, layout):
    case = Case((2, 32, 64), torch.bfloat16, layout)
    check_tail(gpu, case, misplaced=1)
    check_sums(gpu, case, True, misplaced=1)
    check_gradients(gpu, case, (True, True), (True, True), misplaced=1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=name_of)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("shape", [(2, 24, 49), (2, 8, 3136), (2, 5, 2049)], ids=name_of)
def test_moments_far_from_zero(gpu, dtype, layout, shape):
    """The mean is 1e4 standard deviations, as far as the dtype can hold that."""
    far = 1e4 if dtype != torch.bfloat16 else 100
    g = torch.Generator().manual_seed(1)
    x = in_layout((normal(shape, g) + far).to(dtype), layout)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    check_moments(gpu, x, layout, wide)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_moments_of_a_plane_that_begins_elsewhere(gpu, layout):
    """The first pixels are no guide to the others."""
    x = normal((1, 8, 3136), torch.Generator().manual_seed(1)).float() + 1e3
    x[..., :200] = 0
    outcome = gpu.run("moments", in_layout(x, layout), layout)
    exact = (x.double() - x.double().mean(2, keepdim=True)).square().sum(2)
    torch.testing.assert_close(outcome.tensors[3][1], exact, rtol=1e-6, atol=0)


def test_nan_is_kept(gpu):
    case = Case((1, 8, 16), torch.float32, "contiguous")
    case.x[0, 3, 5] = math.nan
    y, _, mask, _ = gpu.run(
        "tail", case.x, case.layout, identity=case.identity, want_mask=True, **case.arguments()
    ).tensors
    assert y[0, 3, 5].isnan()
    assert case.kept_by(mask)[0, 3, 5]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_results_do_not_depend_on_the_order_of_blocks(gpu, layout):
    case = Case((2, 16, 3136), torch.float32, layout)
    found = [
        gpu.run(
            "tail_sums", case.x, layout, identity=case.identity, dy=case.dy, seed=seed,
            mask=case.mask(case.kept), identity_sum=True, **case.arguments(),
        ).tensors[3]
        for seed in (1, 2)
    ]  # fmt: skip
    assert torch.equal(*found)


# ---- memory traffic ----

MAPS = ("x", "identity", "dy", "first", "second", "mask")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=name_of)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("shape", RESNET50, ids=name_of)
def test_traffic(gpu, shape, layout, dtype):
    """A pass reads each map once and writes each result once, and the mask is one bit an element.

    Partial sums and coefficients come to some percent, where planes are small.
    """
    case = Case((1, *shape), dtype, layout)
    c = shape[0]
    one = case.x.numel() * case.x.element_size()
    mask = case.mask(case.kept)
    every = {"identity": case.identity, "count": True} | case.arguments()
    backward = every | {"dy": case.dy, "mask": mask}
    gradients = {"gradient_planes": case.gradient_planes, "by": (True, False)}
    gradients |= {"gradient_channels": case.gradient_channels}
    how = {"multiprocessors": 1}  # a sample alone is then in few parts, as in a large batch
    for operation, given, model in (
        ("moments", {"count": True}, one),
        ("tail", every | {"want_mask": True}, 3 * one + mask.numel()),
        ("tail_sums", backward, 2 * one + mask.numel()),
        ("tail_gradients", backward | gradients, 4 * one + mask.numel()),
    ):
        outcome = gpu.run(operation, case.x, layout, **given, **how)
        maps, others = moved(outcome, MAPS)
        assert outcome.plan["vectors"] or outcome.plan["way"] == "small", (operation, outcome.plan)
        assert abs(maps / model - 1) <= 0.02, (operation, outcome.plan)
        # Coefficients, of float32, and sums, of float64, for each plane; twice for parts.
        parts = outcome.plan["parts"]
        numbers = 9 * 4 * c + 8 * 2 * c * (1 if parts == 1 else 2 * parts + 1)
        assert others <= numbers + 256 * 32, (operation, outcome.plan)
