"""torch.func's transforms and forward-mode AD, alone and nested: results, and who computes them.

Everything is compared with the definition in float64 under the same transform, for which PyTorch
has the rules. A missing part of a derivative shows in the transforms nested one deeper.
"""

import warnings
from types import SimpleNamespace

import pytest
import torch
from torch import func, nn
from torch._dynamo.testing import CompileCounter
from torch.autograd import forward_ad, gradcheck, gradgradcheck
from torch.fx.experimental.proxy_tensor import make_fx

import eca_fused
from eca_fused.ops import backend as backend_module
from eca_fused.ops.backend import select
from helpers.cases import (
    BACKENDS,
    DTYPES,
    LAYOUTS,
    MODES,
    Case,
    assert_as_accurate,
    make_case,
    name_of,
    plain,
    run,
)

pytestmark = [
    pytest.mark.any_device,
    pytest.mark.parametrize("backend", BACKENDS),
    # Warnings of plain PyTorch: it has no rule for second derivatives of unfold(), and its forward
    # mode compiles decompositions with TorchScript.
    pytest.mark.filterwarnings("ignore:There is a performance drop:UserWarning"),
    pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated"),
    pytest.mark.filterwarnings("ignore:Attempted to insert a get_attr Node"),  # linearize()
]

BATCH = 3


def fused(case, backend):
    return lambda x, w: eca_fused.eca(x, w, padding_mode=case.padding_mode, backend=backend)


def batch_of_cases(padding_mode="zeros", own_taps=False, dtype=torch.float64, layout="contiguous"):
    """A case with the arguments of one call; its `many` has BATCH of each, stacked."""
    args = {"padding_mode": padding_mode, "own_taps": own_taps, "dtype": dtype, "layout": layout}
    cases = [make_case((2, 4, 3, 2), seed=seed, **args) for seed in range(BATCH)]
    case = cases[0]
    case.many = Case(*(torch.stack([getattr(c, n) for c in cases]) for n in ("x", "weight", "dy")))
    return case


def loss_of(function):
    # Cubes, so that no second or third derivative is zero by itself.
    return lambda x, w: (function(x, w) ** 3).sum()


BOTH = (0, 1)

