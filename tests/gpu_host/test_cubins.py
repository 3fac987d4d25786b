"""The machine code of the CUDA kernels, read from the extension: nothing spilled, wide accesses."""

import importlib.util
import re
import subprocess
from collections import defaultdict
from pathlib import Path

import pytest

from eca_fused.ops import native
from helpers.cases import needs_extension

ARCHITECTURES = ["sm_80", "sm_90", "sm_100"]
DTYPES = {"float32": "f", "float64": "d", "float16": "6__half", "bfloat16": "13__nv_bfloat16"}
KERNELS = [
    "forward_on_chip", "backward_on_chip", "sum_planes", "sum_pixels", "rescale_planes",
    "rescale_pixels", "make_gates", "make_shifts", "sum_dweight_parts",
    "add_dweight_parts", "sum_own_dweight", "add_parts",
]  # fmt: skip
# Those that keep their tile in registers, by the vectors that a thread holds; none for float64.
IN_REGISTERS = {
    "forward_rows": (7, 13), "backward_rows": (7, 13), "forward_runs": (2, 4, 8),
    "backward_runs": (2, 4, 8), "forward_columns": (4, 7, 13), "backward_columns": (4, 7),
    "forward_kept": (20,), "backward_kept": (7,),
    "forward_stream": (12,), "backward_stream": (8,),
}  # fmt: skip
LAYOUTS = {"planes": "0", "pixels": "1"}
# What __launch_bounds__ of csrc/plan.h leaves a thread.
REGISTERS = {
    "forward_on_chip": 64, "backward_on_chip": 80, "forward_rows": 128, "backward_rows": 128,
    "forward_runs": 128, "backward_runs": 128, "forward_columns": 128, "backward_columns": 80,
    "forward_kept": 128, "backward_kept": 80,
    "forward_stream": 80, "backward_stream": 128,
}  # fmt: skip


def tool() -> Path | None:
    """Triton's cuobjdump: an installation of nvcc need not have one."""
    spec = importlib.util.find_spec("triton")
    for folder in spec.submodule_search_locations or () if spec else ():
        path = Path(folder) / "backends/nvidia/bin/cuobjdump"
        if path.is_file():
            return path
    return None


def built_for(architecture: str) -> bool:
    import eca_fused._C as _C

    number = architecture.removeprefix("sm_")
    wanted = f"{number[:-1]}.{number[-1]}"
    listed = re.split(r"[; ]", _C.build_info()["cuda_architectures"].replace("+PTX", ""))
    return wanted in listed


pytestmark = [
    pytest.mark.every_torch,
    pytest.mark.xdist_group("cubins"),
    needs_extension,
    pytest.mark.skipif("cuda" not in native.devices, reason="needs CUDA kernels: install nvcc"),
    pytest.mark.skipif(tool() is None, reason="needs cuobjdump: pip install triton"),
]


def dump(architecture: str, what: str) -> str:
    if not built_for(architecture):
        pytest.skip(f"not built for {architecture}: rebuild without TORCH_CUDA_ARCH_LIST")
    import eca_fused._C as _C

    command = [str(tool()), what, "-arch", architecture, _C.__file__]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


@pytest.fixture(scope="module", params=ARCHITECTURES)
def architecture(request):
    return request.param


@pytest.fixture(scope="module")
def resources(architecture):
    """Per kernel: registers, stack, static shared and local memory, in bytes."""
    found, name = {}, ""
    for line in dump(architecture, "-res-usage").splitlines():
        if match := re.search(r"Function (\S+):", line):
            name = match[1]
        elif match := re.search(r"REG:(\d+) STACK:(\d+) SHARED:(\d+) LOCAL:(\d+)", line):
            keys = ("registers", "stack", "shared", "local")
            found[name] = dict(zip(keys, map(int, match.groups()), strict=True))
    return found


@pytest.fixture(scope="module")
def instructions(architecture):
    """Per kernel: how often each instruction, with its modifiers, is there."""
    found, name = defaultdict(lambda: defaultdict(int)), ""
    for line in dump(architecture, "-sass").splitlines():
        if match := re.search(r"Function : (\S+)", line):
            name = match[1]
        elif match := re.match(r"\s+/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][\w.]+)", line):
            found[name][match[1]] += 1
    return found


def kernels(found, name, dtype=None, depth=None):
    """The instances of a kernel template, for a dtype, and for the vectors that a thread holds."""
    mangled = f"{len(name)}{name}I{DTYPES[dtype] if dtype else ''}"
    mangled += f"Li{depth}E" if depth else ""
    return {k: v for k, v in found.items() if mangled in k}


