"""The CUDA kernels on a GPU: streams, graphs, devices, forced plans, sizes that only a GPU reaches.

The common tests check what the kernels compute: ECA_FUSED_TEST_DEVICE=cuda runs them here.
"""

import itertools
import threading
import time
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

import eca_fused
from eca_fused.ops import native
from helpers.cases import (
    DTYPES,
    IN_REGISTERS,
    LAYOUTS,
    Case,
    Results,
    assert_as_accurate,
    in_layout,
    make_case,
    name_of,
    run,
)
from helpers.processes import python

if "cuda" not in native.devices:
    reason = "needs the CUDA kernels: make build ECA_FUSED_CUDA=1"
elif not torch.cuda.is_available():
    reason = "needs a GPU: benchmarks/gpu_check.py on a machine that has one"
else:
    reason = ""
pytestmark = [
    pytest.mark.any_device,
    pytest.mark.needs_gpu,
    pytest.mark.skipif(bool(reason), reason=reason),
]

ops = torch.ops.eca_fused


def forced(strategy: str, **sizes: int) -> dict[str, Any]:
    """Arguments of native.force_plan()."""
    return {"strategy": strategy, **sizes}


# A forced plan, shape, layout: every strategy, tiles with and without a halo, a smaller last tile,
# more blocks than the GPU has room for.
FORCED = {
    "two_pass, planes": (forced("two_pass"), (9, 24, 28, 28), "contiguous"),
    "two_pass, pixels": (forced("two_pass"), (9, 24, 28, 28), "channels_last"),
    "rows, one tile": (forced("rows", threads=128, depth=7), (3, 12, 8, 8), "contiguous"),
    "rows, halo": (forced("rows", threads=256, depth=13), (3, 44, 16, 16), "contiguous"),
    "rows, many blocks": (forced("rows", threads=128, depth=7), (400, 64, 8, 8), "contiguous"),
    "rows, teams of several warps": (
        forced("rows", threads=512, depth=13),
        (3, 20, 48, 48),
        "contiguous",
    ),
    "runs, one tile": (forced("runs", threads=128, depth=4), (3, 16, 7, 7), "contiguous"),
    "runs, halo": (forced("runs", threads=128, depth=2), (3, 64, 7, 7), "contiguous"),
    "runs, halo, planes of 8 bytes": (
        forced("runs", threads=128, depth=8),
        (3, 96, 14, 14),
        "contiguous",
    ),
    "runs, halo, teams": (forced("runs", threads=128, depth=8), (3, 64, 13, 13), "contiguous"),
    "columns, one tile": (forced("columns", threads=128, depth=7), (3, 32, 7, 7), "channels_last"),
    "columns, many pixels": (
        forced("columns", tile=16, threads=128, depth=13),
        (3, 64, 12, 12),
        "channels_last",
    ),
    "columns, halo": (
        forced("columns", tile=16, threads=256, depth=4),
        (3, 96, 8, 8),
        "channels_last",
    ),
    "kept, registers": (forced("kept", threads=256, depth=6), (20, 64, 28, 28), "channels_last"),
    "kept, shared memory too": (forced("kept", threads=256), (5, 128, 56, 56), "channels_last"),
    "stream, pixels": (forced("stream", threads=256), (20, 64, 28, 28), "channels_last"),
    "stream, parts of planes": (forced("stream"), (5, 21, 192, 192), "contiguous"),
}


WHOLE = ("two_pass", "kept", "stream")  # strategies without halos


def exists(name: str, dtype: torch.dtype, padding_mode: str) -> bool:
    """float64 has no kernels in registers, and channels that wrap around are no part of a run."""
    in_registers = name.split(",")[0] in IN_REGISTERS
    wraps = name.startswith("runs, halo") and padding_mode == "circular"
    return not (in_registers and dtype == torch.float64) and not wraps


@pytest.fixture(autouse=True)
def no_forced_plan() -> Iterator[None]:
    yield
    native.force_plan(None)


def on_gpu(case: Case, device: str = "cuda") -> Case:
    return Case(*(t.to(device) for t in (case.x, case.weight, case.dy)), case.padding_mode)


