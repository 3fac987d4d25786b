"""The CUDA kernels' own source, run on the CPU thread by thread, against the float64 reference.

gpu_host/simt plays the GPU, in a program under AddressSanitizer and UndefinedBehaviorSanitizer.
The program ends at an access out of bounds, a race, a barrier that not all threads reach, or a read
of what was never written or has not arrived. Outputs and shared memory start as NaN.
"""

import itertools
import math

import pytest
import torch

from helpers.cases import (
    DTYPES,
    LAYOUTS,
    MODES,
    Case,
    assert_as_accurate,
    assert_near,
    make_case,
    name_of,
    plain,
    run as run_plainly,
)
from helpers.gpu_host import (
    A100,
    H200,
    SANITIZED,
    Fault,
    Forced,
    HostGpu,
    Refused,
    check_apart,
    missing,
)

pytestmark = [
    pytest.mark.xdist_group("cuda_kernels"),
    pytest.mark.skipif(missing is not None, reason=str(missing)),
]

# A GPU so small that plans for the tests' small maps have tiles and halos.
TINY = H200 | {"multiprocessors": 4, "shared_per_block": 9 << 10, "l2": 8 << 10}
TINY |= {"shared_per_multiprocessor": 20 << 10}
WAYS = {
    "planned": (None, H200),
    "tiny": (None, TINY),
    "two passes": (Forced("two_pass"), H200),
    # Whole and with a halo; at the largest depth; with threads that are left over.
    "rows": (Forced("rows", threads=128, depth=7), H200),
    "rows of tiles": (Forced("rows", tile=4, threads=128, depth=13), H200),
    "runs": (Forced("runs", threads=128, depth=8), H200),
    "runs of tiles": (Forced("runs", tile=8, threads=128, depth=2), H200),
    "columns": (Forced("columns", threads=64, depth=7), H200),
    "deep columns": (Forced("columns", tile=16, threads=64, depth=13), H200),
    "columns of tiles": (Forced("columns", tile=16, threads=128, depth=4), H200),
    "kept": (Forced("kept"), H200),
    "kept in parts": (Forced("kept", depth=2), H200),
    "stream": (Forced("stream"), H200),
}
# One pixel; planes below, at and above a vector; no multiples; one channel; one sample; more
# channels than a tile; tiles that end early.
SHAPES = [
    (2, 40, 1),
    (3, 1, 5),
    (1, 48, 9),
    (2, 33, 49),
    (2, 64, 16),
    (1, 56, 72),
    (5, 20, 4),
]
TAPS = [1, 3, 7, 45]


@pytest.fixture(scope="module")
def gpu(tmp_path_factory):
    host = HostGpu(tmp_path_factory.mktemp("simt"), SANITIZED)
    yield host
    host.close()


def run(gpu, case: Case, layout: str, forced=None, of=H200, **how):
    """y, dx and dweight, and the plans, of both passes; None where no such plan exists."""
    common = {"circular": case.padding_mode == "circular", "channels_last": layout != "contiguous"}
    common |= {"gpu": of, "forced": forced} | how
    try:
        forward = gpu.forward(case.x, case.weight, **common)
        y, mean, gate = forward.tensors
        backward = gpu.backward(case.dy, case.x, case.weight, mean, gate, **common)
    except Refused:
        return None
    return (y, *backward.tensors), (forward, backward)


