"""The layout for Hugging Face's kernel-builder, and the package in it.

kernel-builder itself needs Nix. Here a stand-in for its _ops.py gives the package its operators.
"""

import ast
import json
import platform
import re
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest
import torch
from torch.utils.cpp_extension import include_paths

from eca_fused.ops import native
from helpers.cases import needs_extension
from helpers.optional import needs_timm
from helpers.processes import ROOT, python

pytestmark = pytest.mark.xdist_group("hub")

TOOL = ROOT / "tools" / "hub_layout.py"
NAMESPACE = "_eca_fused_cpu_a1b2c3d"  # as kernel-builder makes it of name, backend and commit
ALLOWED = {"torch", "triton"}  # beside the standard library
# Headers that are not in the layout: kernel-builder writes the first, and only the tests that run
# CUDA kernels on the host have the second.
UNLISTED = {"registration.h", "simt.h"}
# The folder of a build for this torch, whatever the build has.
BACKEND = f"cu{torch.version.cuda.replace('.', '')}" if torch.version.cuda else "cpu"
VARIANT = f"torch-stable-abi211-{BACKEND}-{platform.machine()}-linux"
METADATA = {
    "id": NAMESPACE,
    "name": "eca-fused",
    "version": 0,
    "license": "MIT",
    "python-depends": [],
    "backend": {"type": "cuda" if torch.version.cuda else "cpu"},
}

# What kernel-builder writes; the first line is another one there: it imports the library.
OPS = """
import torch
{loading}
ops = torch.ops.{namespace}

def add_op_namespace_prefix(op_name: str):
    return f"{namespace}::{{op_name}}"
"""
WITHOUT_KERNELS = OPS.format(loading="", namespace=NAMESPACE)
WITH_KERNELS = OPS.format(
    loading=f"torch.ops.load_library({str(native.LIBRARY)!r})", namespace="eca_fused"
)

# Imports a variant under its unique name, as the package `kernels` does.
IMPORT = f"""
import importlib.util, sys, torch
spec = importlib.util.spec_from_file_location({NAMESPACE!r}, sys.argv[1] + "/__init__.py")
hub = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
spec.loader.exec_module(hub)
assert not any(name.partition(".")[0] == "eca_fused" for name in sys.modules)
"""


@pytest.fixture(scope="module")
def layout(tmp_path_factory):
    folder = tmp_path_factory.mktemp("hub") / "eca-fused"
    subprocess.run([sys.executable, str(TOOL), str(folder)], check=True, capture_output=True)
    return folder


@pytest.fixture(scope="module")
def package(layout):
    return layout / "torch-ext" / "eca_fused"


@pytest.fixture
def build(layout):
    tomllib = pytest.importorskip("tomllib", reason="needs Python 3.11")
    return tomllib.loads((layout / "build.toml").read_text())


@pytest.fixture
def variant(package, tmp_path):
    """Makes the folder that a build has: the package with a text as its _ops.py."""

    def make(ops: str) -> Path:
        folder = tmp_path / "eca-fused" / "build" / VARIANT
        shutil.copytree(package, folder)
        (folder / "_ops.py").write_text(ops)
        (folder / "metadata.json").write_text(json.dumps(METADATA))
        return folder

    return make


def run(code: str, folder: Path) -> str:
    """What code prints, in a process that has imported the variant as `hub`."""
    done = python(IMPORT + code, folder, without=("ECA_FUSED_BACKEND",), PYTHONPATH="")
    assert done.returncode == 0, done.stderr
    return done.stdout


# ---- what kernel-builder asks for ----


def test_imports_are_relative_and_lead_to_files(package):
    seen = 0
    for path in package.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            outside = []
            if isinstance(node, ast.Import):
                outside = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom) and node.level == 0:
                outside = [node.module]
            elif isinstance(node, ast.ImportFrom) and node.module != "_ops":
                target = path.parents[node.level - 1].joinpath(*(node.module or "").split("."))
                files = [target / "__init__.py", *map(target.with_suffix, (".py", ".pyi"))]
                assert any(file.is_file() for file in files), f"{path}:{node.lineno}"
                assert target.is_relative_to(package)
                seen += 1
            roots = {name.partition(".")[0] for name in outside}
            assert roots <= ALLOWED | sys.stdlib_module_names, f"{path}:{node.lineno}"
    assert seen > 100


def test_no_module_names_the_namespace_of_the_package(package):
    """Operators of two builds in one process must not meet."""
    for path in package.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Constant) and isinstance(node.value, str):
                assert not node.value.startswith("eca_fused::"), path
                assert node.value != "eca_fused", path
            assert not (isinstance(node, ast.Attribute) and node.attr == "eca_fused"), path


