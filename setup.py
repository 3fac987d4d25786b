"""Builds the two compiled parts. The rest of the package is in pyproject.toml.

eca_fused/_kernels.so has the kernels and operators. It has no Python, and of torch only the stable
ABI, so one file serves every Python and every torch from the oldest one on. eca_fused._C has the
planner for Python, and is of one version of Python.

ECA_FUSED_CUDA=1 requires the CUDA kernels and ECA_FUSED_CUDA=0 leaves them out. Without it they are
built if there is a CUDA toolkit that fits the installed torch. The build needs no GPU.

Without a C++ compiler, or with ECA_FUSED_NATIVE=0, the package has no compiled kernels. Then Triton
and plain PyTorch compute.
"""

import importlib.util
import logging
import os
import re
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import setuptools
from setuptools import setup

if int(setuptools.__version__.partition(".")[0]) < 77:  # it cannot read pyproject.toml's license
    sys.exit(
        f"error: setuptools 77 or newer is needed, found {setuptools.__version__}; "
        "pip install 'setuptools>=77,<82'"
    )

if TYPE_CHECKING:
    from setuptools import Extension

# The stable ABI of torch 2.11: an extension built against it also loads in every later torch.
STABLE_ABI = "-DTORCH_TARGET_VERSION=0x020b000000000000ULL"
PLANNER = [Path("csrc/module.cpp"), Path("csrc/plan.cpp")]  # of the module _C
EXPORTS = "csrc/kernels.map"
HOST_FLAGS = [
    # Python's own flags ask for debug information, which would be nine tenths of the file.
    "-g0",
    "-fvisibility=hidden",
    "-Wno-psabi",
    "-Wno-ignored-attributes",
    # GCC 12 gives hundreds of false warnings about its own header of AVX-512 intrinsics.
    "-Wno-maybe-uninitialized",
]


class Toolkit(NamedTuple):
    home: Path
    version: tuple[int, int]


def candidate_homes(environ: Mapping[str, str], nvcc: str | None) -> list[Path]:
    """Folders that may hold a CUDA toolkit, best first. `nvcc` is the one on PATH."""
    homes = [Path(environ[name]) for name in ("CUDA_HOME", "CUDA_PATH") if environ.get(name)]
    if nvcc:
        homes.append(Path(nvcc).resolve().parent.parent)
        # nvcc may be a script that calls the real one, and only the real one knows its folder.
        plan = subprocess.run(
            [nvcc, "--dryrun", "-x", "cu", os.devnull], capture_output=True, text=True, check=False
        )
        homes += [Path(top).resolve() for top in re.findall(r"^#\$ TOP=(.+)$", plan.stderr, re.M)]
    homes.append(Path("/usr/local/cuda"))
    if nvidia := importlib.util.find_spec("nvidia"):  # packages such as nvidia-cuda-nvcc
        homes += [Path(p) / "cu13" for p in nvidia.submodule_search_locations or ()]
    return list(dict.fromkeys(homes))