# Each takes a function of x and the taps. `c` has the arguments of one call, `c.many` of several.
TRANSFORMS = {
    "grad": lambda f, c: func.grad(loss_of(f), BOTH)(c.x, c.weight),
    "grad for x": lambda f, c: func.grad(loss_of(f), 0)(c.x, c.weight),
    "grad for taps": lambda f, c: func.grad(loss_of(f), 1)(c.x, c.weight),
    "vjp": lambda f, c: func.vjp(f, c.x, c.weight)[1](c.dy),
    "vmap": lambda f, c: func.vmap(f, (0, None))(c.many.x, c.weight),
    "vmap, last dimension": lambda f, c: func.vmap(f, (-1, None), -1)(
        c.many.x.movedim(0, -1), c.weight
    ),
    "vmap in chunks": lambda f, c: func.vmap(f, (0, None), chunk_size=2)(c.many.x, c.weight),
    "vmap of vmap": lambda f, c: func.vmap(func.vmap(f, (1, None)), (0, None))(
        c.many.x.unsqueeze(2), c.weight
    ),
    "vmap over taps": lambda f, c: func.vmap(f, (None, 0))(c.x, c.many.weight),
    "vmap over both": lambda f, c: func.vmap(f)(c.many.x, c.many.weight),
    "vmap of grad": lambda f, c: func.vmap(func.grad(loss_of(f), BOTH), (0, None))(
        c.many.x, c.weight
    ),
    "vmap of grad for x": lambda f, c: func.vmap(func.grad(loss_of(f), 0), (0, None))(
        c.many.x, c.weight
    ),
    "vmap of grad for taps": lambda f, c: func.vmap(func.grad(loss_of(f), 1), (0, None))(
        c.many.x, c.weight
    ),
    "vmap of vmap of grad": lambda f, c: func.vmap(
        func.vmap(func.grad(loss_of(f), BOTH), (1, None)), (0, None)
    )(c.many.x.unsqueeze(2), c.weight),
    "vmap of grad over both": lambda f, c: func.vmap(func.grad(loss_of(f), BOTH))(
        c.many.x, c.many.weight
    ),
    "vmap of vjp": lambda f, c: func.vmap(lambda x, g: func.vjp(f, x, c.weight)[1](g))(
        c.many.x, c.many.dy
    ),
    "grad of vmap": lambda f, c: func.grad(loss_of(func.vmap(f, (0, None))), BOTH)(
        c.many.x, c.weight
    ),
    "grad of grad": lambda f, c: func.grad(
        lambda x, w: sum((g**2).sum() for g in func.grad(loss_of(f), BOTH)(x, w)), BOTH
    )(c.x, c.weight),
    "grad of vmap of grad": lambda f, c: func.grad(
        lambda x, w: sum(
            (g**2).sum() for g in func.vmap(func.grad(loss_of(f), BOTH), (0, None))(x, w)
        ),
        BOTH,
    )(c.many.x, c.weight),
    "jacrev": lambda f, c: func.jacrev(f, BOTH)(c.x, c.weight),
    "jacfwd": lambda f, c: func.jacfwd(f, BOTH)(c.x, c.weight),
    "jvp": lambda f, c: func.jvp(f, (c.x, c.weight), (c.dy, c.many.weight[1])),
    "jvp for x": lambda f, c: func.jvp(lambda x: f(x, c.weight), (c.x,), (c.dy,)),
    "jvp for taps": lambda f, c: func.jvp(lambda w: f(c.x, w), (c.weight,), (c.many.weight[1],)),
    "vmap of jvp": lambda f, c: func.vmap(
        lambda x, t: func.jvp(f, (x, c.weight), (t, c.many.weight[1]))
    )(c.many.x, c.many.dy),
    "jvp of vmap": lambda f, c: func.jvp(
        func.vmap(f, (0, None)), (c.many.x, c.weight), (c.many.dy, c.many.weight[1])
    ),
    "jvp of jvp": lambda f, c: func.jvp(
        lambda x, w: func.jvp(f, (x, w), (c.dy, c.many.weight[1]))[1],
        (c.x, c.weight),
        (c.many.dy[1], c.many.weight[2]),
    ),
    "jvp of vmap of grad": lambda f, c: func.jvp(
        func.vmap(func.grad(loss_of(f), BOTH), (0, None)),
        (c.many.x, c.weight),
        (c.many.dy, c.many.weight[1]),
    ),
    "linearize": lambda f, c: func.linearize(f, c.x, c.weight)[1](c.dy, c.many.weight[1]),
    "hessian": lambda f, c: func.hessian(loss_of(f), BOTH)(c.x, c.weight),
    "jacrev of jacrev": lambda f, c: func.jacrev(func.jacrev(loss_of(f), BOTH), BOTH)(
        c.x, c.weight
    ),
    "jacrev of jacfwd": lambda f, c: func.jacrev(func.jacfwd(loss_of(f), 1), BOTH)(c.x, c.weight),
    "jacfwd of jacfwd": lambda f, c: func.jacfwd(func.jacfwd(loss_of(f), 1), BOTH)(c.x, c.weight),
    "vmap of hessian": lambda f, c: func.vmap(func.hessian(loss_of(f), 1), (0, None))(
        c.many.x, c.weight
    ),
    "jacrev of hessian": lambda f, c: func.jacrev(func.hessian(loss_of(f), 1), BOTH)(c.x, c.weight),
    "jacfwd of hessian": lambda f, c: func.jacfwd(func.hessian(loss_of(f), 1), BOTH)(c.x, c.weight),
    "functionalize": lambda f, c: func.functionalize(f)(c.x, c.weight),
    "functionalize of grad": lambda f, c: func.functionalize(func.grad(loss_of(f), BOTH))(
        c.x, c.weight
    ),
}

ON_PLAIN_PYTORCH = {  # and warns, but for functionalize(), which a compiler follows
    "vmap over taps": True,
    "vmap over both": True,
    "vmap of grad over both": True,
    "functionalize": False,
    "functionalize of grad": False,
}


