"""A pytest plugin: a sample of the tests, where all of them would take too long.

ECA_FUSED_TEST_SAMPLE=N keeps about one in N of the cases of each test. For Triton's interpreter
that is so of all tests that suit it; under another torch, of those not marked every_torch. Of
these, large grids keep one in five, and tests that run without torch are left out.
"""

import os

import pytest

# In the interpreter these take up to minutes each: tests of the CPU's caches and threads, of a call
# for every element, of many runs or steps on one case or on a large map, of the compiler, and of
# other processors' kernels. It copies every argument itself, so copies are not counted either
# (test_views_are_read_in_place stands in for that). Imports are the same for every backend.
LEFT_OUT = [
    "larger_than_the_caches",
    "number_of_threads",
    "long_sum",
    "finite_differences",
    "doctest",
    "network_learns",
    "20_steps",
    "one_input_frozen",
    "other_processors",
    "every_run",
    "taps_than_a_tile",
    "are_read_in_place",
    "import",
    "test_compile",
    "test_mixed_precision",
]

LARGE_GRID = 25  # cases; smaller ones are of calls that may each differ under another torch

# Compilers and simulators, which take minutes: the same under every torch.
WITHOUT_TORCH = ["tests/gpu_host/", "tests/ops/test_sanitizers.py"]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    one_in = int(os.environ["ECA_FUSED_TEST_SAMPLE"])
    interpreted = os.environ.get("ECA_FUSED_BACKEND") == "triton"
    left_out = LEFT_OUT if interpreted else WITHOUT_TORCH
    if interpreted and one_in > 1:  # only the whole suite has the time for random views
        left_out = [*left_out, "random_views"]
    cases: dict[str, list[pytest.Item]] = {}
    for item in items:
        cases.setdefault(item.nodeid.partition("[")[0], []).append(item)

    def step(group: list[pytest.Item]) -> int:
        if not interpreted and group[0].get_closest_marker("every_torch") is not None:
            return 5 if len(group) > LARGE_GRID else 1
        return min(one_in, max(1, len(group) - 1))

    # A step that shares no factor with the axes of the grids meets all their values.
    items[:] = [
        item
        for name, group in cases.items()
        if not any(part in name for part in left_out)
        for item in group[:: step(group)]
    ]
