"""NormActAttention: its modules called one after the other are the definition."""

import copy
import pickle

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from eca_fused import ECALayer, NormActAttention, attention
from eca_fused.attention import norm_act
from eca_fused.ops import native
from eca_fused.ops.backend import named
from helpers.cases import BACKENDS, COMPILED, DEVICE, LAYOUTS, in_layout, needs_extension
from helpers.optional import needs_timm, timm_layers, torchvision_ops
from helpers.processes import two_processes
from helpers.programs import own_operators
from helpers.tails import assert_same_state, assert_same_step, batch_norm, unregistered

pytestmark = [pytest.mark.every_torch, pytest.mark.any_device]

C = 12
# The kernels that compute what can be one operation. "auto" is never Triton on the CPU.
BY_NATIVE = "native" in BACKENDS and DEVICE in native.gating_devices
BY_TRITON = BACKENDS == ["triton"] and (DEVICE != "cpu" or named("auto") == "triton")
FUSED = BY_NATIVE or BY_TRITON
not_interpreted = pytest.mark.skipif(
    BY_TRITON and DEVICE == "cpu",
    reason="minutes in Triton's interpreter; test_triton_gating.py has the same in seconds",
)
ATTENTIONS = {
    "eca": lambda: ECALayer(C),
    "circular": lambda: ECALayer(C, padding_mode="circular"),
    "ECA-NS": lambda: attention.ECANS(C),
    "se": lambda: attention.SE(C, 4),
}
if timm_layers is not None:
    from timm.models._efficientnet_blocks import SqueezeExcite

    SE = timm_layers.squeeze_excite.SEModule
    EcaModule = timm_layers.EcaModule
    ATTENTIONS |= {
        "timm SE": lambda: SE(C, rd_channels=4),
        "timm SE with hard sigmoid": lambda: SE(C, rd_channels=4, gate_layer="hard_sigmoid"),
        "timm efficientnet SE": lambda: SqueezeExcite(C, rd_channels=4),
        "timm ECA with hard sigmoid": lambda: EcaModule(C, gate_layer="hard_sigmoid"),
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


def a_map(layout="contiguous", n=3, dtype=torch.float64, c=C):
    """A map whose channels have means far apart."""
    wide = {"dtype": torch.float64, "device": DEVICE}
    offset = torch.linspace(-3, 3, c, **wide)[:, None, None]
    return in_layout((torch.randn(n, c, 5, 6, **wide) + offset).to(dtype), layout)


def called(module, x):
    """What calling the modules gives."""
    return norm_act.by_calling(module.parts(), x)


def assert_same(module, x, **options):
    assert_same_step(module, x, by=called, **options)


def fused(module):
    """Whether the modules are one operation."""
    return norm_act.why_called(module.parts()) is None


@pytest.fixture
def no_calls(monkeypatch):
    """Calling the modules one after the other is an error."""
    own = norm_act.by_calling

    def fail(*_):
        raise AssertionError("the modules were called")

    if FUSED:
        monkeypatch.setattr(norm_act, "by_calling", fail)
        monkeypatch.setitem(globals(), "called", lambda module, x: own(module.parts(), x))


# ---- the same as calling the modules ----


@not_interpreted
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("name", ATTENTIONS)
def test_values_gradients_and_statistics(name, norm, layout, no_calls):
    for activation in ("relu", "silu", "hardswish"):
        module = NormActAttention(ATTENTIONS[name](), NORMS[norm](), activation).double()
        assert fused(module)
        for _ in range(2):
            assert_same(module, a_map(layout))


@pytest.mark.parametrize(
    "activation", ["none", "gelu", nn.Identity(), nn.ReLU(), nn.SiLU(), nn.GELU(), nn.Hardswish()]
)
def test_activations(activation, no_calls):
    for name in ("eca", "se"):
        assert_same(
            NormActAttention(ATTENTIONS[name](), batch_norm(C), activation).double(), a_map()
        )


@pytest.mark.parametrize("dims", [0, 1, 3])
def test_maps_of_other_dimensions(dims, no_calls):
    kind = {0: nn.BatchNorm1d, 1: nn.BatchNorm1d, 3: nn.BatchNorm3d}[dims]
    x = torch.randn(4, C, *(3, 4, 5)[:dims], dtype=torch.float64)
    assert_same(NormActAttention(ECALayer(C), batch_norm(C, kind=kind)).double(), x)


@needs_timm
@pytest.mark.parametrize("act_layer", [nn.ReLU, nn.SiLU, nn.Hardswish])
def test_a_norm_with_the_activation_inside(act_layer, no_calls):
    bn = timm_layers.BatchNormAct2d(C, act_layer=act_layer, inplace=True)
    nn.init.normal_(bn.weight)
    module = NormActAttention(ATTENTIONS["timm SE"](), bn, "none").double()
    for training in (True, False):
        assert_same(module.train(training), a_map())


@needs_timm
def test_two_activations_are_called():
    bn = timm_layers.BatchNormAct2d(C, act_layer=nn.SiLU)
    module = NormActAttention(ECALayer(C), bn, "relu").double()
    assert "comes after that of bn" in repr(module)
    assert_same(module, a_map())
    other = timm_layers.BatchNormAct2d(C, act_layer=nn.LeakyReLU)
    module = NormActAttention(ECALayer(C), other, nn.Identity()).double()
    assert "LeakyReLU is not one that the kernels have" in repr(module)
    assert_same(module, a_map())


@not_interpreted
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("offset", [0.0, 1e4])
@pytest.mark.parametrize("activation", ["relu", "silu", "hardswish", "gelu"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_never_less_accurate_than_plain_pytorch(layout, activation, offset, dtype):
    """Also for means of 1e4 standard deviations, in float32. Half precision has no such means.

    The floor is one rounding to the dtype, and 8 units of float32 for everything in it.
    """
    if dtype != torch.float32:
        offset = 0.0
    far = torch.linspace(-1, 1, 16)[:, None, None] * offset
    x, dy = (in_layout((torch.randn(6, 16, 12, 12) + o).to(dtype), layout) for o in (far, 0 * far))
    # The network of SE has float32 parameters.
    gates = [ECALayer(16)] + [attention.SE(16, 4)] * (dtype == torch.float32)

    def step(module, function, given):
        given = given.detach().requires_grad_()
        y = function(module, given)
        grads = torch.autograd.grad(y, [given, *module.parameters()], dy.to(y.dtype))
        return [y.detach(), *grads]

    for gate in gates:
        module = NormActAttention(gate, batch_norm(16), activation)
        ours = step(copy.deepcopy(module), lambda m, a: m(a), x)
        usual = step(copy.deepcopy(module), called, x)
        exact = step(copy.deepcopy(module).double(), called, x.double())
        for got, other, want in zip(ours, usual, exact, strict=True):
            error, plain_error = ((t.double() - want).square().mean().sqrt() for t in (got, other))
            size = want.square().mean().sqrt()
            eps = torch.finfo(got.dtype).eps / 2 + 8 * torch.finfo(torch.float32).eps
            assert error <= plain_error + eps * size
            if offset and FUSED:
                assert error < 1e-5 * size


@pytest.mark.skipif(not BY_NATIVE, reason="needs the native kernels")
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("name", ["eca", "circular", "ECA-NS"])
def test_devices_without_the_operator_that_does_all_in_one_pass(
    monkeypatch, name, norm, layout, no_calls
):
    monkeypatch.setattr(native, "one_pass_gating_devices", frozenset())
    monkeypatch.setattr(native, "gated_block", None)
    module = NormActAttention(ATTENTIONS[name](), NORMS[norm](), "silu").double()
    assert_same(module, a_map(layout))
    with torch.no_grad():
        x = a_map(layout)
        torch.testing.assert_close(module(x), called(module, x))


def test_frozen_parameters(no_calls):
    for frozen in ("bn.weight", "bn.bias", "attention.conv.weight"):
        for training in (True, False):
            module = NormActAttention(ECALayer(C), batch_norm(C)).double().train(training)
            module.get_parameter(frozen).requires_grad_(False)
            assert_same(module, a_map())


@pytest.mark.parametrize("name", ["eca", "se"])
@pytest.mark.parametrize("training", [True, False])
def test_gradients_of_some_tensors(training, name, no_calls):
    """One gradient at a time, as torch.autograd.grad(y, inputs) asks for it."""
    module = NormActAttention(ATTENTIONS[name](), batch_norm(C), "silu").double().train(training)
    twin = copy.deepcopy(module)
    x = a_map().requires_grad_()
    dy = torch.randn_like(x)
    for parameter in [None, *dict(module.named_parameters())]:
        found = [
            torch.autograd.grad(
                function(m, x), x if parameter is None else m.get_parameter(parameter), dy
            )[0]
            for m, function in ((module, lambda m, a: m(a)), (twin, called))
        ]
        torch.testing.assert_close(*found)


def test_without_gradients(no_calls):
    for name in ("eca", "se"):
        module = NormActAttention(ATTENTIONS[name](), batch_norm(C)).double()
        twin = copy.deepcopy(module)
        for context in (torch.no_grad, torch.inference_mode):
            with context():
                x = a_map()
                torch.testing.assert_close(module(x), called(twin, x))
        torch.testing.assert_close(module.bn.running_var, twin.bn.running_var)


@pytest.mark.parametrize("activation", ["relu", "silu"])
@pytest.mark.parametrize("norm", ["no norm", "training", "evaluation"])
@pytest.mark.parametrize("name", ["eca", "se"])
def test_gradients_of_gradients(name, norm, activation):
    module = NormActAttention(ATTENTIONS[name](), NORMS[norm](), activation).double()
    twin = copy.deepcopy(module)
    x = a_map()

    def second(module, function):
        given = x.detach().requires_grad_()
        y = function(module, given)
        (first,) = torch.autograd.grad(y.square().sum(), given, create_graph=True)
        return torch.autograd.grad(first.square().sum(), [given, *module.parameters()])

    results = second(module, lambda m, a: m(a)), second(twin, called)
    for got, want in zip(*results, strict=True):
        torch.testing.assert_close(got, want)


@pytest.mark.parametrize("name", ["eca", "se"])
@pytest.mark.parametrize("transform", ["grad", "vmap", "jvp", "hessian", "batched gradients"])
def test_transforms(transform, name):
    module = NormActAttention(ATTENTIONS[name](), batch_norm(C).eval(), "silu").double()
    x = a_map(n=2)
    dy = torch.randn_like(x)

    def result(function):
        if transform == "grad":
            return torch.func.grad(lambda x: (function(x) * dy).sum())(x)
        if transform == "vmap":
            return torch.vmap(function)(torch.stack([x, x * 2]))
        if transform == "jvp":
            return torch.func.jvp(function, (x,), (dy,))
        if transform == "hessian":
            return torch.func.hessian(lambda x: function(x).sum())(x[:1, :, :2, :2])
        given = x.detach().requires_grad_()
        y = function(given)
        return torch.autograd.grad(y, given, torch.stack([dy, x]), is_grads_batched=True)

    torch.testing.assert_close(result(module), result(lambda a: called(module, a)))


@pytest.mark.parametrize("name", ["eca", "se"])
def test_20_steps_of_training(name):
    """The loss, the parameters and the running statistics follow those of the plain modules."""
    module = NormActAttention(ATTENTIONS[name](), batch_norm(C), "silu").double()
    nets = [nn.ModuleList([nn.Conv2d(C, C, 3, padding=1).double(), module])]
    nets.append(copy.deepcopy(nets[0]))
    losses = [[], []]
    data = [a_map() for _ in range(20)]
    for net, record, function in zip(nets, losses, (lambda m, a: m(a), called), strict=True):
        optimizer = torch.optim.SGD(net.parameters(), 0.05, momentum=0.9)
        for x in data:
            loss = (function(net[1], net[0](x)) - x.flip(0)).square().mean()
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
    module = NormActAttention(ECALayer(C), batch_norm(C), nn.ReLU()).double()
    change(module)
    return module


CHANGES = {
    "a weight that is not registered": lambda m: unregistered(m.bn),
    "a hook on bn": lambda m: m.bn.register_forward_hook(double_output),
    "a hook on the attention": lambda m: m.attention.register_forward_hook(double_output),
    "a hook on its convolution": lambda m: m.attention.conv.register_forward_hook(double_output),
    "a hook on the activation": lambda m: m.activation.register_forward_hook(double_output),
    "a forward on the instance": lambda m: setattr(m.bn, "forward", lambda x: x * 3),
    "another norm": lambda m: setattr(m, "bn", nn.GroupNorm(3, C).double()),
    "a wrapper": lambda m: setattr(m, "bn", nn.Sequential(m.bn)),
    "another activation": lambda m: setattr(m, "activation", nn.LeakyReLU()),
    "gelu with tanh": lambda m: setattr(m, "activation", nn.GELU("tanh")),
    "another attention": lambda m: setattr(m, "attention", nn.Conv2d(C, C, 1).double()),
    "no attention": lambda m: setattr(m, "attention", nn.Identity()),
    "plain attention": lambda m: setattr(m.attention, "fused", False),
}


@pytest.mark.parametrize("name", CHANGES)
def test_what_acts_on_a_module_is_not_lost(name):
    module = changed(CHANGES[name])
    assert not fused(module)
    assert "calls its modules (" in repr(module)
    assert_same(module, a_map())


def test_a_hook_added_later_is_called_until_it_is_removed():
    module = changed(lambda m: None)
    assert "one operation" in repr(module)
    seen = []
    handle = module.bn.register_forward_hook(lambda m, a, out: seen.append(out.shape))
    module(a_map())
    handle.remove()
    module(a_map())
    assert len(seen) == 1


def test_hooks_inside_the_gate_network_are_called(no_calls):
    module = NormActAttention(attention.SE(C, 4), batch_norm(C)).double()
    seen = []
    layers = [m for m in module.attention.modules() if isinstance(m, nn.Linear | nn.Conv2d)]
    layers[0].register_forward_hook(lambda m, a, out: seen.append(out.shape))
    module(a_map())
    assert len(seen) == 1


def test_maps_that_do_not_fit_get_the_modules_errors():
    module = NormActAttention(ECALayer(C), batch_norm(C))
    x = torch.randn(2, C, 4, 4)
    with pytest.raises(ValueError, match="expected 4D input"):
        module(x[0])
    with pytest.raises(RuntimeError, match="running_mean should contain"):
        module(torch.randn(2, C + 1, 4, 4))
    with pytest.raises(ValueError, match="Expected more than 1 value per channel"):
        module(x[:1, :, :1, :1])
    with pytest.raises(ValueError, match="channels"):
        NormActAttention(attention.SE(C, 4))(x[:, :3])


def test_empty_batches():
    module = NormActAttention(ECALayer(C), batch_norm(C).eval())
    x = torch.randn(0, C, 4, 4, requires_grad=True)
    y = module(x)
    assert y.shape == x.shape
    assert torch.autograd.grad(y.sum(), x)[0].shape == x.shape


def test_errors():
    with pytest.raises(TypeError, match=r"bn as a torch\.nn\.Module or None, got str"):
        NormActAttention(ECALayer(C), "bn")
    with pytest.raises(TypeError, match="attention as a torch"):
        NormActAttention(None)
    with pytest.raises(ValueError, match="activation as one of none, relu"):
        NormActAttention(ECALayer(C), activation="tanh")
    with pytest.raises(TypeError, match="activation as a torch"):
        NormActAttention(ECALayer(C), activation=torch.relu)


# ---- PyTorch's features ----


def test_copies_pickles_and_state_dicts():
    module = NormActAttention(ECALayer(C), batch_norm(C), nn.SiLU()).double()
    x = a_map()
    for twin in (copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
        assert_same(twin, x, twin=copy.deepcopy(module))
    other = NormActAttention(ECALayer(C), batch_norm(C), nn.SiLU()).double()
    other.load_state_dict(module.state_dict(), strict=True)
    torch.testing.assert_close(other(x), copy.deepcopy(module)(x))


def test_checkpointing():
    module = NormActAttention(attention.SE(C, 4), batch_norm(C)).double()
    twin = copy.deepcopy(module)
    results = []
    x = a_map()
    for function in (module, lambda a: checkpoint(twin, a, use_reentrant=False)):
        given = x.detach().requires_grad_()
        y = function(given)
        results.append((y, *torch.autograd.grad(y.square().sum(), given)))
    for got, want in zip(*results, strict=True):
        torch.testing.assert_close(got, want)


@pytest.mark.parametrize(("backend", "dynamic"), COMPILED)
@pytest.mark.parametrize("name", ["eca", "se"])
@pytest.mark.parametrize("training", [True, False])
def test_compile_in_one_graph(training, name, backend, dynamic):
    module = NormActAttention(ATTENTIONS[name](), batch_norm(C), "hardswish").train(training)
    twin = copy.deepcopy(module)
    module.attention.backend = backend
    torch._dynamo.reset()
    compiled = torch.compile(module, fullgraph=True, dynamic=dynamic)
    x = a_map(dtype=torch.float32)
    results = []
    for function in (compiled, lambda a: called(twin, a)):
        given = x.detach().requires_grad_()
        y = function(given)
        results.append((y, *torch.autograd.grad(y.square().sum(), given)))
    for got, want in zip(*results, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(module.bn.running_var, twin.bn.running_var)
    assert int(module.bn.num_batches_tracked) == int(training)


def test_export_and_trace():
    module = NormActAttention(attention.SE(C, 4), batch_norm(C), "silu").eval()
    x = a_map(dtype=torch.float32)
    want = called(module, x)
    exported = torch.export.export(module, (x,))
    torch.testing.assert_close(exported.module()(x), want)
    if named("auto") != "triton":  # which TorchScript cannot have
        torch.testing.assert_close(torch.jit.trace(module, x)(x), want)


@pytest.mark.skipif(not BY_NATIVE, reason="needs native kernels on this device")
@pytest.mark.parametrize("training", [True, False])
def test_export_with_batches_of_any_size(training):
    """The fused operators, values and running statistics."""
    layer = ECALayer(C, backend="native")
    module = NormActAttention(layer, batch_norm(C), "silu").train(training)
    twin = copy.deepcopy(module)
    sizes = ({0: torch.export.Dim("batch", min=1, max=64)},)
    x = a_map(dtype=torch.float32)
    program = torch.export.export(module, (x,), dynamic_shapes=sizes)
    assert own_operators(program)
    exported = program.module()
    with torch.no_grad():
        for samples in (1, 2, 5):
            given = x[:1] + torch.randn(samples, *x.shape[1:], device=x.device)
            torch.testing.assert_close(exported(given), called(twin, given))
    assert_same_state(exported, twin, exported=True)


def test_autocast():
    module = NormActAttention(attention.SE(C, 4), batch_norm(C))
    conv = nn.Conv2d(C, C, 1)
    with torch.autocast(DEVICE, torch.bfloat16):
        given = conv(a_map(dtype=torch.float32))
        y = module(given)
    assert y.dtype == given.dtype == torch.bfloat16
    y.sum().backward()
    assert conv.weight.grad is not None


@pytest.mark.skipif(not FUSED, reason="needs the kernels")
@pytest.mark.parametrize("name", ["eca", "se"])
def test_keeps_x_and_numbers_for_each_plane(name):
    x = torch.randn(4, 64, 28, 28)
    module = NormActAttention(attention.make(name, 64), nn.BatchNorm2d(64), "silu")

    def kept(function):
        storages = {}

        def pack(t):
            storages[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
            return t

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
            y = function(module, x.requires_grad_())
        assert y.grad_fn is not None
        return sum(storages.values())

    one = x.numel() * 4
    assert kept(lambda m, a: m(a)) <= one + 4 * 64 * 32 + 16384
    assert kept(called) >= 3 * one


PROCESSES = """
import copy, os, sys
import torch
import torch.distributed as dist
from torch import nn
from eca_fused import ECALayer, NormActAttention, attention

rank, path = int(sys.argv[1]), sys.argv[2]
dist.init_process_group("gloo", init_method=f"file://{path}", rank=rank, world_size=2)
torch.manual_seed(0)
x, dy = torch.randn(2, 5, 6, 4, 3, dtype=torch.float64) * 2 + 1
own = [slice(0, 2), slice(2, 5)][rank]  # batches of two and three


def step(module, x, dy):
    x = x.clone().requires_grad_()
    y = module(x)
    return y, torch.autograd.grad(y, [x, *module.parameters()], dy)


for gate in (ECALayer(6), attention.SE(6, 2)):
    plain = NormActAttention(gate, nn.BatchNorm2d(6), "silu").double()
    shared = nn.SyncBatchNorm.convert_sync_batchnorm(copy.deepcopy(plain))
    assert type(shared.bn) is nn.SyncBatchNorm
    y, (dx, *dp) = step(plain, x, dy)
    got, (gx, *gp) = step(shared, x[own], dy[own])
    torch.testing.assert_close(got, y[own])
    torch.testing.assert_close(gx, dx[own])
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