def forced_case(name: str, dtype: torch.dtype = torch.float32, k: int = 5) -> Case:
    """The case of a forced plan; every later call gets the plan."""
    plan, shape, layout = FORCED[name]
    native.force_plan(**plan)
    return on_gpu(make_case(shape, k=k, dtype=dtype, layout=layout))


def ours(case: Case) -> Results:
    return run(lambda x, w: eca_fused.eca(x, w, padding_mode=case.padding_mode), case)


def plan_of(case: Case, name: str, backward: bool) -> dict[str, Any]:
    plan, shape, layout = FORCED[name]
    from eca_fused import _C

    return _C.plan(
        backward=backward, dtype=name_of(case.x.dtype), channels_last=layout == "channels_last",
        samples=shape[0], channels=shape[1], pixels=shape[2] * shape[3],
        kernel_size=case.weight.shape[2], own_taps=False, circular=False, aligned=True,
        in_place=False, gpu=native.gpu_of_device(0), forced=plan,
    )  # fmt: skip


def same(a: Results, b: Results) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def busy(seconds: float = 0.1) -> None:
    """Keep the current stream busy."""
    torch.cuda._sleep(int(seconds * 1.5e9))


# ---- forced plans ----


@pytest.mark.parametrize("name", FORCED)
def test_the_forced_plans_are_what_their_names_say(name):
    case = forced_case(name)
    for backward in (False, True):
        plan = plan_of(case, name, backward)
        assert plan["strategy"] == name.split(",")[0]


@pytest.mark.parametrize(
    ("name", "dtype", "padding_mode"),
    [
        pytest.param(*chosen, id="-".join(map(str, (chosen[0], name_of(chosen[1]), chosen[2]))))
        for chosen in itertools.product(FORCED, DTYPES, ["zeros", "circular"])
        if exists(*chosen)
    ],
)
def test_forced_plans_are_right(name, dtype, padding_mode):
    plan, shape, layout = FORCED[name]
    native.force_plan(**plan)
    for k, own_taps in ((5, False), (3, True)):
        case = on_gpu(
            make_case(
                shape, k=k, dtype=dtype, layout=layout, padding_mode=padding_mode, own_taps=own_taps
            )
        )
        assert_as_accurate(ours(case), case)


@pytest.mark.parametrize("name", FORCED)
def test_the_same_bits_on_20_runs_and_on_any_stream(name):
    case = forced_case(name)
    first = ours(case)
    streams = [torch.cuda.Stream() for _ in range(4)]
    torch.cuda.synchronize()
    results = []
    for i in range(20):
        with torch.cuda.stream(streams[i % 4]):  # up to four at a time
            results.append(ours(case))
    torch.cuda.synchronize()
    assert all(same(first, result) for result in results)


@pytest.mark.parametrize(
    "name", ["rows, halo", "kept, registers", "stream, pixels", "two_pass, planes"]
)
def test_the_same_bits_beside_other_work(name):
    # Blocks start and arrive in another order while another stream takes multiprocessors away.
    case = forced_case(name)
    first = ours(case)
    other = torch.cuda.Stream()
    noise = torch.randn(1024, 1024, device="cuda")
    torch.cuda.synchronize()
    with torch.cuda.stream(other):
        for _ in range(2000):
            noise = noise @ noise / 32
    results = [ours(case) for _ in range(20)]
    torch.cuda.synchronize()
    assert all(same(first, result) for result in results)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=name_of)
@pytest.mark.parametrize("name", [n for n in FORCED if "one tile" in n or n.split(",")[0] in WHOLE])
def test_forced_plans_in_place(name, dtype):
    case = forced_case(name, dtype)
    y = ours(case)[0]
    with torch.no_grad():
        assert eca_fused.eca_(case.x, case.weight) is case.x
    assert torch.equal(case.x, y)


