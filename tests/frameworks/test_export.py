"""torch.export, AOTInductor, TorchScript and ONNX: what leaves Python computes the same.

A program with the compiled operators needs `import eca_fused` before it is loaded; one made with
fused=False does not.
"""

import sys
import warnings

import pytest
import torch
from torch import nn

import eca_fused
from eca_fused import ECALayer
from eca_fused.attention import ECANS, SE
from eca_fused.models import BasicBlock, ResNet
from eca_fused.ops import native
from helpers.cases import LAYOUTS, MODES, assert_as_accurate, make_case, name_of, needs_extension
from helpers.processes import python
from helpers.programs import called, needs_onnx, onnx_session

pytestmark = pytest.mark.every_torch

no_torchscript = pytest.mark.skipif(
    sys.version_info >= (3, 14), reason="TorchScript needs Python 3.13 or older"
)
BACKENDS = ["auto", "reference"] + ["native"] * (native.missing is None)
operators = torch.ops.eca_fused


def exported(layer, x, strict=False):
    batch = torch.export.Dim("batch", min=1, max=64)
    return torch.export.export(layer, (x,), dynamic_shapes=({0: batch},), strict=strict)


# ---- torch.export and AOTInductor ----


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("grad", [True, False])
@pytest.mark.parametrize("strict", [True, False])
def test_export(strict, grad, layout, backend):
    layer = ECALayer(8, backend=backend)
    with torch.set_grad_enabled(grad):
        program = exported(layer, make_case((2, 8, 5, 7), layout=layout).x, strict)
    for samples in (1, 2, 9):
        x = make_case((samples, 8, 5, 7), layout=layout).x
        with torch.no_grad():
            y, want = program.module()(x), layer(x)
        torch.testing.assert_close(y, want)
        assert y.stride() == want.stride()
    fused = {operators.forward.default, operators.inference.default}
    asked = backend != "reference" and native.missing is None
    assert bool(called(program.graph_module) & fused) is asked


def test_exported_program_of_the_reference_has_gradients():
    layer = ECALayer(8, backend="reference")
    case = make_case((2, 8, 5, 7))
    module = exported(layer, case.x).module()
    module(case.x).backward(case.dy)
    layer(case.x).backward(case.dy)
    torch.testing.assert_close(
        dict(module.named_parameters())["conv.weight"].grad, layer.conv.weight.grad
    )


@pytest.mark.parametrize("fused", [pytest.param(True, marks=needs_extension), False])
def test_aot_inductor_in_a_fresh_process(fused, tmp_path):
    layer = ECALayer(8, fused=fused).requires_grad_(False)
    x = make_case((2, 8, 5, 7), layout="channels_last").x
    file = str(tmp_path / "layer.pt2")
    torch._inductor.aoti_compile_and_package(exported(layer, x), package_path=file)
    torch.save((x, layer(x)), tmp_path / "results.pt")
    code = """
import sys, torch
if sys.argv[3] == "True":
    import eca_fused
package = torch._inductor.aoti_load_package(sys.argv[1])
x, want = torch.load(sys.argv[2])
torch.testing.assert_close(package(x), want)
torch.testing.assert_close(package(torch.cat([x, x])), torch.cat([want, want]))
print("same")
"""
    done = python(code, file, tmp_path / "results.pt", fused)
    assert done.stdout.strip() == "same", done.stderr


@needs_extension
def test_saved_program_in_a_fresh_process(tmp_path):
    layer, x = ECALayer(8).requires_grad_(False), make_case((2, 8, 5, 7)).x
    torch.export.save(exported(layer, x), tmp_path / "layer.pt2")
    torch.save((x, layer(x)), tmp_path / "results.pt")
    code = """
import sys, torch
{}
x, want = torch.load(sys.argv[2])
assert torch.equal(torch.export.load(sys.argv[1]).module()(x), want)
print("same")
"""
    files = tmp_path / "layer.pt2", tmp_path / "results.pt"
    done = python(code.format("import eca_fused"), *files)
    assert done.stdout.strip() == "same", done.stderr
    done = python(code.format(""), *files)
    assert done.returncode != 0
    assert "eca_fused" in done.stderr


# ---- TorchScript ----


def torchscript(layer, how, x):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it is deprecated, and says so
        return torch.jit.script(layer) if how == "script" else torch.jit.trace(layer, (x,))


