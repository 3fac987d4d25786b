"""Values at the edge: NaN, infinity, saturated gates, subnormals, nothing at all."""

import pytest
import torch

import eca_fused
from helpers.cases import (
    BACKENDS,
    DEVICE,
    DTYPES,
    LAYOUTS,
    MODES,
    Case,
    in_layout,
    make_case,
    name_of,
    plain,
    run,
)

pytestmark = [pytest.mark.any_device, pytest.mark.parametrize("backend", BACKENDS)]


def both(case, backend):
    """Each of y, dx, dweight, and the same by plain PyTorch in float64 on the CPU.

    PyTorch's bfloat16 convolution on the CPU multiplies in pairs, which carries NaN one channel
    farther than the convolution reaches. A library's convolution on a GPU may carry it anywhere.
    """
    on_cpu = Case(case.x.cpu(), case.weight.cpu(), case.dy.cpu(), case.padding_mode)
    theirs = (t.to(case.x.device) for t in run(plain(case), on_cpu, torch.float64))
    ours = run(
        lambda x, w: eca_fused.eca(x, w, padding_mode=case.padding_mode, backend=backend), case
    )
    return zip(ours, theirs, strict=True)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("padding_mode", MODES)
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("channel", [0, 4, 19])
@pytest.mark.parametrize("where", ["x", "dy"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=name_of)
def test_nan_and_infinity_spread_as_in_plain_pytorch(
    backend, where, channel, value, padding_mode, layout, dtype
):
    case = make_case((2, 20, 5, 7), dtype=dtype, k=5, padding_mode=padding_mode, layout=layout)
    getattr(case, where)[1, channel, 3, 2] = value
    for ours, theirs in both(case, backend):
        assert torch.equal(ours.isnan(), theirs.isnan())
        assert torch.equal(ours.isposinf(), theirs.isposinf())
        assert torch.equal(ours.isneginf(), theirs.isneginf())


@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
@pytest.mark.parametrize("z", [-1e30, -200.0, -104.0, -90.0, -87.0, -20.0, 0.0, 20.0, 90.0, 1e30])
def test_gates_from_zero_to_one(backend, z, dtype):
    x = torch.ones(1, 1, 4, 4, dtype=torch.float64 if dtype == torch.float64 else torch.float32)
    want = torch.sigmoid(torch.tensor(z, dtype=torch.float64)).to(x.dtype)
    y = eca_fused.eca(x, torch.full((1, 1, 1), z, dtype=x.dtype), backend=backend)
    # Two units in the last place of the gate, or of the smallest number.
    limits = torch.finfo(x.dtype)
    assert (y - want).abs().max() <= 2 * limits.eps * want + 2 * limits.smallest_normal * limits.eps


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=name_of)
def test_every_half_precision_value_is_rounded_as_pytorch_rounds(backend, dtype):
    # All 65,536 bit patterns, in planes whose mean is not finite or whose tap is zero: the gate is
    # 1/2 wherever the mean is finite.
    x = torch.arange(-(2**15), 2**15, dtype=torch.int16).view(dtype).reshape(1, 256, 16, 16)
    weight = torch.zeros(1, 1, 1)
    y = eca_fused.eca(x, weight, backend=backend)
    finite = torch.isfinite(x.float().mean((2, 3), keepdim=True)).expand_as(x)
    assert finite.sum() > 60_000
    assert torch.equal(y[finite], (x[finite].float() / 2).to(dtype))
    assert y[~finite].isnan().any()


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(
    "shape", [(0, 4, 3, 3), (2, 4, 0, 3), (0, 4), (2, 4, 3, 0, 2), (0, 4, 0, 0)], ids=name_of
)
@pytest.mark.parametrize("own_taps", [False, True])
def test_empty_maps_as_in_plain_pytorch(backend, shape, layout, own_taps):
    case = make_case(shape, layout="contiguous", own_taps=own_taps)
    case.x = in_layout(case.x, layout)
    for ours, theirs in both(case, backend):
        torch.testing.assert_close(ours.double(), theirs, equal_nan=True)


@pytest.mark.parametrize("shape", [(2**31, 2**30, 0), (2**40, 8, 0), (1, 2**62, 0)], ids=name_of)
def test_more_channels_than_memory_in_empty_maps(backend, shape):
    """No pixels, and no memory for a number of each channel: inference needs none."""
    x, weight = torch.empty(shape, device=DEVICE), torch.ones(1, 1, 3, device=DEVICE)
    if backend != "reference":
        assert eca_fused.eca(x, weight, backend=backend).shape == shape
        assert eca_fused.eca_(x, weight, backend=backend) is x
    else:
        with pytest.raises(RuntimeError, match=r"overflowed|allocate|memory"):
            eca_fused.eca(x, weight, backend=backend)


def test_no_channels(backend):
    x = torch.empty(2, 0, 3, 3, requires_grad=True)
    weight = torch.randn(1, 1, 3, requires_grad=True)
    y = eca_fused.eca(x, weight, backend=backend)
    y.sum().backward()
    assert y.shape == x.shape
    assert x.grad.shape == x.shape
    assert torch.equal(weight.grad, torch.zeros(1, 1, 3))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("own_taps", [False, True], ids=["shared", "own"])
@pytest.mark.parametrize("padding_mode", MODES)
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("tap", [0, 2, 4])
def test_taps_that_are_not_finite(backend, tap, value, padding_mode, own_taps, layout):
    case = make_case(
        (2, 20, 5, 7), k=5, padding_mode=padding_mode, own_taps=own_taps, layout=layout
    )
    case.weight[-1, 0, tap] = value
    for ours, theirs in both(case, backend):
        assert torch.equal(ours.isnan(), theirs.isnan())
        assert torch.equal(ours.isposinf(), theirs.isposinf())
