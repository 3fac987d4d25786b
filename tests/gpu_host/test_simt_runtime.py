"""The host runtime of the CUDA kernels finds every fault, and none in sound kernels."""

import os
import re
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from helpers.processes import ROOT

SOURCES = ROOT / "tests/gpu_host/simt"
COMPILER = os.environ.get("CXX", "g++")
SANITIZERS = ["-fsanitize=address,undefined", "-fno-sanitize-recover=all"]

pytestmark = [
    pytest.mark.xdist_group("simt_runtime"),
    pytest.mark.skipif(shutil.which(COMPILER) is None, reason=f"needs a C++ compiler: {COMPILER}"),
]

RUNTIME, ASAN, WRONG, REFUSED = 3, 1, 4, 5  # exit statuses: who has noticed

# By kernel of faults.cpp: who notices, and what the message names.
FAULTS = {
    "global_bounds": (ASAN, "heap-buffer-overflow"),
    "misaligned_load": (RUNTIME, "misaligned access"),
    "misaligned_store": (RUNTIME, "misaligned access"),
    "misaligned_shared": (RUNTIME, "misaligned access"),
    "shared_bounds": (RUNTIME, "out of bounds in shared memory"),
    "shared_size": (RUNTIME, "out of bounds in shared memory"),
    "unwritten": (RUNTIME, "uninitialised shared memory"),
    # Which one depends on which of the two threads is first.
    "read_too_early": (RUNTIME, "(data race in|uninitialised) shared memory"),
    "written_too_early": (RUNTIME, "data race in shared memory"),
    "written_twice": (RUNTIME, "data race in shared memory"),
    "read_by_all": (RUNTIME, "data race in shared memory"),
    "ordered_by_shuffle": (RUNTIME, "(data race in|uninitialised) shared memory"),
    "barrier_after_exit": (RUNTIME, "barrier not reached by all threads"),
    "two_barriers": (RUNTIME, "barrier not reached by all threads"),
    "barrier_for_some": (RUNTIME, "shuffle not reached by all lanes"),
    "shuffle_after_exit": (RUNTIME, "shuffle not reached by all lanes"),
    "shuffle_in_branch": (RUNTIME, "shuffle not reached by all lanes"),
    "short_warp": (RUNTIME, "shuffle not reached by all lanes"),
    "wait_for_others": (RUNTIME, "deadlock"),
    "fetch_read_too_early": (RUNTIME, "copy in flight"),
    "fetch_bounds": (ASAN, "heap-buffer-overflow"),
    "fetch_never_finished": (RUNTIME, "copy never waited for"),
    "fetch_over_use": (RUNTIME, "data race in shared memory"),
    "too_much_shared": (REFUSED, "did not start: .* bytes of shared memory"),
}

# Only some orders of events show these.
NOW_AND_THEN = ["published_too_early"]


@pytest.fixture(scope="session")
def programs(tmp_path_factory):
    """Two programs: faults, with sanitizers as in tests, and checks, without as when counting."""
    folder = tmp_path_factory.mktemp("simt")
    common = [COMPILER, "-std=c++17", "-DECA_HOST_SIMT", "-Wall", "-Wextra", "-Werror"]

    def compile_one(source, target, *flags):
        command = [
            *common,
            *flags,
            "-c",
            SOURCES / source,
            "-o",
            folder / target,
        ]
        subprocess.run(command, check=True)

    checked, fast = ["-O1", *SANITIZERS], ["-O2"]
    jobs = [
        ("runtime.cpp", "runtime.o", *checked),
        ("faults.cpp", "faults.o", *checked),
        ("runtime.cpp", "runtime_fast.o", *fast),
        ("checks.cpp", "checks.o", *fast),
    ]
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        list(pool.map(lambda job: compile_one(*job), jobs))
    for name, flags in ("faults runtime", SANITIZERS), ("checks runtime_fast", []):
        objects = [folder / f"{part}.o" for part in name.split()]
        program = folder / name.split()[0]
        subprocess.run([COMPILER, *flags, *objects, "-o", program], check=True)
    return folder


def run(programs, name, *arguments, **options):
    return subprocess.run([programs / name, *map(str, arguments)], capture_output=True, **options)


def checks(programs, *arguments):
    return run(programs, "checks", *arguments, check=True, text=True).stdout