def cases():
    """Each combination of dtype, layout, padding, kind of taps and plan, with two of the shapes and
    of the numbers of taps in turn, so that every shape meets every plan in several of them."""
    every = itertools.product(DTYPES, LAYOUTS, MODES, (False, True), WAYS)
    for number, (dtype, layout, mode, own_taps, name) in enumerate(every):
        for turn in range(2):
            shape = SHAPES[(number + 3 * turn) % len(SHAPES)]
            k = TAPS[(number // 2 + turn) % len(TAPS)]
            if mode == "circular":
                k = min(k, 2 * shape[1] - 1)
            words = (name_of(dtype), layout, mode, "own" if own_taps else "shared")
            words += (name.replace(" ", "_"), name_of(shape), str(k))
            yield pytest.param(dtype, layout, mode, own_taps, name, shape, k, id="-".join(words))


@pytest.mark.parametrize(
    ("dtype", "layout", "mode", "own_taps", "name", "shape", "k"), list(cases())
)
def test_kernels(gpu, dtype, layout, mode, own_taps, name, shape, k):
    forced, of = WAYS[name]
    case = make_case(shape, k, dtype, layout, mode, own_taps)
    done = run(gpu, case, layout, forced, of, seed=shape[1] + k)
    if done is None:  # this shape cannot have the forced plan: the planner's choice
        done = run(gpu, case, layout, None, of, seed=shape[1] + k)
        assert done is not None
    assert_as_accurate(done[0], case)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=name_of)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("shape", [(1, 6, 5000), (2, 16, 4900), (1, 3, 5001)], ids=name_of)
@pytest.mark.parametrize("of", [H200, TINY], ids=["h200", "tiny"])
def test_two_passes_over_parts_and_chunks(gpu, dtype, layout, shape, of):
    """A plane, or a sample's pixels, is summed in parts. If L2 is small, a call works on
    one sample at a time."""
    case = make_case(shape, 3, dtype, layout)
    done = run(gpu, case, layout, Forced("two_pass"), of)
    assert done is not None
    assert of is TINY or all(outcome.plan["parts"] > 1 for outcome in done[1])
    assert of is H200 or all(outcome.plan["chunk"] == 1 for outcome in done[1])
    assert_as_accurate(done[0], case)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=name_of)
@pytest.mark.parametrize("padding_mode", MODES)
@pytest.mark.parametrize("own_taps", [False, True], ids=["shared", "own"])
@pytest.mark.parametrize("vectors", [0, 23, 9, 2])
def test_kept_in_registers_and_in_shared_memory(gpu, dtype, padding_mode, own_taps, vectors):
    """A thread has more vectors than its registers hold, in one part or in several, the last of
    which ends early. Some threads have no column."""
    shape = (2, 96, 16 // dtype.itemsize * 85)
    case = make_case(shape, 5, dtype, "channels_last", padding_mode, own_taps)
    done = run(gpu, case, "channels_last", Forced("kept", depth=vectors))
    assert done is not None
    for outcome in done[1]:
        assert outcome.plan["strategy"] == "kept"
        assert (outcome.plan["spare"] > 0) or vectors
        assert (outcome.plan["parts"] > 1) or not vectors
    assert_as_accurate(done[0], case)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("own_taps", [False, True], ids=["shared", "own"])
@pytest.mark.parametrize("padding_mode", MODES)
@pytest.mark.parametrize("name", WAYS)
def test_taps_that_are_not_finite(gpu, name, padding_mode, own_taps, layout):
    """Forward they are multiplied by the zeros of the padding; backward there is no padding."""
    forced, of = WAYS[name]
    for tap in (0, 4):
        case = make_case((2, 32, 24), 5, torch.float32, layout, padding_mode, own_taps)
        case.weight[-1, 0, tap] = float("inf")
        done = run(gpu, case, layout, forced, of) or run(gpu, case, layout)
        assert done is not None
        plainly = run_plainly(plain(case), case, torch.float64)
        for ours, theirs in zip(done[0], plainly, strict=True):
            assert torch.equal(ours.isnan(), theirs.isnan()), (name, tap)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=name_of)
@pytest.mark.parametrize("padding_mode", MODES)
@pytest.mark.parametrize("own_taps", [False, True], ids=["shared", "own"])
def test_parts_of_planes(gpu, dtype, padding_mode, own_taps):
    """Planes that no block can hold, of channels whose sums do not fill whole vectors."""
    pixels = 7 * 4 * 256 * 16 // dtype.itemsize
    case = make_case((3, 5, pixels), 3, dtype, "contiguous", padding_mode, own_taps)
    done = run(gpu, case, "contiguous", Forced("stream"), H200 | {"l2": 1 << 20})
    assert done is not None
    assert all(o.plan["parts"] > 2 for o in done[1])
    assert_as_accurate(done[0], case)