def test_the_commands_and_what_they_need_are_left_out(package):
    assert not [name for name in ("cli", "conversion", "models") if (package / name).exists()]


def test_every_source_is_listed_and_there(layout, build):
    """kernel-builder copies only the files that build.toml lists."""
    everything = {
        path.relative_to(ROOT).as_posix()
        for path in (ROOT / "csrc").rglob("*")
        if path.suffix in (".cpp", ".cu", ".h")
    } - {"csrc/module.cpp"}
    on_cuda = set(build["kernel"]["eca_fused_cuda"]["src"])
    on_cpu = set(build["kernel"]["eca_fused_cpu"]["src"])
    assert on_cuda == everything
    assert on_cpu == {p for p in everything if p.endswith(".h") or "/cuda/" not in p}
    for name in [*on_cuda, *build["torch"]["src"]]:
        path = layout / name
        for header in re.findall(r'#include "(.+)"', path.read_text()):
            if header not in UNLISTED:
                found = (path.parent / header).resolve()
                assert found.relative_to(layout.resolve()).as_posix() in on_cpu, (name, header)


def test_the_stable_abi_is_that_of_setup_py(build):
    first, second = re.search(r"VERSION=0x(..)(..)", (ROOT / "setup.py").read_text()).groups()
    assert build["torch"]["stable-abi"] == f"{int(first, 16)}.{int(second, 16)}"


def test_a_second_layout_keeps_what_is_not_of_the_first(layout):
    (layout / "flake.lock").write_text("{}")
    (layout / "csrc" / "old.cpp").write_text("")
    subprocess.run([sys.executable, str(TOOL), str(layout)], check=True, capture_output=True)
    assert (layout / "flake.lock").is_file()
    assert not (layout / "csrc" / "old.cpp").exists()


