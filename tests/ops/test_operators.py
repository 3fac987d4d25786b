"""torch.ops.eca_fused.*: schemas, fakes and strides by opcheck; a layer under torch.compile."""

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

import eca_fused
from eca_fused.ops import native
from helpers.cases import (
    DEVICE,
    DTYPES,
    LAYOUTS,
    VIEWS,
    in_layout,
    make_case,
    name_of,
    needs_extension,
)
from helpers.processes import python, run_tests

pytestmark = [pytest.mark.any_device, needs_extension]
ops = torch.ops.eca_fused


def check_in_place(x, weight, circular=False):
    x = x.clone(memory_format=torch.preserve_format)
    torch.library.opcheck(ops.inference_, (x, weight, circular))


def check_operators(x, weight, circular=False):
    torch.library.opcheck(ops.forward, (x, weight, circular))
    torch.library.opcheck(ops.inference, (x, weight, circular))
    _, mean, gate = ops.forward(x, weight, circular)
    dy = torch.randn_like(x)
    for needs in ((True, True), (True, False), (False, True)):
        torch.library.opcheck(ops.backward, (dy, x, weight, mean, gate, circular, *needs))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
@pytest.mark.parametrize(
    "shape", [(2, 8), (2, 8, 5), (2, 8, 4, 4), (2, 3, 1, 1), (2, 4, 2, 3, 4)], ids=name_of
)
def test_opcheck_for_every_shape(shape, dtype, layout):
    case = make_case(shape, dtype=dtype, layout=layout)
    check_operators(case.x, case.weight)


@pytest.mark.parametrize("k", [1, 3, 5, 7, 9])
@pytest.mark.parametrize("circular", [False, True])
@pytest.mark.parametrize("shape", [(2, 6, 4, 4), (2, 4, 1, 1)], ids=name_of)
def test_opcheck_for_taps(shape, k, circular):
    case = make_case(shape, k=k, own_taps=circular)
    check_operators(case.x, case.weight, circular)
    layout = "channels_last" if circular else "contiguous"
    check_in_place(in_layout(case.x, layout), case.weight, circular)


@pytest.mark.parametrize("taps_dtype", [None, torch.float32], ids=["same", "single"])
@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
def test_opcheck_for_more_taps_than_channels(dtype, taps_dtype):
    case = make_case((1, 1, 3, 3), k=9, dtype=dtype, taps_dtype=taps_dtype)
    check_operators(case.x, case.weight)
    check_in_place(case.x, case.weight)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("view", VIEWS)
def test_opcheck_for_views(view, layout):
    case = make_case((3, 8, 4, 4), layout=layout)
    check_operators(VIEWS[view](case.x), case.weight)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
@pytest.mark.parametrize("view", ["whole", "batch slice", "channel slice", "spatial slice"])
def test_opcheck_in_place(view, dtype, layout):
    case = make_case((3, 8, 4, 4), dtype=dtype, layout=layout)
    torch.library.opcheck(
        ops.inference_,
        (VIEWS[view](case.x.clone(memory_format=torch.preserve_format)), case.weight),
    )


def test_a_bare_operator_warns_that_it_has_no_gradient():
    # The operators are the kernels alone; eca() is differentiable.
    case = make_case((2, 8, 4, 4))
    y = ops.forward(case.x.requires_grad_(), case.weight)[0]
    with pytest.warns(UserWarning, match="an autograd kernel was not registered"):
        y.sum().backward()


@pytest.mark.parametrize("layout", LAYOUTS)
def test_compiles_without_a_graph_break(layout):
    case = make_case((2, 8, 6, 6), layout=layout)
    layer = eca_fused.ECALayer(8)
    compiled = torch.compile(layer, fullgraph=True)
    results = []
    for function in (layer, compiled):
        x = case.x.detach().clone(memory_format=torch.preserve_format).requires_grad_()
        layer.zero_grad()
        y = function(x)
        y.backward(case.dy)
        results.append((y, x.grad, layer.conv.weight.grad.clone()))
        assert y.stride() == case.x.stride()
    for ours, want in zip(*results, strict=True):
        torch.testing.assert_close(ours, want)


