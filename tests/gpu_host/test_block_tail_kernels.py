"""The CUDA kernels of tails with ECA's gate, run on the CPU, against plain PyTorch in float64.

As in test_cuda_kernels.py, the program ends at an access out of bounds, at a race, or at a read of
what was never written.
"""

import math

import pytest
import torch

from eca_fused import kernel_size
from helpers.block_tails import BlockCase, check_backward, check_forward
from helpers.cases import DTYPES, LAYOUTS, MODES, assert_near, name_of
from helpers.gpu_host import H200, SANITIZED, Forced, Refused, missing
from helpers.gpu_host_block_tails import BlockTailGpu
from helpers.gpu_host_tails import ACTIVATIONS

pytestmark = [
    pytest.mark.xdist_group("block_tail_kernels"),
    pytest.mark.skipif(missing is not None, reason=str(missing)),
]

# Every strategy with a tail, with a halo and without, and the passes. Planes of 36 and of 196
# numbers in float32 end within a byte of the mask, as do 12 and 20 channels; planes of 49 and of 25
# numbers within vectors too. Of 40 channels the last tile is smaller.
PLANS = {
    "rows": (Forced("rows", tile=4, threads=128, depth=7), [(2, 24, 64), (2, 13, 36)]),
    "rows, teams of several warps": (Forced("rows", threads=512, depth=13), [(1, 6, 3136)]),
    "rows, all channels": (Forced("rows", threads=128, depth=7), [(3, 5, 196)]),
    "runs": (Forced("runs", tile=8, threads=128, depth=2), [(2, 48, 49), (2, 40, 20)]),
    "runs, deep": (Forced("runs", threads=128, depth=8), [(2, 64, 49), (1, 96, 196)]),
    "runs, all channels": (Forced("runs", threads=128, depth=4), [(2, 8, 25), (2, 16, 64)]),
    "columns": (Forced("columns", tile=16, threads=128, depth=4), [(2, 48, 24), (2, 40, 24)]),
    "columns, narrow": (Forced("columns", tile=4, threads=128, depth=4), [(2, 20, 24)]),
    "columns, deep": (Forced("columns", depth=7), [(2, 64, 49), (1, 24, 7), (1, 12, 30)]),
    "kept": (Forced("kept", depth=2), [(2, 32, 90), (1, 200, 31), (1, 8, 600), (1, 20, 50)]),
    "kept, shared memory too": (Forced("kept"), [(1, 32, 1200)]),
    "two_pass": (Forced("two_pass"), [(2, 24, 49), (2, 16, 64)]),
}
OF_PIXELS = ("columns", "kept")


def is_refused(
    forced: Forced,
    dtype: torch.dtype,
    layout: str,
    mode: str,
    shape: tuple[int, int, int],
    backward: bool = False,
) -> bool:
    """Whether a strategy has no tail for these maps."""
    if forced.strategy == "two_pass":
        return False
    pixels = layout == "channels_last"
    if dtype == torch.float64 or pixels != (forced.strategy in OF_PIXELS):
        return True
    vector = 4 if dtype == torch.float32 else 8
    if pixels:
        # Two threads would write a byte of the mask.
        return shape[1] % vector != 0 or (dtype == torch.float32 and not backward)
    if forced.strategy == "rows":
        return shape[2] % vector != 0
    held = forced.threads * forced.depth * vector
    # Where channels wrap around, the halo is not a part of the run.
    return mode == "circular" and (forced.tile > 0 or shape[1] * shape[2] > held)


@pytest.fixture(scope="module")
def gpu(tmp_path_factory):
    host = BlockTailGpu(tmp_path_factory.mktemp("block_tails"), SANITIZED)
    yield host
    host.close()


@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", PLANS)
def test_forward(gpu, dtype, layout, name):
    forced, shapes = PLANS[name]
    for number, shape in enumerate(shapes):
        for mode in MODES:
            for own_taps in (False, True):
                case = BlockCase(shape, dtype, layout, mode=mode, own_taps=own_taps)
                refused = is_refused(forced, dtype, layout, mode, shape)
                try:
                    outcome = check_forward(gpu, case, forced=forced, seed=number)
                except Refused:
                    assert refused
                    continue
                assert not refused
                assert outcome.plan["strategy"] == forced.strategy


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=name_of)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", [name for name in PLANS if name != "two_pass"])
def test_backward_on_chip(gpu, dtype, layout, name):
    forced, shapes = PLANS[name]
    for number, shape in enumerate(shapes):
        for mode in MODES:
            case = BlockCase(shape, dtype, layout, "relu" if number else "none", mode=mode)
            refused = is_refused(forced, dtype, layout, mode, shape, backward=True)
            for wants in ((True, True, True), (True, False, True), (False, True, False)):
                try:
                    outcome = check_backward(gpu, case, False, wants, forced=forced, seed=number)
                except Refused:
                    assert refused
                    continue
                assert not refused
                assert outcome.plan["strategy"] == forced.strategy


