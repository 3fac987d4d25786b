"""What PyTorch's instruments say of the operators: the FLOP counter, the profiler."""

import importlib

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

import eca_fused
from eca_fused.ops import native
from eca_fused.ops.backend import select
from helpers.cases import BACKENDS, DEVICE, MODES, make_case, needs_extension
from helpers.processes import python

pytestmark = pytest.mark.any_device

SHAPE, K = (3, 40, 5, 4), 5
CONVOLUTION = 2 * 3 * 40 * 5  # multiplications and additions, over samples, channels and taps


def counted(action):
    with FlopCounterMode(display=False) as counter:
        action()
    return counter.get_total_flops()


@pytest.mark.parametrize("backend", [*BACKENDS, "reference"])
@pytest.mark.parametrize("padding_mode", MODES)
@pytest.mark.parametrize("needs", [(), ("x",), ("weight",), ("x", "weight")], ids=" and ".join)
def test_the_convolution_counts_as_in_plain_pytorch(backend, needs, padding_mode):
    case = make_case(SHAPE, k=K, padding_mode=padding_mode)
    x = case.x.requires_grad_("x" in needs)
    weight = case.weight.requires_grad_("weight" in needs)

    def forward():
        return eca_fused.eca(x, weight, padding_mode=padding_mode, backend=backend)

    assert counted(forward) == CONVOLUTION
    if needs:
        y = forward()
        assert counted(lambda: y.backward(case.dy)) == len(needs) * CONVOLUTION
        assert counted(lambda: forward().backward(case.dy)) == (1 + len(needs)) * CONVOLUTION


@pytest.mark.parametrize("backend", BACKENDS)
def test_taps_of_each_channels_own_count_as_shared_ones(backend):
    # Plain PyTorch uses no convolution for them, so it counts none.
    case = make_case(SHAPE, k=K, own_taps=True)
    assert counted(lambda: eca_fused.eca(case.x, case.weight, backend=backend)) == CONVOLUTION


@pytest.mark.parametrize("backend", BACKENDS)
def test_in_place_counts_too(backend):
    case = make_case(SHAPE, k=K)
    assert counted(lambda: eca_fused.eca_(case.x, case.weight, backend=backend)) == CONVOLUTION


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_layer_in_a_network_has_its_own_count(backend):
    net = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 1), eca_fused.ECALayer(8, backend=backend))
    with FlopCounterMode(display=False) as counter:
        net(torch.randn(2, 3, 4, 4)).sum().backward()
    once = 2 * 2 * 8 * 3
    assert sum(counter.get_flop_counts()["Sequential.1"].values()) == 3 * once


@pytest.mark.skipif(DEVICE != "cpu", reason="about imports: run it without ECA_FUSED_TEST_DEVICE")
@needs_extension
@pytest.mark.parametrize(
    "order",
    [
        "import eca_fused; from torch.utils.flop_counter import FlopCounterMode",
        "from torch.utils.flop_counter import FlopCounterMode; import eca_fused",
        "import torch.utils.flop_counter as f; counter = f.FlopCounterMode(display=False)\n"
        "import eca_fused; FlopCounterMode = lambda display: counter",
    ],
    ids=["counter second", "counter first", "made before"],
)
def test_the_order_of_imports_does_not_matter(order):
    code = f"""
import torch
{order}
with FlopCounterMode(display=False) as counter:
    eca_fused.eca(torch.randn(2, 8, 4, 4), torch.randn(1, 1, 3), backend="native")
assert counter.get_total_flops() == 2 * 2 * 8 * 3, counter.get_flop_counts()
"""
    done = python(code)
    assert done.returncode == 0, done.stderr


@pytest.mark.skipif(DEVICE != "cpu", reason="about imports: run it without ECA_FUSED_TEST_DEVICE")
def test_importing_does_not_import_the_counter_or_triton():
    code = (
        "import sys, eca_fused; print(*({'torch.utils.flop_counter', 'triton'} & {*sys.modules}))"
    )
    done = python(code, without=("ECA_FUSED_BACKEND",))
    assert (done.returncode, done.stdout) == (0, "\n"), done.stderr


@pytest.mark.parametrize(
    "direction", ["forward", "backward", "inference", "inference_", "inference_into"]
)
@pytest.mark.parametrize("prefix", ["", "triton_"])
def test_every_operator_has_a_formula(prefix, direction):
    if prefix:
        pytest.importorskip("triton", reason="needs Triton: pip install triton")
        importlib.import_module("eca_fused.ops.triton")
    elif native.missing is not None:
        pytest.skip("needs the compiled extension: run `make build`")
    assert getattr(torch.ops.eca_fused, prefix + direction) in FlopCounterMode().flop_registry


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_profiler_names_the_operators(backend):
    case = make_case(SHAPE, k=K)
    x = case.x.requires_grad_()
    with torch.profiler.profile(record_shapes=True) as profile:
        eca_fused.eca(x, case.weight, backend=backend).backward(case.dy)
    shapes = {event.key: event.input_shapes for event in profile.key_averages(True)}
    prefix = "" if select(x, backend).name == "native" else "triton_"
    assert shapes[f"eca_fused::{prefix}forward"][:2] == [list(SHAPE), [1, 1, K]]
    assert shapes[f"eca_fused::{prefix}backward"][:3] == [list(SHAPE), list(SHAPE), [1, 1, K]]
    assert any("ECAFunctionBackward" in name for name in shapes)