@pytest.mark.skipif(DEVICE != "cpu", reason="the CPU's: run it without ECA_FUSED_TEST_DEVICE")
@pytest.mark.parametrize("capability", ["avx2", "baseline"])
def test_kernels_for_other_processors(capability):
    here = native.description.partition("(")[2].partition(")")[0]
    known = ["baseline", "avx2", "avx512"]
    if known.index(capability) >= known.index(here):
        pytest.skip(f"needs a processor with more than {capability}; this one has {here}")
    # 5 shares no factor with the grids of cases.
    env = {"ECA_FUSED_CPU_CAPABILITY": capability, "ECA_FUSED_TEST_SAMPLE": "5"}
    code = "from eca_fused.ops import native; print(native.description)"
    assert f"({capability})" in python(code, **env).stdout
    files = ("kernels", "values", "gating_operators")
    run_tests("-x", "-p", "helpers.sample", *(f"tests/ops/test_{name}.py" for name in files), **env)
    # Of tails, what the passes over maps compute.
    files = ("tests/autograd/test_residual_tail.py", "tests/modules/test_residual_tail.py")
    names = "values_gradients or rounds_once or every_shape or views or never_less or moments"
    run_tests("-x", "-p", "helpers.sample", *files, "-k", names, **env)


def calls():
    """Every operator, with arguments that it takes."""
    case = make_case((2, 6, 4, 4))
    x, weight, dy = case.x, case.weight, case.dy
    mean, gate = torch.rand(2, 6, device=DEVICE), torch.rand(2, 6, device=DEVICE)
    return {
        "forward": (x, weight),
        "inference": (x, weight),
        "inference_": (x.clone(), weight),
        "inference_into": (x, weight, torch.empty_like(x)),
        "backward": (dy, x, weight, mean, gate),
        "pool": (x,),
        "rescale": (x, gate, mean),
        "rescale_backward": (dy, x, gate),
    }


# ---- the operators that write, called directly ----


def written(op, x, weight, target):
    """Call it so that target is written."""
    if op == "inference_":
        return ops.inference_(target, weight)
    return ops.inference_into(x, weight, target)


@pytest.mark.parametrize("op", ["inference_", "inference_into"])
def test_a_write_is_counted(op):
    """Autograd notices that a tensor that it has kept was overwritten."""
    case = make_case((2, 8, 4, 4))
    target, factor = case.x.clone(), torch.randn_like(case.x).requires_grad_()
    product = (factor * target).sum()
    version = target._version
    with torch.no_grad():
        written(op, case.x, case.weight, target)
    assert target._version == version + 1
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        product.backward()


@pytest.mark.parametrize("op", ["inference_", "inference_into"])
@pytest.mark.parametrize("who", ["x", "weight", "target"])
@pytest.mark.parametrize("leaf", [True, False])
def test_a_write_refuses_what_needs_a_gradient(op, who, leaf):
    case = make_case((2, 8, 4, 4))
    given = {"x": case.x, "weight": case.weight, "target": case.x.clone()}
    if op == "inference_":
        given["x"] = given["target"]
    before = given["target"].clone()
    given[who] = given[who].requires_grad_() if leaf else given[who].requires_grad_() * 1
    if op == "inference_" and who == "x":
        given["target"] = given["x"]
    with pytest.raises(RuntimeError, match="has no gradient, and one is needed"):
        written(op, given["x"], given["weight"], given["target"])
    assert torch.equal(given["target"], before)
    with torch.no_grad():
        written(op, given["x"], given["weight"], given["target"])
    assert not torch.equal(given["target"], before)


@pytest.mark.parametrize("op", ["inference_", "inference_into"])
@pytest.mark.parametrize("inference_mode", [False, True])
def test_a_write_refuses_a_negated_view(op, inference_mode):
    case = make_case((2, 8, 4, 4))
    with torch.inference_mode(inference_mode):
        target = torch._neg_view(case.x.clone())
        with pytest.raises(RuntimeError, match=r"a negated view.*resolve_neg\(\)"):
            written(op, case.x, case.weight, target)