def test_a_plan_that_cannot_run_is_an_error_and_no_forced_plan_lasts():
    case = on_gpu(make_case((2, 24, 8, 8)))
    native.force_plan("rows", threads=64, depth=5)
    with pytest.raises((ValueError, RuntimeError), match=r"cannot run rows with .* a depth of 5"):
        eca_fused.eca(case.x, case.weight)
    native.force_plan(None)
    assert_as_accurate(ours(case), case)


# ---- the planner's own choice ----


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=name_of)
@pytest.mark.parametrize(
    ("shape", "k"),
    [
        ((8, 256, 56, 56), 3),
        ((8, 512, 28, 28), 5),
        ((8, 1024, 14, 14), 5),
        ((8, 2048, 7, 7), 7),
        ((1, 2048, 7, 7), 7),
        ((2, 64, 224, 224), 3),
        ((1, 256, 200, 334), 5),
    ],
    ids=name_of,
)
def test_layers_of_networks(shape, k, dtype, layout):
    case = on_gpu(make_case(shape, k=k, dtype=dtype, layout=layout))
    first = ours(case)
    assert_as_accurate(first, case)
    assert all(same(first, ours(case)) for _ in range(5))


@pytest.mark.parametrize("offset", range(1, 16))
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", ["two_pass, planes", None])
def test_misaligned_storage(name, layout, offset):
    shape = FORCED[name][1] if name else (3, 40, 9, 7)
    case = on_gpu(make_case(shape, k=5, dtype=torch.bfloat16, layout=layout))
    if name and layout == "contiguous":
        native.force_plan(**FORCED[name][0])
    for what in ("x", "dy"):
        dense = getattr(case, what)
        buffer = torch.empty(dense.numel() + offset, dtype=dense.dtype, device="cuda")
        view = buffer[offset:].as_strided(dense.shape, dense.stride(), offset).copy_(dense)
        setattr(case, what, view)
    # x and dy lie at different places within a line.
    case.dy = in_layout(case.dy.float(), layout).to(case.dy.dtype) if offset % 2 else case.dy
    assert_as_accurate(ours(case), case)


@pytest.mark.parametrize("offset", range(1, 8))
@pytest.mark.parametrize("shape", [(3, 60, 7, 7), (5, 37, 5, 5), (3, 48, 14, 14)], ids=name_of)
def test_results_may_begin_anywhere(shape, offset):
    case = on_gpu(make_case(shape, k=5, dtype=torch.bfloat16))
    memory = torch.full((case.x.numel() + offset + 8,), 7, dtype=case.x.dtype, device="cuda")
    out = memory[offset:-8].view(shape)
    ops.inference_into(case.x, case.weight, out)
    assert_as_accurate((out, *ours(case)[1:]), case)
    assert bool((memory[:offset] == 7).all())
    assert bool((memory[-8:] == 7).all())


@pytest.mark.parametrize("name", ["kept, registers", "stream, pixels", "stream, parts of planes"])
def test_saved_gates_may_begin_anywhere(name):
    case = forced_case(name)
    _, mean, gate = ops.forward(case.x, case.weight, False)
    want = ops.backward(case.dy, case.x, case.weight, mean, gate, False)
    moved = torch.empty(gate.numel() + 1, device="cuda")[1:].view(gate.shape).copy_(gate)
    got = ops.backward(case.dy, case.x, case.weight, mean, moved, False)
    assert same(tuple(got), tuple(want))


@pytest.mark.parametrize("shape", [(0, 4, 3, 3), (2, 4, 0, 3), (0, 4), (2, 0, 3, 3)], ids=name_of)
def test_empty_tensors_launch_nothing_wrong(shape):
    x = torch.empty(shape, device="cuda", requires_grad=True)
    weight = torch.ones(1, 1, 3, device="cuda", requires_grad=True)
    y = eca_fused.eca(x, weight)
    y.sum().backward()
    torch.cuda.synchronize()
    assert y.shape == x.shape
    assert x.grad is not None
    if 0 in shape[:2]:  # without pixels a mean is NaN, as in plain PyTorch
        assert torch.equal(weight.grad, torch.zeros_like(weight))
    with torch.no_grad():
        eca_fused.eca_(x.detach(), weight)
    torch.cuda.synchronize()


