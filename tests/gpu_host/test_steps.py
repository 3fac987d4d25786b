"""A second step of the CUDA kernels, the tail of a residual block, on the host: relu(gate * x +
identity). It reads and stores maps of its own, and needs two sums at a time.
"""

import pytest
import torch
from torch import Tensor

from eca_fused import reference
from helpers.cases import LAYOUTS, MODES, assert_near, in_layout, make_case, name_of
from helpers.gpu_host import H200, SANITIZED, Forced, HostGpu, Refused, missing

pytestmark = [
    pytest.mark.xdist_group("steps"),
    pytest.mark.skipif(missing is not None, reason=str(missing)),
]

DTYPES = ["float32", "bfloat16"]
SMALL_L2 = H200 | {"l2": 1 << 14}
# Every kernel: in registers, with a halo and without; two forms of stream for planes; two passes.
PLANS = {
    "planned": (None, (2, 24, 16)),
    "rows": (Forced("rows", tile=4, threads=128, depth=7), (2, 24, 64)),
    "runs": (Forced("runs", tile=8, threads=128, depth=2), (2, 48, 49)),
    "columns": (Forced("columns", tile=16, threads=128, depth=4), (2, 48, 24)),
    "kept": (Forced("kept", depth=2), (2, 32, 90)),
    "kept, shared memory too": (Forced("kept"), (1, 32, 1200)),
    "stream": (Forced("stream"), (3, 24, 64)),
    "stream, runs": (Forced("stream"), (3, 32, 49)),
    "stream, runs of broken vectors": (Forced("stream"), (2, 37, 25)),
    "stream, parts of planes": (Forced("stream"), (2, 8, 14336)),
    "two_pass": (Forced("two_pass"), (2, 24, 49)),
}


@pytest.fixture(scope="module")
def gpu(tmp_path_factory):
    host = HostGpu(tmp_path_factory.mktemp("steps"), SANITIZED, dtypes=DTYPES, tails=True)
    yield host
    host.close()


def identity_like(x: Tensor, layout: str) -> Tensor:
    drawn = torch.randn(x.shape, generator=torch.Generator().manual_seed(9))
    return in_layout(drawn.to(x.dtype), layout)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", PLANS)
def test_the_tail_of_a_block(gpu, dtype, layout, mode, name):
    forced, shape = PLANS[name]
    case = make_case(shape, 5 if shape[1] > 4 else 3, getattr(torch, dtype), layout, mode)
    identity = identity_like(case.x, layout)
    how = {"circular": mode == "circular", "channels_last": layout != "contiguous"}
    how |= {"forced": forced, "gpu": SMALL_L2}
    try:
        forward = gpu.forward(case.x, case.weight, identity=identity, **how)
        y, mean, gate = forward.tensors
        backward = gpu.backward(case.dy, case.x, case.weight, mean, gate, result=y, **how)
    except Refused:
        planes = forced.strategy in ("rows", "runs") or shape[1] % 8 != 0
        only_zeros = forced.strategy == "runs" and mode == "circular"
        elsewhere = (layout != "contiguous") if planes else (layout == "contiguous")
        assert only_zeros or elsewhere, f"{name} was refused"
        return
    dx, dweight, d_identity = backward.tensors

    x, other, dy, weight = (t.double() for t in (case.x, identity, case.dy, case.weight))
    x.requires_grad_()
    weight.requires_grad_()
    exact = reference.eca(x, weight, padding_mode=mode)
    sums = x.abs().detach() + other.abs()
    assert_near("y", y, torch.relu(exact + other).detach(), sums, case.x.dtype, torch.float32)
    # Where the rounded result is 0, no gradient passes.
    mask = (y > 0).double()
    assert torch.equal(d_identity, (mask * dy).to(case.dy.dtype))
    want_dx, want_dweight = torch.autograd.grad(exact, (x, weight), mask * dy)
    assert_near("dx", dx, want_dx, dy.abs() + 1, case.x.dtype, torch.float32)
    terms = (dy * x.detach()).abs().sum(2).mean() * want_dweight.new_ones(want_dweight.shape)
    assert_near(
        "dweight",
        dweight,
        want_dweight,
        shape[0] * shape[1] * terms,
        case.weight.dtype,
        torch.float32,
    )


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("shape", [(2, 24, 16), (3, 5, 49), (1, 16, 5000)], ids=name_of)
def test_two_sums_at_a_time(gpu, dtype, layout, shape):
    case = make_case(shape, dtype=getattr(torch, dtype), layout=layout)
    result = identity_like(case.x, layout)
    got = gpu.sums_of_gradient(
        case.x, case.dy, result, channels_last=layout != "contiguous", gpu=SMALL_L2
    )
    g = torch.where(result > 0, case.dy, 0).double()
    for name, sums, terms in zip(("g", "g * x"), got, (g, g * case.x.double()), strict=True):
        assert_near(name, sums, terms.sum(2), terms.abs().sum(2), torch.float32, torch.float32)
