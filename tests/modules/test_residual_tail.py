"""ResidualTail: its modules called one after the other are the definition."""

import copy
import pickle

import pytest
import torch
from torch import nn
from torch.nn.utils import prune

from eca_fused import ECALayer, ResidualTail, attention
from eca_fused.attention import residual_tail
from eca_fused.ops import native
from helpers.cases import COMPILED, DEVICE, LAYOUTS, in_layout, needs_extension
from helpers.optional import needs_timm, needs_torchvision, timm_layers, torchvision_ops
from helpers.processes import two_processes
from helpers.tails import (
    MODULES_OF_TAILS,
    assert_same_state,
    assert_same_step,
    batch_norm,
    called,
    unregistered,
)

pytestmark = MODULES_OF_TAILS

C = 12
ATTENTIONS = {
    "none": lambda: None,
    "identity": nn.Identity,
    "eca": lambda: ECALayer(C),
    "circular": lambda: ECALayer(C, padding_mode="circular"),
    "ECA-NS": lambda: attention.ECANS(C),
    "se": lambda: attention.SE(C, 4),
}
if timm_layers is not None:
    from timm.models._efficientnet_blocks import SqueezeExcite

    SE = timm_layers.squeeze_excite.SEModule
    EcaModule, CecaModule = timm_layers.EcaModule, timm_layers.CecaModule
    ATTENTIONS |= {
        "timm SE": lambda: SE(C, rd_channels=4),
        "timm SE with batch norm": lambda: SE(C, rd_channels=4, norm_layer=nn.BatchNorm2d),
        "timm effective SE": lambda: timm_layers.squeeze_excite.EffectiveSEModule(C),
        "timm efficientnet SE": lambda: SqueezeExcite(C, rd_channels=4),
        "timm ECA with hard sigmoid": lambda: EcaModule(C, gate_layer="hard_sigmoid"),
        "timm ECA with MLP": lambda: EcaModule(C, use_mlp=True, rd_channels=4),
        "timm circular ECA with hard sigmoid": lambda: CecaModule(C, gate_layer="hard_sigmoid"),
    }
if torchvision_ops is not None:
    ATTENTIONS["torchvision SE"] = lambda: torchvision_ops.SqueezeExcitation(C, 4)
NORMS = {
    "no norm": lambda: None,
    "training": lambda: batch_norm(C),
    "evaluation": lambda: batch_norm(C).eval(),
    "not affine": lambda: batch_norm(C, affine=False),
    "no running statistics": lambda: batch_norm(C, track_running_stats=False),
    "no running statistics, evaluation": lambda: batch_norm(C, track_running_stats=False).eval(),
    "cumulative": lambda: batch_norm(C, momentum=None),
    "eps": lambda: batch_norm(C, eps=0.5),
}


def maps(layout="contiguous", n=3, dtype=torch.float64, c=C):
    """x and an identity with means far apart."""
    offset = torch.linspace(-3, 3, c, dtype=torch.float64)[:, None, None]
    return [
        in_layout((torch.randn(n, c, 5, 6, dtype=torch.float64) + o).to(dtype), layout)
        for o in (offset, -offset)
    ]


def fused(tail):
    """Whether the modules of a tail are one operation."""
    return residual_tail.why_called(tail.parts()) is None


@pytest.fixture
def no_calls(monkeypatch):
    """Calling the modules one after the other is an error."""

    def fail(*_):
        raise AssertionError("the modules were called")

    if native.missing is None:
        monkeypatch.setattr(residual_tail, "by_calling", fail)