# More channels than four for each thread of the block that adds up the parts of a sample.
MANY_CHANNELS = [
    ("contiguous", (1, 520, 49), torch.float32, Forced("stream")),
    ("contiguous", (2, 1024, 16), torch.bfloat16, Forced("stream")),
    ("contiguous", (1, 1028, 1024), torch.float32, Forced("stream")),
    ("channels_last", (1, 2048, 9), torch.bfloat16, Forced("stream")),
    ("channels_last", (1, 2048, 9), torch.bfloat16, Forced("kept", depth=2)),
]


@pytest.mark.parametrize(
    ("layout", "shape", "dtype", "forced"), MANY_CHANNELS, ids=lambda v: name_of(v) or str(v)
)
def test_many_channels(gpu, layout, shape, dtype, forced):
    case = make_case(shape, 5, dtype, layout)
    done = run(gpu, case, layout, forced)
    assert done is not None
    assert_as_accurate(done[0], case)


def test_every_strategy_is_run(gpu):
    """The grid above would be worth little if its ways were all refused."""
    seen = set()
    for layout in LAYOUTS:
        for name in WAYS:
            forced, of = WAYS[name]
            done = run(gpu, make_case((2, 64, 16), 3, layout=layout), layout, forced, of)
            if done is not None:
                seen |= {o.plan["strategy"] for o in done[1]}
    assert seen == {"rows", "runs", "columns", "kept", "stream", "two_pass"}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", WAYS)
def test_any_schedule_gives_the_same_bits(gpu, layout, name):
    forced, of = WAYS[name]
    case = make_case((3, 32, 24), 5, torch.float32, layout)
    first = run(gpu, case, layout, forced, of)
    if first is None:  # planes or pixels alone
        other = (
            ("columns", "deep columns", "kept")
            if layout == "contiguous"
            else ("one channel", "rows", "runs")
        )
        assert name.startswith(other), f"{name} was refused"
        return
    for seed in range(2, 8):
        again = run(gpu, case, layout, forced, of, seed=seed, resident=8 + seed % 3)
        for a, b in zip(first[0], again[0], strict=True):
            assert torch.equal(a, b), f"seed {seed}"


# Slices of the batch, and of the channels: aligned, not aligned, and with gaps between rows.
SLICES = {
    "batch": lambda t: t[1:3],
    "channels": lambda t: t[:, 16:48],
    "odd channels": lambda t: t[:, 3:40],
    "the first channels": lambda t: t[:, :37],
    "every second channel": lambda t: t[:, ::2],
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=name_of)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", SLICES)
@pytest.mark.parametrize("pixels", [16, 25])
@pytest.mark.parametrize("of", [H200, TINY], ids=["h200", "tiny"])
def test_slices_are_read_in_place(gpu, dtype, layout, name, pixels, of):
    if layout == "channels_last" and name == "every second channel":
        return_layout = "not a row of consecutive channels: the operators copy it first"
        assert SLICES[name](make_case((4, 64, pixels), layout=layout).x).stride(1) == 2, (
            return_layout
        )
        return
    whole = make_case((4, 64, pixels), 3, dtype, layout)
    x, dy = SLICES[name](whole.x), SLICES[name](whole.dy)
    case = Case(x, whole.weight, dy)
    done = run(gpu, case, layout, None, of)
    assert done is not None
    assert_as_accurate(done[0], case)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=name_of)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", ["batch", "channels", "odd channels", "the first channels"])
@pytest.mark.parametrize("forced", [None, Forced("two_pass")], ids=str)
def test_slices_are_written_in_place(gpu, dtype, layout, name, forced):
    """y is a part of a larger map, x is not; nothing beside y is written."""
    into = SLICES[name](make_case((4, 64, 25), dtype=dtype, layout=layout).x)
    case = make_case(tuple(into.shape), 3, dtype, layout)
    common = {"channels_last": layout != "contiguous", "forced": forced}
    y = gpu.forward(case.x, case.weight, into=into, **common).tensors[0]
    usual = gpu.forward(case.x, case.weight, **common).tensors[0]
    assert_near("y", y, usual.double(), case.x.double().abs(), dtype, torch.float32)
    assert int(y._base.isnan().sum()) == y._base.numel() - y.numel()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=name_of)
