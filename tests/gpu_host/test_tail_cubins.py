"""The machine code of the CUDA kernels of tails, and of attention after an activation.

As in test_cubins.py.
"""

import re

import pytest

from helpers import cubins

ARCHITECTURES = ["sm_80", "sm_90", "sm_100"]
IN_VECTORS = ["float32", "float16", "bfloat16"]
# Of the boolean template arguments: SiLU or GELU, and whether another map is read.
KINDS = [(smooth, identity) for smooth in (False, True) for identity in (False, True)]
TEMPLATES = ["tail_flat", "tail_columns", "sum_tail_rows", "sum_tail_columns", "sum_tail_small"]

pytestmark = [pytest.mark.xdist_group("cubins"), *cubins.needs_cubins]


@pytest.fixture(scope="module", params=ARCHITECTURES)
def architecture(request):
    return request.param


def kernels(architecture: str, template: str, dtype: str, pass_: str = "") -> list[str]:
    begin = cubins.mangled(template, dtype)
    return [n for n in cubins.resources(architecture) if begin in n and pass_ in n]


def kind_of(name: str) -> tuple[bool, bool]:
    smooth, *more = re.findall(r"Lb([01])E", name)
    return smooth == "1", more == ["1"]


def test_every_kernel_is_there(architecture):
    for dtype in cubins.DTYPES:
        vectors = dtype in IN_VECTORS
        # Single elements ask at run time whether there is an identity.
        for pass_ in ("TailForward", "TailBackward"):
            assert len(kernels(architecture, "tail_flat", dtype, pass_)) == (6 if vectors else 2)
            found = kernels(architecture, "tail_columns", dtype, pass_)
            assert sorted(map(kind_of, found)) == (KINDS if vectors else [])
        # Single elements ask at run time for the activation.
        for pass_ in ("GatedForward", "GatedBackward"):
            assert len(kernels(architecture, "tail_flat", dtype, pass_)) == (3 if vectors else 1)
            assert len(kernels(architecture, "tail_columns", dtype, pass_)) == (2 if vectors else 0)
        for pass_, count, single, small in (
            ("TailMoments", 2, 1, 1),
            ("TailGradientSums", 6, 2, 2),
            ("ActivatedSum", 6, 2, 4),
        ):
            for template in ("sum_tail_rows", "sum_tail_columns"):
                found = kernels(architecture, template, dtype, pass_)
                assert len(found) == (count if vectors else single)
            found = kernels(architecture, "sum_tail_small", dtype, pass_)
            assert len(found) == (small if vectors else 0)


def test_nothing_is_spilled(architecture):
    for template in TEMPLATES:
        for dtype in cubins.DTYPES:
            for name in kernels(architecture, template, dtype):
                used = cubins.resources(architecture)[name]
                assert used["stack"] == used["local"] == 0, name
                assert used["registers"] <= 128, name


# With ECA's gate, on chip: the kernels of test_cubins.py with another step, by the vectors of a
# thread. Those that write a mask of pixels are for two-byte elements.
ON_CHIP = {
    "forward_rows": (7, 13), "backward_rows": (7, 13), "forward_runs": (2, 4, 8),
    "backward_runs": (2, 4, 8), "forward_columns": (4, 7), "backward_columns": (4, 7),
    "forward_kept": (12,), "backward_kept": (10,),
}  # fmt: skip
# Bytes of a thread that wait in the L1 cache, at most; a thread loads 208 bytes of each map.
SPILLED = {
    "backward_rows": 8,
    # nvcc 13.0 loads all of x there before it adds any.
    ("backward_kept", "sm_100"): 32,
}


@pytest.mark.parametrize("template", ON_CHIP)
def test_tails_on_chip(architecture, template):
    spilled = SPILLED.get((template, architecture), SPILLED.get(template, 0))
    writes_bytes = template in ("forward_columns", "forward_kept")
    for dtype in cubins.DTYPES:
        for depth in ON_CHIP[template]:
            begin = cubins.mangled(template, dtype, depth)
            names = [n for n in cubins.resources(architecture) if begin in n and "BlockTail" in n]
            there = dtype in IN_VECTORS and not (writes_bytes and dtype == "float32")
            granules = 2 if "runs" in template and dtype != "float32" else 1
            assert len(names) == (granules if there else 0), (template, dtype, depth)
            for name in names:
                used = cubins.resources(architecture)[name]
                assert used["stack"] <= spilled, name
                assert used["local"] == 0, name
                assert used["registers"] <= 128, name


@pytest.mark.parametrize("dtype", IN_VECTORS)
@pytest.mark.parametrize("template", TEMPLATES[:4])
def test_loads_of_a_batch_come_before_their_use(architecture, template, dtype):
    """Between the first and the last wide load of maps nothing uses what one of them loads."""
    maps = {"TailForward": 1, "TailBackward": 2, "TailGradientSums": 2, "TailMoments": 1}
    maps |= {"GatedForward": 1, "GatedBackward": 2, "ActivatedSum": 1}
    at_once = {"tail_flat": 2, "sum_tail_rows": 4, "sum_tail_columns": 4}
    for pass_, read in maps.items():
        for name in kernels(architecture, template, dtype, pass_):
            if re.search(r"Li1E", name):  # single elements
                continue
            smooth, another = kind_of(name) if "Lb" in name else (False, False)
            few = pass_.endswith("Backward") and (smooth or another)
            wanted = at_once.get(template, 2 if few else 4) * (read + another)
            if (architecture, template, dtype, pass_) == (
                *("sm_100", "tail_columns", "float32", "TailBackward"),
            ):
                wanted = min(wanted, 6)  # nvcc 13.0 asks for the last two after a first use
            assert longest_batch(cubins.code(architecture)[name]) >= wanted, name


def longest_batch(lines: list[str]) -> int:
    """Wide loads in a row of which none is used before the last is asked for."""
    best, loaded, count = 0, set(), 0
    for line in lines:
        names = re.findall(r"\bR(\d+)\b", line.replace(".reuse", ""))
        match = re.match(r"(?:@!?U?P\d\s+)?LDG\S*128\S*\s+R(\d+)", line)
        read = set(map(int, names[1:] if names else []))
        if loaded & read:
            best, loaded, count = max(best, count), set(), 0
        if match:
            loaded |= set(range(int(match[1]), int(match[1]) + 4))
            count += 1
    return max(best, count)
