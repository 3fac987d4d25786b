"""The machine code of the CUDA kernels, read from the extension: nothing spilled, wide accesses."""

import re
from collections import Counter

import pytest

from helpers import cubins

ARCHITECTURES = ["sm_80", "sm_90", "sm_100"]
DTYPES = list(cubins.DTYPES)
KERNELS = [
    "sum_planes", "sum_pixels", "rescale_planes", "rescale_pixels", "make_gates", "make_shifts",
    "sum_dweight_parts",
    "add_dweight_parts", "sum_own_dweight", "add_parts",
]  # fmt: skip
# Those that keep their tile in registers, by the vectors that a thread holds; none for float64.
IN_REGISTERS = {
    "forward_rows": (7, 13), "backward_rows": (7, 13), "forward_runs": (2, 4, 8),
    "backward_runs": (2, 4, 8), "forward_columns": (4, 7, 13), "backward_columns": (4, 7),
    "forward_kept": (20,), "backward_kept": (7,),
    "forward_stream": (12,), "backward_stream": (8,),
    "forward_stream_planes": (13,), "backward_stream_planes": (8,),
    "forward_stream_runs": (8,), "backward_stream_runs": (8,),
}  # fmt: skip
# What __launch_bounds__ of csrc/plan.h leaves a thread.
REGISTERS = {
    **dict.fromkeys(KERNELS, 64), "add_dweight_parts": 64, "sum_own_dweight": 255,
    "forward_rows": 128, "backward_rows": 128,
    "forward_runs": 128, "backward_runs": 128, "forward_columns": 128, "backward_columns": 80,
    "forward_kept": 128, "backward_kept": 80,
    "forward_stream": 80, "backward_stream": 128,
    "forward_stream_planes": 80, "backward_stream_planes": 128,
    "forward_stream_runs": 128, "backward_stream_runs": 128,
}  # fmt: skip


pytestmark = [pytest.mark.xdist_group("cubins"), *cubins.needs_cubins]


@pytest.fixture(scope="module", params=ARCHITECTURES)
def architecture(request):
    return request.param


@pytest.fixture(scope="module")
def resources(architecture):
    return cubins.resources(architecture)


@pytest.fixture(scope="module")
def instructions(architecture):
    """Per kernel: how often each instruction, with its modifiers, is there."""
    opcode = re.compile(r"(?:@!?U?P\w+\s+)?([A-Z][\w.]+)")
    return {
        name: Counter(match[1] for line in lines if (match := opcode.match(line)))
        for name, lines in cubins.code(architecture).items()
    }


def kernels(found, name, dtype=None, depth=None):
    """The instances of a kernel template, for a dtype, and for the vectors that a thread holds."""
    mangled = cubins.mangled(name, dtype, *([depth] if depth else []))
    return {k: v for k, v in found.items() if mangled in k and OF_TAILS not in k}


def instances(name, dtype):
    """Of a kernel in registers, for each depth. Runs of 2-byte elements sum one or four at once."""
    return 0 if dtype == "float64" else 2 if "runs" in name and dtype != "float32" else 1


def has(counts, opcode, width=""):
    return any(i.split(".")[0] == opcode and width in i for i in counts)


def test_every_kernel_is_there(resources):
    for name in KERNELS:
        # With one map and with two, or without and with shifts.
        per_dtype = 2 if name.startswith(("sum_p", "rescale_")) else 1
        for dtype in DTYPES:
            assert len(kernels(resources, name, dtype)) == per_dtype, (name, dtype)
    for name, depths in IN_REGISTERS.items():
        for dtype in DTYPES:
            wanted = instances(name, dtype)
            assert len(kernels(resources, name, dtype)) == wanted * len(depths), (name, dtype)
            for depth in depths:
                assert len(kernels(resources, name, dtype, depth)) == wanted, (name, dtype, depth)


# Spilled bytes of a thread, stored and loaded once each in the L1 cache; a thread loads 208 bytes
# from each map. The alternative is a block less on each multiprocessor.
SPILLED = {("sm_100", "backward_rows", "bfloat16", 13): 8}
OF_TAILS = "BlockTail"  # kernels that test_tail_cubins.py tests


def test_nothing_is_spilled(resources, instructions, architecture):
    assert resources
    allowed = {
        kernel: stack
        for (where, name, dtype, depth), stack in SPILLED.items()
        for kernel in kernels(resources, name, dtype, depth)
        if where == architecture
    }
    for name, used in resources.items():
        if OF_TAILS in name:
            continue
        assert used["stack"] <= allowed.get(name, 0), name
        assert used["local"] == 0, name
    for name, counts in instructions.items():
        if name not in allowed and OF_TAILS not in name:
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
@pytest.mark.parametrize("name", ["sum_planes", "sum_pixels"])
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
            elif name.endswith("stream_runs"):  # results that begin anywhere, four at a time: from
                assert stores == depth + 2 * 4, kernel  # sources that fit, and from others
            else:
                assert stores == depth, kernel


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", ["rescale_planes", "rescale_pixels"])
def test_stores_of_16_bytes(instructions, name, dtype):
    found = kernels(instructions, name, dtype)
    assert found
    for kernel, counts in found.items():
        assert has(counts, "STG", ".128"), kernel
        assert has(counts, "LDG", ".128"), kernel
