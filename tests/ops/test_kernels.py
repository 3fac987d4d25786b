"""Every backend against float64 plain PyTorch: values and gradients over the whole input space."""

import pytest
import torch

import eca_fused
from helpers.cases import (
    BACKENDS,
    DEVICE,
    DTYPES,
    LAYOUTS,
    MODES,
    SHAPES,
    assert_as_accurate,
    assert_near,
    make_case,
    name_of,
    plain,
    run,
)

pytestmark = [pytest.mark.any_device, pytest.mark.parametrize("backend", BACKENDS)]


def check(backend, case):
    result = run(
        lambda x, w: eca_fused.eca(x, w, padding_mode=case.padding_mode, backend=backend), case
    )
    assert_as_accurate(result, case)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
@pytest.mark.parametrize("shape", SHAPES, ids=name_of)
def test_shapes(backend, shape, dtype, layout):
    check(backend, make_case(shape, dtype=dtype, layout=layout))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("own_taps", [False, True], ids=["shared", "own"])
@pytest.mark.parametrize("padding_mode", MODES)
@pytest.mark.parametrize("k", [1, 3, 5, 7, 9, 11, 13])
@pytest.mark.parametrize("channels", [7, 40])
def test_taps(backend, channels, k, padding_mode, own_taps, layout):
    check(
        backend,
        make_case(
            (2, channels, 5, 3), k=k, layout=layout, padding_mode=padding_mode, own_taps=own_taps
        ),
    )


@pytest.mark.parametrize("own_taps", [False, True], ids=["shared", "own"])
@pytest.mark.parametrize(("channels", "k"), [(1, 3), (2, 5), (3, 13), (1, 27)])
def test_more_taps_than_channels(backend, channels, k, own_taps):
    check(backend, make_case((2, channels, 4, 4), k=k, own_taps=own_taps))


@pytest.mark.parametrize(("channels", "k"), [(1, 3), (2, 5), (6, 13)])
def test_circular_taps_that_wrap_exactly_once(backend, channels, k):
    check(backend, make_case((2, channels, 4, 4), k=k, padding_mode="circular"))


@pytest.mark.parametrize("own_taps", [False, True], ids=["shared", "own"])
@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
def test_float32_taps_with_any_map(backend, dtype, own_taps):
    case = make_case((2, 12, 6, 6), dtype=dtype, own_taps=own_taps, taps_dtype=torch.float32)
    check(backend, case)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("padding_mode", MODES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=name_of)
@pytest.mark.parametrize(
    "shape", [(1, 16, 128, 128), (3, 40, 37, 41), (16, 6, 50, 50), (8, 64, 40, 40)], ids=name_of
)
def test_any_number_of_threads(backend, shape, dtype, padding_mode, layout, threads):
    assert torch.get_num_threads() == threads
    check(backend, make_case(shape, 5, dtype, layout, padding_mode))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("padding_mode", MODES)
@pytest.mark.parametrize("own_taps", [False, True], ids=["shared", "own"])
@pytest.mark.parametrize(
    "shape", [(1, 16, 128, 128), (3, 40, 37, 41), (16, 6, 50, 50), (2, 200, 40, 40)], ids=name_of
)
def test_in_place_with_any_number_of_threads(
    backend, shape, own_taps, padding_mode, layout, threads
):
    # A thread may not overwrite what another one still has to read.
    case = make_case(shape, k=5, padding_mode=padding_mode, layout=layout, own_taps=own_taps)
    exact, terms = run(plain(case), case, torch.float64)[0], case.x.double().abs()
    eca_fused.eca_(case.x, case.weight, padding_mode=padding_mode, backend=backend)
    assert_near("y", case.x, exact, terms, torch.float32, torch.float32)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_map_larger_than_the_caches(backend, layout):
    # 48 MB: beyond the size from which outputs are streamed, with rows that are not whole lines.
    check(backend, make_case((13, 96, 99, 101), layout=layout))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=name_of)
def test_small_planes_larger_than_the_caches(backend, dtype, layout):
    check(backend, make_case((100, 1700, 9, 11), dtype=dtype, layout=layout))


def test_accuracy_of_a_long_sum(backend):
    # Four million pixels with a mean far from zero: naive float32 sums lose digits here.
    case = make_case((1, 1, 2048, 2048), k=1)
    case.x += 10
    check(backend, case)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
@pytest.mark.parametrize("shape", [(4, 64, 14, 14), (2, 8, 120, 120)], ids=name_of)
def test_bitwise_the_same_on_every_run(backend, shape, dtype, layout):
    case = make_case(shape, dtype=dtype, layout=layout)
    first = run(lambda x, w: eca_fused.eca(x, w, backend=backend), case)
    for _ in range(3):
        again = run(lambda x, w: eca_fused.eca(x, w, backend=backend), case)
        assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
@pytest.mark.parametrize("shape", SHAPES, ids=name_of)
def test_inference_gives_the_same_bits_as_training(backend, shape, dtype, layout):
    case = make_case(shape, dtype=dtype, layout=layout)
    y = run(lambda x, w: eca_fused.eca(x, w, backend=backend), case)[0]
    with torch.no_grad():
        assert torch.equal(y, eca_fused.eca(case.x, case.weight, backend=backend))
        x = case.x.clone(memory_format=torch.preserve_format)
        assert eca_fused.eca_(x, case.weight, backend=backend) is x
        if DEVICE == "cpu":
            assert torch.equal(y, x)
        else:  # no tile may have a halo here, so other threads may add up a plane
            limits = torch.finfo(dtype)
            torch.testing.assert_close(x, y, rtol=8 * limits.eps, atol=limits.smallest_normal)
