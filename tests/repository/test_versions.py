"""What is supported is in one table, and private names of PyTorch are in one file."""

import ast
import re
import runpy
import subprocess
import sys

import pytest
import torch

from helpers.processes import ROOT, python

pytestmark = pytest.mark.every_torch

TABLE = ROOT / "tools" / "versions.txt"
HOME = "eca_fused/torch_state.py"

# torch._x, torch.a._b, from torch._x import, from torch.a import _b, forward_ad._x
PRIVATE = re.compile(
    r"\btorch(\.\w+)*\._(?!_)\w+|from torch[\w.]*\._\w+|from torch[\w.]* import .*\b_(?!_)\w+"
    r"|\b(forward_ad|functorch)\._\w+"
    # attributes of modules, of functions and of tensors
    r"|\._(?:dynamo_marked_constant|compiled_call_impl|call_impl|conv_forward|modules|parameters)\b"
    r"|\._(?:buffers|(?:forward|backward)(?:_pre)?_hooks)\b|\[\"_(?:modules|parameters|buffers)"
)

SCRIPT = ROOT / "tools" / "versions.sh"  # an archive of the sources has the table alone
needs_checkout = pytest.mark.skipif(not SCRIPT.is_file(), reason="needs the source folder")


def rows() -> list[list[str]]:
    lines = TABLE.read_text().splitlines()
    return [line.split(None, 4) for line in lines if line.strip() and not line.startswith("#")]


@needs_checkout
def test_the_table_of_versions():
    names = [row[0] for row in rows()]
    assert len(names) == len(set(names))
    assert {"default", "newest"} < set(names)
    assert rows()[0][0] == "2.11.0"
    assert all(len(row) == 5 for row in rows())


@needs_checkout
def test_the_oldest_version_is_the_same_everywhere():
    oldest = ".".join(rows()[0][0].split(".")[:2])
    project = (ROOT / "pyproject.toml").read_text()
    assert project.count(f'"torch>={oldest}"') == 1
    major, minor = map(int, oldest.split("."))
    setup = (ROOT / "setup.py").read_text()
    assert f"TORCH_TARGET_VERSION=0x{major:02x}{minor:02x}000000000000ULL" in setup
    for name in ("README.md", "docs/getting_started.md", "tools/setup.sh"):
        text = (ROOT / name).read_text()
        assert re.search(rf"\b{re.escape(oldest)}\b", text)


@needs_checkout
@pytest.mark.skipif(sys.version_info < (3, 11), reason="needs tomllib: Python 3.11")
def test_the_oldest_optional_packages_are_tested():
    import tomllib

    text = (ROOT / "pyproject.toml").read_text()
    bounds = runpy.run_path(str(ROOT / "tools" / "oldest.py"))["oldest"](text)
    extras = tomllib.loads(text)["project"]["optional-dependencies"]
    asked = {re.split(r"[\[<>=]", r)[0] for r in extras["demo"] + extras["test"]}
    assert asked - {"eca-fused"} == set(bounds), "a package without a lower bound"
    assert "oldest" in rows()[0]


def test_this_torch_is_supported():
    oldest = tuple(map(int, rows()[0][0].split(".")[:2]))
    assert tuple(map(int, torch.__version__.split(".")[:2])) >= oldest


def uses(text: str) -> list[str]:
    """The private names of torch in Python source, comments left out."""
    found = []
    for line in text.splitlines():
        code = line.split("  #")[0]
        if not code.lstrip().startswith("#"):
            found += [match[0] for match in PRIVATE.finditer(code)]
    return found


# sys._getframe(), a method of named tuples, and operators of ours.
OTHERS = {"_getframe", "_replace", "_inference_", "_inference_into"}
OTHERS |= {"_triton_inference_", "_triton_inference_into"}


def foreign_attributes(text: str) -> list[str]:
    """Private attributes that are neither of self or cls nor named in this file."""
    tree = ast.parse(text)
    own = {n.name for n in ast.walk(tree) if isinstance(n, ast.FunctionDef | ast.ClassDef)}
    own |= {n.attr for n in ast.walk(tree) if isinstance(n, ast.Attribute) and of_self(n)}
    return [
        node.attr
        for node in ast.walk(tree)
        if isinstance(node, ast.Attribute) and re.match(r"_[a-z]", node.attr)
        if not of_self(node) and node.attr not in own
    ]


def of_self(node: ast.Attribute) -> bool:
    return isinstance(node.value, ast.Name) and node.value.id in ("self", "cls")


@needs_checkout
def test_private_attributes_are_our_own():
    found = {
        f"{path.relative_to(ROOT)}: {name}"
        for path in sorted((ROOT / "eca_fused").rglob("*.py"))
        if path.relative_to(ROOT).as_posix() != HOME
        for name in foreign_attributes(path.read_text())
        if name not in OTHERS
    }
    assert found == set()
    assert foreign_attributes("a.untyped_storage()._cdata") == ["_cdata"]


@needs_checkout
def test_private_names_of_torch_are_in_one_file():
    found = {
        f"{path.relative_to(ROOT)}: {use}"
        for folder in ("eca_fused", "examples", "benchmarks")
        for path in sorted((ROOT / folder).rglob("*.py"))
        if path.relative_to(ROOT).as_posix() != HOME
        for use in uses(path.read_text())
        if not use.startswith("torch.ops.")  # our own
    }
    assert found == set()
    assert len(uses((ROOT / HOME).read_text())) >= 8  # a pattern that finds nothing proves nothing


@pytest.mark.parametrize(
    "line",
    [
        "x = torch._C._is_tracing()",
        "from torch._subclasses.fake_tensor import is_fake",
        "from torch.jit._trace import TracerWarning",
        "with forward_ad._set_fwd_grad_enabled(True):",
        "flag = torch.compiler._is_exporting_flag",
        "parts = module._modules",
        'vars(module)["_modules"] = {}',
        "function._dynamo_marked_constant = True",
    ],
)
def test_what_counts_as_a_private_name(line):
    assert uses(line)
    assert not uses("# " + line)


def test_no_graph_break_in_the_layer():
    """Without fullgraph a break is silent: the layer is only slow."""
    code = """
import torch, eca_fused
from torch._dynamo import explain
x = torch.randn(2, 16, 8, 8)
for layer in (
    eca_fused.ECALayer(16), eca_fused.ECALayer(16, padding_mode="circular"),
    eca_fused.ECALayer(16, fused=False), eca_fused.attention.make("se", 16),
    *([eca_fused.ECALayer(16, backend="native")] if eca_fused.backends()["native"] else []),
):
    for grad in (False, True):
        torch._dynamo.reset()
        with torch.set_grad_enabled(grad):
            found = explain(layer)(x)
        assert (found.graph_count, found.graph_break_count) == (1, 0), (layer, found.break_reasons)
print("whole")
"""
    done = python(code)
    assert done.stdout.strip() == "whole", done.stderr[-3000:]


@needs_checkout
def test_versions_script_lists_its_rows():
    done = subprocess.run([str(SCRIPT), "--list"], capture_output=True, text=True, timeout=60)
    assert done.stdout.split() == [row[0] for row in rows()]
    wrong = subprocess.run([str(SCRIPT), "1.0"], capture_output=True, text=True, timeout=60)
    assert wrong.returncode == 2
    assert "no row 1.0" in wrong.stderr
