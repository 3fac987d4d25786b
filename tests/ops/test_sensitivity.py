"""The tests can fail: each deliberate fault in a backend is caught by the comparison they use."""

import pytest
import torch

from eca_fused.functional import ECAFunction
from eca_fused.ops import native
from helpers.cases import Case, assert_as_accurate, make_case, needs_extension, run

pytestmark = [pytest.mark.any_device, needs_extension]


class Broken:
    """The native backend with a fault in one of its results."""

    def __init__(self, **faults):
        self.faults = faults

    def forward(self, x, weight, circular):
        y, mean, gate = native.forward(x, weight, circular)
        return self.faults.get("y", lambda y: y)(y), mean, gate

    def backward(self, dy, x, weight, mean, gate, circular, need_dx, need_dweight):
        args = {"mean": mean, "gate": gate, "weight": weight, "dy": dy}
        for name in args.keys() & self.faults.keys():
            args[name] = self.faults[name](args[name])
        dx, dweight = native.backward(
            args["dy"], x, args["weight"], args["mean"], args["gate"], circular, True, True
        )
        dx = self.faults.get("dx", lambda dx: dx)(dx)
        return dx, self.faults.get("dweight", lambda dweight: dweight)(dweight)


def one_element(t, factor=1.01):
    t = t.clone()
    t.view(-1)[t.numel() // 2] *= factor
    return t


FAULTS = {
    "the gate of the next channel": {"y": lambda y: y.roll(1, 1)},
    "one element of y off by 1 %": {"y": one_element},
    "one element of y never written": {"y": lambda y: one_element(y, float("nan"))},
    "dx without the gradient through the mean": {"dx": None},
    "one element of dx off by 1 %": {"dx": one_element},
    "taps in the wrong order": {"weight": lambda w: w.flip(-1)},
    "means shifted by one channel": {"mean": lambda m: m.roll(1, 1)},
    "gate of another sample": {"gate": lambda a: a.roll(1, 0)},
    "a partial sum of dweight lost": {"dweight": lambda w: w * 0.999},
    "dy transposed": {"dy": lambda g: g.transpose(2, 3)},
}


def case() -> Case:
    return make_case((3, 20, 6, 6), k=5)


@pytest.mark.parametrize("fault", FAULTS)
def test_a_broken_kernel_is_caught(fault):
    c = case()
    faults = dict(FAULTS[fault])
    if fault == "dx without the gradient through the mean":
        gate = native.forward(c.x, c.weight, False)[2]
        faults["dx"] = lambda dx: gate[:, :, None, None] * c.dy
    result = run(lambda x, w: ECAFunction.apply(x, w, False, Broken(**faults)), c)
    with pytest.raises(AssertionError, match="error"):
        assert_as_accurate(result, c)


def test_without_a_fault_it_passes():
    c = case()
    assert_as_accurate(run(lambda x, w: ECAFunction.apply(x, w, False, Broken()), c), c)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_second_rounding_to_half_precision_is_caught(dtype):
    # Plain PyTorch rounds its gate to half precision. Its error would hide the same loss in the
    # kernels, so here the comparison has the floor alone.
    c = make_case((3, 20, 6, 6), dtype=dtype)
    y, _mean, gate = native.forward(c.x, c.weight, False)
    want = (gate[:, :, None, None] * c.x.float()).to(dtype)
    rounded = gate.to(dtype)[:, :, None, None] * c.x
    assert torch.equal(y, want)
    assert not torch.equal(rounded, want)