@no_torchscript
@pytest.mark.parametrize("how", ["script", "trace"])
@pytest.mark.parametrize("padding_mode", MODES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=name_of)
@pytest.mark.parametrize("shape", [(2, 8), (2, 8, 5, 7), (2, 8, 3, 4, 5)], ids=name_of)
def test_torchscript(shape, dtype, padding_mode, how):
    case = make_case(shape, 5, dtype, padding_mode=padding_mode)
    layer = ECALayer(kernel_size=5, padding_mode=padding_mode, dtype=dtype)
    with torch.no_grad():
        layer.conv.weight.copy_(case.weight)
    scripted = torchscript(layer, how, case.x)

    x = case.x.clone().requires_grad_()
    y = scripted(x)
    results = y.detach(), *torch.autograd.grad(y, (x, scripted.conv.weight), case.dy)
    assert_as_accurate(results, case)
    with torch.no_grad():
        y, want = scripted(case.x), layer(case.x)
    assert torch.equal(y, want)
    # The program also runs on another batch.
    other = torch.cat([case.x, case.x])
    torch.testing.assert_close(scripted(other), layer(other))


@no_torchscript
@needs_extension
@pytest.mark.parametrize("how", ["script", "trace"])
def test_torchscript_runs_the_kernels_where_no_gradient_is_needed(how):
    layer, x = ECALayer(8), make_case((2, 8, 5, 7)).x
    scripted = torchscript(layer, how, x)
    for grad in (False, True):
        with torch.set_grad_enabled(grad), torch.profiler.profile() as profile:
            scripted(x)
        names = {event.name for event in profile.events()}
        assert ("eca_fused::inference" in names) is not grad


@no_torchscript
@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_scripted_in_place(backend, fused):
    layer = ECALayer(8, inplace=True, backend=backend, fused=fused)
    x = make_case((2, 8, 5, 7)).x
    scripted = torchscript(layer, "script", x)
    with torch.no_grad():
        want = ECALayer(8, backend=backend, fused=fused)
        want.load_state_dict(layer.state_dict())
        expected = want(x)
        y = scripted(x)
    assert y.data_ptr() == x.data_ptr()
    torch.testing.assert_close(x, expected)
    with pytest.raises(torch.jit.Error, match="in-place ECA would overwrite the x"):
        scripted(x)


@no_torchscript
@pytest.mark.parametrize("fused", [True, False])
def test_a_trace_in_place_refuses_a_gradient(fused):
    layer = ECALayer(8, inplace=True, fused=fused)
    x = make_case((2, 8, 5, 7)).x
    with torch.no_grad():
        traced = torchscript(layer, "trace", x.clone())
        want = eca_fused.eca(x, layer.conv.weight)
        y = traced(own := x.clone())
    assert y.data_ptr() == own.data_ptr()
    torch.testing.assert_close(own, want)
    with pytest.raises((RuntimeError, torch.jit.Error), match="in-place ECA would overwrite"):
        traced(x.clone().requires_grad_() * 1)


@no_torchscript
def test_a_network_is_scripted():
    network = ResNet(BasicBlock, [1, 1, 1, 1]).eval()
    x = make_case((2, 3, 32, 32)).x
    scripted = torchscript(network, "script", x)
    with torch.no_grad():
        torch.testing.assert_close(scripted(x), network(x))


@no_torchscript
def test_a_script_names_a_wrong_padding_mode():
    layer = ECALayer(8)
    layer.padding_mode = "reflect"
    with pytest.raises(torch.jit.Error, match="'zeros' or 'circular', got 'reflect'"):
        torchscript(layer, "script", None)(torch.ones(2, 8))


@no_torchscript
@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("inplace", [True, False])
@pytest.mark.parametrize("own_taps", [True, False])
def test_a_trace_warns_of_nothing(own_taps, inplace, fused):
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(make_case((2, 8), 5, own_taps=own_taps).weight)

        def forward(self, x):
            run = eca_fused.eca_ if inplace else eca_fused.eca
            return run(x, self.weight, backend="auto" if fused else "reference")

    net, x = Net(), make_case((2, 8, 5, 7)).x
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("error", torch.jit.TracerWarning)
        warnings.filterwarnings("ignore", "`torch.jit.trace` is deprecated", DeprecationWarning)
        traced = torch.jit.trace(net, (x.clone(),))
        for other in (torch.cat([x, x, x]), make_case((1, 8, 3, 4)).x):
            torch.testing.assert_close(traced(other.clone()), net(other.clone()))


@no_torchscript
def test_what_a_script_cannot_do_it_refuses():
    x = make_case((2, 8, 5, 7)).x
    with pytest.raises(torch.jit.Error, match="'triton' cannot be used in TorchScript"):
        torchscript(ECALayer(8, backend="triton"), "script", None)(x)
    layer = ECALayer(8)
    layer.backend = "fast"
    with pytest.raises(torch.jit.Error, match="one of auto, native, reference, got 'fast'"):
        torchscript(layer, "script", None)(x)
    on_meta = ECALayer(8, backend="native", device="meta")
    with pytest.raises(torch.jit.Error, match="no compiled kernels for meta"):
        torchscript(on_meta, "script", None)(x.to("meta"))