# ---- streams ----


@pytest.mark.parametrize(
    "name",
    ["rows, halo", "kept, registers", "stream, pixels", "two_pass, planes", None],
)
def test_work_is_submitted_to_the_current_stream(name):
    # On another stream the kernels would read x before the copy that makes it.
    case = forced_case(name) if name else on_gpu(make_case((8, 64, 28, 28)))
    want = ours(case)
    late = Case(torch.full_like(case.x, 7), case.weight, torch.full_like(case.dy, 7))
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        ours(late)  # takes the memory and loads the kernels
    torch.cuda.synchronize()
    with torch.cuda.stream(stream):
        busy()
        late.x.copy_(case.x)
        late.dy.copy_(case.dy)
        got = ours(late)
    stream.synchronize()
    assert same(got, want)


@pytest.mark.parametrize("name", [*FORCED, None])
def test_no_call_waits_for_the_gpu(name):
    case = forced_case(name) if name else on_gpu(make_case((8, 64, 28, 28)))
    x, weight = case.x.requires_grad_(), case.weight.requires_grad_()

    def step() -> tuple[Tensor, ...]:
        with torch.no_grad():
            y = eca_fused.eca(x, weight)
        return y, *torch.autograd.grad(eca_fused.eca(x, weight), (x, weight), case.dy)

    for _ in range(3):  # later calls need no more memory of the driver
        kept = step()
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")  # finds waits of PyTorch
    try:
        busy(0.4)
        start = time.perf_counter()
        kept = step()
        elapsed = time.perf_counter() - start
        still_busy = not torch.cuda.current_stream().query()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    torch.cuda.synchronize()
    assert kept[0].shape == x.shape
    assert still_busy, f"the GPU was done after {elapsed:.3f} s"  # this finds ours


def test_threads_with_streams_of_their_own():
    cases = [on_gpu(make_case((4, 32, 16, 16), seed=i, k=5)) for i in range(4)]
    want = [ours(case) for case in cases]
    wrong: list[object] = []

    def work(i: int) -> None:
        try:
            with torch.cuda.stream(torch.cuda.Stream()):
                if not all(same(ours(cases[i]), want[i]) for _ in range(30)):
                    wrong.append(i)
        except Exception as error:
            wrong.append(error)

    torch.cuda.synchronize()
    threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


# ---- CUDA graphs ----


class Graph:
    """Forward and backward pass of a case in a CUDA graph."""

    def __init__(self, case: Case) -> None:
        self.x, self.dy = case.x.clone(), case.dy.clone()
        self.weight = case.weight.clone()
        self.graph = torch.cuda.CUDAGraph()
        stream = torch.cuda.Stream()
        torch.cuda.synchronize()
        with torch.cuda.stream(stream):
            for _ in range(2):
                self.step()
        torch.cuda.synchronize()
        with torch.cuda.graph(self.graph, stream=stream):
            self.results = self.step()
        torch.cuda.synchronize()

    def step(self) -> Results:
        y, mean, gate = ops.forward(self.x, self.weight, False)
        return y, *ops.backward(self.dy, self.x, self.weight, mean, gate, False)

    def set(self, case: Case) -> None:
        for own, new in ((self.x, case.x), (self.dy, case.dy), (self.weight, case.weight)):
            own.copy_(new)
        for result in self.results:
            result.fill_(float("nan"))


def other_inputs(case: Case, seed: int) -> Case:
    generator = torch.Generator(device="cuda").manual_seed(seed)

    def drawn(t: Tensor) -> Tensor:
        values = torch.randn(t.shape, generator=generator, device="cuda").to(t.dtype)
        return torch.empty_like(t).copy_(values)

    return Case(drawn(case.x), drawn(case.weight), drawn(case.dy))


@pytest.mark.parametrize("name", [*FORCED, None])
def test_a_graph_replays_with_changing_inputs(name):
    case = forced_case(name) if name else on_gpu(make_case((8, 64, 28, 28), k=5))
    graph = Graph(case)
    for seed in range(20):
        new = other_inputs(case, seed)
        want = ours(new)
        graph.set(new)
        for _ in range(3):
            graph.graph.replay()
        torch.cuda.synchronize()
        assert same(graph.results, want), f"replay {seed}"


