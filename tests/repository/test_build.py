"""What a build needs, and setup.py's choice between builds with and without kernels."""

import importlib.util
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from eca_fused.ops import native
from helpers.cases import needs_extension
from helpers.processes import ROOT

pytestmark = pytest.mark.xdist_group("build")

SETUP = ROOT / "setup.py"
KERNELS = {"torch_version": "2.15.0", "torch_cuda": "13.2", "has_kernels": True}


def load(name, path):
    spec = importlib.util.spec_from_file_location(name, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def build():
    return load("eca_fused_setup", SETUP)


@pytest.fixture
def backend(build, monkeypatch):
    """tools/build_backend.py, in the root of the sources, as pip runs it."""
    monkeypatch.chdir(ROOT)
    monkeypatch.setitem(sys.modules, "setup", build)
    return load("eca_fused_build_backend", ROOT / "tools" / "build_backend.py")


def script(path, text):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("#!/bin/sh\n" + text)
    path.chmod(0o755)
    return path


def make_toolkit(home, version=13000):
    """A folder that looks like a CUDA toolkit; its nvcc tells where it is, as the real one does."""
    (home / "include").mkdir(parents=True)
    (home / "include" / "cuda_runtime.h").touch()
    (home / "include" / "cuda_runtime_api.h").write_text(f"#define CUDART_VERSION  {version}\n")
    script(home / "bin" / "nvcc", f"echo '#$ TOP={home}/bin/..' >&2\n")
    return home


@pytest.mark.parametrize("request_", [None, "", "1"])
def test_cuda_where_the_toolkit_fits_torch(build, tmp_path, request_):
    home = make_toolkit(tmp_path / "cuda")
    toolkit, reason = build.choose_toolkit(request_, [home], **KERNELS)
    assert toolkit == (home, (13, 0))
    assert str(home) in reason
    assert "13.0" in reason


def test_zero_leaves_cuda_out(build, tmp_path):
    home = make_toolkit(tmp_path / "cuda")
    assert build.choose_toolkit("0", [home], **KERNELS) == (None, "ECA_FUSED_CUDA=0")


def test_first_fitting_toolkit_wins(build, tmp_path):
    old = make_toolkit(tmp_path / "old", 12080)
    homes = [tmp_path / "none", old, make_toolkit(tmp_path / "a"), make_toolkit(tmp_path / "b")]
    toolkit, _ = build.choose_toolkit(None, homes, **KERNELS)
    assert toolkit.home == tmp_path / "a"


def no_kernels(_):
    return {"has_kernels": False}, [r"this version has no CUDA kernels", r"Unset ECA_FUSED_CUDA"]


def cpu_only_torch(folder):
    homes = [make_toolkit(folder / "cuda")]
    found = r"torch 2\.15\.0 was built without CUDA"
    return {"torch_cuda": None, "homes": homes}, [found, r"Install a torch built with CUDA"]


def nothing_found(folder):
    found = rf"no CUDA toolkit \({folder}/a: no include/cuda_runtime\.h"
    return {"homes": [folder / "a"]}, [found, r"CUDA 13 toolkit", r"nvidia-nvvm==13\.2\.\*"]


def headers_without_compiler(folder):
    home = make_toolkit(folder / "cuda")
    (home / "bin" / "nvcc").unlink()
    return {"homes": [home]}, [rf"{home}: no bin/nvcc", r"set CUDA_HOME"]


def headers_without_version(folder):
    home = make_toolkit(folder / "cuda")
    (home / "include" / "cuda_runtime_api.h").unlink()
    return {"homes": [home]}, [rf"{home}: no CUDART_VERSION"]


def other_major_version(folder):
    home = make_toolkit(folder / "cuda", 12080)
    found = rf"built with CUDA 13\.2, but found CUDA 12\.8 in {home}"
    return {"homes": [home]}, [found, r"Install the CUDA 13 toolkit"]


def torch_of_an_older_cuda(folder):
    home = make_toolkit(folder / "cuda")
    return {"homes": [home], "torch_cuda": "12.8"}, [r"built with CUDA 12\.8", r"CUDA 12 toolkit"]


OBSTACLES = [
    no_kernels,
    cpu_only_torch,
    nothing_found,
    headers_without_compiler,
    headers_without_version,
    other_major_version,
    torch_of_an_older_cuda,
]


@pytest.mark.parametrize("obstacle", OBSTACLES)
def test_obstacle_means_no_cuda_or_an_error(build, tmp_path, obstacle):
    changes, patterns = obstacle(tmp_path)
    arguments = {"homes": [], **KERNELS, **changes}
    toolkit, reason = build.choose_toolkit(None, **arguments)
    assert toolkit is None
    with pytest.raises(SystemExit, match="ECA_FUSED_CUDA=1, but ") as error:
        build.choose_toolkit("1", **arguments)
    assert reason in str(error.value)
    for pattern in patterns:
        error.match(pattern)


@pytest.mark.parametrize("request_", ["yes", "2", "auto"])
def test_unknown_request(build, request_):
    with pytest.raises(SystemExit, match=f"to be 0 or 1, got '{request_}'"):
        build.choose_toolkit(request_, [], **KERNELS)


def test_variables_come_before_nvcc_on_path(build, tmp_path):
    environ = {"CUDA_HOME": "/named/home", "CUDA_PATH": "/named/path"}
    nvcc = make_toolkit(tmp_path / "cuda") / "bin" / "nvcc"
    homes = build.candidate_homes(environ, str(nvcc))
    expected = ["/named/home", "/named/path", tmp_path / "cuda", "/usr/local/cuda"]
    assert homes[:4] == [Path(p) for p in expected]


def test_empty_variables_do_not_count(build):
    homes = build.candidate_homes({"CUDA_HOME": "", "CUDA_PATH": ""}, None)
    assert homes[0] == Path("/usr/local/cuda")


@pytest.mark.parametrize("kind", ["link", "script"])
def test_toolkit_behind_a_link_or_a_script(build, tmp_path, kind):
    real = make_toolkit(tmp_path / "cuda") / "bin" / "nvcc"
    nvcc = tmp_path / "bin" / "nvcc"
    if kind == "link":
        nvcc.parent.mkdir()
        nvcc.symlink_to(real)
    else:
        script(nvcc, f'exec {real} "$@"\n')
    homes = build.candidate_homes({}, str(nvcc))
    toolkit, _ = build.choose_toolkit("1", homes[: homes.index(Path("/usr/local/cuda"))], **KERNELS)
    assert toolkit.home == tmp_path / "cuda"


def test_nvcc_that_fails_is_passed_over(build, tmp_path):
    nvcc = script(tmp_path / "bin" / "nvcc", "exit 1\n")
    assert build.candidate_homes({}, str(nvcc))[0] == tmp_path


@pytest.mark.parametrize(
    ("version", "newest"), [((12, 6), "9.0+PTX"), ((12, 8), "12.0+PTX"), ((13, 0), "12.0+PTX")]
)
def test_architectures_are_those_the_toolkit_knows(build, version, newest):
    assert build.architectures(version).split(";")[-1] == newest


# ---- what the build asks for, see tools/build_backend.py ----


def install_torch(folder, version="2.14.1+cu130", cuda="13.0"):
    """What of an installed torch can be seen without importing it."""
    (folder / "torch").mkdir(parents=True)
    (folder / "torch" / "version.py").write_text(f"__version__ = {version!r}\ncuda = {cuda!r}\n")
    metadata = folder / f"torch-{version}.dist-info"
    metadata.mkdir()
    (metadata / "METADATA").write_text(f"Metadata-Version: 2.1\nName: torch\nVersion: {version}\n")
    return folder


def requirements(backend, folders, homes=(), **environ):
    return backend.requirements({"CXX": sys.executable, **environ}, folders, homes)


def test_the_installed_torch_is_found(backend, tmp_path):
    empty, folder = tmp_path / "empty", install_torch(tmp_path / "site")
    empty.mkdir()
    assert backend.find_torch([empty, folder]) == (folder, "2.14.1+cu130", "13.0")
    assert requirements(backend, [empty, folder]) == []


@pytest.mark.parametrize("version", [None, "2.10.2", "1.13.1+cu117"])
def test_torch_is_asked_for_where_none_fits(backend, tmp_path, version):
    folders = [] if version is None else [install_torch(tmp_path / "site", version)]
    assert requirements(backend, folders) == ["torch>=2.11"]


def test_nvcc_is_asked_for_where_no_toolkit_fits(backend, tmp_path):
    folders = [install_torch(tmp_path / "site", cuda="13.2")]
    old, fitting = make_toolkit(tmp_path / "old", 12080), make_toolkit(tmp_path / "cuda", 13000)
    asked = requirements(backend, folders, [old], ECA_FUSED_CUDA="1")
    assert "nvidia-cuda-nvcc==13.2.*" in asked
    assert requirements(backend, folders, [fitting], ECA_FUSED_CUDA="1") == []
    assert requirements(backend, folders, [old]) == []
    for folder, cuda in (("none", None), ("twelve", "12.8")):  # then the build says what it lacks
        folders = [install_torch(tmp_path / folder, cuda=cuda)]
        assert requirements(backend, folders, [], ECA_FUSED_CUDA="1") == []


def test_without_kernels_nothing_is_asked_for(build, backend, tmp_path, monkeypatch):
    assert requirements(backend, [], ECA_FUSED_NATIVE="0") == []
    monkeypatch.setenv("PATH", str(tmp_path))  # no compiler
    assert build.leaves_kernels_out({}) == "there is no C++ compiler"
    assert build.leaves_kernels_out({"CXX": f"{sys.executable} -pthread"}) is None
    for name in ("ECA_FUSED_NATIVE", "ECA_FUSED_CUDA"):
        with pytest.raises(SystemExit, match=f"{name}=1, but there is no C.. compiler. Install"):
            build.leaves_kernels_out({name: "1"})
    with pytest.raises(SystemExit, match="expected ECA_FUSED_NATIVE to be 0 or 1, got 'yes'"):
        build.leaves_kernels_out({"ECA_FUSED_NATIVE": "yes"})


def test_an_old_python_is_named(backend, monkeypatch):
    major, minor = backend.OLDEST_PYTHON
    assert f'requires-python = ">={major}.{minor}"' in (ROOT / "pyproject.toml").read_text()
    monkeypatch.setattr(sys, "version_info", (major, minor - 1, 18))
    monkeypatch.setitem(sys.modules, "setup", None)  # it cannot be read
    message = re.escape(f"error: expected Python {major}.{minor} or newer, got ")
    with pytest.raises(SystemExit, match=message):
        load("eca_fused_build_backend", ROOT / "tools" / "build_backend.py")


def test_the_folder_of_the_installed_torch_is_looked_at(backend):
    folder = Path(importlib.util.find_spec("torch").origin).parents[1]
    assert folder in backend.site_folders()


@needs_extension
@pytest.mark.skipif(not shutil.which("nm"), reason="needs nm: install binutils")
def test_the_library_of_the_kernels_depends_on_no_python_and_exports_nothing():
    """Of torch it needs the C interface alone, so that one file serves every Python and torch."""

    def symbols(which: str) -> list[str]:
        listed = subprocess.run(
            ["nm", "-D", "-C", which, str(native.LIBRARY)],
            capture_output=True,
            text=True,
            check=True,
        )
        return [line.split(maxsplit=1)[1] for line in listed.stdout.splitlines()]

    assert symbols("--defined-only") == []
    needed = symbols("--undefined-only")
    assert any(name.startswith("aoti_torch_") for name in needed)
    assert [name for name in needed if name.startswith(("Py", "_Py"))] == []
    assert [name for name in needed if re.match(r"(c10|at|torch)::", name)] == []
