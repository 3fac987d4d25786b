"""The Triton backend's tails in one pass where they run: on a GPU, or in Triton's interpreter."""

import itertools

import pytest
import torch

import eca_fused
from helpers.block_tails import BlockCase, check_backward, check_forward
from helpers.cases import DEVICE, DTYPES, LAYOUTS, MODES, name_of

_status = eca_fused.backends()["triton"]
if DEVICE not in (_status.devices or ()):
    pytest.skip(
        f"needs a GPU, or TRITON_INTERPRET=1 before Python starts: {_status}",
        allow_module_level=True,
    )

from eca_fused.ops import triton  # noqa: E402
from eca_fused.ops.checks import ACTIVATIONS  # noqa: E402
from eca_fused.ops.triton import plan  # noqa: E402
from helpers.triton_block_tails import TritonBlockTails  # noqa: E402

pytestmark = pytest.mark.any_device

by_triton = TritonBlockTails()
each_layout = pytest.mark.parametrize("layout", LAYOUTS)
resident_tail = plan.resident_tail


@pytest.fixture(autouse=True)
def in_one_pass(monkeypatch):
    """Whether each call's planes fitted; a test may give another plan."""
    fitted = []

    def recorded(shape, sloped):
        tile = resident_tail(shape, sloped)
        fitted.append(tile is not None)
        return tile

    monkeypatch.setattr(plan, "resident_tail", recorded)
    return fitted


def check(case: BlockCase, identity_sum: bool | None = None, **how: object) -> None:
    with_identity = case.identity is not None
    check_forward(by_triton, case)
    check_backward(by_triton, case, with_identity if identity_sum is None else identity_sum, **how)


@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
@each_layout
def test_both_directions(layout, dtype, in_one_pass):
    """Rows below a byte of the mask, no multiples of eight, and whole bytes."""
    for shape, activation, identity, mode, own_taps in (
        ((2, 5, 3), "relu", True, "zeros", False),
        ((2, 12, 49), "gelu", True, "circular", True),
        ((1, 24, 64), "relu", False, "circular", False),
        ((1, 3, 150), "silu", False, "zeros", True),
    ):
        check(BlockCase(shape, dtype, layout, activation, identity, mode, own_taps))
    assert all(in_one_pass)


@pytest.mark.parametrize("mode", MODES)
@each_layout
def test_tiles_with_neighbours(layout, mode, monkeypatch):
    """The last tile is not full, and a tile has as many channels as its halo."""
    monkeypatch.setattr(plan, "resident_tail", lambda shape, sloped: plan.Tile(8, 16, 4))
    for activation, identity, k in (("relu", True, 5), ("silu", True, 3), ("none", False, 9)):
        check(BlockCase((2, 22, 15), torch.float32, layout, activation, identity, mode, True, k))
    for dtype in (torch.bfloat16, torch.float64):
        check(BlockCase((1, 13, 15), dtype, layout, "relu", True, mode, False, 5))


@pytest.mark.parametrize("mode", MODES)
@each_layout
def test_planes_that_do_not_fit(layout, mode, monkeypatch):
    """By passes over the maps: of the same results."""
    monkeypatch.setattr(plan, "resident_tail", lambda shape, sloped: None)
    for activation, identity, own_taps in (("relu", True, False), ("silu", False, True)):
        check(BlockCase((2, 9, 15), torch.float32, layout, activation, identity, mode, own_taps))
    check(BlockCase((2, 9, 15), torch.bfloat16, layout))


def test_large_planes_do_not_fit(in_one_pass):
    check(BlockCase((1, 8, 5000), torch.float32, "contiguous"))
    assert in_one_pass == [False, False]


@each_layout
def test_options(layout):
    for activation, identity in itertools.product(ACTIVATIONS, (False, True)):
        case = BlockCase((1, 10, 9), torch.float32, layout, activation, identity)
        for wants in ((True, False, True), (False, True, False)):
            check_backward(by_triton, case, identity and wants[0], wants)


@each_layout
def test_without_a_mask_and_without_a_scale(layout):
    case = BlockCase((2, 10, 9), torch.float32, layout)
    given = {k: v for k, v in case.arguments().items() if k != "scale"}
    with_ones = by_triton.run_block(**given, scale=torch.ones(2), want_mask=True)
    x, identity, weight, channels = (
        t.to(DEVICE)
        for t in (case.x, case.identity, case.weight, case.channels[[2, 0, 1, 3, 4, 5]])
    )
    y, mask, distance, gate = triton.block_tail(
        x, identity, weight, None, channels, False, ACTIVATIONS.index("relu"), False
    )
    assert mask.numel() == 0
    for got, want in zip(
        (y, distance, gate), (with_ones.tensors[i] for i in (0, 2, 3)), strict=True
    ):
        assert torch.equal(got.cpu(), want)


VIEWS = {
    "batch slice": lambda t: t[1:],
    "channel slice": lambda t: t[:, 8:24],
    "odd channels": lambda t: t[:, 3:10],
    "every second sample": lambda t: t[::2],
    "every second pixel": lambda t: t[..., ::2],  # this one is copied
}


@each_layout
@pytest.mark.parametrize("name", VIEWS)
def test_views(name, layout):
    view = VIEWS[name]
    check(BlockCase((3, 32, 20), torch.float32, layout, view=view))
    if name != "every second pixel":
        case = BlockCase((3, 32, 20), torch.bfloat16, layout, view=view, identity_view=view)
        case.dy = case.dy.clone()
        check(case)