@pytest.mark.parametrize("name", [*FORCED, None])
def test_two_graphs_and_eager_calls_at_a_time(name):
    case = forced_case(name) if name else on_gpu(make_case((8, 64, 28, 28), k=5))
    inputs = [other_inputs(case, seed) for seed in range(3)]
    want = [ours(new) for new in inputs]
    graphs = [Graph(new) for new in inputs[:2]]
    streams = [torch.cuda.Stream() for _ in range(2)]
    torch.cuda.synchronize()
    eager = []
    for round_ in range(20):
        for stream, graph in zip(streams, graphs, strict=True):
            with torch.cuda.stream(stream):
                if round_ == 0:
                    busy(0.02)  # so that both have work waiting to run side by side
                graph.graph.replay()
        eager.append(ours(inputs[2]))
    torch.cuda.synchronize()
    for graph, expected in zip(graphs, want, strict=False):
        assert same(graph.results, expected)
    assert all(same(result, want[2]) for result in eager)


FIRST_CALL = """
import torch, eca_fused
x = torch.randn(20, 64, 28, 28, device="cuda").to(memory_format=torch.channels_last)
weight = torch.randn(1, 1, 5, device="cuda")
stream, graph = torch.cuda.Stream(), torch.cuda.CUDAGraph()
from eca_fused.ops import native
native.force_plan("kept")  # blocks meet through counters, which belong to the CUDA module
with torch.cuda.graph(graph, stream=stream):
    y = eca_fused.eca(x, weight)
graph.replay()
torch.cuda.synchronize()
assert torch.equal(y, eca_fused.eca(x, weight))
"""


def test_the_first_call_of_a_process_may_be_captured():
    """Within a capture, CUDA refuses calls that load code, unless a thread asks for them."""
    done = python(FIRST_CALL)
    assert done.returncode == 0, done.stderr[-2000:]


def test_a_graph_of_many_launches_whose_blocks_meet():
    """Launches of a graph share their counters: this one has more than there are words."""
    case = forced_case("kept, registers")
    want = ours(case)[0]
    stream, graph = torch.cuda.Stream(), torch.cuda.CUDAGraph()
    torch.cuda.synchronize()
    calls = (1 << 16) // (2 * case.x.shape[0]) + 50
    with torch.cuda.graph(graph, stream=stream):
        for _ in range(calls):
            y = ops.forward(case.x, case.weight, False)[0]
    graph.replay()
    torch.cuda.synchronize()
    assert torch.equal(y, want)


def test_a_graph_of_a_training_step_through_autograd():
    case = on_gpu(make_case((4, 64, 14, 14), k=5))
    layer = eca_fused.ECALayer(kernel_size=5, device="cuda")
    x = case.x.clone().requires_grad_()
    stream = torch.cuda.Stream()
    torch.cuda.synchronize()

    def step() -> tuple[Tensor, ...]:
        y = layer(x)
        return y.detach(), *torch.autograd.grad(y, (x, layer.conv.weight), case.dy)

    with torch.cuda.stream(stream):
        for _ in range(3):
            step()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        results = step()
    for seed in range(5):
        new = other_inputs(case, seed)
        with torch.no_grad():
            x.copy_(new.x)
        graph.replay()
        torch.cuda.synchronize()
        want = ours(Case(new.x, layer.conv.weight.detach(), case.dy))
        assert same(tuple(results), want)


# ---- devices ----


@pytest.mark.skipif(
    torch.cuda.is_available() and torch.cuda.device_count() < 2, reason="needs two GPUs"
)
@pytest.mark.parametrize("name", [*FORCED, None])
def test_a_device_that_is_not_the_current_one(name):
    case = forced_case(name) if name else on_gpu(make_case((8, 64, 28, 28)))
    want = ours(case)
    there = on_gpu(case, "cuda:1")
    assert torch.cuda.current_device() == 0
    got = ours(there)
    assert torch.cuda.current_device() == 0
    assert all(t.device.index == 1 for t in got)
    assert all(torch.equal(a.cpu(), b.cpu()) for a, b in zip(got, want, strict=True))


