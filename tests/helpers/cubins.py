"""The cubins in the extension: where cuobjdump is, and what it prints of them."""

import importlib.util
import re
import subprocess
from functools import cache
from pathlib import Path

import pytest

from eca_fused.ops import native
from helpers.cases import needs_extension

# As C++ mangles them.
DTYPES = {"float32": "f", "float64": "d", "float16": "6__half", "bfloat16": "13__nv_bfloat16"}


def tool() -> Path | None:
    """Triton's cuobjdump: an installation of nvcc need not have one."""
    spec = importlib.util.find_spec("triton")
    for folder in spec.submodule_search_locations or () if spec else ():
        path = Path(folder) / "backends/nvidia/bin/cuobjdump"
        if path.is_file():
            return path
    return None


needs_cubins = [
    needs_extension,
    pytest.mark.skipif("cuda" not in native.devices, reason="needs CUDA kernels: install nvcc"),
    pytest.mark.skipif(tool() is None, reason="needs cuobjdump: pip install triton"),
]


def built_for(architecture: str) -> bool:
    number = architecture.removeprefix("sm_")
    wanted = f"{number[:-1]}.{number[-1]}"
    listed = re.split(r"[; ]", native.build_info["cuda_architectures"].replace("+PTX", ""))
    return wanted in listed


def dump(architecture: str, *what: str) -> str:
    """What cuobjdump prints with these options."""
    if not built_for(architecture):
        pytest.skip(f"not built for {architecture}: rebuild without TORCH_CUDA_ARCH_LIST")
    command = [str(tool()), *what, "-arch", architecture, str(native.LIBRARY)]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


@cache
def code(architecture: str) -> dict[str, list[str]]:
    """The instructions of each kernel, by its mangled name, with predicates and operands."""
    found: dict[str, list[str]] = {}
    lines: list[str] = []
    for line in dump(architecture, "-sass").splitlines():
        if match := re.search(r"Function : (\S+)", line):
            lines = found[match[1]] = []
        elif match := re.match(r"\s+/\*[0-9a-f]{4,}\*/\s+(.*?);", line):
            lines.append(match[1])
    return found


@cache
def nvcc_releases() -> set[str]:
    """Of the compilers that the kernels are from, such as 13.0: a cubin names its own."""
    found = re.findall(rb"Cuda compilation tools, release (\d+\.\d+)", native.LIBRARY.read_bytes())
    return {release.decode() for release in found}


@cache
def resources(architecture: str) -> dict[str, dict[str, int]]:
    """Of each kernel, by its mangled name: registers, and bytes of each memory."""
    found, name = {}, ""
    keys = ("registers", "stack", "shared", "local", "constant")
    pattern = r"REG:(\d+) STACK:(\d+) SHARED:(\d+) LOCAL:(\d+) .*CONSTANT\[0\]:(\d+)"
    for line in dump(architecture, "-res-usage").splitlines():
        if match := re.search(r"Function (\S+):", line):
            name = match[1]
        elif match := re.search(pattern, line):
            found[name] = dict(zip(keys, map(int, match.groups()), strict=True))
    return found


def mangled(name: str, dtype: str | None = None, *numbers: int) -> str:
    """How the name of a kernel template begins, with its first arguments."""
    start = f"{len(name)}{name}I{DTYPES[dtype] if dtype else ''}"
    return start + "".join(f"Li{number}E" for number in numbers)