# ---- the same as calling the modules ----


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("name", ATTENTIONS)
def test_values_gradients_and_statistics(name, norm, layout, no_calls):
    for other, activation in (("no norm", "relu"), ("training", "silu"), ("evaluation", "none")):
        tail = ResidualTail(ATTENTIONS[name](), NORMS[norm](), NORMS[other](), activation).double()
        assert fused(tail)
        for _ in range(2):
            assert_same_step(tail, *maps(layout))
    alone = ResidualTail(ATTENTIONS[name](), NORMS[norm]()).double()
    assert_same_step(alone, maps(layout)[0])


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("norm", ["no norm", "training", "evaluation"])
@pytest.mark.parametrize("name", ["eca", "se"])
def test_deterministic_algorithms(name, norm, layout, no_calls):
    """The same bits from every run, and nothing is read that was not written."""
    tail = ResidualTail(ATTENTIONS[name](), NORMS[norm](), NORMS[norm]())
    given = [m.requires_grad_() for m in maps(layout, n=16, dtype=torch.float32)]

    def step():
        twin = copy.deepcopy(tail)
        y = twin(*given)
        gradients = torch.autograd.grad(y.square().sum(), [*given, *twin.parameters()])
        return [y.detach(), *gradients, *twin.buffers()]

    # On a GPU, the products of SE's network ask for a setting of the environment.
    torch.use_deterministic_algorithms(True, warn_only=name == "se")
    try:
        first = step()
        for _ in range(3):
            assert all(map(torch.equal, step(), first))
    finally:
        torch.use_deterministic_algorithms(False)


@needs_timm
@pytest.mark.parametrize("kind", ["SEModule", "EffectiveSEModule"])
def test_attention_that_pools_the_maximum_too_is_called(kind):
    layer = getattr(timm_layers.squeeze_excite, kind)(C, add_maxpool=True)
    tail = ResidualTail(layer, NORMS["training"]()).double()
    assert residual_tail.why_called(tail.parts()) == f"attention: {kind} pools the maximum too"
    assert_same_step(tail, *maps())


@pytest.mark.parametrize("dims", [0, 1, 3])
def test_maps_of_other_dimensions(dims, no_calls):
    kind = {0: nn.BatchNorm1d, 1: nn.BatchNorm1d, 3: nn.BatchNorm3d}[dims]
    x, identity = torch.randn(2, 4, C, *(3, 4, 5)[:dims], dtype=torch.float64)
    tail = ResidualTail(ECALayer(C), batch_norm(C, kind=kind), batch_norm(C, kind=kind)).double()
    assert_same_step(tail, x, identity)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("offset", [0.0, 1e4])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_never_less_accurate_than_plain_pytorch(layout, offset, dtype):
    """Also for means of 1e4 standard deviations, in float32. Half precision has no such means.

    The floor is one rounding to the dtype, and 8 units of float32 for everything in it.
    """
    if dtype != torch.float32:
        offset = 0.0
    far = torch.linspace(-1, 1, 16)[:, None, None] * offset
    x, identity, dy = (
        in_layout((torch.randn(6, 16, 12, 12) + o).to(dtype), layout) for o in (far, -far, 0 * far)
    )
    tail = ResidualTail(ECALayer(16), batch_norm(16), batch_norm(16))

    def step(module, function, given):
        given = [t.detach().requires_grad_() for t in given]
        y = function(module, *given)
        grads = torch.autograd.grad(y, [*given, *module.parameters()], dy.to(y.dtype))
        return [y.detach(), *grads]

    ours = step(copy.deepcopy(tail), lambda m, *a: m(*a), (x, identity))
    usual = step(copy.deepcopy(tail), called, (x, identity))
    exact = step(copy.deepcopy(tail).double(), called, (x.double(), identity.double()))
    for got, other, want in zip(ours, usual, exact, strict=True):
        error, plain_error = ((t.double() - want).square().mean().sqrt() for t in (got, other))
        size = want.square().mean().sqrt()
        eps = torch.finfo(got.dtype).eps / 2 + 8 * torch.finfo(torch.float32).eps
        assert error <= plain_error + eps * size
        if offset and native.missing is None:
            assert error < 1e-5 * size


@needs_timm
@pytest.mark.parametrize("rescaled", [True, False])
def test_drop_path_draws_the_same_samples(rescaled, no_calls):
    drop = timm_layers.DropPath(0.5, rescaled)
    tail = ResidualTail(ECALayer(C), batch_norm(C), drop_path=drop).double()
    x, identity = maps(n=16)
    assert_same_step(tail, x, identity)
    torch.manual_seed(1)
    y = tail(x, identity)
    dropped = torch.isclose(y, identity.relu()).flatten(1).all(1)
    assert 0 < dropped.sum() < 16
    tail.eval()
    assert_same_step(tail, x, identity)