# ---- more elements than 32 bits count ----

LARGE = {
    "many samples": (700_000, 64, 7, 7),
    "large planes": (3, 256, 1700, 1700),
    "one plane": (1, 1, 46_400, 46_400),
    "many channels": (70, 700_000, 7, 7),
}


def totals(values: Tensor) -> Tensor:
    """(n, C, H, W) to (n, C), in float64 but for the rows."""
    return values.sum(3).double().sum(2)


def shifted_sum(values: Tensor, taps: list[float]) -> Tensor:
    """sum_j taps[j] * values[n, c + j - r], with zeros beyond the ends."""
    channels = values.shape[1]
    rows = torch.nn.functional.pad(values, (len(taps) // 2,) * 2)
    parts = [t * rows[:, j : j + channels] for j, t in enumerate(taps)]
    return torch.stack(parts).sum(0)


def check_sample(x: Tensor, dy: Tensor, gate: Tensor, dx: Tensor, taps: list[float]) -> None:
    """Gates and dx of some samples (n, C, H, W), by other sums than the kernels'."""
    pixels = x.shape[2] * x.shape[3]
    want = torch.sigmoid(shifted_sum(totals(x.float()) / pixels, taps))
    torch.testing.assert_close(gate.double(), want, rtol=0, atol=1e-5)
    dz = totals(x.float() * dy.float()) * want * (1 - want)
    shift = (shifted_sum(dz, taps[::-1]) / pixels).float()[:, :, None, None]
    rows = max(1, 2**28 // (x.shape[0] * x.shape[1] * x.shape[3]))
    for begin in range(0, x.shape[2], rows):
        here = slice(begin, begin + rows)
        expected = gate[:, :, None, None] * dy[:, :, here].float() + shift
        error = (dx[:, :, here].float() - expected).abs()
        assert bool((error <= 2**-8 * expected.abs() + 1e-4).all())  # rounded to bfloat16


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", LARGE)
def test_more_than_2_to_the_31_elements(name, layout):
    shape = LARGE[name]
    n, c, h, w = shape
    elements = n * c * h * w
    assert elements > 2**31
    torch.cuda.empty_cache()
    needed = 2 * elements * 16  # x, dy, y, dx in 16 bits, and room for the check
    if torch.cuda.mem_get_info()[0] < needed:
        pytest.skip(f"needs {needed / 1e9:.0f} GB of free GPU memory")
    memory_format = torch.channels_last if layout == "channels_last" else torch.contiguous_format
    x, dy = (
        torch.empty(
            shape, device="cuda", dtype=torch.bfloat16, memory_format=memory_format
        ).normal_()
        for _ in range(2)
    )
    weight = torch.randn(1, 1, 5, device="cuda")
    y, mean, gate = ops.forward(x, weight, False)
    dx, dweight = ops.backward(dy, x, weight, mean, gate, False)
    assert bool(dweight.isfinite().all())
    sample = c * h * w
    step = min(n, max(1, 2**28 // sample))
    # The first samples, the last, and those around elements 2^31 and 2^32.
    middles = [2**31 // sample, 2**32 // sample]
    begins = [0, n - step, *(min(max(m - step // 2, 0), n - step) for m in middles)]
    for begin in sorted(set(begins)):
        part = slice(begin, begin + step)
        check_sample(x[part], dy[part], gate[part], dx[part], weight.flatten().tolist())
    rows = max(1, 2**28 // (step * c * w))
    for begin in range(0, n, step):
        part = slice(begin, begin + step)
        for row in range(0, h, rows):
            here = (part, slice(None), slice(row, row + rows))
            want = (gate[part, :, None, None] * x[here].float()).to(x.dtype)
            assert torch.equal(y[here], want), f"y of samples from {begin}, rows from {row}"
    del x, dy, y, dx, want
    torch.cuda.empty_cache()
