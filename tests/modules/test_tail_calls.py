"""ResidualTail under autocast, on views, in checkpoints, torch.func and TorchScript."""

import copy

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from eca_fused import ECALayer, NormActAttention, ResidualTail, attention
from helpers.cases import DEVICE, LAYOUTS, in_layout
from helpers.tails import MODULES_OF_TAILS, assert_same_step, batch_norm, called

pytestmark = MODULES_OF_TAILS

C = 12
ATTENTIONS = {
    "none": lambda: None,
    "eca": lambda: ECALayer(C),
    "se": lambda: attention.SE(C, 4),
}


def a_tail(name, training=True):
    return ResidualTail(ATTENTIONS[name](), batch_norm(C), batch_norm(C)).train(training)


def maps(layout="contiguous", dtype=torch.float64, shape=(3, C, 5, 6)):
    return [in_layout(torch.randn(shape, dtype=dtype), layout) for _ in range(2)]


# Views of maps (5, 16, 9, 10) that have the shape (3, C, 5, 6).
VIEWS = {
    "samples and channels": lambda t: t[1:4, 2 : 2 + C, :5, :6],
    "rows": lambda t: t[:3, :C, 2:7, :6],
    "columns": lambda t: t[:3, :C, :5, 3:9],
    "every second": lambda t: t[::2, :C, ::2, 1:7],
    "turned": lambda t: t[:3, :C, :6, :5].mT,
    "flipped": lambda t: t[:3, :C, :5, :6].flip(3),
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("view", VIEWS)
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("name", ATTENTIONS)
def test_views(name, training, view, layout):
    tail = a_tail(name, training).double()
    x, identity = (VIEWS[view](t) for t in maps(layout, shape=(5, 16, 9, 10)))
    results = []
    for function in (copy.deepcopy(tail), lambda *a: called(tail, *a)):
        x, identity = (t.detach().requires_grad_() for t in (x, identity))
        y = function(x, identity)
        results.append((y, *torch.autograd.grad(y.square().sum(), (x, identity))))
    for got, want in zip(*results, strict=True):
        torch.testing.assert_close(got, want)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("name", ATTENTIONS)
def test_autocast_is_as_accurate_as_the_modules(name, training):
    """In bfloat16, against float64. Twelve roundings of a size may have norms three times apart."""
    tail, conv = a_tail(name, training), nn.Conv2d(C, C, 1)
    x, identity = maps(dtype=torch.float32, shape=(4, C, 20, 20))

    def step(function, module, conv, given, dtype=None):
        given = [t.detach().to(dtype or t.dtype).requires_grad_() for t in given]
        with torch.autocast(DEVICE, torch.bfloat16, enabled=dtype is None):
            x = conv(given[0])
            y = function(module, x, given[1].to(x.dtype))
        assert y.dtype == (dtype or torch.bfloat16)
        asked = [*given, *conv.parameters(), *module.parameters()]
        return [y.detach(), *torch.autograd.grad(y.double().square().mean(), asked)]

    def twins():
        return copy.deepcopy(tail), copy.deepcopy(conv)

    ours = step(lambda m, *a: m(*a), *twins(), (x, identity))
    plain = step(called, *twins(), (x, identity))
    module, wide = twins()
    exact = step(called, module.double(), wide.double(), (x, identity), torch.float64)
    for got, usual, want in zip(ours, plain, exact, strict=True):
        allowed = 3 * (usual.double() - want).norm() + 2**-9 * want.norm()
        assert (got.double() - want).norm() <= allowed


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("name", ATTENTIONS)
def test_checkpointing(name, reentrant):
    """The forward pass runs twice, and updates running statistics twice, as with the modules."""
    results = []
    tail = a_tail(name).double()
    x, identity = maps()
    for calls in (False, True):
        twin = copy.deepcopy(tail)
        function = (lambda *a, twin=twin: called(twin, *a)) if calls else twin
        given = [t.detach().requires_grad_() for t in (x, identity)]
        y = checkpoint(function, *given, use_reentrant=reentrant)
        y.square().sum().backward()
        leaves = [*given, *twin.parameters()]
        results.append([y.detach(), *(t.grad for t in leaves), *twin.buffers()])
    for got, want in zip(*results, strict=True):
        torch.testing.assert_close(got, want)


@pytest.mark.parametrize("transform", ["grad", "per sample", "vmap", "jvp", "hessian"])
@pytest.mark.parametrize("name", ATTENTIONS)
def test_transforms(name, transform):
    tail = a_tail(name, training=False).double()
    x, identity = maps()
    dy = torch.randn_like(x)

    def result(function):
        if transform == "grad":
            return torch.func.grad(lambda *a: (function(*a) * dy).sum(), (0, 1))(x, identity)
        if transform == "per sample":
            one = torch.func.grad(lambda a, b: function(a[None], b[None]).square().sum())
            return torch.vmap(one)(x, identity)
        if transform == "vmap":
            return torch.vmap(function)(torch.stack([x, 2 * x]), torch.stack([identity, x]))
        if transform == "jvp":
            return torch.func.jvp(function, (x, identity), (dy, x))
        small = x[:1, :, :2, :2], identity[:1, :, :2, :2]
        return torch.func.hessian(lambda a: function(a, small[1]).square().sum())(small[0])

    torch.testing.assert_close(result(tail), result(lambda *a: called(tail, *a)))


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("name", ATTENTIONS)
def test_gradients_of_the_parameters_by_functional_call(name, training):
    tail = a_tail(name, training=training).double()
    twin = copy.deepcopy(tail)
    x, identity = maps()
    given = {key: p.detach() for key, p in tail.named_parameters()}
    buffers = dict(tail.named_buffers())

    def loss(parameters, buffers):
        state = (parameters, buffers)
        return torch.func.functional_call(tail, state, (x, identity)).square().sum()

    got = torch.func.grad(loss)(given, buffers)
    total = called(twin, x, identity).square().sum()
    want = torch.autograd.grad(total, list(twin.parameters()))
    for key, value in zip(given, want, strict=True):
        torch.testing.assert_close(got[key], value)
    torch.testing.assert_close(buffers, dict(twin.named_buffers()))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_identity_is_a_view_of_the_memory_of_x(layout):
    tail = a_tail("eca").double()
    both = maps(layout, shape=(3, 2 * C, 5, 6))[0]
    assert_same_step(tail, both[:, :C], both[:, C:])


@pytest.mark.filterwarnings(
    "ignore:.torch.jit:FutureWarning", "ignore:.torch.jit:DeprecationWarning"
)
@pytest.mark.parametrize("cls", [ResidualTail, NormActAttention])
def test_scripting_says_what_to_do(cls):
    message = f"expected a model without {cls.__name__}; .* torch.jit.trace instead"
    with pytest.raises(RuntimeError, match=message):
        torch.jit.script(nn.Sequential(cls(ECALayer(C))))
