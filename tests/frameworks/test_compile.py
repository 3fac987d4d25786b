"""torch.compile: no graph break, no recompilation, the results and strides of eager mode."""

import contextlib
import copy

import pytest
import torch
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend

import eca_fused
from eca_fused import ECALayer
from eca_fused.functional.ways import ForTheCompiler
from eca_fused.ops import graph, native
from helpers.cases import (
    DEVICE,
    DTYPES,
    LAYOUTS,
    MODES,
    VIEWS,
    Case,
    assert_as_accurate,
    make_case,
    name_of,
    needs_extension,
    run,
)
from helpers.processes import python

pytestmark = pytest.mark.any_device


# "auto" does not always give the compiler the kernels.
COMPILED = ["auto", *(["native"] if native.missing is None else [])]


@pytest.fixture(autouse=True)
def forget_compiled():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def eca_of(case, **arguments):
    return lambda x, w: eca_fused.eca(x, w, padding_mode=case.padding_mode, **arguments)


def assert_as_eager(function, case):
    """A compiled function of x and weight is as accurate as eager mode, and has its strides."""
    # Cloned, as the next call of a CUDA graph writes over its results.
    got = tuple(t.clone() for t in run(function, case))
    assert_as_accurate(got, case)
    for name, ours, eager in zip(("y", "dx", "dweight"), got, run(eca_of(case), case), strict=True):
        assert ours.stride() == eager.stride(), name
    with torch.no_grad():
        y, eager = function(case.x, case.weight), eca_of(case)(case.x, case.weight)
    assert_as_accurate((y, *got[1:]), case)
    assert y.stride() == eager.stride()


def targets(counter):
    """What the captured graphs call."""
    return {node.target for graph in counter.graphs for node in graph.graph.nodes}


@pytest.mark.parametrize("backend", COMPILED)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
def test_compiled_is_as_accurate_as_eager(dtype, layout, backend):
    case = make_case((3, 8, 5, 7), 5, dtype, layout)
    assert_as_eager(torch.compile(eca_of(case, backend=backend), fullgraph=True), case)


@pytest.mark.parametrize("backend", COMPILED)
@pytest.mark.parametrize(
    ("shape", "layout", "padding_mode", "own_taps"),
    [
        ((2, 8), "contiguous", "circular", True),
        ((2, 8, 9), "channels_last", "zeros", False),
        ((2, 5, 3, 4, 2), "channels_last", "circular", False),
        ((1, 1, 1, 1), "contiguous", "zeros", False),
        ((2, 6, 16, 16), "contiguous", "zeros", True),
    ],
    ids=name_of,
)
def test_shapes_paddings_and_taps(shape, layout, padding_mode, own_taps, backend):
    k = 1 if shape[1] == 1 else 7
    case = make_case(shape, k, layout=layout, padding_mode=padding_mode, own_taps=own_taps)
    assert_as_eager(torch.compile(eca_of(case, backend=backend), fullgraph=True), case)


@pytest.mark.parametrize("backend", COMPILED)
def test_taps_in_float32_under_half_precision(backend):
    case = make_case((2, 8, 5, 7), 3, torch.bfloat16, taps_dtype=torch.float32)
    assert_as_eager(torch.compile(eca_of(case, backend=backend), fullgraph=True), case)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("view", VIEWS)
def test_strides_for_views(view, layout):
    whole = make_case((3, 8, 4, 6), layout=layout)
    case = Case(VIEWS[view](whole.x), whole.weight, VIEWS[view](whole.dy))
    function = torch.compile(eca_of(case), fullgraph=True)
    with torch.no_grad():
        y, eager = function(case.x, case.weight), eca_of(case)(case.x, case.weight)
    torch.testing.assert_close(y, eager)
    assert y.stride() == eager.stride()


@pytest.mark.parametrize("mode", ["reduce-overhead", "max-autotune"])
def test_modes(mode):
    case = make_case((2, 8, 6, 6), layout="channels_last")
    assert_as_eager(torch.compile(eca_of(case), fullgraph=True, mode=mode), case)


@pytest.mark.parametrize("backend", ["auto", "native"])
@pytest.mark.parametrize("dynamic", ["mark_dynamic", "dynamic=True"])
def test_no_recompilation_for_another_batch_or_size(dynamic, backend):
    if backend == "native" and native.missing is not None:
        pytest.skip("needs the compiled extension: run `make build`")
    marked = dynamic == "mark_dynamic"
    counter = CompileCounterWithBackend("inductor")
    layer = ECALayer(8, backend=backend)
    function = torch.compile(
        layer, fullgraph=True, backend=counter, dynamic=None if marked else True
    )
    shapes = [(4, 8, 6, 7), (5, 8, 6, 7), (32, 8, 6, 7)]
    if not marked:
        shapes += [(3, 8, 9, 5)]
    for grad in (True, False):
        before = counter.frame_count
        for shape in shapes:
            case = make_case(shape, layout="channels_last")
            x = case.x.requires_grad_(grad)
            if marked:
                torch._dynamo.mark_dynamic(x, 0)
            with torch.set_grad_enabled(grad):
                y, want = function(x), layer(case.x)
            torch.testing.assert_close(y, want)
            assert y.stride() == want.stride()
            if grad:
                got, want = (torch.autograd.grad(t, x, case.dy)[0] for t in (y, want))
                torch.testing.assert_close(got, want)
                assert got.stride() == want.stride()
        assert counter.frame_count == before + 1