def test_writes_in_inference_mode():
    case = make_case((2, 8, 4, 4))
    want = eca_fused.eca(case.x, case.weight)
    with torch.inference_mode():
        x, out = case.x.clone(), torch.empty_like(case.x)
        ops.inference_(x, case.weight)
        ops.inference_into(case.x, case.weight, out, circular=False)
    torch.testing.assert_close((x, out), (want, want))


def arguments_of_operators():
    names = {
        "forward": "x weight",
        "inference": "x weight",
        "inference_": "x weight",
        "inference_into": "x weight out",
        "backward": "dy x weight mean gate",
        "rescale": "x gate shift",
        "rescale_backward": "dy x gate",
    }
    return [(op, i, a) for op, them in names.items() for i, a in enumerate(them.split())]


@pytest.mark.parametrize(("op", "position", "argument"), arguments_of_operators())
def test_one_argument_without_memory_is_refused(op, position, argument):
    """Torch then calls the fake: what it returns is memory that no kernel has written."""
    given = list(calls()[op])
    given[position] = given[position].to("meta")
    with pytest.raises((ValueError, RuntimeError), match=r"device|meta"):
        getattr(ops, op)(*given)


@pytest.mark.parametrize("change", ["shape", "dtype"])
@pytest.mark.parametrize(("op", "position", "argument"), arguments_of_operators())
def test_fakes_refuse_what_the_operators_refuse(op, position, argument, change):
    given = list(calls()[op])
    t = given[position]
    changed = {"shape": t.flatten(), "dtype": t.to(torch.int32)}
    given[position] = changed[change]
    with pytest.raises(RuntimeError, match="expected"):
        getattr(ops, op)(*given)
    with FakeTensorMode() as mode, pytest.raises((TypeError, ValueError), match="expected"):
        getattr(ops, op)(*(mode.from_tensor(t) for t in given))


# ---- the mutating operators and autograd, called directly ----

WRITE = {
    "inference_": lambda x, weight: ops.inference_(x, weight),
    "inference_into": lambda x, weight: ops.inference_into(torch.ones_like(x), weight, x),
}


@pytest.mark.parametrize("write", WRITE)
def test_a_write_in_inference_mode_is_counted(write):
    a = torch.randn(2, 8, 4, 4, device=DEVICE, requires_grad=True)
    scale, weight = torch.rand_like(a), torch.randn(1, 1, 3, device=DEVICE)
    y = a * scale.detach()
    scale = y.grad_fn._saved_other
    with torch.inference_mode():
        WRITE[write](scale, weight)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


@pytest.mark.parametrize("write", WRITE)
def test_tensors_of_inference_mode_are_written_inside_it_alone(write):
    with torch.inference_mode():
        x, weight = torch.ones(2, 8, 4, 4, device=DEVICE), torch.randn(1, 1, 3, device=DEVICE)
        WRITE[write](x, weight)
        before = x.clone()
    for taps in (weight, torch.zeros(1, 1, 3, device=DEVICE)):
        with torch.no_grad(), pytest.raises(RuntimeError, match="was made in inference mode"):
            WRITE[write](x, taps)
    assert torch.equal(x, before)


@pytest.mark.parametrize("write", WRITE)
def test_no_tangent_goes_stale(write):
    x, weight = torch.ones(2, 8, 4, 4, device=DEVICE), torch.randn(1, 1, 3, device=DEVICE)

    def function(x):
        x = x * 1
        WRITE[write](x, weight)
        return x

    with pytest.raises(RuntimeError, match="no forward-mode derivative"):
        torch.func.jvp(function, (x,), (x,))


@pytest.mark.parametrize("position", range(5))
def test_the_fake_refuses_a_sparse_tensor(position):
    case = make_case((2, 8, 3, 3))
    _, mean, gate = ops.forward(case.x, case.weight)
    arguments = [case.dy, case.x, case.weight, mean, gate]
    with FakeTensorMode() as mode:
        fakes = [mode.from_tensor(t) for t in arguments]
        fakes[position] = fakes[position].to_sparse()
        with pytest.raises(Exception, match=r"expected \w+ as a dense tensor"):
            ops.backward(*fakes)
