"""How many instructions the CUDA kernels execute on sm_90: a block's machine code is executed.

Where planes are small, or maps lie in the L2 cache, kernels wait for their instructions more than
for memory. So a change that adds some for each element fails here, without a GPU: 2 % more than the
number here is too many. A tenth less is better, and asks for the number to be renewed.

helpers/sass.py says what is approximate in a count. Blocks of a sample that add up the sums
of the others, in kept and stream, are not counted.
"""

import json
import re
import subprocess
from collections import Counter
from functools import cache
from typing import Any, NamedTuple

import pytest

from eca_fused import kernel_size
from helpers import cubins
from helpers.gpu_host import COMPILER, LETTERS, missing
from helpers.processes import ROOT
from helpers.sass import PARAMETERS, count_instructions
from helpers.sass_text import Kernel, read_kernel

ARCHITECTURE, NVCC = "sm_90", "13.0"  # which the numbers are of
MOST, LEAST = 1.02, 0.9  # of the number here
SAMPLES = 256
DTYPES = {"float32": (0, 4), "bfloat16": (3, 2)}  # the number in csrc/eca.h, and bytes
LAYOUTS = ["contiguous", "channels_last"]


class Case(NamedTuple):
    """A layer and how it is stored; strategy, threads and depth where the planner has no choice."""

    channels: int
    side: int
    layout: str
    dtype: str
    forced: tuple[str, int, int] | None = None

    def __str__(self) -> str:
        layer = f"{self.channels}x{self.side}x{self.side}-{self.layout}-{self.dtype}"
        return layer if self.forced is None else "-".join([layer, *map(str, self.forced)])


# Instructions of warps for 512 bytes of x, forward and backward.
COUNTED = {
    Case(256, 56, "contiguous", "float32"): (72.6, 96.7),
    Case(256, 56, "contiguous", "bfloat16"): (88.5, 119.9),
    Case(512, 28, "contiguous", "float32"): (52.0, 68.5),
    Case(512, 28, "contiguous", "bfloat16"): (100.0, 117.1),
    Case(1024, 14, "contiguous", "float32"): (77.9, 101.1),
    Case(1024, 14, "contiguous", "bfloat16"): (99.3, 138.0),
    Case(2048, 7, "contiguous", "float32"): (78.1, 110.3),
    Case(2048, 7, "contiguous", "bfloat16"): (130.6, 243.5),
    Case(256, 56, "channels_last", "float32"): (42.9, 66.5),
    Case(256, 56, "channels_last", "bfloat16"): (77.7, 108.1),
    Case(512, 28, "channels_last", "float32"): (43.5, 69.4),
    Case(512, 28, "channels_last", "bfloat16"): (78.4, 110.2),
    Case(1024, 14, "channels_last", "float32"): (53.1, 104.1),
    Case(1024, 14, "channels_last", "bfloat16"): (97.4, 163.0),
    Case(2048, 7, "channels_last", "float32"): (61.8, 105.4),
    Case(2048, 7, "channels_last", "bfloat16"): (105.6, 171.5),
    Case(64, 224, "contiguous", "float32"): (58.2, 80.4),
    Case(64, 224, "contiguous", "bfloat16"): (91.1, 135.8),
    # Plans that the planner need not choose.
    Case(1024, 14, "contiguous", "bfloat16", ("runs", 128, 8)): (99.3, 138.0),
    Case(2048, 7, "contiguous", "float32", ("runs", 128, 8)): (78.1, 110.3),
    Case(2048, 7, "contiguous", "bfloat16", ("runs", 128, 8)): (130.6, 189.6),
    Case(1024, 14, "contiguous", "bfloat16", ("stream", 256, 0)): (111.2, 135.6),
    Case(2048, 7, "contiguous", "float32", ("stream", 256, 0)): (86.6, 104.4),
    Case(2048, 7, "contiguous", "bfloat16", ("stream", 256, 0)): (137.4, 174.0),
    Case(256, 56, "channels_last", "float32", ("stream", 256, 0)): (68.5, 90.4),
    Case(256, 56, "channels_last", "bfloat16", ("stream", 256, 0)): (97.9, 129.9),
}

pytestmark = [
    pytest.mark.xdist_group("instructions"),
    *cubins.needs_cubins,
    pytest.mark.skipif(missing is not None, reason=str(missing)),
]


@pytest.fixture(scope="module")
def parameters(tmp_path_factory):
    """The program parameters.cpp."""
    program = tmp_path_factory.mktemp("instructions") / "parameters"
    here = ROOT / "tests/gpu_host"
    command = [COMPILER, "-std=c++17", "-DECA_HOST_SIMT", "-Wno-unknown-pragmas"]
    command += [f"-I{here / 'simt'}", here / "parameters.cpp", ROOT / "csrc/plan.cpp"]
    done = subprocess.run([*command, "-o", program], capture_output=True, text=True)
    assert done.returncode == 0, (
        "tests/gpu_host/parameters.cpp no longer fits csrc, whose structs and functions it uses:\n"
        + done.stderr[-5000:]
    )
    return program