@pytest.fixture
def calls(backend, monkeypatch):
    """How often the kernels were called, forward and backward."""
    counts = SimpleNamespace(forward=0, backward=0)
    kernels = select(torch.empty(1), backend)

    def count(name):
        call = getattr(kernels, name)

        def counted(*args):
            setattr(counts, name, getattr(counts, name) + 1)
            return call(*args)

        monkeypatch.setattr(kernels, name, counted)

    count("forward")
    count("backward")
    return counts


@pytest.mark.parametrize("padding_mode", MODES)
@pytest.mark.parametrize("own_taps", [False, True], ids=["shared", "own"])
@pytest.mark.parametrize("name", TRANSFORMS)
def test_agrees_with_plain_pytorch(backend, name, own_taps, padding_mode):
    case = batch_of_cases(padding_mode, own_taps)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "eca_fused runs in plain PyTorch", RuntimeWarning)
        ours = TRANSFORMS[name](fused(case, backend), case)
    torch.testing.assert_close(ours, TRANSFORMS[name](plain(case), case))


@pytest.mark.parametrize("name", TRANSFORMS)
def test_plain_pytorch_runs_where_it_says_so_only(backend, name, calls, monkeypatch):
    monkeypatch.setattr(backend_module, "_warned", set())
    case = batch_of_cases()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(2):
            TRANSFORMS[name](fused(case, backend), case)
    said = [str(w.message) for w in caught if w.category is RuntimeWarning]
    if name in ON_PLAIN_PYTORCH:
        assert len(said) == ON_PLAIN_PYTORCH[name]
        assert all("taps batched by vmap()" in message for message in said)
        assert calls.forward == 0
    else:
        assert said == []
        assert calls.forward > 0


# Calls of forward and backward. Gradients of the taps for each example take one more pass.
CALLS = {
    "grad": (1, 1),
    "vjp": (1, 1),
    "vmap": (1, 0),
    "vmap of vmap": (1, 0),
    "vmap of grad": (1, 2),
    "vmap of grad for x": (1, 1),
    "vmap of vmap of grad": (1, 2),
    "vmap of vjp": (1, 2),
    "grad of vmap": (1, 1),
    "jvp": (1, 0),
    "jacfwd": (1, 0),
    "vmap of jvp": (1, 0),
}


@pytest.mark.parametrize("name", CALLS)
def test_a_batch_is_one_call_of_the_kernels(backend, name, calls):
    case = batch_of_cases()
    TRANSFORMS[name](fused(case, backend), case)
    assert (calls.forward, calls.backward) == CALLS[name]


def test_kernels_see_the_batch_among_the_samples(backend, monkeypatch):
    case = batch_of_cases(layout="channels_last")
    kernels = select(case.x, backend)
    seen = []

    def spy(x, weight, circular, call=kernels.forward):
        seen.append(x)
        return call(x, weight, circular)

    monkeypatch.setattr(kernels, "forward", spy)
    y = func.vmap(fused(case, backend), (0, None))(case.many.x, case.weight)
    assert [x.shape for x in seen] == [(BATCH * 2, 4, 3, 2)]
    # In place, in its layout: neither x nor y was copied.
    assert seen[0].data_ptr() == case.many.x.data_ptr()
    assert y.stride() == case.many.x.stride()


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
@pytest.mark.parametrize("taps_dtype", [None, torch.float32], ids=["same", "single"])
def test_gradients_of_each_example_are_as_accurate_as_of_one(backend, dtype, taps_dtype, layout):
    weight = make_case((1, 32), 5, dtype, taps_dtype=taps_dtype).weight
    cases = [
        make_case((2, 32, 7, 5), 5, dtype, layout, taps_dtype=taps_dtype, seed=i)
        for i in range(BATCH)
    ]
    x, dy = (torch.stack([getattr(c, name) for c in cases]) for name in ("x", "dy"))

    def results(x, dy):
        y, pull = func.vjp(lambda x, w: eca_fused.eca(x, w, backend=backend), x, weight)
        return y, *pull(dy)

    for case, *result in zip(cases, *func.vmap(results)(x, dy), strict=True):
        case.weight = weight
        assert_as_accurate(tuple(result), case)


