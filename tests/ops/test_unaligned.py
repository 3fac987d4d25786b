"""Memory that does not begin at a multiple of an element's size, as views of raw bytes may."""

import pytest
import torch

import eca_fused
from helpers.cases import DTYPES, LAYOUTS, make_case, name_of, needs_extension, shifted

pytestmark = [pytest.mark.every_torch, needs_extension]

ops = torch.ops.eca_fused


@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_tensor_of_every_operator(dtype, layout):
    case = make_case((3, 17, 9, 11), 5, dtype, layout)
    y, mean, gate = ops.forward(case.x, case.weight, True)
    dx, dweight = ops.backward(case.dy, case.x, case.weight, mean, gate, True)
    for offset in (1, dtype.itemsize // 2, dtype.itemsize + 1):
        x, dy, weight, m, g = (
            shifted(t, offset) for t in (case.x, case.dy, case.weight, mean, gate)
        )
        assert x.data_ptr() % dtype.itemsize
        for got, want in zip(ops.forward(x, weight, True), (y, mean, gate), strict=True):
            assert torch.equal(got, want)
            assert got.stride() == want.stride()
        assert torch.equal(ops.inference(x, weight, True), y)
        out = shifted(torch.zeros_like(case.x), offset)
        ops.inference_into(case.x, weight, out, True)
        assert torch.equal(out, y)
        grads = ops.backward(dy, x, weight, m, g, True)
        assert torch.equal(grads[0], dx)
        assert torch.equal(grads[1], dweight)
        assert torch.equal(ops.pool(x), ops.pool(case.x))
        assert torch.equal(ops.rescale(x, g, m), ops.rescale(case.x, gate, mean))
        for got, want in zip(
            ops.rescale_backward(dy, x, g), ops.rescale_backward(case.dy, case.x, gate), strict=True
        ):
            assert torch.equal(got, want)
        ops.inference_(x, weight, True)
        assert torch.equal(x, y)


@pytest.mark.parametrize(
    ("dtype", "offset"), [(torch.float32, 1), (torch.float32, 2), (torch.bfloat16, 1)], ids=str
)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_outputs_that_are_larger_than_the_caches(dtype, offset, layout):
    """From half of the last-level cache on, outputs are stored in whole vectors."""
    elements = 160_000_000 // dtype.itemsize
    x = torch.ones(4, 8, elements // 32, dtype=dtype)
    if layout == "channels_last":
        x = x.transpose(1, 2).contiguous().transpose(1, 2)
    out = shifted(torch.empty_strided(x.shape, x.stride(), dtype=dtype), offset)
    weight = torch.zeros(1, 1, 3, dtype=dtype)
    with torch.no_grad():
        assert eca_fused.eca(x, weight, out=out) is out
    assert bool((out == 0.5).all())