@pytest.mark.parametrize("backend", COMPILED)
@pytest.mark.parametrize("grad", [True, False])
def test_unmarked_batches_compile_as_often_as_for_one_operation(grad, backend):
    """By itself PyTorch compiles for the first size, then for any, and again for one sample."""
    layer = ECALayer(8, backend=backend)
    ours, plain = CompileCounterWithBackend("aot_eager"), CompileCounterWithBackend("aot_eager")
    function = torch.compile(layer, fullgraph=True, backend=ours)
    sigmoid = torch.compile(torch.sigmoid, fullgraph=True, backend=plain)
    for samples in (2, 3, 5, 1, 7, 1):
        x = make_case((samples, 8, 6, 7)).x.requires_grad_(grad)
        with torch.set_grad_enabled(grad):
            sigmoid(x)
            y, want = function(x), layer(x)
            torch.testing.assert_close(y, want)
            if grad:
                dx, want = (torch.autograd.grad(t.sum(), x)[0] for t in (y, want))
                torch.testing.assert_close(dx, want)
        assert ours.frame_count <= plain.frame_count, samples
    assert ours.frame_count == 3


@pytest.mark.parametrize("backend", COMPILED)
def test_no_graph_break_in_a_network(backend):
    layer, circular = (ECALayer(8, backend=backend, padding_mode=mode) for mode in MODES)
    net = nn.Sequential(nn.Conv2d(3, 8, 3), layer, nn.ReLU(), circular)
    found = torch._dynamo.explain(net)(torch.randn(2, 3, 8, 8))
    assert (found.graph_count, found.graph_break_count) == (1, 0)


@needs_extension
@pytest.mark.skipif(DEVICE != "cpu", reason="the CPU's: run it without ECA_FUSED_TEST_DEVICE")
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("grad", [False, True], ids=["inference", "training"])
def test_auto_on_the_cpu_trains_in_the_kernels_where_channels_are_innermost(grad, layout):
    layer, x = ECALayer(8), torch.randn(2, 8, 4, 4)
    if layout == "channels_last":
        x = x.contiguous(memory_format=torch.channels_last)
    counter = CompileCounterWithBackend("eager")
    with torch.set_grad_enabled(grad):
        y = torch.compile(layer, fullgraph=True, backend=counter)(x)
    assert y.requires_grad is grad
    # With gradients the operators are in the subgraphs of the autograd function.
    code = "".join(str(graph) for graph in counter.graphs)
    subgraphs = [m.code for g in counter.graphs for m in g.modules() if hasattr(m, "code")]
    in_kernels = grad and layout == "channels_last"
    assert ("eca_fused.forward.default" in code + "".join(subgraphs)) is in_kernels
    assert torch.ops.eca_fused.inference.default not in targets(counter)


@needs_extension
@pytest.mark.parametrize("how", ["argument", "use_backend"])
def test_a_backend_by_name_is_the_one_that_runs(how):
    x = torch.randn(2, 8, 4, 4)
    for name, present in (("native", True), ("reference", False)):
        torch._dynamo.reset()
        counter = CompileCounterWithBackend("inductor")
        layer = ECALayer(8, backend=name if how == "argument" else "auto")
        function = torch.compile(layer, fullgraph=True, backend=counter)
        inside = eca_fused.use_backend(name) if how != "argument" else contextlib.nullcontext()
        with torch.no_grad(), inside:
            got, want = function(x), layer(x)
        torch.testing.assert_close(got, want)
        assert (torch.ops.eca_fused.inference.default in targets(counter)) is present


@pytest.mark.parametrize("backend", COMPILED)
def test_the_first_call_of_all_compiles_once(backend):
    # In a process of its own, where nothing has called eca() before.
    code = f"""
import torch
from eca_fused import ECALayer
from torch._dynamo.testing import CompileCounter
counter = CompileCounter()
function = torch.compile(ECALayer(8, backend={backend!r}), fullgraph=True, backend=counter)
for _ in range(3):
    function(torch.ones(2, 8, 4, 4))
print(counter.frame_count)
"""
    done = python(code)
    assert done.stdout.strip() == "1", done.stdout + done.stderr