@pytest.mark.parametrize("name", ["vmap", "vmap of grad", "vmap over both"])
def test_what_is_not_finite_stays_in_its_example(backend, name):
    case = batch_of_cases()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "eca_fused runs in plain PyTorch", RuntimeWarning)
        want = TRANSFORMS[name](fused(case, backend), case)
        case.many.x[1] = torch.inf
        got = TRANSFORMS[name](fused(case, backend), case)
    for ours, before in zip(
        *(torch.utils._pytree.tree_leaves(r) for r in (got, want)), strict=True
    ):
        torch.testing.assert_close(ours[::2], before[::2])
        assert not ours[1].isfinite().all()


@pytest.mark.parametrize("shape", [(0, 4, 3, 3), (2, 4), (2, 1, 5), (1, 3, 2, 2, 2)], ids=name_of)
def test_shapes_of_one_example(backend, shape):
    case = make_case(shape, dtype=torch.float64)
    x = torch.stack([case.x, 2 * case.x])

    def results(function):
        return (
            func.vmap(function, (0, None))(x, case.weight),
            func.vmap(func.grad(loss_of(function), BOTH), (0, None))(x, case.weight),
            func.jvp(function, (case.x, case.weight), (case.dy, case.weight)),
        )

    torch.testing.assert_close(results(fused(case, backend)), results(plain(case)))


# Plain PyTorch is no reference here: its convolution takes no empty batch.
EMPTY = [
    name
    for name in TRANSFORMS
    if name.startswith("vmap") and name not in ("vmap, last dimension", "vmap in chunks")
]


@pytest.mark.parametrize("name", [name for name in EMPTY if name not in ON_PLAIN_PYTORCH])
def test_a_batch_of_none(backend, name):
    case = batch_of_cases()
    want = TRANSFORMS[name](fused(case, backend), case)
    case.many = Case(case.many.x[:0], case.many.weight, case.many.dy[:0])
    got = TRANSFORMS[name](fused(case, backend), case)
    leaves = torch.utils._pytree.tree_leaves
    for ours, of_three in zip(leaves(got), leaves(want), strict=True):
        assert ours.shape == (0, *of_three.shape[1:])


def test_gradients_of_a_batch_of_none_are_zero(backend):
    case = batch_of_cases()
    case.many = Case(case.many.x[:0], case.many.weight, case.many.dy[:0])
    for name in ("grad of vmap", "grad of vmap of grad"):
        dx, dweight = TRANSFORMS[name](fused(case, backend), case)
        assert dx.shape == case.many.x.shape
        assert torch.equal(dweight, torch.zeros_like(case.weight))


@pytest.mark.parametrize("name", ["grad", "vmap", "vmap of grad", "jvp"])
def test_compiled_transforms_are_right_and_in_plain_pytorch(backend, name, calls):
    torch._dynamo.reset()
    case = batch_of_cases("circular", dtype=torch.float32)
    # A function of tensors: the compiler cannot take a Case apart.
    names = ("x", "weight", "dy")

    def computed(*tensors):
        one, many = Case(*tensors[:3], "circular"), Case(*tensors[3:])
        one.many = many
        return TRANSFORMS[name](fused(one, backend), one)

    tensors = [getattr(c, n) for c in (case, case.many) for n in names]
    counter = CompileCounter()
    got = torch.compile(computed, fullgraph=True, backend=counter)(*tensors)
    assert counter.frame_count == 1
    assert (calls.forward, calls.backward) == (0, 0)
    torch.testing.assert_close(got, TRANSFORMS[name](plain(case), case))
    torch._dynamo.reset()


