"""A pytest plugin for Triton's interpreter: a sample of the tests that suit it.

ECA_FUSED_TEST_SAMPLE=N keeps about one in N of the cases of each test.
"""

import os

import pytest

# These take up to minutes each: tests of the CPU's caches and threads, of a call for every element,
# of many runs on one case or on a large map, of the compiler, and of other processors' kernels. The
# interpreter copies every argument itself, so copies are not counted either
# (test_views_are_read_in_place stands in for that). Imports are the same for every backend.
LEFT_OUT = [
    "larger_than_the_caches",
    "number_of_threads",
    "long_sum",
    "finite_differences",
    "doctest",
    "network_learns",
    "one_input_frozen",
    "other_processors",
    "every_run",
    "taps_than_a_tile",
    "are_read_in_place",
    "import",
    "test_compile",
    "test_mixed_precision",
]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    one_in = int(os.environ["ECA_FUSED_TEST_SAMPLE"])
    # Only the whole suite has the time for random views.
    left_out = [*LEFT_OUT, "random_views"] if one_in > 1 else LEFT_OUT
    cases: dict[str, list[pytest.Item]] = {}
    for item in items:
        cases.setdefault(item.nodeid.partition("[")[0], []).append(item)
    # A step that shares no factor with the axes of the grids meets all their values.
    items[:] = [
        item
        for name, group in cases.items()
        if not any(part in name for part in left_out)
        for item in group[:: min(one_in, max(1, len(group) - 1))]
    ]