@no_torchscript
@needs_extension
@pytest.mark.parametrize("inplace", [True, False])
def test_a_trace_keeps_what_use_backend_said(inplace):
    layer, x = ECALayer(8, inplace=inplace), make_case((2, 8, 5, 7)).x
    with torch.no_grad():
        want = eca_fused.eca(x, layer.conv.weight)
        with eca_fused.use_backend("reference"):
            plain = torchscript(layer, "trace", x.clone())
        fused = torchscript(layer, "trace", x.clone())
        for traced, kernels in ((plain, False), (fused, True)):
            with torch.profiler.profile() as profile:
                torch.testing.assert_close(traced(x.clone()), want)
            names = {event.name for event in profile.events()}
            assert bool(names & {"eca_fused::inference", "eca_fused::inference_"}) is kernels


BAD_INPUT = {
    "no channels": (torch.ones(8), torch.ones(1, 1, 3), "got [8]"),
    "too many dimensions": (torch.ones(2, 8, 1, 1, 1, 1), torch.ones(1, 1, 3), "0 to 3 spatial"),
    "integers": (torch.ones(2, 8, dtype=torch.int32), torch.ones(1, 1, 3), "convert it"),
    "taps of two dimensions": (torch.ones(2, 8), torch.ones(1, 3), "(1, 1, k), or (C, 1, k)"),
    "taps of other channels": (torch.ones(2, 8), torch.ones(4, 1, 3), "(8, 1, k)"),
    "even taps": (torch.ones(2, 8), torch.ones(1, 1, 4), "odd number of taps k, got 4"),
    "taps in float64": (
        torch.ones(2, 8),
        torch.ones(1, 1, 3, dtype=torch.float64),
        "expected taps of dtype",
    ),
    "taps elsewhere": (torch.ones(2, 8), torch.ones(1, 1, 3, device="meta"), "on the device of x"),
}


@no_torchscript
@pytest.mark.parametrize("backend", ["auto", "reference"])
@pytest.mark.parametrize("grad", [True, False])
@pytest.mark.parametrize("what", BAD_INPUT)
def test_a_script_names_what_is_wrong(what, grad, backend):
    def run(x: torch.Tensor, weight: torch.Tensor, backend: str) -> torch.Tensor:
        return eca_fused.eca(x, weight, backend=backend)

    x, weight, message = BAD_INPUT[what]
    with pytest.raises((TypeError, ValueError)) as eager:
        eca_fused.eca(x, weight, backend=backend)
    assert message in str(eager.value).replace("(8,)", "[8]")
    weight = weight.requires_grad_(grad)
    with torch.set_grad_enabled(grad), pytest.raises((RuntimeError, torch.jit.Error)) as scripted:
        torchscript(run, "script", None)(x, weight, backend)
    plain = grad or backend == "reference" or native.missing is not None
    # The compiled operators have messages of their own.
    assert (message if plain else "expected ") in str(scripted.value)


@no_torchscript
def test_a_script_names_circular_taps_that_wrap_around_twice():
    layer = ECALayer(kernel_size=9, padding_mode="circular", fused=False)
    with pytest.raises(torch.jit.Error, match="wrap around more than once: k = 9 needs 4 channels"):
        torchscript(layer, "script", None)(torch.ones(2, 3))