def test_right_kernels_pass(programs):
    done = run(programs, "faults", "right", 20, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout == f"{len(FAULTS) + len(NOW_AND_THEN)} cases\n"


@pytest.mark.parametrize("name", FAULTS)
def test_fault_is_found(programs, name):
    status, message = FAULTS[name]
    where = r"[^ ]*faults\.cpp:\d+"
    if status == RUNTIME:
        message = (
            rf"^simt fault: {message}: launch 1 at {where}, block \d+, thread \d+, at {where}: "
        )
    for seed in range(1, 3):
        done = run(programs, "faults", name, seed, text=True)
        assert done.returncode == status, done.stderr[-3000:]
        assert re.search(message, done.stderr), done.stderr[-3000:]
        if status == RUNTIME:
            assert done.stderr.count("\n") == 1


@pytest.mark.parametrize("name", NOW_AND_THEN)
def test_fault_changes_a_result(programs, name):
    statuses = [run(programs, "faults", name, seed).returncode for seed in range(1, 31)]
    assert set(statuses) == {0, WRONG}


@pytest.mark.parametrize(("name", "dtype"), [("half", torch.half), ("bfloat16", torch.bfloat16)])
def test_widen(programs, name, dtype):
    got = run(programs, "checks", "widen", name, check=True).stdout
    got = torch.frombuffer(bytearray(got), dtype=torch.float32)
    want = torch.arange(1 << 16).to(torch.uint16).view(dtype).float()
    assert torch.equal(got.isnan(), want.isnan())
    numbers = ~want.isnan()
    # As integers, so that the zeros keep their signs.
    assert torch.equal(got[numbers].view(torch.int32), want[numbers].view(torch.int32))


@pytest.mark.parametrize(("name", "dtype"), [("half", torch.half), ("bfloat16", torch.bfloat16)])
def test_narrow(programs, name, dtype):
    numbers = torch.arange(1 << 16).to(torch.uint16).view(dtype).float()
    numbers = numbers[numbers.isfinite()].sort().values
    ties = (numbers[1:] + numbers[:-1]) / 2  # exact in float32, but for two of bfloat16's largest
    around = [torch.nextafter(ties, torch.tensor(end)) for end in (-torch.inf, torch.inf)]
    anything = torch.randint(-(1 << 31), 1 << 31, (200_000,)).to(torch.int32).view(torch.float32)
    limits = torch.tensor([65504, 65519.996, 65520, 65536, 3.39e38, torch.inf, torch.nan, 0, 1e-45])
    x = torch.cat([numbers, ties, *around, anything, limits, -limits])
    got = run(programs, "checks", "narrow", name, input=x.numpy().tobytes(), check=True).stdout
    got = torch.frombuffer(bytearray(got), dtype=dtype)
    want = x.to(dtype)
    assert torch.equal(got.isnan(), want.isnan())
    numbers = ~want.isnan()
    assert torch.equal(got[numbers].view(torch.int16), want[numbers].view(torch.int16))


def test_order_of_blocks(programs):
    orders = [list(map(int, checks(programs, "order", seed).split())) for seed in range(1, 6)]
    for order in orders:
        assert sorted(order) == list(range(20))
        assert order != sorted(order)
    assert len(set(map(tuple, orders))) == len(orders)
    assert orders[0] == list(map(int, checks(programs, "order", 1).split()))


def test_traffic(programs):
    lines = [line.split() for line in checks(programs, "traffic").splitlines()]
    got = {name: counts for name, *counts in lines}
    # By site: accesses, bytes, sectors asked for. By buffer: distinct sectors read and written.
    nothing = ["y:0:0", "other:0:0"]
    assert got == {
        "vectors": ["load:2:1024:32", "store:2:1024:32", "x:32:0", "y:0:32", "other:0:0"],
        "strided": ["load:2:256:64", "x:64:0", *nothing],
        "misaligned": ["load:2:256:10", "x:9:0", *nothing],
        "same_element": ["load:2:8:2", "x:1:0", *nothing],
        "passes": ["load:6:252:10", "x:10:0", *nothing],
        "resumed": ["load:4:320:10", "x:8:0", *nothing],
        "between_blocks": ["x:8:0", *nothing],
    }
