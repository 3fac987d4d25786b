import os
from collections.abc import Iterator

import pytest
import torch

from helpers.cases import DEVICE

if DEVICE != "cpu":
    if DEVICE == "cuda" and not torch.cuda.is_available():
        pytest.exit("ECA_FUSED_TEST_DEVICE=cuda, but there is no GPU that torch can use", 2)
    torch.set_default_device(DEVICE)
    # The definition is the oracle: convolutions in full precision, the same bits on every run.
    torch.backends.cudnn.allow_tf32 = False
    torch.backends.cudnn.deterministic = True


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    other = pytest.mark.skip(reason="not about kernels: run it without ECA_FUSED_TEST_DEVICE")
    for item in items:
        if DEVICE != "cpu" and not item.get_closest_marker("any_device"):
            item.add_marker(other)


def pytest_runtest_setup(item: pytest.Item) -> None:
    # After an illegal access no CUDA call of the process works again. A worker of pytest-xdist that
    # dies is replaced, which costs this one test and spares the rest.
    if DEVICE != "cuda":
        return
    try:
        torch.cuda.synchronize()
    except Exception as reason:
        if hasattr(item.config, "workerinput"):
            os._exit(70)
        pytest.exit(f"an earlier test has broken the CUDA context: {reason}", 3)


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)


# On the CPU counts beyond the number of processors too, so that every split of the work runs.
@pytest.fixture(params=[1, 2, 7] if DEVICE == "cpu" else [1], ids=lambda n: f"{n}threads")
def threads(request: pytest.FixtureRequest) -> Iterator[int]:
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


@pytest.fixture
def one_thread() -> Iterator[None]:
    """Threads gain nothing on small images, and wait for each other where tests run in parallel."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