def inspect_home(home: Path) -> Toolkit | str:
    """The toolkit in a folder, or what the folder lacks."""
    for part in ("include/cuda_runtime.h", "bin/nvcc"):
        if not (home / part).is_file():
            return f"no {part}"
    api = home / "include" / "cuda_runtime_api.h"
    version = re.search(
        r"#define\s+CUDART_VERSION\s+(\d+)", api.read_text(errors="replace") if api.exists() else ""
    )
    if not version:
        return "no CUDART_VERSION in include/cuda_runtime_api.h"
    return Toolkit(home, (int(version[1]) // 1000, int(version[1]) % 1000 // 10))


def choose_toolkit(
    request: str | None,
    homes: Sequence[Path],
    torch_version: str,
    torch_cuda: str | None,
    has_kernels: bool,
) -> tuple[Toolkit | None, str]:
    """The toolkit for the CUDA kernels, or None for a build without them; and the reason.

    request      the value of ECA_FUSED_CUDA: "1", "0", "" or None
    homes        folders that may hold a toolkit, best first
    torch_cuda   the CUDA version that torch was built with, None for a torch without CUDA
    has_kernels  whether there are CUDA sources to build
    """
    if request not in (None, "", "0", "1"):
        raise SystemExit(f"eca_fused: error: expected ECA_FUSED_CUDA to be 0 or 1, got {request!r}")
    if request == "0":
        return None, "ECA_FUSED_CUDA=0"

    found = {home: inspect_home(home) for home in homes}
    toolkits = [t for t in found.values() if isinstance(t, Toolkit)]
    major = torch_cuda.split(".")[0] if torch_cuda else None
    fitting = [t for t in toolkits if str(t.version[0]) == major]

    if not has_kernels:
        reason = "this version has no CUDA kernels"
        remedy = "Unset ECA_FUSED_CUDA, or set it to 0."
    elif not torch_cuda:
        reason = f"torch {torch_version} was built without CUDA"
        remedy = "Install a torch built with CUDA."
    elif fitting:
        home, version = fitting[0]
        return fitting[0], f"CUDA {dotted(version)} in {home}, torch {torch_version}"
    elif toolkits:
        there = ", ".join(f"CUDA {dotted(t.version)} in {t.home}" for t in toolkits)
        reason = f"torch {torch_version} was built with CUDA {torch_cuda}, but found {there}"
        remedy = f"Install {toolkit_name(torch_cuda)}, or a torch built with the CUDA found."
    else:
        looked = "; ".join(f"{home}: {lack}" for home, lack in found.items()) or "nowhere to look"
        reason = f"no CUDA toolkit ({looked})"
        remedy = f"Install {toolkit_name(torch_cuda)}."
    if request == "1":
        raise SystemExit(f"eca_fused: error: ECA_FUSED_CUDA=1, but {reason}. {remedy}")
    return None, reason


def dotted(version: tuple[int, int]) -> str:
    return f"{version[0]}.{version[1]}"


def toolkit_name(torch_cuda: str) -> str:
    """What to install for a torch built with CUDA `torch_cuda`."""
    text = f"the CUDA {torch_cuda.split('.')[0]} toolkit and set CUDA_HOME to its folder"
    if packages := nvcc_packages(torch_cuda):
        text += f" (or: pip install {' '.join(map(repr, packages))})"
    return text


def nvcc_packages(torch_cuda: str) -> list[str]:
    """The PyPI packages that make up a toolkit for a CUDA version, all of one minor version."""
    major, minor = torch_cuda.split(".")[:2]
    if major != "13":
        return []
    parts = ("cuda-nvcc", "nvvm", "cuda-crt", "cuda-runtime", "cuda-cccl")
    return [f"nvidia-{part}=={major}.{minor}.*" for part in parts]


def architectures(version: tuple[int, int]) -> str:
    """The GPU architectures that a toolkit can build for, with PTX for later ones."""
    return "7.5;8.0;8.6;8.9;9.0;10.0;12.0+PTX" if version >= (12, 8) else "7.5;8.0;8.6;8.9;9.0+PTX"


def extensions(toolkit: Toolkit | None) -> "list[Extension]":
    if toolkit:
        os.environ["CUDA_HOME"] = str(toolkit.home)
        # By default torch builds for the GPUs it sees, and fails if it sees none.
        if not os.environ.get("TORCH_CUDA_ARCH_LIST"):
            os.environ["TORCH_CUDA_ARCH_LIST"] = architectures(toolkit.version)
    import pybind11

    logging.disable(logging.WARNING)  # torch warns if it sees no GPU, but a build needs none
    from torch.utils.cpp_extension import CppExtension, CUDAExtension

    logging.disable(logging.NOTSET)

    sources = [p for p in sorted(Path("csrc").rglob("*")) if p.suffix in (".cpp", ".cu")]
    headers = [p for p in sorted(Path("csrc").rglob("*")) if p.suffix in (".h", ".cuh")]
    if not toolkit:
        sources = [p for p in sources if "cuda" not in p.parts]
    sources.remove(PLANNER[0])
    # With -O2, GCC 12 needs two thirds of the time for the CPU kernels, and tails of maps in the
    # caches take up to 1.6 times as long (AVX-512, one thread).
    flags = ["-O3", STABLE_ABI]
    if toolkit:
        # torch declares its current CUDA stream only with USE_CUDA.
        flags += ["-DECA_FUSED_WITH_CUDA", "-DUSE_CUDA"]
        built = {"ARCHITECTURES": os.environ["TORCH_CUDA_ARCH_LIST"]}
        built["TOOLKIT"] = dotted(toolkit.version)
        flags += [f'-DECA_FUSED_CUDA_{name}="{value}"' for name, value in built.items()]
    make = CUDAExtension if toolkit else CppExtension
    kernels = make(
        "eca_fused._kernels",
        [str(p) for p in sources],
        depends=[*map(str, headers), EXPORTS],
        extra_compile_args={"cxx": flags + HOST_FLAGS, "nvcc": flags},
        extra_link_args=[f"-Wl,--version-script={EXPORTS}"],
        py_limited_api=True,  # it has no Python at all
    )
    if toolkit:
        # With the static runtime, users need no libcudart of the same minor version.
        kernels.libraries = [
            "cudart_static" if library == "cudart" else library for library in kernels.libraries
        ] + ["rt", "dl", "pthread"]
    planner = setuptools.Extension(
        "eca_fused._C",
        [str(p) for p in PLANNER],
        depends=[str(p) for p in headers],
        include_dirs=[pybind11.get_include()],
        extra_compile_args={"cxx": ["-O2", "-std=c++17", "-g0", "-fvisibility=hidden"]},
        language="c++",
    )
    return [kernels, planner]


def oldest_torch() -> str:
    """Major and minor version of the oldest supported torch, from tools/versions.txt."""
    lines = (Path(__file__).parent / "tools" / "versions.txt").read_text().splitlines()
    first = next(line for line in lines if line.strip() and not line.startswith("#"))
    return ".".join(first.split()[0].split(".")[:2])


def find_compiler(environ: Mapping[str, str]) -> str | None:
    """The C++ compiler: that of CXX, Python's own or one by its usual name; None without one."""
    names = (environ.get("CXX"), sysconfig.get_config_var("CXX"), "c++", "g++", "clang++")
    commands = [name.split()[0] for name in names if name and name.strip()]
    return next(filter(shutil.which, commands), None)


def leaves_kernels_out(environ: Mapping[str, str]) -> str | None:
    """Why this build has no compiled kernels, or None if it has."""
    request = environ.get("ECA_FUSED_NATIVE") or "1"
    if request not in ("0", "1"):
        raise SystemExit(
            f"eca_fused: error: expected ECA_FUSED_NATIVE to be 0 or 1, got {request!r}"
        )
    if request == "0":
        return "ECA_FUSED_NATIVE=0"
    if find_compiler(environ):
        return None
    reason = "there is no C++ compiler"
    for name in ("ECA_FUSED_NATIVE", "ECA_FUSED_CUDA"):
        if environ.get(name) == "1":
            raise SystemExit(
                f"eca_fused: error: {name}=1, but {reason}. Install one (Debian and Ubuntu: "
                "apt-get install g++), or set CXX."
            )
    return reason


# Commands of setuptools that compile something, or say what would be compiled.
COMPILING = {"bdist_wheel", "build", "build_ext", "develop", "editable_wheel", "install"}


def main() -> None:
    if not COMPILING & set(sys.argv):
        setup()
        return
    if reason := leaves_kernels_out(os.environ):
        print(f"eca_fused: no compiled kernels ({reason})", flush=True)
        setup()
        return
    try:
        import torch
    except ImportError as error:
        raise SystemExit(
            f"eca_fused: error: the build needs PyTorch, which does not import ({error}). "
            f"Install torch {oldest_torch()} or newer, or let pip do it: leave out "
            "--no-build-isolation. For a build without compiled kernels, set ECA_FUSED_NATIVE=0."
        ) from error

    toolkit, reason = choose_toolkit(
        os.environ.get("ECA_FUSED_CUDA"),
        candidate_homes(os.environ, shutil.which("nvcc")),
        torch.__version__,
        torch.version.cuda,
        has_kernels=any(Path("csrc/cuda").rglob("*.cu")),
    )
    print(f"eca_fused: {'CPU and CUDA' if toolkit else 'CPU'} kernels ({reason})", flush=True)
    modules = extensions(toolkit)
    from torch.utils.cpp_extension import BuildExtension

    class Build(BuildExtension):
        def finalize_options(self) -> None:
            super().finalize_options()
            # A folder that stays, unlike pip's temporary one: the next build compiles only changes.
            self.build_temp = f"build/objects-{sys.implementation.cache_tag}"

        def get_ext_filename(self, fullname: str) -> str:
            if fullname.endswith("_kernels"):  # of no version of Python
                return f"{fullname.replace('.', '/')}.so"
            return super().get_ext_filename(fullname)  # type: ignore[no-any-return]

    setup(ext_modules=modules, cmdclass={"build_ext": Build})


if __name__ == "__main__":
    main()