def instances(name, dtype):
    """Of a kernel in registers, for each depth. Runs of 2-byte elements sum one or four at once."""
    return 0 if dtype == "float64" else 2 if "runs" in name and dtype != "float32" else 1


def has(counts, opcode, width=""):
    return any(i.split(".")[0] == opcode and width in i for i in counts)


def test_every_kernel_is_there(resources):
    for name in KERNELS:
        per_dtype = 2 if "on_chip" in name else 1  # planes and pixels
        for dtype in DTYPES:
            assert len(kernels(resources, name, dtype)) == per_dtype, (name, dtype)
    for name, depths in IN_REGISTERS.items():
        for dtype in DTYPES:
            wanted = instances(name, dtype)
            assert len(kernels(resources, name, dtype)) == wanted * len(depths), (name, dtype)
            for depth in depths:
                assert len(kernels(resources, name, dtype, depth)) == wanted, (name, dtype, depth)


# Spilled bytes of a thread, stored and loaded once each in the L1 cache; a thread loads 320 bytes
# from its map. The alternative is a block less on each multiprocessor.
SPILLED = {("sm_100", "forward_kept", "float16", 20): 8}


def test_nothing_is_spilled(resources, instructions, architecture):
    assert resources
    allowed = {
        kernel: stack
        for (where, name, dtype, depth), stack in SPILLED.items()
        for kernel in kernels(resources, name, dtype, depth)
        if where == architecture
    }
    for name, used in resources.items():
        assert used["stack"] <= allowed.get(name, 0), name
        assert used["local"] == 0, name
    for name, counts in instructions.items():
        if name not in allowed:
            assert not has(counts, "LDL"), name
            assert not has(counts, "STL"), name


@pytest.mark.parametrize("name", REGISTERS)
def test_registers_and_shared_memory_are_what_the_planner_counts_with(
    resources, name, architecture
):
    for kernel, used in kernels(resources, name).items():
        # From capability 10.0 on, launch bounds ask for one block less, to have more registers.
        most = 128 if architecture == "sm_100" and name in IN_REGISTERS else REGISTERS[name]
        assert used["registers"] <= most, kernel
        # Dynamic shared memory is the plan's; below it lies what the driver reserves.
        assert used["shared"] <= (1024 if architecture != "sm_80" else 0), kernel


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", ["backward_on_chip", "sum_planes", "sum_pixels"])
def test_loads_of_16_bytes(instructions, name, dtype):
    found = kernels(instructions, name, dtype)
    assert found
    for kernel, counts in found.items():
        assert has(counts, "LDG", ".128"), kernel


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("name", IN_REGISTERS)
def test_tiles_in_registers_are_asked_for_at_once(instructions, name, dtype):
    """A load and a store of 16 bytes for each vector that a thread holds; backward, two loads."""
    maps = 2 if name.startswith("backward") else 1
    for depth in IN_REGISTERS[name]:
        for kernel, counts in kernels(instructions, name, dtype, depth).items():
            loads = sum(n for i, n in counts.items() if i.startswith("LDG") and ".128" in i)
            stores = sum(n for i, n in counts.items() if i.startswith("STG") and ".128" in i)
            assert loads >= maps * depth, kernel
            if name.endswith("kept"):  # also stores what is in shared memory
                assert stores > depth, kernel
            else:
                assert stores == depth, kernel


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "name", ["forward_on_chip", "backward_on_chip", "rescale_planes", "rescale_pixels"]
)
def test_stores_of_16_bytes(instructions, name, dtype):
    found = kernels(instructions, name, dtype)
    assert found
    for kernel, counts in found.items():
        assert has(counts, "STG", ".128"), kernel
        if "rescale" in name:
            assert has(counts, "LDG", ".128"), kernel


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", ["forward_on_chip", "backward_on_chip"])
def test_tiles_arrive_without_passing_through_registers(instructions, name, dtype, architecture):
    """By the copy engine from sm_90 on, and 16 bytes a thread before and beside it."""
    found = kernels(instructions, name, dtype)
    assert found
    for kernel, counts in found.items():
        assert has(counts, "LDS", ".128"), kernel
        if architecture != "sm_80":
            assert has(counts, "UBLKCP"), kernel
        if architecture == "sm_80" or f"LNS_6LayoutE{LAYOUTS['pixels']}" in kernel:
            assert has(counts, "LDGSTS", ".128"), kernel
