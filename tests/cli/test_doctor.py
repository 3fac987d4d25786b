"""`python -m eca_fused doctor`: whole and broken installs, and that the self-test can fail."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import eca_fused
from eca_fused.__main__ import main
from eca_fused.cli.doctor import choices, facts, self_test, text
from eca_fused.cli.doctor.choices import Choice, Off
from eca_fused.cli.doctor.facts import Compiled, Gpus
from eca_fused.ops import native
from helpers.cases import needs_extension

pytestmark = pytest.mark.usefixtures("one_thread")

LIBRARY = native.LIBRARY.name
WITHOUT_GPU = pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
CPU = torch.device("cpu")


def in_process(capsys: pytest.CaptureFixture[str]) -> tuple[int, dict[str, Any]]:
    """Exit status and JSON document of a run in this process."""
    status = main(["doctor", "--json"])
    return status, json.loads(capsys.readouterr().out)


@pytest.fixture
def install(tmp_path: Path) -> Path:
    """A folder with a copy of the package that has no compiled module."""
    package = Path(eca_fused.__file__).parent
    ignored = shutil.ignore_patterns("*.so", "__pycache__")
    shutil.copytree(package, tmp_path / "eca_fused", ignore=ignored)
    return tmp_path


def run_in(
    folder: Path, *arguments: str, before: str = "", **env: str
) -> subprocess.CompletedProcess[str]:
    """The command in a fresh process that imports the package of a folder.

    An editable install would give it the modules that the folder lacks.
    """
    code = f"{before}\nimport sys\n"
    code += (
        "finders = [f for f in sys.meta_path if 'editable' not in getattr(f, '__module__', '')]\n"
    )
    code += "sys.meta_path[:] = finders\nfrom eca_fused.__main__ import process\n"
    code += "sys.exit(process(['doctor', *sys.argv[1:]]))"
    dropped = ("PYTHONPATH", "ECA_FUSED_BACKEND", "TRITON_INTERPRET")
    kept = {name: value for name, value in os.environ.items() if name not in dropped}
    return subprocess.run(
        [sys.executable, "-c", code, *arguments],
        cwd=folder,
        env=kept | {"OMP_NUM_THREADS": "1"} | env,
        capture_output=True,
        text=True,
    )


# ---- a whole install ----


@needs_extension
@WITHOUT_GPU
def test_a_whole_install(capsys: pytest.CaptureFixture[str]) -> None:
    status, found = in_process(capsys)
    assert (status, found["ok"], found["problems"]) == (0, True, [])
    assert found["software"]["torch"] == torch.__version__
    assert found["software"]["torch_cuda"] == torch.version.cuda
    assert found["software"]["python"] == sys.version.split()[0]
    assert found["software"]["eca_fused"] == eca_fused.__version__
    compiled = found["compiled"]
    assert compiled["loaded"] is True
    assert compiled["info"]["cpu_capability"] in compiled["info"]["cpu_capabilities"]
    assert compiled["info"]["torch_abi"] == "2.11"
    assert "+" in compiled["info"]["compiler"]
    kinds = {(one["device"], one["dtype"], one["layout"]) for one in found["choices"]}
    assert len(kinds) == len(found["choices"]) == 8
    assert {one["residual_tail"] for one in found["choices"]} == {"native"}
    tested = {
        (one["backend"], one["operation"], one["dtype"], one["layout"])
        for one in found["self_test"]
        if one["device"] == "cpu"
    }
    assert {entry[0] for entry in tested} >= {"native", "reference"}
    assert len([entry for entry in tested if entry[0] == "native"]) == 16
    assert all(one["passed"] and one["used"] <= 1 for one in found["self_test"])
    assert max(one["used"] for one in found["self_test"]) > 0.05  # compared with something else


@needs_extension
@WITHOUT_GPU
def test_the_text_has_the_same_facts_in_100_columns(capsys: pytest.CaptureFixture[str]) -> None:
    _, found = in_process(capsys)
    assert main(["doctor"]) == 0
    printed = capsys.readouterr().out
    assert (
        max(len(line) for line in printed.splitlines() if "/" not in line) <= 100
    )  # but for paths
    joined = " ".join(printed.split())
    assert found["software"]["torch"] in joined
    assert found["compiled"]["file"] in joined
    assert ", ".join(found["compiled"]["info"]["cpu_capabilities"]) in joined
    assert "native for eca(), ResidualTail, NormActAttention, in every dtype and layout" in joined
    assert "cpu native passed, 16 cases" in joined
    assert joined.endswith("No problems: all that should run here does.")


def test_only_torch_is_needed(install: Path) -> None:
    blocked = (
        "import sys\n"
        "for name in ('numpy', 'matplotlib', 'sklearn', 'PIL', 'tqdm', 'timm', 'torchvision',\n"
        "             'triton', 'safetensors'):\n"
        "    sys.modules[name] = None\n"
    )
    done = run_in(install, "--json", before=blocked)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert all(one["passed"] for one in found["self_test"])
    assert "could not be imported" in found["backends"]["triton"]


# ---- broken installs ----


def test_without_compiled_kernels(install: Path) -> None:
    done = run_in(install)
    assert done.returncode == 0, done.stdout + done.stderr
    printed = " ".join(done.stdout.split())
    assert "WARNING NO COMPILED KERNELS, so CPUs run the slower plain PyTorch" in printed
    assert "built with ECA_FUSED_NATIVE=0 or without a C++ compiler" in printed
    assert "fix `pip install .` in the source folder, with a C++ compiler" in printed
    assert "cpu plain PyTorch for eca()" in printed
    assert "cpu reference passed, 16 cases" in printed
    assert printed.endswith("No problems, 1 warning.")


def test_damaged_kernels(install: Path) -> None:
    (install / "eca_fused" / LIBRARY).write_text("no library")
    done = run_in(install)
    assert done.returncode == 1
    printed = " ".join(done.stdout.split())
    assert "NOT LOADED OSError" in printed
    assert "PROBLEM NO COMPILED KERNELS" in printed
    assert "as the file is damaged" in printed
    assert "cpu reference passed" in printed  # the rest is still reported


@pytest.mark.skipif(shutil.which("cc") is None, reason="makes a library: needs a C compiler")
def test_an_undefined_symbol(install: Path) -> None:
    """As after an update of torch that a library without a stable ABI does not survive."""
    source = install / "kernels.c"
    source.write_text("void torch_of_before(void);\nvoid forward(void) { torch_of_before(); }\n")
    library = install / "eca_fused" / LIBRARY
    subprocess.run(["cc", "-shared", "-fPIC", "-Wl,-z,now", "-o", library, source], check=True)
    done = run_in(install, "--json")
    assert done.returncode == 1
    found = json.loads(done.stdout)
    assert found["ok"] is False
    assert found["compiled"]["loaded"] is False
    assert "undefined symbol: torch_of_before" in found["compiled"]["error"]
    (problem,) = found["problems"]
    assert "built for another torch" in problem["what"]
    assert "undefined symbol: torch_of_before" in problem["what"]
    assert "pip install" in problem["fix"]


@needs_extension
def test_a_planner_for_another_python(install: Path) -> None:
    """The kernels are of no version of Python, so the rest works."""
    shutil.copy2(native.LIBRARY, install / "eca_fused")
    (install / "eca_fused" / "_C.cpython-39-x86_64-linux-gnu.so").touch()
    done = run_in(install, "--json")
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads(done.stdout)
    assert found["compiled"]["loaded"] is True
    (warning,) = found["warnings"]
    assert "plan() does not work" in warning["what"]
    assert "pip install" in warning["fix"]


@pytest.mark.parametrize(
    ("module", "what", "fix"),
    [
        (Compiled(None, None, {}, True, "/site/eca_fused"), "the sources", "finds /site/eca_fused"),
        (Compiled(None, None, {}, True, None), "the sources", "make build"),
        (Compiled(None, None, {}, False, None), "ECA_FUSED_NATIVE=0", "with a C++ compiler"),
    ],
)
def test_the_fix_fits_the_reason(module: Compiled, what: str, fix: str) -> None:
    found = choices.missing_module(module)
    assert what in found[0]
    assert fix in found[1]


@pytest.mark.parametrize(
    ("error", "meaning"),
    [
        ("ImportError: /lib/libstdc++.so.6: version `GLIBCXX_3.4.32' not found", "newer libraries"),
        ("ImportError: libcudart.so.13: cannot open shared object file", "library that it needs"),
        ("AttributeError: '_OpNamespace' object has no attribute 'tail'", "another version's"),
    ],
)
def test_what_the_linker_means(monkeypatch: pytest.MonkeyPatch, error: str, meaning: str) -> None:
    monkeypatch.setattr(native, "load_error", error)
    reason, fix = choices.missing_module(Compiled(f"/x/{LIBRARY}", error, {}, False, None))
    assert meaning in reason
    assert error in reason
    assert "pip install" in fix


def test_an_installed_copy_behind_the_sources_is_found(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "eca_fused").mkdir()
    monkeypatch.setattr(sys, "path", [str(tmp_path)])
    assert facts.compiled().installed is None
    (tmp_path / "eca_fused" / LIBRARY).touch()
    assert facts.compiled().installed == str(tmp_path / "eca_fused")


# ---- settings ----


@needs_extension
@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("ECA_FUSED_BACKEND", "bogus"),
        ("ECA_FUSED_CPU_CAPABILITY", "sse"),
        ("ECA_FUSED_CPU_CACHE_BYTES", "all"),
    ],
)
def test_a_wrong_setting_is_a_problem(name: str, value: str) -> None:
    done = run_in(Path(eca_fused.__file__).parents[1], "--json", **{name: value})
    assert done.returncode == 1, done.stderr
    found = json.loads(done.stdout)
    assert found["settings"][name] == value
    (problem,) = found["problems"]
    assert f"expected {name}" in problem["what"]
    assert "unset" in problem["fix"]


@needs_extension
@WITHOUT_GPU
def test_a_backend_that_was_asked_for(capsys: pytest.CaptureFixture[str], monkeypatch: Any) -> None:
    monkeypatch.setenv("ECA_FUSED_BACKEND", "reference")
    with eca_fused.use_backend("reference"):
        status, found = in_process(capsys)
    assert status == 0
    assert {one["eca"] for one in found["choices"]} == {"reference"}
    assert ["ECA_FUSED_BACKEND=reference replaces" in w["what"] for w in found["warnings"]] == [
        True
    ]


# ---- kernels that compute something else ----


def wrong(place: int, change: Callable[[Any], Any]) -> Callable[[Any], Any]:
    """An operator that changes one of its results."""

    def break_(operator: Any) -> Any:
        def broken(*arguments: Any) -> Any:
            found = operator(*arguments)
            if isinstance(found, torch.Tensor):
                return change(found)
            return *found[:place], change(found[place]), *found[place + 1 :]

        return broken

    return break_


def raising(operator: Any) -> Any:
    def broken(*arguments: Any) -> Any:
        raise RuntimeError("CUDA error: an illegal memory access\nand more")

    return broken


@needs_extension
@WITHOUT_GPU
@pytest.mark.parametrize(
    ("operator", "break_", "cases", "failure"),
    [
        ("inference", wrong(0, lambda y: y * 1.01), 8, "y in inference is"),
        ("forward", wrong(0, lambda y: y * float("nan")), 8, "y is nan"),
        ("backward", wrong(0, lambda dx: dx * 0.99), 8, "dx is"),
        ("backward", wrong(1, lambda dw: dw * 0.9), 8, "dw is"),
        ("block_tail_backward", wrong(1, lambda d: d * 0.9), 8, "d_identity is"),
        ("forward", raising, 8, "RuntimeError: CUDA error: an illegal memory access"),
    ],
)
def test_a_wrong_backend_fails(
    operator: str,
    break_: Callable[[Any], Any],
    cases: int,
    failure: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(native, operator, break_(getattr(native, operator)))
    status, found = in_process(capsys)
    assert status == 1
    failed = [one for one in found["self_test"] if not one["passed"]]
    assert len(failed) == cases
    assert {one["backend"] for one in failed} == {"native"}
    assert all(one["failure"].startswith(failure) for one in failed)
    (problem,) = found["problems"]
    assert f"the self-test of native on cpu fails {cases} of 16 cases" in problem["what"]
    assert main(["doctor"]) == 1
    assert f"FAILED, {cases} of 16 cases" in capsys.readouterr().out


def test_plain_pytorch_is_tested_too(monkeypatch: pytest.MonkeyPatch) -> None:
    rescale = eca_fused.reference.rescale
    exact = torch.float64  # the yardstick stays right
    monkeypatch.setattr(
        eca_fused.reference,
        "rescale",
        lambda x, gate: rescale(x, gate) * (1 if x.dtype == exact else 1.2),
    )
    self_test.yardstick.cache_clear()
    failed = {one.dtype for one in self_test.self_test(CPU, "reference") if not one.passed}
    self_test.yardstick.cache_clear()
    assert failed == {"float32", "float16", "bfloat16"}


# ---- GPUs ----

MODULE = Compiled(f"/x/{LIBRARY}", None, {}, False, None)
NO_GPUS = Gpus([], [], False, "")


def on_cuda(backend: str = "", error: str = "") -> list[Choice]:
    return [Choice("cuda:0", "float32", "contiguous", backend, backend, backend, error)]


@needs_extension
def test_a_gpu_in_plain_pytorch_is_a_problem() -> None:
    reasons = [Off("cuda:0", "native", "no", "build it"), Off("cuda:0", "triton", "no", "get it")]
    (found,) = choices.findings(MODULE, NO_GPUS, on_cuda("reference"), reasons)
    assert found.problem
    assert "cuda:0 runs plain PyTorch" in found.what
    assert found.fix == "build it; or get it"


@needs_extension
def test_a_gpu_on_triton_is_a_warning() -> None:
    reasons = [Off("cuda:0", "native", "compiled without kernels for cuda", "build it")]
    (found,) = choices.findings(MODULE, NO_GPUS, on_cuda("triton"), reasons)
    assert (found.problem, found.fix) == (False, "build it")
    assert "compiled without kernels for cuda" in found.what
    assert list(choices.findings(MODULE, NO_GPUS, on_cuda("native"), [])) == []


@needs_extension
@WITHOUT_GPU
def test_why_the_others_are_off(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native, "devices", frozenset({"cpu"}))  # as in a build without CUDA
    found = {one.backend: one for one in choices.off([torch.device("cuda", 0)], MODULE)}
    assert found["native"].reason == "the extension was compiled without kernels for cuda"
    assert found["native"].fix == "`ECA_FUSED_CUDA=1 pip install .` in the source folder"
    assert found["triton"].fix == f"install the Triton that belongs to torch {torch.__version__}"
    (on_the_cpu,) = choices.off([CPU], MODULE)
    assert (on_the_cpu.backend, on_the_cpu.fix) == ("triton", "")


@needs_extension
def test_a_gpu_in_the_text() -> None:
    gpu = {
        "index": 1,
        "name": "NVIDIA H900",
        "capability": "9.0",
        "multiprocessors": 132,
        "memory_bytes": 80 * 2**30,
    }
    lines = text.machine(facts.cpu(), Gpus([gpu], [], False, ""))
    shown = "NVIDIA H900, compute capability 9.0, 132 multiprocessors, 80 GiB"
    assert " ".join(lines[-1].split()) == f"cuda:1 {shown}"
    info = {**native.build_info, "cuda_architectures": "8.0;9.0+PTX", "cuda_toolkit": "13.0"}
    module = Compiled(f"/x/{LIBRARY}", None, info, False, None)
    joined = " ".join(" ".join(text.module(module)).split())
    assert "CUDA compute capabilities 8.0;9.0+PTX toolkit CUDA 13.0" in joined


@needs_extension
@WITHOUT_GPU
def test_a_gpu_that_does_not_answer_is_a_problem() -> None:
    chosen = choices.choices([torch.device("cuda", 0)])
    assert all(one.error for one in chosen)
    (found,) = choices.findings(MODULE, NO_GPUS, chosen, [])
    assert found.problem
    assert found.what.startswith("nothing runs on cuda:0: ")


@WITHOUT_GPU
def test_a_gpu_that_torch_cannot_use(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    program = tmp_path / "nvidia-smi"
    program.write_text('#!/bin/sh\ncase "$*" in *=name*) echo NVIDIA H900;; *) echo 999.1;; esac\n')
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    status, found = in_process(capsys)
    assert status == 1
    assert found["software"]["nvidia_driver"] == "999.1"
    (problem,) = found["problems"]
    assert problem["what"].startswith("torch cannot use the GPU (NVIDIA H900): ")
    assert problem["fix"]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert main(["doctor"]) == 0
    assert "NVIDIA H900; hidden by CUDA_VISIBLE_DEVICES" in capsys.readouterr().out