@no_torchscript
def test_a_function_that_calls_eca_is_scripted():
    def twice(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        return eca_fused.eca(eca_fused.eca(x, weight, padding_mode="circular"), weight)

    case = make_case((2, 8, 5, 7))
    scripted = torchscript(twice, "script", None)
    torch.testing.assert_close(scripted(case.x, case.weight), twice(case.x, case.weight))


@no_torchscript
def test_scripting_leaves_the_model_as_it_is():
    model = nn.Sequential(nn.Conv2d(3, 8, 1), ECALayer(8))
    before = list(model)
    torchscript(model, "script", None)
    assert all(a is b for a, b in zip(model, before, strict=True))


@no_torchscript
@pytest.mark.parametrize("how", ["script", "trace"])
@pytest.mark.parametrize("fused", [True, False])
def test_torchscript_in_a_fresh_process(fused, how, tmp_path):
    layer = ECALayer(8, fused=fused)
    case = make_case((2, 8, 5, 7))
    torchscript(layer, how, case.x).save(tmp_path / "layer.pt")
    layer(case.x).backward(case.dy)
    results = case.x, case.dy, layer(case.x).detach(), layer.conv.weight.grad
    torch.save(results, tmp_path / "results.pt")
    code = """
import sys, torch
{}
x, dy, want, dweight = torch.load(sys.argv[2])
layer = torch.jit.load(sys.argv[1])
with torch.no_grad():
    torch.testing.assert_close(layer(x), want)
layer(x).backward(dy)
torch.testing.assert_close(layer.conv.weight.grad, dweight, rtol=1e-5, atol=1e-5)
print("same")
"""
    files = tmp_path / "layer.pt", tmp_path / "results.pt"
    needed = fused and native.missing is None
    done = python(code.format("import eca_fused" if needed else ""), *files)
    assert done.stdout.strip() == "same", done.stderr
    if needed:
        assert "eca_fused::inference" in python(code.format(""), *files).stderr


# ---- ONNX ----


@needs_onnx
@pytest.mark.parametrize("padding_mode", MODES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=name_of)
@pytest.mark.parametrize("shape", [(2, 8), (2, 8, 7), (2, 8, 5, 7)], ids=name_of)
def test_onnx(shape, dtype, padding_mode):
    case = make_case(shape, 5, dtype, padding_mode=padding_mode)
    layer = ECALayer(kernel_size=5, padding_mode=padding_mode, dtype=dtype)
    program = torch.onnx.export(
        layer,
        (case.x,),
        dynamo=True,
        dynamic_shapes=({0: torch.export.Dim("batch")},),
        verbose=False,
    )
    session = onnx_session(program)
    for x in (case.x, torch.cat([case.x, case.x, case.x])):
        (y,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
        with torch.no_grad():
            torch.testing.assert_close(torch.from_numpy(y), layer(x))


@needs_onnx
@pytest.mark.parametrize("layout", LAYOUTS)
def test_onnx_of_a_network(layout):
    parts = nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), ECALayer(8, backend="auto"), nn.ReLU()
    net = nn.Sequential(*parts).eval()
    x = make_case((2, 3, 9, 9), layout=layout).x
    with torch.no_grad():
        program = torch.onnx.export(net, (x,), dynamo=True, verbose=False)
        want = net(x)
    session = onnx_session(program)
    (y,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
    torch.testing.assert_close(torch.from_numpy(y), want)


@needs_onnx
@no_torchscript
@pytest.mark.parametrize(
    "form",
    ["layer", "in place", "circular", "called", "SE", "ECA-NS", "called NS", "pool", "eca_", "out"],
)
@pytest.mark.filterwarnings("ignore:.*:DeprecationWarning", "ignore:.*:UserWarning")
def test_onnx_by_a_trace(form, tmp_path):
    """The older exporter, torch.onnx.export(dynamo=False), traces to standard operators."""
    torch.manual_seed(0)
    modules = {
        "layer": ECALayer(8), "in place": ECALayer(8, inplace=True), "SE": SE(8, 2),
        "circular": ECALayer(8, padding_mode="circular"), "ECA-NS": ECANS(8), "called": ECALayer(8),
        "pool": Ends(), "called NS": ECANS(8), "eca_": Written(eca_fused.eca_),
        "out": Written(lambda x, w: eca_fused.eca(x.clone(), w, out=x)),
    }  # fmt: skip
    module = modules[form].eval()
    if form == "called NS":
        module.conv.register_forward_hook(lambda m, a, y: 2 * y)
    if form == "called":
        module.conv = nn.Conv1d(1, 1, 3, padding=1)
    x = torch.randn(2, 8, 5, 7)
    with torch.no_grad():
        want = module(x.clone())
        path = tmp_path / "traced.onnx"
        torch.onnx.export(module, (x.clone(),), str(path), dynamo=False)
    onnxruntime = pytest.importorskip("onnxruntime", reason="needs onnxruntime: make test")
    session = onnxruntime.InferenceSession(str(path))
    (y, *_) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
    torch.testing.assert_close(torch.from_numpy(y), want, rtol=1e-5, atol=1e-5)


class Written(nn.Module):
    """Uses what the call has written, not what it returns."""

    def __init__(self, write):
        super().__init__()
        self.write, self.weight = write, nn.Parameter(torch.randn(1, 1, 3))

    def forward(self, x):
        written = x * 1
        self.write(written, self.weight)
        return written + 1


class Ends(nn.Module):
    """Both ends of channel attention, called as functions."""

    def forward(self, x):
        return eca_fused.rescale(x, torch.sigmoid(eca_fused.pool(x)))


@needs_extension
def test_an_exported_program_has_the_operators_own_strides():
    layer = ECALayer(5, backend="native")
    x = make_case((4, 8, 5, 7)).x[:, :5]
    program = exported(layer, x)
    with torch.no_grad():
        y = layer(x)
        assert program.module()(x).stride() == y.stride()
    (output,) = [n for n in program.graph.nodes if n.op == "output"]
    assert tuple(output.args[0][0].meta["val"].stride()[1:]) == y.stride()[1:]