@pytest.mark.parametrize("in_place", [False, True], ids=["into a slice", "in place"])
def test_slices_that_do_not_end_with_a_vector(gpu, dtype, in_place):
    """Samples begin at multiples of 16 bytes, but what follows a sample belongs to someone else."""
    whole = make_case((4, 64, 25), 3, dtype)
    x = whole.x[:, :37]
    if in_place:
        y = gpu.forward(x, whole.weight, in_place=True).tensors[0]
        # The memory ends with the last element of y.
        assert torch.equal(y._base[: 3 * 64 * 25].view(3, 64, 25)[:, 37:], whole.x[:3, 37:])
    else:
        into = make_case((4, 64, 25), dtype=dtype).x[:, :37]
        y = gpu.forward(x, whole.weight, into=into).tensors[0]
        assert int(y._base.isnan().sum()) == y._base.numel() - y.numel()
    want = gpu.forward(x.contiguous(), whole.weight, forced=Forced("two_pass")).tensors[0]
    assert_near("y", y, want.double(), x.double().abs(), dtype, torch.float32)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=name_of)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("pixels", [16, 25])
def test_maps_at_different_places_of_their_lines(gpu, dtype, layout, pixels):
    """x, dy and dx begin at different places within 16 bytes."""
    case = make_case((2, 24, pixels), 3, dtype, layout)

    def shifted(t, by):
        memory = torch.zeros(t.numel() + by, dtype=t.dtype)
        moved = memory.as_strided(t.shape, t.stride(), by)
        moved.copy_(t)
        return moved

    moved = Case(shifted(case.x, 1), case.weight, shifted(case.dy, 3))
    for forced in (None, Forced("two_pass")):
        done = run(gpu, moved, layout, forced)
        assert done is not None
        assert_as_accurate(done[0], case)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=name_of)