@needs_torchvision
@pytest.mark.parametrize("mode", ["row", "batch"])
def test_stochastic_depth(mode, no_calls):
    drop = torchvision_ops.StochasticDepth(0.5, mode)
    tail = ResidualTail(ECALayer(C), batch_norm(C), drop_path=drop).double()
    assert_same_step(tail, *maps(n=8))


def test_scale(no_calls):
    tail = ResidualTail(ECALayer(C), None, activation="none", scale=0.3).double()
    assert_same_step(tail, *maps())
    assert "scale=0.3" in repr(tail)


def test_frozen_parameters(no_calls):
    for frozen in ("bn.weight", "bn.bias", "attention.conv.weight", "identity_bn.weight"):
        for training in (True, False):
            tail = ResidualTail(ECALayer(C), batch_norm(C), batch_norm(C)).double()
            tail.train(training)
            tail.get_parameter(frozen).requires_grad_(False)
            assert_same_step(tail, *maps())


def test_without_gradients(no_calls):
    tail = ResidualTail(attention.SE(C, 4), batch_norm(C), batch_norm(C)).double()
    twin = copy.deepcopy(tail)
    for context in (torch.no_grad, torch.inference_mode):
        with context():
            given = maps()
            torch.testing.assert_close(tail(*given), called(twin, *given))
    torch.testing.assert_close(tail.bn.running_var, twin.bn.running_var)


@pytest.mark.parametrize("activation", ["relu", "silu"])
@pytest.mark.parametrize("other", ["no norm", "training", "evaluation"])
@pytest.mark.parametrize("name", ["none", "eca", "se"])
def test_gradients_of_gradients(name, other, activation):
    tail = ResidualTail(ATTENTIONS[name](), batch_norm(C), NORMS[other](), activation).double()
    twin = copy.deepcopy(tail)
    x, identity = maps()

    def second(module, function):
        given = x.detach().requires_grad_()
        y = function(module, given, identity)
        (first,) = torch.autograd.grad(y.square().sum(), given, create_graph=True)
        return torch.autograd.grad(first.square().sum(), [given, *module.parameters()])

    results = second(tail, lambda m, *a: m(*a)), second(twin, called)
    for got, want in zip(*results, strict=True):
        torch.testing.assert_close(got, want)


def test_20_steps_of_training():
    """The loss, the parameters and the running statistics follow those of the plain modules."""
    tail = ResidualTail(ECALayer(C), batch_norm(C), batch_norm(C)).double()
    nets = [
        nn.ModuleList([nn.Conv2d(C, C, 3, padding=1).double(), tail]),
    ]
    nets.append(copy.deepcopy(nets[0]))
    losses = [[], []]
    data = [maps()[0] for _ in range(20)]
    for net, record, function in zip(nets, losses, (None, called), strict=True):
        optimizer = torch.optim.SGD(net.parameters(), 0.05, momentum=0.9)
        for x in data:
            y = net[0](x)
            y = net[1](y, x) if function is None else function(net[1], y, x)
            loss = (y - x.flip(0)).square().mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            record.append(loss.item())
    assert losses[0][-1] < losses[0][0]
    torch.testing.assert_close(losses[0], losses[1])
    assert_same_state(*nets)


# ---- modules that must be called ----


def double_output(_module, _args, output):
    return output * 2


def changed(change):
    tail = ResidualTail(
        ECALayer(C), batch_norm(C), batch_norm(C), nn.ReLU(), nn.Identity()
    ).double()
    change(tail)
    return tail


class DoubleNorm(nn.BatchNorm2d):
    def forward(self, x):
        return super().forward(x) * 2