@pytest.mark.skipif(not shutil.which("g++"), reason="needs g++")
@pytest.mark.parametrize(
    "source", ["coefficient_ops", "gated_ops", "info_ops", "ops", "tail_ops", "whole_tail_ops"]
)
def test_operators_are_registered_in_the_namespace_of_the_build(layout, build, source):
    flags = build["kernel"]["eca_fused_cpu"]["cxx-flags"]
    includes = [f"-I{path}" for path in [*include_paths(), sysconfig.get_path("include")]]
    version = "-DTORCH_TARGET_VERSION=0x020b000000000000ULL"
    command = ["g++", "-E", "-P", *flags, version, f"-DTORCH_EXTENSION_NAME={NAMESPACE}", *includes]
    made = subprocess.run(
        [*command, str(layout / "csrc" / f"{source}.cpp")],
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    # Torch's macros pass the namespace and the dispatch key as strings.
    registered = re.findall(r'Kind::(?:DEF|FRAGMENT|IMPL),\s*&\w+,\s*"(\w+)"', made)
    assert len(registered) >= 2
    assert set(registered) == {NAMESPACE}


# ---- the package under another name ----

COMPUTES = """
x = torch.randn(2, 16, 5, 5, dtype=torch.float64, requires_grad=True)
weight = torch.randn(1, 1, 3, dtype=torch.float64, requires_grad=True)
y, expected = hub.eca(x, weight), hub.reference.eca(x, weight)
torch.testing.assert_close(y, expected)
gradients = [torch.autograd.grad(z.sum(), (x, weight)) for z in (y, expected)]
torch.testing.assert_close(*gradients)
with torch.no_grad():
    torch.testing.assert_close(hub.ECALayer(16).double()(x).shape, x.shape)
    torch.testing.assert_close(torch.jit.script(hub.ECALayer(16))(x.float()).shape, x.shape)
print(hub.backends()["native"].usable)
"""


def test_without_kernels_plain_pytorch_computes(variant):
    assert run(COMPUTES, variant(WITHOUT_KERNELS)).strip() == "False"


@needs_extension
def test_the_kernels_compute(variant):
    assert run(COMPUTES, variant(WITH_KERNELS)).strip() == "True"


@needs_extension
def test_the_kernels_compute_in_compiled_code(variant):
    code = """
x, weight = torch.randn(2, 16, 5, 5), torch.randn(1, 1, 3)
compiled = torch.compile(lambda x, w: hub.eca(x, w, backend="native"), backend="aot_eager")
torch.testing.assert_close(compiled(x, weight), hub.reference.eca(x, weight))
"""
    run(code, variant(WITH_KERNELS))


# ---- layers ----


def test_layers_have_no_state_and_no_constructor(variant):
    code = """
import inspect
from torch import nn
for name in hub.layers.__all__:
    layer = getattr(hub.layers, name)
    assert issubclass(layer, nn.Module) and layer.__init__ is nn.Module.__init__
    added = {n for n, _ in inspect.getmembers(layer)}
    added -= {n for n, _ in inspect.getmembers(nn.Module)}
    assert added <= {"can_torch_compile", "has_backward"}, added
    assert list(inspect.signature(layer.forward).parameters) == ["self", "x"]
print(len(hub.layers.__all__))
"""
    assert run(code, variant(WITHOUT_KERNELS)).strip() == "3"


# Modules whose forward a layer replaces, as kernelize() does it.
LAYERS = """
import copy
from types import MethodType
from timm.layers import CecaModule, EcaModule
from torch import nn

class eca_layer(nn.Module):  # of ECA-Net's authors
    def __init__(self, channel, k_size=3):
        super().__init__()
        self.avg_pool = nn.AdaptiveAvgPool2d(1)
        self.conv = nn.Conv1d(1, 1, kernel_size=k_size, padding=(k_size - 1) // 2, bias=False)
        self.sigmoid = nn.Sigmoid()

    def forward(self, x):
        y = self.conv(self.avg_pool(x).squeeze(-1).transpose(-1, -2))
        return x * self.sigmoid(y.transpose(-1, -2).unsqueeze(-1)).expand_as(x)

made = [("ECALayer", eca_layer(16))]
for options in {}, {"gate_layer": "hard_sigmoid"}:
    for mlp in False, True:
        made.append(("EcaModule", EcaModule(16, use_mlp=mlp, **options)))
    for act in None, nn.ReLU:
        made.append(("CecaModule", CecaModule(16, act_layer=act, **options)))
for name, module in made:
    module = module.double()
    twin = copy.deepcopy(module)
    twin.forward = MethodType(getattr(hub.layers, name).forward, twin)
    results = []
    for m in module, twin:
        torch.manual_seed(0)
        x = torch.randn(2, 16, 5, 5, dtype=torch.float64, requires_grad=True)
        y = m(x)
        results.append([y, *torch.autograd.grad(y.square().sum(), [x, *m.parameters()])])
    torch.testing.assert_close(*results)
print(len(made))
"""


@needs_timm
@pytest.mark.parametrize(
    "ops", [WITHOUT_KERNELS, pytest.param(WITH_KERNELS, marks=needs_extension)]
)
def test_layers_compute_what_the_modules_do(variant, ops):
    assert run(LAYERS, variant(ops)).strip() == "9"


# ---- the checks of the package `kernels` ----


def kernels(module="kernels"):
    return pytest.importorskip(module, reason="needs: pip install kernels kernel-abi-check")


def test_kernels_accepts_build_toml(layout):
    kernels()
    from kernels._rust import Backend, Build

    found = Build.open(layout)
    assert found.general.backends == [Backend.CPU, Backend.CUDA]


@needs_timm
@needs_extension
def test_kernelize_takes_the_layers(variant):
    kernels()
    code = """
from pathlib import Path
from kernels import (
    LocalLayerRepository, Mode, get_local_kernel, kernelize, replace_kernel_forward_from_hub,
    use_kernel_mapping,
)
from timm.layers import EcaModule

folder = Path(sys.argv[1]).parents[1]
replace_kernel_forward_from_hub(EcaModule, "EcaModule")
model, x = torch.nn.Sequential(EcaModule(16)), torch.randn(2, 16, 5, 5)
expected = model(x)
mapping = {"EcaModule": {"cpu": LocalLayerRepository(folder, layer_name="EcaModule")}}
with use_kernel_mapping(mapping):
    mode = Mode.TRAINING | Mode.TORCH_COMPILE
    kernelize(model, mode=mode, device="cpu", use_fallback=False)
assert model[0].forward.__func__ is get_local_kernel(folder).layers.EcaModule.forward
torch.testing.assert_close(model(x), expected)
"""
    folder = variant(WITH_KERNELS)
    done = python("import sys, torch\n" + code, folder, PYTHONPATH="", HF_HUB_OFFLINE="1")
    assert done.returncode == 0, done.stderr


@needs_extension
def test_the_library_needs_nothing_of_one_version_of_python():
    check = kernels("kernel_abi_check")
    assert check.ObjectFile(native.LIBRARY).check_python_abi("3.9") == []