def plan_of(parameters, case: Case, backward: bool) -> dict[str, Any]:
    number, _ = DTYPES[case.dtype]
    problem = [number, LAYOUTS.index(case.layout), SAMPLES, case.channels, case.side**2]
    problem += [kernel_size(case.channels), int(backward)]
    forced = []
    if case.forced:
        strategy, *sizes = case.forced
        forced = [LETTERS[strategy], *sizes]
    command = [str(parameters), *map(str, problem + forced)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, f"{case} has no plan: {done.stderr}"
    return json.loads(done.stdout)


@cache
def kernel_of(name: str) -> Kernel:
    return read_kernel(cubins.dump(ARCHITECTURE, "-sass", "-fun", name))


def name_of(plan: dict[str, Any], case: Case, backward: bool) -> str:
    template = f"{'backward' if backward else 'forward'}_{plan['strategy']}"
    if plan["strategy"] == "stream" and case.layout == "contiguous":
        template += "_runs" if plan["runs"] else "_planes"
    sizes = [plan["depth"], plan["granule"]][: 2 if plan["runs"] else 1]
    begin = cubins.mangled(template, case.dtype, *sizes)
    # Those of tails have the same names, and another step.
    names = [name for name in cubins.resources(ARCHITECTURE) if "BlockTail" not in name]
    found = [name for name in names if begin in name]
    assert len(found) == 1, (
        f"{case}: the planner chose {plan['strategy']}, and {begin} begins the names of {found}; "
        "kernels with tiles in registers are counted"
    )
    return found[0]


def parameters_of(name: str, plan: dict[str, Any]) -> bytes:
    """A kernel's parameters, in the order that its mangled name has their types in."""
    _, types = name.split("Ev", 1)
    found = b""
    # A type of eca or of eca::cuda, or an argument of the template, of which the step is one.
    pattern = r"NS\d*_\d+([A-Za-z]+)E|T\d*_|(.)"
    for match in re.finditer(pattern, types):
        struct = match[1] or ("Rescale" if match[0].startswith("T") else None)
        assert struct in plan, (
            f"{name} has a parameter that tests/gpu_host/parameters.cpp does not print: {match[0]}"
        )
        alignment = plan[struct]["alignment"]
        found += b"\0" * (-len(found) % alignment) + bytes.fromhex(plan[struct]["bytes"])
    known = cubins.resources(ARCHITECTURE)[name]["constant"] - PARAMETERS
    assert len(found) == known, (
        f"{name} has {known} bytes of parameters, and csrc {len(found)}: rebuild the extension"
    )
    return found


def count(parameters, case: Case, backward: bool) -> tuple[Counter[str], dict[str, Any]]:
    """Instructions for each 512 bytes of x by their opcodes, and the plan."""
    plan = plan_of(parameters, case, backward)
    name = name_of(plan, case, backward)
    issued: Counter[str] = Counter()
    for block in plan["counted"]:
        issued += count_instructions(
            kernel_of(name), parameters_of(name, plan), block=block,
            blocks=plan["blocks"], threads=plan["threads"],
        )  # fmt: skip
    _, size = DTYPES[case.dtype]
    units = plan["elements"] * size / 512
    # A warp stores 512 bytes at most. So a block that ends early is noticed.
    assert issued["STG"] >= units
    return Counter({opcode: n / units for opcode, n in issued.items()}), plan


@pytest.mark.parametrize("backward", [False, True], ids=["forward", "backward"])
@pytest.mark.parametrize("case", COUNTED, ids=str)
def test_counts(parameters, case, backward):
    if (releases := cubins.nvcc_releases()) != {NVCC}:
        pytest.skip(
            f"numbers of nvcc {NVCC}; the extension is of {', '.join(releases) or 'no known one'}"
        )
    issued, plan = count(parameters, case, backward)
    number, counted = COUNTED[case][backward], issued.total()
    sizes = {key: plan[key] for key in ("threads", "depth", "tile")}
    most = ", ".join(f"{opcode} {n:.1f}" for opcode, n in issued.most_common(12))
    message = (
        f"{counted:.1f} instructions for 512 bytes of x, {counted / number - 1:+.1%} from the "
        f"{number} of COUNTED\n{case}, {plan['strategy']} with {sizes}\nmost are {most}"
    )
    assert counted <= MOST * number, message
    assert counted >= LEAST * number, f"{message}\nbetter: write {counted:.1f} into COUNTED"


@pytest.mark.parametrize("backward", [False, True], ids=["forward", "backward"])
@pytest.mark.parametrize("case", COUNTED, ids=str)
def test_the_planner_knows_them(parameters, case, backward):
    """Its model is a line through counts, which fits most plans within 10 %."""
    plan, (_, size) = plan_of(parameters, case, backward), DTYPES[case.dtype]
    units = SAMPLES * case.channels * case.side**2 * size / 512
    assert plan["instructions"] / units == pytest.approx(COUNTED[case][backward], rel=0.15)