def test_leaving_use_backend_compiles_again():
    layer, x = ECALayer(8), torch.randn(2, 8, 4, 4)
    counter = CompileCounterWithBackend("eager")
    function = torch.compile(layer, fullgraph=True, backend=counter)
    with torch.no_grad():
        function(x)
        with eca_fused.use_backend("reference"):
            function(x)
            function(x)
        function(x)
    assert counter.frame_count == 2
    assert torch.conv1d in targets(counter)  # only the reference calls it


@pytest.mark.parametrize("backend", ["auto", "reference"] + ["native"] * (native.missing is None))
@pytest.mark.parametrize("layout", LAYOUTS)
def test_in_place_inference(layout, backend):
    case = make_case((2, 8, 6, 6), layout=layout)
    layer = ECALayer(8, inplace=True, backend=backend)
    function = torch.compile(layer, fullgraph=True)
    for inference in (torch.no_grad, torch.inference_mode):
        x = case.x.clone()
        with inference():
            want = layer(case.x.clone())
            assert function(x) is x
        torch.testing.assert_close(x, want)
        assert x.stride() == case.x.stride()


def test_in_place_with_a_gradient_is_an_error():
    function = torch.compile(ECALayer(8, inplace=True))
    with pytest.raises(RuntimeError, match="in-place ECA would overwrite the x"):
        function(torch.randn(2, 8, 4, 4))


@pytest.mark.parametrize("backend", COMPILED)
def test_a_compiled_block_trains(backend):
    norm = nn.BatchNorm2d(8)
    plain = nn.Sequential(nn.Conv2d(4, 8, 1), norm, ECALayer(8, fused=False), nn.ReLU()).double()
    fused = copy.deepcopy(plain)
    fused[2].fused, fused[2].backend = True, backend
    x = torch.randn(4, 4, 6, 6, dtype=torch.float64)
    grads = []
    for net, function in ((plain, plain), (fused, torch.compile(fused, fullgraph=True))):
        function(x).square().sum().backward()
        grads.append([p.grad for p in net.parameters()])
    torch.testing.assert_close(*grads)


@pytest.mark.parametrize("padding_mode", MODES)
@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
@pytest.mark.parametrize("own_taps", [False, True])
def test_plain_operations_are_as_accurate_as_the_kernels(own_taps, dtype, padding_mode):
    # Uncompiled, so that many cases take no time.
    case = make_case((3, 9, 6, 7), 5, dtype, padding_mode=padding_mode, own_taps=own_taps)
    circular = padding_mode == "circular"
    assert_as_accurate(run(lambda x, w: graph.eca(x, w, circular), case), case)


@needs_extension
@pytest.mark.parametrize("own_taps", [False, True])
@pytest.mark.parametrize(
    "shape", [(2, 8), (2, 1, 5), (0, 4, 3, 3), (2, 4, 0), (1, 4, 2, 3, 2)], ids=name_of
)
def test_plain_operations_keep_the_contract_of_the_kernels(shape, own_taps):
    case = make_case(shape, 3, layout="channels_last", own_taps=own_taps)
    way, theirs = ForTheCompiler(native), native.inference(case.x, case.weight)
    with torch.no_grad():
        y, x = way.eca(case.x, case.weight, False), case.x.clone()
        assert way.eca_(x, case.weight, False) is x
    torch.testing.assert_close(y, theirs, equal_nan=True)
    assert (y.dtype, y.stride()) == (theirs.dtype, theirs.stride())
    assert torch.equal(x.nan_to_num(), y.nan_to_num())


BAD_INPUT = {
    "integer x": (torch.ones(2, 8, 3, 3, dtype=torch.int32), torch.ones(1, 1, 3)),
    "even taps": (torch.ones(2, 8, 3, 3), torch.ones(1, 1, 4)),
    "too many dimensions": (torch.ones(2, 8, 1, 1, 1, 1), torch.ones(1, 1, 3)),
    "taps in float64": (torch.ones(2, 8, 3, 3), torch.ones(1, 1, 3, dtype=torch.float64)),
    "one dimension": (torch.ones(8), torch.ones(1, 1, 3)),
}


@pytest.mark.parametrize("grad", [False, True], ids=["inference", "training"])
@pytest.mark.parametrize("what", BAD_INPUT)
def test_what_eager_refuses_is_refused_by_the_compiled(what, grad):
    x, weight = BAD_INPUT[what]
    weight = weight.clone().requires_grad_(grad)
    with pytest.raises((TypeError, ValueError)) as eager:
        eca_fused.eca(x, weight)
    with pytest.raises((TypeError, ValueError)) as compiled:
        torch.compile(eca_fused.eca)(x, weight)
    assert str(compiled.value) == str(eager.value)