IN_PLAIN_PYTORCH = {
    "taps of each example": lambda f, x, w: func.vmap(f)(x[None], w[None])[0],
    "functionalize": lambda f, x, w: func.functionalize(f)(x, w),
    "compiled": lambda f, x, w: torch.compile(
        lambda x: func.vmap(f, (0, None))(x, w), fullgraph=True, backend="eager"
    )(x[None])[0],
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=name_of)
@pytest.mark.parametrize("how", IN_PLAIN_PYTORCH)
def test_plain_pytorch_rounds_as_little_as_the_kernels(backend, how, dtype):
    torch._dynamo.reset()
    case = make_case((2, 32, 7, 5), 5, dtype, taps_dtype=torch.float32)

    def computed(x, w):
        return IN_PLAIN_PYTORCH[how](fused(case, backend), x, w)

    with warnings.catch_warnings(), torch.autocast(case.x.device.type, torch.bfloat16):
        warnings.filterwarnings("ignore", "eca_fused runs in plain PyTorch", RuntimeWarning)
        y = computed(case.x, case.weight)
    _, dx, dweight = run(lambda x, w: eca_fused.eca(x, w, backend=backend), case)
    assert_as_accurate((y, dx, dweight), case)
    torch._dynamo.reset()


def test_gradients_of_each_example_for_a_network(backend):
    net = nn.Sequential(
        nn.Conv2d(3, 8, 3), eca_fused.ECALayer(8, backend=backend), nn.Flatten(), nn.Linear(288, 2)
    ).double()
    x = torch.randn(BATCH, 3, 8, 8, dtype=torch.float64)
    parameters = dict(net.named_parameters())

    def loss(parameters, x):
        return func.functional_call(net, parameters, x.unsqueeze(0)).pow(2).sum()

    each = func.vmap(func.grad(loss), (None, 0))(parameters, x)
    for i in range(BATCH):
        net.zero_grad()
        net(x[i : i + 1]).pow(2).sum().backward()
        for name, parameter in parameters.items():
            torch.testing.assert_close(each[name][i], parameter.grad)


def test_the_usual_backward_pass_through_vmap(backend):
    case = batch_of_cases()

    def gradients(function):
        x, w = case.many.x.clone().requires_grad_(), case.weight.clone().requires_grad_()
        y = func.vmap(function, (0, None))(x, w)
        dx, dw = torch.autograd.grad(y, (x, w), case.many.dy, create_graph=True)
        return dx, dw, *torch.autograd.grad(dx.pow(2).sum() + dw.pow(2).sum(), (x, w))

    torch.testing.assert_close(gradients(fused(case, backend)), gradients(plain(case)))


@pytest.mark.parametrize("padding_mode", MODES)
@pytest.mark.parametrize("own_taps", [False, True], ids=["shared", "own"])
def test_forward_mode_and_batches_by_finite_differences(backend, own_taps, padding_mode):
    case = batch_of_cases(padding_mode, own_taps)
    case.x.requires_grad_()
    case.weight.requires_grad_()
    function, inputs = fused(case, backend), (case.x, case.weight)
    assert gradcheck(function, inputs, check_forward_ad=True, check_batched_grad=True)
    assert gradcheck(function, inputs, check_forward_ad=True, check_batched_forward_grad=True)
    assert gradgradcheck(function, inputs, check_fwd_over_rev=True, check_rev_over_rev=True)


@pytest.mark.parametrize("create_graph", [False, True])
@pytest.mark.parametrize("dual", ["x", "taps", "both"])
def test_dual_numbers(backend, dual, create_graph):
    case = batch_of_cases()

    def tangents(function):
        x, w = case.x.clone().requires_grad_(), case.weight.clone().requires_grad_()
        with forward_ad.dual_level():
            dual_x = forward_ad.make_dual(x, case.dy) if dual != "taps" else x
            dual_w = forward_ad.make_dual(w, case.many.weight[1]) if dual != "x" else w
            y = function(dual_x, dual_w)
            gradients = torch.autograd.grad(
                y, (x, w), case.many.dy[1], create_graph=create_graph, retain_graph=True
            )
            found = [forward_ad.unpack_dual(t).tangent for t in (y, *gradients)]
        if create_graph:
            found += torch.autograd.grad(sum(t.pow(2).sum() for t in found), (x, w))
        return found

    ours, want = tangents(fused(case, backend)), tangents(plain(case))
    assert all(t is not None for t in ours)
    torch.testing.assert_close(ours, want)