@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("shape", [(2, 24, 49), (2, 32, 64), (3, 5, 7), (1, 8, 1225)], ids=name_of)
def test_backward(gpu, dtype, layout, shape):
    for seed, (activation, identity) in enumerate((("relu", True), ("gelu", False))):
        for mode in MODES:
            case = BlockCase(
                shape, dtype, layout, activation, identity, mode, own_taps=activation == "gelu"
            )
            check_backward(gpu, case, identity, seed=seed)
            check_backward(gpu, case, False, seed=seed)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("identity", [False, True], ids=["alone", "identity"])
def test_options(gpu, layout, activation, identity):
    for shape in ((2, 16, 49), (2, 16, 64), (1, 24, 1300)):
        case = BlockCase(shape, torch.bfloat16, layout, activation, identity)
        outcome = check_forward(gpu, case)
        on_chip = activation in ("none", "relu")
        assert (outcome.plan["strategy"] != "two_pass") == on_chip, outcome.plan
        for wants in ((True, True, True), (True, False, False), (False, True, False)):
            check_backward(gpu, case, identity, wants)
        check_backward(gpu, case, False, (False, False, True))


def test_without_a_mask(gpu):
    for layout in LAYOUTS:
        for shape in ((2, 16, 49), (2, 16, 64)):
            case = BlockCase(shape, torch.float16, layout)
            y, mask, _, _ = gpu.run_block(**case.arguments(), want_mask=False).tensors
            assert (mask == 255).all()
            assert torch.equal(y, gpu.run_block(**case.arguments()).tensors[0])


VIEWS = {
    "batch slice": lambda t: t[1:],
    "channel slice": lambda t: t[:, 8:24],
    "odd channels": lambda t: t[:, 3:10],
    "every second sample": lambda t: t[::2, :, :],
    "but for a channel": lambda t: t[:, 1:],
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=name_of)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("pixels", [49, 64])
@pytest.mark.parametrize("name", VIEWS)
def test_views(gpu, dtype, layout, pixels, name):
    case = BlockCase((3, 32, pixels), dtype, layout, view=VIEWS[name])
    check_forward(gpu, case)
    check_backward(gpu, case, True)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("pixels", [49, 64])
def test_maps_with_strides_of_their_own(gpu, layout, pixels):
    """The identity is every second sample of a larger map, y a slice of channels of one."""
    case = BlockCase((2, 24, pixels), torch.bfloat16, layout)
    case.identity = BlockCase((4, 24, pixels), torch.bfloat16, layout).dy[::2]
    into = BlockCase((2, 40, pixels), torch.bfloat16, layout).x[:, 8:32]
    check_forward(gpu, case, into=into)
    check_forward(gpu, case)


def test_means_far_from_zero(gpu):
    """The mean of x is 1e4 times its deviation, and the centre takes it away."""
    for layout in LAYOUTS:
        for dtype, shape in ((torch.float32, (2, 24, 64)), (torch.float32, (2, 24, 49))):
            case = BlockCase(shape, dtype, layout)
            case.x += 1e4
            case.channels[3] += 1e4
            y = gpu.run_block(**case.arguments()).tensors[0]
            near = BlockCase(shape, dtype, layout)
            near.x = case.x.double() - 1e4
            near.channels = case.channels.double()
            near.channels[3] -= 1e4
            v = near.exact(*near.in_float64())[0].relu()
            # A mean near 1e4 has an error of some units of 1e-3, which only the gate sees.
            terms = near.magnitudes()[0]
            assert ((y.double() - v).abs() <= 1e-3 * terms + 1e-6).all()