@pytest.mark.parametrize("channels", [64, 60, 58, 61])
@pytest.mark.parametrize("of", [H200, TINY], ids=["h200", "tiny"])
def test_two_passes_move_the_most_that_divides_a_row(gpu, dtype, channels, of):
    case = make_case((3, channels, 72), 5, dtype, "channels_last")
    done = run(gpu, case, "channels_last", Forced("two_pass"), of)
    assert done is not None
    assert_as_accurate(done[0], case)
    whole = math.gcd(channels * dtype.itemsize, 16)
    assert [o.plan["width"] for o in done[1]] == [whole] * 2


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=name_of)
@pytest.mark.parametrize("padding_mode", MODES)
@pytest.mark.parametrize("shape", [(3, 60, 49), (2, 37, 25), (2, 9, 784), (2, 24, 8)], ids=name_of)
def test_results_that_begin_anywhere(gpu, dtype, padding_mode, shape):
    """The lines of 16 bytes of y decide where vectors begin; those of x, where it is read."""
    case = make_case(shape, 5, dtype, "contiguous", padding_mode)
    circular = padding_mode == "circular"

    def at(place):
        memory = torch.zeros(math.prod(shape) + place, dtype=dtype)
        return memory.as_strided(shape, case.x.stride(), place)

    for y_at, x_at in ((1, 0), (2, 5), (3, 3), (16 // dtype.itemsize - 1, 1)):
        x = at(x_at).copy_(case.x)
        done = gpu.forward(x, case.weight, circular=circular, into=at(y_at))
        assert done.plan["strategy"] == "stream"
        y, mean, gate = done.tensors
        assert int(y._base.isnan().sum()) == y._base.numel() - y.numel()
        # The samples of dx begin anywhere where a sample is not whole lines.
        grads = gpu.backward(
            case.dy, x, case.weight, mean, gate, circular=circular, forced=Forced("stream")
        )
        assert_as_accurate((y, *grads.tensors), case)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("of", [H200, TINY], ids=["h200", "tiny"])
@pytest.mark.parametrize("shape", [(3, 32, 16), (2, 64, 49)], ids=name_of)
def test_in_place(gpu, layout, of, shape):
    """A block's halo is never read after another block has overwritten it."""
    case = make_case(shape, 5, torch.float32, layout)
    common = {"channels_last": layout != "contiguous", "gpu": of}
    y, _, _ = gpu.forward(case.x, case.weight, **common).tensors
    for seed in range(4):
        done = gpu.forward(case.x, case.weight, in_place=True, seed=seed, **common)
        assert done.plan["halo"] == 0
        torch.testing.assert_close(done.tensors[0], y, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("own_taps", [False, True], ids=["shared", "own"])
@pytest.mark.parametrize(
    ("layout", "shape", "forced"),
    [
        ("contiguous", (2, 32, 16), None),
        ("contiguous", (2, 32, 16), Forced("rows", tile=4, threads=128, depth=7)),
        ("contiguous", (2, 32, 16), Forced("runs", tile=16, threads=128, depth=2)),
        ("contiguous", (2, 32, 16), Forced("stream")),  # runs
        ("contiguous", (2, 3, 16000), Forced("stream")),  # parts of planes
        ("contiguous", (2, 32, 16), Forced("two_pass")),
        ("channels_last", (2, 48, 16), Forced("columns", tile=16, threads=64, depth=7)),
        ("channels_last", (5, 48, 64), Forced("kept", depth=2)),
        ("channels_last", (5, 48, 64), Forced("stream")),
        ("channels_last", (2, 48, 16), Forced("two_pass")),
    ],
    ids=str,
)
def test_what_is_not_wanted_is_not_written(gpu, layout, shape, forced, own_taps):
    case = make_case(shape, 3, torch.float32, layout, own_taps=own_taps)
    common = {"forced": forced, "channels_last": layout != "contiguous"}
    y, mean, gate = gpu.forward(case.x, case.weight, **common).tensors
    inference = gpu.forward(case.x, case.weight, want_mean=False, **common)
    assert torch.equal(inference.tensors[0], y)
    assert all(t.isnan().all() for t in inference.tensors[1:])
    saved = (case.dy, case.x, case.weight, mean, gate)
    dx, dweight = gpu.backward(*saved, **common).tensors
    only_dx = gpu.backward(*saved, want_dweight=False, **common).tensors
    assert torch.equal(only_dx[0], dx)
    assert only_dx[1].isnan().all()
    only_dweight = gpu.backward(*saved, want_dx=False, **common).tensors
    assert torch.equal(only_dweight[1], dweight)
    assert only_dweight[0].isnan().all()


@pytest.mark.parametrize("mode", MODES)
def test_more_taps_than_threads(gpu, mode):
    case = make_case((2, 150, 16), 131, torch.float32, "contiguous", mode)
    done = run(gpu, case, "contiguous", Forced("runs", threads=128, depth=8))
    assert done is not None
    assert_as_accurate(done[0], case)


@pytest.mark.parametrize(
    ("layout", "shape", "forced"),
    [
        ("contiguous", (2, 32, 16), Forced("rows", tile=4, threads=128, depth=7)),
        ("contiguous", (2, 40, 49), Forced("runs", threads=128, depth=8)),
        ("channels_last", (2, 48, 16), Forced("columns", tile=16, threads=64, depth=7)),
        ("channels_last", (5, 48, 64), Forced("kept")),
        ("channels_last", (5, 48, 64), Forced("stream")),
        ("contiguous", (2, 32, 16), Forced("two_pass")),
    ],
    ids=str,
)
@pytest.mark.parametrize("own_taps", [False, True], ids=["shared", "own"])
def test_taps_of_float32_for_maps_of_half_precision(gpu, layout, shape, forced, own_taps):
    case = make_case(shape, 5, torch.bfloat16, layout, own_taps=own_taps, taps_dtype=torch.float32)
    done = run(gpu, case, layout, forced)
    assert done is not None
    assert_as_accurate(done[0], case)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=name_of)
@pytest.mark.parametrize("forced", [None, Forced("two_pass")], ids=str)
def test_gates_near_zero_keep_their_digits(gpu, dtype, forced):
    """exp(90) overflows float32, but exp(-90) is one of its small numbers."""
    x = torch.ones(1, 16, 16, dtype=dtype)
    weight = torch.full((1, 1, 1), -90.0, dtype=dtype)
    _, _, gate = gpu.forward(x, weight, forced=forced).tensors
    exact = torch.sigmoid(torch.tensor(-90.0, dtype=torch.float64))
    # Below its normal numbers, float32 has steps of 2^-149.
    torch.testing.assert_close(gate.double(), exact.expand(1, 16), rtol=1e-6, atol=2.0**-148)
    assert (gate > 0).all()


@pytest.mark.parametrize("threads", [16, 96, 1024])
def test_numbers_of_threads_that_cannot_be_divided_into_teams_are_refused(gpu, threads):
    case = make_case((1, 16, 16), 3)
    with pytest.raises(Refused):
        gpu.forward(case.x, case.weight, forced=Forced("rows", threads=threads, depth=7))


def test_no_pixels(gpu):
    """As in plain PyTorch, the mean of nothing is NaN."""
    case = make_case((2, 6, 0), 3)
    y, mean, _ = gpu.forward(case.x, case.weight).tensors
    assert y.shape == (2, 6, 0)
    assert mean.isnan().all()


def test_values_that_are_no_numbers_stay_where_they_are(gpu):
    case = make_case((2, 32, 16), 3)
    case.x[1, 7, 3] = float("nan")
    y = gpu.forward(case.x, case.weight, forced=Forced("rows", tile=8, depth=7)).tensors[0]
    touched = torch.zeros(2, 32, dtype=torch.bool)
    touched[1, 6:9] = True
    assert y[touched].isnan().all()
    assert not y[~touched].isnan().any()


def test_kept_needs_room_for_a_sample(gpu):
    """The blocks of a sample wait for each other: without room for all of them, they are stuck."""
    case = make_case((3, 16, 200), 3, layout="channels_last")
    common = {"channels_last": True, "forced": Forced("kept", depth=1)}
    parts = gpu.forward(case.x, case.weight, **common).plan["parts"]
    assert parts > 2
    with pytest.raises(Fault, match="deadlock"):
        gpu.forward(case.x, case.weight, resident=parts - 1, **common)
    for seed in range(10):
        gpu.forward(case.x, case.weight, resident=parts, seed=seed, **common)


# ---- memory traffic ----

RESNET50 = [((256, 3136), 5), ((512, 784), 5), ((1024, 196), 5), ((2048, 49), 7)]


def counted_bytes(outcome, buffers) -> int:
    return 32 * sum(
        sum(launch["buffers"].get(name, (0, 0))) for launch in outcome.traffic for name in buffers
    )


def assert_modelled(outcome) -> None:
    """The sectors of all launches together are the planner's bytes, within 2 %.

    Sectors that one launch of "stream" reads twice count once.
    """
    assert outcome.plan["launches"] <= 2
    names = {name for launch in outcome.traffic for name in launch["buffers"]}
    everything = counted_bytes(outcome, sorted(names))
    assert abs(everything / outcome.plan["dram_bytes"] - 1) <= 0.02, outcome.plan


@pytest.mark.parametrize(("shape", "k"), RESNET50, ids=lambda v: name_of(v) or str(v))
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=name_of)
def test_traffic_of_resnet50(gpu, shape, k, layout, dtype):
    """Distinct sectors per launch: each byte of the maps is read once and written once, in 2.05 and
    3.05 times the bytes of x, and everything together is what the planner models."""
    case = make_case((1, *shape), k, dtype, layout)
    bytes_of_x = case.x.numel() * case.x.element_size()
    done = run(gpu, case, layout, count=True)
    assert done is not None
    for outcome, most in zip(done[1], (2.05, 3.05), strict=True):
        if outcome.plan["strategy"] == "stream":  # which reads one map again, from L2
            most += 1
        assert counted_bytes(outcome, ("x", "y", "dy", "dx")) <= most * bytes_of_x
        assert_modelled(outcome)


@pytest.mark.parametrize(
    ("forced", "of", "layout", "shape"),
    [
        (Forced("rows", tile=4, threads=256, depth=13), H200, "contiguous", (3, 64, 784)),
        (Forced("runs", threads=128, depth=8), H200, "contiguous", (2, 32, 49)),
        (Forced("columns", threads=256, depth=13), H200, "channels_last", (3, 64, 196)),
        (Forced("kept", depth=4), H200, "channels_last", (3, 64, 784)),
        (None, A100, "contiguous", (3, 64, 2304)),
        (None, A100, "channels_last", (3, 64, 2304)),
    ],
    ids=["rows", "runs", "columns", "kept", "A100's planes", "A100's pixels"],
)
def test_traffic_is_what_the_planner_models(gpu, forced, of, layout, shape):
    """Other plans, GPUs and batches."""
    done = run(gpu, make_case(shape, 5, torch.bfloat16, layout), layout, forced, of, count=True)
    assert done is not None
    for outcome in done[1]:
        assert_modelled(outcome)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_traffic_of_two_passes(gpu, layout):
    """Each launch counts by itself: what the second pass reads again is in the model's L2 bytes."""
    case = make_case((3, 64, 2304), 5, torch.bfloat16, layout)
    done = run(gpu, case, layout, Forced("two_pass"), count=True)
    assert done is not None
    for outcome in done[1]:
        everything = counted_bytes(outcome, list(outcome.traffic[0]["buffers"]))
        assert abs(everything / outcome.plan["l2_bytes"] - 1) <= 0.02, outcome.plan


# Plans, and the share of the sectors' bytes that their warps use. A run begins at any 16 bytes, so
# the 512 bytes of a warp lie in 16 or 17 sectors. So do the 160 or 288 bytes of a row of columns
# and their halo, in 6 or 10.
STREAMS = [
    ("contiguous", (256, 784), Forced("rows", threads=128, depth=13), 1.0),
    ("contiguous", (64, 3136), Forced("rows", threads=512, depth=13), 1.0),
    ("contiguous", (128, 196), Forced("runs", threads=128, depth=8), 16 / 17),
    ("channels_last", (256, 196), Forced("columns", tile=64, threads=256, depth=7), 5 / 6),
    ("channels_last", (128, 3136), Forced("kept"), 1.0),
]


@pytest.mark.parametrize(
    ("layout", "shape", "forced", "least"), STREAMS, ids=lambda v: name_of(v) or str(v)
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=name_of)
def test_streaming_accesses_are_coalesced(gpu, layout, shape, forced, least, dtype):
    """The share holds at every line of source that moves at least half of the map. The last warp of
    a plane or row is not full: 5 %."""
    case = make_case((1, *shape), 5, dtype, layout)
    bytes_of_x = case.x.numel() * case.x.element_size()
    done = run(gpu, case, layout, forced, count=True)
    assert done is not None
    streaming = 0
    for outcome in done[1]:
        for site in outcome.traffic[0]["sites"]:
            if site["bytes"] >= bytes_of_x / 2:
                streaming += 1
                assert site["bytes"] >= 0.95 * least * 32 * site["sectors"], site
    assert streaming >= 4  # x, y; dy, x and dx, where dy and x may come the same way


# ---- pooling and rescaling apart ----

APART_SHAPES = [*SHAPES, (1, 6, 5000), (2, 16, 4900), (3, 5, 2001)]


def apart_cases():
    every = itertools.product(DTYPES, LAYOUTS, (H200, TINY), (1, 2))
    for number, (dtype, layout, of, turn) in enumerate(every):
        for shape in APART_SHAPES[(number + turn) % 3 :: 3]:
            words = (name_of(dtype), layout, "h200" if of is H200 else "tiny", name_of(shape))
            yield pytest.param(dtype, layout, of, shape, id="-".join(words) + f"-{turn}")


@pytest.mark.parametrize(("dtype", "layout", "of", "shape"), list(apart_cases()))
def test_sums_and_rescaling_apart(gpu, dtype, layout, of, shape):
    case = make_case(shape, dtype=dtype, layout=layout)
    check_apart(gpu, case.x, case.dy, layout, of)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=name_of)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", ["batch", "channels", "odd channels"])
@pytest.mark.parametrize("pixels", [16, 25])
def test_slices_apart(gpu, dtype, layout, name, pixels):
    whole = make_case((4, 64, pixels), dtype=dtype, layout=layout)
    check_apart(gpu, SLICES[name](whole.x), SLICES[name](whole.dy), layout, TINY)