CHANGES = {
    "a weight that is not registered": lambda t: unregistered(t.bn),
    "a hook on bn": lambda t: t.bn.register_forward_hook(double_output),
    "a pre-hook on bn": lambda t: t.bn.register_forward_pre_hook(lambda m, a: (a[0] * 2,)),
    "a hook on identity_bn": lambda t: t.identity_bn.register_forward_hook(double_output),
    "a hook on the attention": lambda t: t.attention.register_forward_hook(double_output),
    "a hook on its convolution": lambda t: t.attention.conv.register_forward_hook(double_output),
    "a hook on the activation": lambda t: t.activation.register_forward_hook(double_output),
    "a forward on the instance": lambda t: setattr(t.bn, "forward", lambda x: x * 3),
    "another norm": lambda t: setattr(t, "bn", nn.GroupNorm(3, C).double()),
    "a norm derived from batch norm": lambda t: setattr(t, "bn", DoubleNorm(C).double()),
    "a wrapper": lambda t: setattr(t, "bn", nn.Sequential(t.bn)),
    "another activation": lambda t: setattr(t, "activation", nn.LeakyReLU()),
    "gelu with tanh": lambda t: setattr(t, "activation", nn.GELU("tanh")),
    "another attention": lambda t: setattr(t, "attention", nn.Conv2d(C, C, 1).double()),
    "a drop path of its own": lambda t: setattr(t, "drop_path", nn.Dropout(0.0)),
    "plain attention": lambda t: setattr(t.attention, "fused", False),
}


@pytest.mark.parametrize("name", CHANGES)
def test_what_acts_on_a_module_is_not_lost(name):
    tail = changed(CHANGES[name])
    assert not fused(tail)
    assert "calls its modules (" in repr(tail)
    assert_same_step(tail, *maps())


def test_a_pruned_norm_is_called():
    tail = changed(lambda t: prune.l1_unstructured(t.bn, "weight", 0.5))
    assert not fused(tail)
    given = maps()
    torch.testing.assert_close(tail.eval()(*given), called(tail, *given))


def test_a_hook_added_later_is_called_until_it_is_removed():
    tail = changed(lambda t: None)
    assert fused(tail)
    assert "one operation" in repr(tail)
    seen = []
    handle = tail.bn.register_forward_hook(lambda m, a, out: seen.append(out.shape))
    tail(*maps())
    assert len(seen) == 1
    handle.remove()
    assert fused(tail)
    tail(*maps())
    assert len(seen) == 1


def test_global_hooks_are_called():
    tail = changed(lambda t: None)
    seen = []
    with torch.nn.modules.module.register_module_forward_hook(lambda m, a, out: seen.append(m)):
        tail(*maps())
    assert tail.bn in seen
    assert tail.attention in seen


def test_maps_that_do_not_fit_get_the_modules_errors():
    tail = ResidualTail(ECALayer(C), batch_norm(C))
    x = torch.randn(2, C, 4, 4)
    with pytest.raises(ValueError, match="expected 4D input"):
        tail(x[0])
    with pytest.raises(RuntimeError, match="running_mean should contain"):
        tail(torch.randn(2, C + 1, 4, 4))
    with pytest.raises(ValueError, match="Expected more than 1 value per channel"):
        tail(x[:1, :, :1, :1])
    with pytest.raises(RuntimeError, match="must match"):
        tail(x, x[:, :3])
    assert tail(x, x[:1]).shape == x.shape  # broadcast, as x + identity is


@needs_extension
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_running_statistics_may_change_before_the_backward_pass(dtype):
    tail = ResidualTail(ECALayer(6), nn.BatchNorm2d(6), nn.BatchNorm2d(6)).to(dtype).eval()
    x, identity, other = (torch.randn(2, 6, 4, 4, dtype=dtype) for _ in range(3))
    x.requires_grad_()
    (expected,) = torch.autograd.grad(tail(x, identity).sum(), x)
    y = tail(x, identity)
    tail.train()(other, other)
    torch.testing.assert_close(torch.autograd.grad(y.sum(), x)[0], expected)