def test_means_far_from_zero():
    """The mean of x is 1e4 times its deviation, and the centre takes it away."""
    for layout in LAYOUTS:
        case, near = (BlockCase((2, 24, 49), torch.float32, layout) for _ in range(2))
        case.x += 1e4
        case.channels[3] += 1e4
        near.x = case.x.double() - 1e4
        near.channels = case.channels.double()
        near.channels[3] -= 1e4
        want, _, gate, distance = near.exact(*near.in_float64())
        y, _, got_distance, got_gate = by_triton.run_block(
            **case.arguments(), want_mask=True
        ).tensors
        # x - centre is exact: what is left are roundings of numbers as large as x's deviation.
        terms, distance_terms, z = near.magnitudes()
        eps = 64 * torch.finfo(torch.float32).eps
        assert ((y.double() - want.relu()).abs() <= eps * terms).all()
        assert ((got_distance.double() - distance).abs() <= eps * (distance_terms + 1)).all()
        assert ((got_gate.double() - gate).abs() <= eps * (1 + z)).all()


def test_an_infinite_tap_has_no_term_in_the_padding():
    for forced in (resident_tail, lambda shape, sloped: None):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(plan, "resident_tail", forced)
            case = BlockCase((1, 5, 8), torch.float32, "contiguous", "none")
            case.weight = torch.tensor([[[float("inf"), 1.0, 1.0]]])
            gate = torch.full((1, 5), 0.5)
            saved = torch.zeros(0, dtype=torch.uint8), torch.zeros(1, 5), gate
            given = {**case.arguments(), "dy": case.dy, "saved": saved}
            dmean = by_triton.run_block(**given).tensors[3]
            assert dmean[:, -1].isfinite().all()
            assert dmean[:, :-1].isinf().all()


@each_layout
def test_bitwise_the_same_on_every_run(layout):
    case = BlockCase((2, 20, 30), torch.bfloat16, layout)
    kept = by_triton.run_block(**case.arguments(), want_mask=True).tensors
    given = {**case.arguments(), "dy": case.dy, "saved": kept[1:], "identity_sum": True}
    first = by_triton.run_block(**given).tensors
    again = by_triton.run_block(**given).tensors
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))


def test_opcheck(monkeypatch):
    for layout, plan_of in zip(LAYOUTS, (resident_tail, lambda shape, sloped: None), strict=True):
        monkeypatch.setattr(plan, "resident_tail", plan_of)
        case = BlockCase((2, 9, 20), torch.bfloat16, layout)
        case.weight = case.weight.float()
        tensors = case.x, case.dy, case.identity, case.weight, case.scale, case.channels
        x, dy, identity, weight, scale, channels = (t.to(DEVICE) for t in tensors)
        forward = x, identity, weight, scale, channels, False, 1, True
        torch.library.opcheck(triton.block_tail, forward)
        _, mask, distance, gate = triton.block_tail(*forward)
        saved = mask, weight, scale, channels, distance, gate, False, 1
        for flag in (True, False):
            arguments = dy, x, identity, *saved, flag, flag, True, flag
            torch.library.opcheck(triton.block_tail_backward, arguments)


def test_empty_maps():
    for shape in ((0, 4, 3), (2, 4, 0)):
        x, weight = torch.randn(shape, device=DEVICE), torch.ones(1, 1, 3, device=DEVICE)
        channels = torch.ones(6, 4, device=DEVICE)
        y, mask, distance, gate = triton.block_tail(x, x, weight, None, channels, False, 1, True)
        assert y.shape == shape
        assert not distance.any()
        assert not gate.any()
        dx, none, sums, dmean, dweight = triton.block_tail_backward(
            *(x, x, x, mask, weight, None, channels, distance, gate),
            *(False, 1, True, True, False, True),
        )
        assert dx.shape == shape
        assert none.numel() == 0
        assert sums.shape == (3, *shape[:2])
        assert not any(t.any() for t in (sums, dmean, dweight))


def test_operators_refuse_what_does_not_fit():
    x, weight = torch.randn(2, 4, 9, device=DEVICE), torch.ones(1, 1, 3, device=DEVICE)
    channels, ones = torch.ones(6, 4, device=DEVICE), torch.ones(2, 4, device=DEVICE)

    def forward(**change):
        names = "x", "identity", "weight", "scale", "channels", "circular", "activation"
        given = dict(zip(names, (x, None, weight, None, channels, False, 1), strict=True))
        return triton.block_tail(**(given | change), need_mask=True)

    for message, change in {
        "expected channels contiguous, of shape": {"channels": channels[:3]},
        "expected scale contiguous, of shape": {"scale": ones},
        "expected identity of the shape": {"identity": x[:, :2]},
        "expected taps of shape": {"weight": weight[0]},
        "expected activation from 0 to": {"activation": 9},
    }.items():
        with pytest.raises(ValueError, match=message):
            forward(**change)
    _, mask, distance, gate = forward()
    rest = False, 1, False, True, False, True
    for message, (bits, saved) in {
        "expected mask as the forward operator returned it": (mask[1:], (distance, gate)),
        "expected mean of shape": (mask, (distance[:1], gate)),
    }.items():
        with pytest.raises((ValueError, TypeError), match=message):
            triton.block_tail_backward(x, x, None, bits, weight, None, channels, *saved, *rest)


@pytest.mark.skipif(DEVICE == "cpu", reason="needs a GPU")
class TestOnGpu:
    @each_layout
    @pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
    @pytest.mark.parametrize(
        "shape", [(4, 256, 3136), (4, 1024, 196), (4, 2048, 49), (2, 64, 50176)], ids=name_of
    )
    def test_shapes(self, shape, dtype, layout):
        for activation, identity in (("relu", True), ("gelu", False)):
            check(BlockCase(shape, dtype, layout, activation, identity))
