"""The choice of the backend, and what is said if it is not the expected one."""

import warnings

import pytest
import torch

import eca_fused
from eca_fused.ops import backend as backend_module, native
from helpers.cases import needs_extension
from helpers.processes import python

pytestmark = pytest.mark.every_torch


# The library of the kernels does not load, as where it was built for another machine.
WITHOUT_KERNELS = """
import warnings, torch
from pathlib import Path
def load_library(path):
    raise {error}
torch.ops.load_library = load_library
Path.is_file = lambda path: {there}
import eca_fused
x, w = torch.randn(2, 4, 3, 3), torch.randn(1, 1, 3)
"""


def test_backends_says_what_is_usable():
    status = eca_fused.backends()
    assert list(status) == ["native", "triton", "reference"]
    assert status["reference"].usable
    assert all(s.detail for s in status.values())
    for s in status.values():
        assert str(s).startswith("usable: " if s else "not usable: ")


@needs_extension
def test_native_names_its_instruction_set():
    assert any(
        name in eca_fused.backends()["native"].detail for name in ("avx512", "avx2", "baseline")
    )


@pytest.mark.parametrize(
    ("error", "there", "reason"),
    [
        ("OSError('no such file')", False, "this install has no compiled kernels"),
        ("OSError('undefined symbol')", True, "undefined symbol"),
        ("ValueError('invalid ELF header')", True, "invalid ELF header"),
    ],
)
def test_missing_or_broken_kernels_never_break_the_import(error, there, reason):
    done = python(
        WITHOUT_KERNELS.format(error=error, there=there)
        + """
status = eca_fused.backends()["native"]
assert not status.usable
print(status.detail)
with warnings.catch_warnings(record=True) as seen:
    warnings.simplefilter("always")
    y = [eca_fused.eca(x, w) for _ in range(3)]
print(len(seen), seen[0].message)
assert torch.equal(y[0], eca_fused.reference.eca(x, w))
try:
    eca_fused.eca(x, w, backend="native")
except RuntimeError as e:
    print(e)
""",
    )
    assert done.returncode == 0, done.stderr
    status, warning, error_line = done.stdout.splitlines()
    assert reason in status
    assert "pip install" in status
    assert warning.startswith("1 eca_fused runs in plain PyTorch on cpu, which is slower")
    assert "'native', which the argument asked for, cannot be used: th" in error_line
    assert reason in error_line


def test_kernels_of_another_version_never_break_the_import():
    done = python(
        """
import torch
torch.ops.load_library = lambda path: None  # one without these operators
import eca_fused
print(eca_fused.backends()["native"])
eca_fused.eca(torch.ones(1, 1), torch.ones(1, 1, 1))
"""
    )
    assert done.returncode == 0, done.stderr
    assert "not usable: the compiled extension could not be loaded, or is another" in done.stdout


@needs_extension
def test_an_unknown_instruction_set_is_an_error_that_lists_them():
    code = "import eca_fused; print(eca_fused.backends()['native'])"
    done = python(code, ECA_FUSED_CPU_CAPABILITY="AVX2")
    assert "one of baseline, avx2, avx512, got 'AVX2'; unset the variable" in done.stdout
    assert "pip install" not in done.stdout  # no build would mend it
    assert "usable: CPU" in python(code, ECA_FUSED_CPU_CAPABILITY="").stdout


def test_a_fallback_compiles_and_warns(monkeypatch):
    monkeypatch.setattr(native, "devices", frozenset())
    monkeypatch.setattr(backend_module, "_warned", set())
    layer = eca_fused.ECALayer(8)
    x = torch.randn(2, 8, 3, 3)
    torch._dynamo.reset()
    with pytest.warns(RuntimeWarning, match="eca_fused runs in plain PyTorch on cpu"):
        y = torch.compile(layer, fullgraph=True, backend="eager")(x)
    torch._dynamo.reset()
    torch.testing.assert_close(y, eca_fused.reference.eca(x, layer.conv.weight))


def test_auto_warns_once_on_a_device_without_kernels(monkeypatch):
    monkeypatch.setattr(native, "devices", frozenset({"cuda"}))
    monkeypatch.setattr(native, "missing", None)
    monkeypatch.setattr(backend_module, "_warned", set())
    x, w = torch.randn(2, 4, 3, 3), torch.randn(1, 1, 3)
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        for _ in range(3):
            assert torch.equal(eca_fused.eca(x, w), eca_fused.reference.eca(x, w))
    assert len(seen) == 1
    assert "compiled without kernels for cpu" in str(seen[0].message)
    assert seen[0].filename == __file__


@needs_extension
def test_no_warning_where_the_kernels_run():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        eca_fused.eca(torch.randn(2, 4, 3, 3), torch.randn(1, 1, 3))


@needs_extension
def test_use_backend_sets_and_restores_the_default(monkeypatch):
    calls = []
    inference = native.inference
    monkeypatch.setattr(native, "inference", lambda *a: calls.append(1) or inference(*a))
    x, w = torch.randn(2, 4, 3, 3), torch.randn(1, 1, 3)
    eca_fused.eca(x, w)
    assert len(calls) == 1
    with eca_fused.use_backend("reference"):
        eca_fused.eca(x, w)
        assert len(calls) == 1
        with eca_fused.use_backend("native"):
            eca_fused.eca(x, w)
        assert len(calls) == 2
        eca_fused.eca(x, w, backend="native")
        assert len(calls) == 3
    with pytest.raises(KeyError), eca_fused.use_backend("reference"):
        raise KeyError
    eca_fused.eca(x, w)
    assert len(calls) == 4


def test_environment_sets_the_default():
    code = (
        "import torch, eca_fused\n"
        "x, w = torch.randn(2, 4, 3, 3), torch.randn(1, 1, 3)\n"
        "from eca_fused.ops.backend import select\n"
        "print(select(x, 'auto'))\n"
    )
    assert python(code, ECA_FUSED_BACKEND="reference").stdout.strip() == "None"
    if native.missing is None:
        assert "eca_fused.ops.native" in python(code, ECA_FUSED_BACKEND="native").stdout
        assert "eca_fused.ops.native" in python(code, ECA_FUSED_BACKEND="").stdout
    failed = python(code, ECA_FUSED_BACKEND="fast")
    assert failed.returncode == 1
    assert (
        "expected ECA_FUSED_BACKEND as one of auto, native, triton, reference, got 'fast'"
        in failed.stderr
    )


def test_importing_the_package_imports_no_optional_one():
    optional = ["triton", "timm", "torchvision", "sklearn", "matplotlib"]
    code = f"import sys, eca_fused.models; print([m for m in {optional} if m in sys.modules])"
    assert python(code).stdout.strip() == "[]"