def test_an_error_leaves_the_running_statistics():
    """The modules are called with the shortcut first, whose norm does not fit."""
    x = torch.randn(2, C, 4, 4)
    tail = ResidualTail(ECALayer(C), batch_norm(C), batch_norm(C + 1))
    before = {name: b.clone() for name, b in tail.named_buffers()}
    with pytest.raises(RuntimeError, match="running_mean should contain"):
        tail(x, x)
    for name, b in tail.bn.named_buffers():
        assert torch.equal(b, before[f"bn.{name}"])


def test_errors():
    with pytest.raises(TypeError, match=r"bn as a torch\.nn\.Module or None, got str"):
        ResidualTail(None, "bn")
    with pytest.raises(ValueError, match="activation as one of none, relu"):
        ResidualTail(None, activation="tanh")
    with pytest.raises(TypeError, match="activation as a torch"):
        ResidualTail(None, activation=torch.relu)


# ---- PyTorch's features ----


def test_copies_pickles_and_state_dicts():
    tail = ResidualTail(ECALayer(C), batch_norm(C), None, nn.ReLU()).double()
    given = maps()
    for twin in (copy.deepcopy(tail), pickle.loads(pickle.dumps(tail))):
        assert_same_step(twin, *given, twin=copy.deepcopy(tail))
    other = ResidualTail(ECALayer(C), batch_norm(C), None, nn.ReLU()).double()
    other.load_state_dict(tail.state_dict(), strict=True)
    assert set(tail.state_dict()) == {
        "attention.conv.weight",
        *(f"bn.{n}" for n in ("weight", "bias", "running_mean", "running_var")),
        "bn.num_batches_tracked",
    }
    torch.testing.assert_close(other(*given), copy.deepcopy(tail)(*given))