# Transforms of the gradients of a y that was computed before, outside of any transform.
OF_GRADIENTS = {
    "vmap": lambda f, c: func.vmap(f)(c.many.dy),
    "jvp": lambda f, c: func.jvp(f, (c.dy,), (c.many.dy[1],)),
    "grad": lambda f, c: func.grad(lambda g: sum((t**2).sum() for t in f(g)))(c.dy),
    "vmap of jvp": lambda f, c: func.vmap(lambda g: func.jvp(f, (c.dy,), (g,)))(c.many.dy),
}


@pytest.mark.parametrize("create_graph", [False, True])
@pytest.mark.parametrize("name", OF_GRADIENTS)
def test_transforms_of_a_backward_pass_alone(backend, name, create_graph, calls):
    case = batch_of_cases()

    def results(function):
        x, w = case.x.clone().requires_grad_(), case.weight.clone().requires_grad_()
        y = function(x, w)

        def gradients(dy):
            return torch.autograd.grad(
                y, (x, w), dy, retain_graph=True, create_graph=create_graph or name == "grad"
            )

        found = torch.utils._pytree.tree_leaves(OF_GRADIENTS[name](gradients, case))
        if create_graph:
            found += torch.autograd.grad(sum(t.pow(2).sum() for t in found), (x, w))
        return found

    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)  # such as of a batch that runs one by one
        warnings.filterwarnings("ignore", "`torch.jit.script` is deprecated")
        ours = results(fused(case, backend))
    assert calls.backward > 0
    torch.testing.assert_close(ours, results(plain(case)))


@pytest.mark.parametrize("create_graph", [False, True])
def test_a_dual_gradient_of_what_is_not_dual(backend, create_graph):
    case = batch_of_cases()

    def tangents(function):
        x, w = case.x.clone().requires_grad_(), case.weight.clone().requires_grad_()
        y = function(x, w)
        with forward_ad.dual_level():
            dual = forward_ad.make_dual(case.dy, case.many.dy[1])
            gradients = torch.autograd.grad(y, (x, w), dual, create_graph=create_graph)
            return [t for g in gradients for t in forward_ad.unpack_dual(g)]

    ours = tangents(fused(case, backend))
    assert all(t is not None for t in ours)
    torch.testing.assert_close(ours, tangents(plain(case)))


@pytest.mark.parametrize("strategy", ["reverse-mode", "forward-mode"])
def test_hessians_of_torch_autograd_functional(backend, strategy):
    case = batch_of_cases()
    # Its batches are older than torch.func's, and have rules of their own.
    ours, want = (
        torch.autograd.functional.hessian(
            loss_of(function(case)),
            (case.x, case.weight),
            vectorize=function is not plain,
            outer_jacobian_strategy=strategy if function is not plain else "reverse-mode",
        )
        for function in (lambda case: fused(case, backend), plain)
    )
    torch.testing.assert_close(ours, want)


def test_arguments_are_checked_in_transforms_too(backend):
    case = batch_of_cases()
    with pytest.raises(ValueError, match=r"got \(4, 3\)|expected x of shape"):
        func.vmap(func.vmap(fused(case, backend), (0, None)), (0, None))(
            case.many.x[:, :, 0, 0], case.weight
        )
    with pytest.raises(TypeError, match="expected x of dtype float32"):
        func.vmap(fused(case, backend), (0, None))(case.many.x.int(), case.weight)


def test_the_rules_of_transforms_cost_nothing_elsewhere(backend):
    case = batch_of_cases()
    assert eca_fused.eca(case.x.requires_grad_(), case.weight, backend=backend).grad_fn.name() == (
        "ECAFunctionBackward"
    )


def test_a_traced_transform_has_the_kernels_in_it(backend):
    case = batch_of_cases()
    function = func.vmap(func.grad(loss_of(fused(case, backend)), BOTH), (0, None))
    graph = make_fx(function)(case.many.x, case.weight)
    called = [node.target for node in graph.graph.nodes]
    kernels = select(case.x, backend)
    assert called.count(kernels.forward) == 1
    assert called.count(kernels.backward) == 2
    torch.testing.assert_close(graph(case.many.x, case.weight), function(case.many.x, case.weight))
