"""The tests can fail: each deliberate fault in a backend is caught by the comparison they use."""

import pytest
import torch

from eca_fused import ECALayer, ResidualTail
from eca_fused.functional import ECAFunction
from eca_fused.ops import native
from helpers.cases import DEVICE, Case, assert_as_accurate, make_case, needs_extension, run
from helpers.tails import assert_same_step, batch_norm

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


# ---- tails ----


def one_bit(mask):
    mask = mask.clone()
    mask.view(-1)[0] ^= 1
    return mask


# An operator, which of its results, and the fault.
TAIL_FAULTS = {
    "y of the next channel": ("tail_training", 0, lambda y: y.roll(1, 1)),
    "one element of y off by 1 %": ("tail_training", 0, one_element),
    "one bit of the mask": ("tail_training", 1, one_bit),
    "coefficients of another plane": ("tail_training", 2, lambda p: p.roll(1, -1)),
    "the gate of another sample": ("tail_training", 4, lambda a: a.roll(1, 0)),
    "one element of dx off by 1 %": ("tail_backward", 0, one_element),
    "one element of the identity's gradient off by 1 %": ("tail_backward", 1, one_element),
    "a partial sum of dweight lost": ("tail_backward", 2, lambda w: w * 0.999),
    "dgamma of the next channel": ("tail_backward", 5, lambda g: g.roll(1, 0)),
    "the mean of a batch off": ("batch_moments", 1, lambda m: m + 1e-3),
    "a running variance that is not updated": ("batch_moments", 2, None),
}


@pytest.mark.skipif(DEVICE != "cpu", reason="whole directions are operators on the CPU alone")
@pytest.mark.parametrize("fault", TAIL_FAULTS)
def test_a_broken_kernel_of_tails_is_caught(fault, monkeypatch):
    name, place, change = TAIL_FAULTS[fault]
    original = getattr(native, name)

    def broken(*arguments):
        if change is None:  # without the running statistics
            return original(arguments[0])
        found = list(original(*arguments))
        found[place] = change(found[place])
        return tuple(found)

    # ReLU needs its mask for the backward pass, SiLU the coefficients.
    activation = "relu" if "mask" in fault else "silu"
    tail = ResidualTail(
        ECALayer(12, backend="native"), batch_norm(12), batch_norm(12), activation
    ).double()
    x, identity = (torch.randn(3, 12, 5, 6, dtype=torch.float64) for _ in range(2))
    assert_same_step(tail, x, identity)
    monkeypatch.setattr(native, name, broken)
    with pytest.raises(AssertionError):
        assert_same_step(tail, x, identity)