@pytest.mark.parametrize(("backend", "dynamic"), COMPILED)
@pytest.mark.parametrize("name", ["eca", "se"])
@pytest.mark.parametrize("training", [True, False])
def test_compile_in_one_graph(training, name, backend, dynamic):
    tail = ResidualTail(ATTENTIONS[name](), batch_norm(C), batch_norm(C)).train(training)
    twin = copy.deepcopy(tail)
    tail.attention.backend = backend
    torch._dynamo.reset()
    compiled = torch.compile(tail, fullgraph=True, dynamic=dynamic)
    x, identity = maps(dtype=torch.float32)
    results = []
    for function in (compiled, lambda *a: called(twin, *a)):
        given = x.detach().requires_grad_()
        y = function(given, identity)
        results.append((y, *torch.autograd.grad(y.square().sum(), given)))
    for got, want in zip(*results, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(tail.bn.running_var, twin.bn.running_var)
    assert int(tail.bn.num_batches_tracked) == int(training)


def with_inference_tensors(bn):
    with torch.inference_mode():
        bn.running_mean, bn.running_var = bn.running_mean + 0, bn.running_var + 0
    return bn


def with_strides(bn):
    bn.running_mean = bn.running_mean.repeat_interleave(2)[::2]
    bn.running_var = bn.running_var.repeat_interleave(2)[::2]
    return bn


@pytest.mark.parametrize("change", [lambda bn: bn, with_strides, with_inference_tensors])
def test_running_statistics_in_any_memory(change):
    """Kernels update them where they can, and autograd sees that they changed."""
    tail = ResidualTail(ECALayer(C), change(batch_norm(C)))
    twin = copy.deepcopy(tail)
    x, identity = maps(dtype=torch.float32)
    with torch.inference_mode():  # the only place where tensors of inference may be written
        for function in (tail, lambda *a: called(twin, *a)):
            function(x, identity)
            function(x, identity)
    assert_same_state(tail, twin)


def test_autograd_sees_the_update_of_running_statistics():
    tail = ResidualTail(ECALayer(C), batch_norm(C))
    x, identity = maps(dtype=torch.float32)
    factor = torch.ones(C, requires_grad=True)
    for name in ("running_mean", "running_var"):
        product = factor * getattr(tail.bn, name)
        tail(x, identity)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            product.sum().backward()


def test_autocast():
    tail = ResidualTail(ECALayer(C), batch_norm(C))
    conv = nn.Conv2d(C, C, 1)
    x, _ = maps(dtype=torch.float32)
    with torch.autocast(DEVICE, torch.bfloat16):
        given = conv(x)
        assert given.dtype == torch.bfloat16
        y = tail(given, given)
        mixed = tail(given, x)  # another dtype: x + identity gives float32
    assert y.dtype == torch.bfloat16
    assert mixed.dtype == torch.float32
    y.sum().backward()
    assert conv.weight.grad is not None


def test_taps_and_maps_of_other_dtypes():
    """As an ECALayer takes them: half precision taps under autocast, and no others."""
    tail = ResidualTail(ECALayer(C).bfloat16(), batch_norm(C))
    x, identity = maps(dtype=torch.float32)
    before = tail.bn.running_mean.clone()
    with pytest.raises(TypeError, match="expected taps of dtype"):
        tail(x, identity)
    assert torch.equal(tail.bn.running_mean, before)
    with torch.autocast(DEVICE, torch.bfloat16):
        y = tail(x, identity)
    assert y.dtype == torch.float32
    with pytest.raises((RuntimeError, TypeError), match=r"Int|int64"):
        ResidualTail(ECALayer(C))(torch.ones(2, C, 3, 3, dtype=torch.int64))


@needs_extension
def test_memory_of_a_block():
    """Bytes kept for backward: x, one bit an element, numbers for each plane."""
    x, identity = (torch.randn(4, 64, 28, 28) for _ in range(2))
    tail = ResidualTail(ECALayer(64), nn.BatchNorm2d(64))

    def kept(function):
        storages = {}

        def pack(t):
            storages[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
            return t

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
            y = function(tail, x.requires_grad_(), identity.requires_grad_())
        assert y.grad_fn is not None
        return sum(storages.values())

    one = x.numel() * 4
    ours, plain = kept(lambda m, *a: m(*a)), kept(called)
    assert ours <= one + one // 32 + 4 * 64 * 32 + 16384
    assert plain >= 3 * one


PROCESSES = """
import copy, os, sys
import torch
import torch.distributed as dist
from torch import nn
from eca_fused import ECALayer, ResidualTail

rank, path = int(sys.argv[1]), sys.argv[2]
dist.init_process_group("gloo", init_method=f"file://{path}", rank=rank, world_size=2)
torch.manual_seed(0)
plain = ResidualTail(ECALayer(6), nn.BatchNorm2d(6), nn.BatchNorm2d(6), "silu").double()
shared = nn.SyncBatchNorm.convert_sync_batchnorm(copy.deepcopy(plain))
assert type(shared.bn) is nn.SyncBatchNorm
maps = [torch.randn(5, 6, 4, 3, dtype=torch.float64) * 2 + 1 for _ in range(3)]
own = [slice(0, 2), slice(2, 5)][rank]  # batches of two and three


def step(tail, x, identity, dy):
    x, identity = x.clone().requires_grad_(), identity.clone().requires_grad_()
    y = tail(x, identity)
    return y, torch.autograd.grad(y, [x, identity, *tail.parameters()], dy)


y, (dx, di, *dp) = step(plain, *maps)
got, (gx, gi, *gp) = step(shared, *(m[own] for m in maps))
torch.testing.assert_close(got, y[own])
torch.testing.assert_close(gx, dx[own])
torch.testing.assert_close(gi, di[own])
for a, b in zip(gp, dp):  # DistributedDataParallel adds those of the processes
    dist.all_reduce(a)
    torch.testing.assert_close(a, b)
for (name, a), (_, b) in zip(shared.named_buffers(), plain.named_buffers()):
    torch.testing.assert_close(a, b, msg=name)
dist.destroy_process_group()
# A thread of gloo that releases the last tensor needs the interpreter, and aborts the process if
# that has ended (torch 2.11).
sys.stdout.flush()
sys.stderr.flush()
os._exit(0)
"""


@needs_extension
def test_statistics_of_two_processes_with_batches_of_different_sizes(tmp_path):
    script = tmp_path / "processes.py"
    script.write_text(PROCESSES)
    for process in two_processes(script, tmp_path / "s"):
        assert process.returncode == 0, process.stderr[-3000:]