def test_nan_is_kept(gpu):
    for layout in LAYOUTS:
        case = BlockCase((1, 8, 16), torch.bfloat16, layout)
        case.identity[0, 3, 5] = math.nan
        outcome = gpu.run_block(**case.arguments())
        assert outcome.plan["strategy"] != "two_pass"
        y, mask, _, _ = outcome.tensors
        assert y[0, 3, 5].isnan()
        assert y.isnan().sum() == 1
        assert case.kept_by(mask)[0, 3, 5]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_an_infinite_gradient_without_a_norm(gpu, layout):
    case = BlockCase((1, 8, 16), torch.float32, layout, "none", identity=False)
    case.channels[:] = torch.tensor([1.0, 0, 0, 0, 1, 0])[:, None]
    case.dy[0, 3, 5] = math.inf
    n, c, _ = case.x.shape
    saved = (torch.zeros(2 * 16, dtype=torch.uint8)[: 8 * 2 if layout == "contiguous" else 16],)
    saved += (torch.zeros(n, c), torch.full((n, c), 0.5))
    case.x[0, 3, 5] = 1.0
    _, _, sums, dmean, _ = gpu.run_block(**case.arguments(), dy=case.dy, saved=saved).tensors
    assert sums[:2, 0, 3].isinf().all()
    assert not dmean.isnan().any()


# ---- memory traffic ----

RESNET50 = [(256, 3136), (512, 784), (1024, 196), (2048, 49)]


def moved(outcome) -> tuple[int, int]:
    """Bytes of distinct sectors in each launch, of maps and of the rest."""
    maps = others = 0
    for launch in outcome.traffic:
        for name, (read, written) in launch["buffers"].items():
            if name in ("x", "identity", "dy", "first", "second", "mask"):
                maps += 32 * (read + written)
            else:
                others += 32 * (read + written)
    return maps, others


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=name_of)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("shape", RESNET50, ids=name_of)
def test_traffic_backward(gpu, shape, layout, dtype):
    """dy, x and the mask are read once, dx and d_identity are written once."""
    case = BlockCase((1, *shape), dtype, layout, k=kernel_size(shape[0]))
    saved = tuple(gpu.run_block(**case.arguments()).tensors[1:])
    outcome = gpu.run_block(**case.arguments(), dy=case.dy, saved=saved, count=True)
    assert outcome.plan["strategy"] != "two_pass"
    one = case.x.numel() * case.x.element_size()
    maps, others = moved(outcome)
    assert abs(maps / (4 * one + saved[0].numel()) - 1) <= 0.02, outcome.plan
    assert outcome.plan["map_bytes"] == 4 * one + case.x.numel() // 8
    assert abs((maps + others) / outcome.plan["dram_bytes"] - 1) <= 0.05, (others, outcome.plan)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=name_of)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("shape", RESNET50, ids=name_of)
def test_traffic_of_one_pass(gpu, shape, layout, dtype):
    """x and the identity are read once, y and one bit of each element are written once."""
    case = BlockCase((1, *shape), dtype, layout, k=kernel_size(shape[0]))
    outcome = gpu.run_block(**case.arguments(), count=True)
    one = case.x.numel() * case.x.element_size()
    maps, others = moved(outcome)
    if layout == "channels_last" and dtype == torch.float32:
        assert outcome.plan["strategy"] == "two_pass"
        assert abs(maps / (4 * one + case.x.numel() // 8) - 1) <= 0.02
        return
    assert outcome.plan["strategy"] != "two_pass"
    assert len(outcome.traffic) == 1
    bits = case.mask(torch.zeros_like(case.x, dtype=torch.bool)).numel()
    assert abs(maps / (3 * one + bits) - 1) <= 0.02, outcome.plan
    # What the planner counts with. Here the GPU has one sample, which may be in many parts.
    assert outcome.plan["map_bytes"] == 3 * one + case.x.numel() // 8
    assert abs((maps + others) / outcome.plan["dram_bytes"] - 1) <= 0.05, (others, outcome.plan)


def test_small_gpus_have_a_plan_too(gpu):
    """One with 64 KB of shared memory."""
    small = H200 | {"capability": 75, "multiprocessors": 40, "shared_per_block": 64 << 10}
    small |= {"shared_per_multiprocessor": 64 << 10, "threads_per_multiprocessor": 1024}
    for layout in LAYOUTS:
        case = BlockCase((2, 64, 784), torch.float16, layout)
        outcome = gpu.run_block(**case.arguments(), gpu=small)
        y, _, _, _ = outcome.tensors
        exact = case.exact(*case.in_float64())[0].relu()
        assert outcome.plan["strategy"] != "two_pass"
        assert_near("y", y, exact, case.magnitudes()[0], case.x.dtype, case.wide)
