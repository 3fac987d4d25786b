"""The Triton kernels where they run: on a GPU, or in Triton's interpreter on the CPU."""

import pytest
import torch

import eca_fused
from helpers.cases import (
    DTYPES,
    LAYOUTS,
    MODES,
    VIEWS,
    Case,
    assert_as_accurate,
    make_case,
    name_of,
    run,
)

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
_status = eca_fused.backends()["triton"]
if DEVICE not in (_status.devices or ()):
    pytest.skip(
        f"needs a GPU, or TRITON_INTERPRET=1 before Python starts: {_status}",
        allow_module_level=True,
    )

from eca_fused.ops.triton import launch, plan, tuning  # noqa: E402

pytestmark = pytest.mark.any_device

ops = torch.ops.eca_fused


def on_device(case: Case) -> Case:
    return Case(*(t.to(DEVICE) for t in (case.x, case.weight, case.dy)), case.padding_mode)


def check(case: Case) -> None:
    case = on_device(case)
    results = run(
        lambda x, w: eca_fused.eca(x, w, padding_mode=case.padding_mode, backend="triton"), case
    )
    assert_as_accurate(results, case)
    assert results[0].stride() == case.x.stride()


def check_operators(x: torch.Tensor, weight: torch.Tensor, circular: bool = False) -> None:
    torch.library.opcheck(ops.triton_forward, (x, weight, circular))
    torch.library.opcheck(ops.triton_inference, (x, weight, circular))
    _, mean, gate = ops.triton_forward(x, weight, circular)
    for needs in ((True, True), (True, False), (False, True), (False, False)):
        arguments = (torch.randn_like(x), x, weight, mean, gate, circular, *needs)
        torch.library.opcheck(ops.triton_backward, arguments)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=name_of)
def test_opcheck(dtype, layout):
    case = on_device(make_case((2, 6, 4, 4), dtype=dtype, layout=layout))
    check_operators(case.x, case.weight)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("view", VIEWS)
def test_opcheck_for_views(view, layout):
    case = on_device(make_case((3, 8, 4, 4), layout=layout))
    check_operators(VIEWS[view](case.x), case.weight, circular=True)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("view", ["whole", "channel slice", "spatial slice"])
def test_opcheck_in_place(view, layout):
    case = on_device(make_case((3, 8, 4, 4), layout=layout))
    x = VIEWS[view](case.x.clone(memory_format=torch.preserve_format))
    torch.library.opcheck(ops.triton_inference_, (x, case.weight))
    torch.library.opcheck(ops.triton_inference_into, (x, case.weight, torch.empty_like(x)))


def written(op, x, weight, target):
    if op == "inference_":
        return ops.triton_inference_(target, weight)
    return ops.triton_inference_into(x, weight, target)


@pytest.mark.parametrize("op", ["inference_", "inference_into"])
def test_a_write_is_counted(op):
    case = on_device(make_case((2, 8, 4, 4)))
    target, factor = case.x.clone(), torch.randn_like(case.x).requires_grad_()
    product = (factor * target).sum()
    with torch.no_grad():
        written(op, case.x, case.weight, target)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        product.backward()


@pytest.mark.parametrize("op", ["inference_", "inference_into"])
@pytest.mark.parametrize("leaf", [True, False])
def test_a_write_refuses_what_needs_a_gradient(op, leaf):
    case = on_device(make_case((2, 8, 4, 4)))
    target = case.x.clone().requires_grad_()
    before = target.detach().clone()
    target = target if leaf else target * 1
    with pytest.raises(RuntimeError, match="has no gradient, and one is needed"):
        written(op, case.x, case.weight, target)
    assert torch.equal(target, before)


@pytest.mark.parametrize("op", ["inference_", "inference_into"])
def test_a_write_refuses_a_negated_view(op):
    case = on_device(make_case((2, 8, 4, 4)))
    with torch.no_grad(), pytest.raises(RuntimeError, match=r"negated view.*resolve_neg\(\)"):
        written(op, case.x, case.weight, torch._neg_view(case.x.clone()))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("own_taps", [False, True], ids=["shared", "own"])
@pytest.mark.parametrize("padding_mode", MODES)
def test_two_passes(padding_mode, own_taps, layout, monkeypatch):
    monkeypatch.setattr(plan, "STREAM", 128)
    monkeypatch.setattr(plan, "resident", lambda shape, maps: None)
    check(make_case((2, 9, 5, 16), 5, torch.float32, layout, padding_mode, own_taps))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("own_taps", [False, True], ids=["shared", "own"])
@pytest.mark.parametrize("padding_mode", MODES)
@pytest.mark.parametrize("tile", [4, 8])
def test_resident_tiles_with_neighbours(tile, padding_mode, own_taps, layout, monkeypatch):
    monkeypatch.setattr(plan, "resident", lambda shape, maps: plan.Tile(tile, 16, 4))
    check(make_case((2, 22, 3, 5), 5, torch.float32, layout, padding_mode, own_taps))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("resident", [True, False])
def test_indices_of_64_bits(resident, layout, monkeypatch):
    monkeypatch.setattr(launch, "WIDE_FROM", 1)
    if not resident:
        monkeypatch.setattr(plan, "resident", lambda shape, maps: None)
    check(make_case((2, 9, 5, 7), layout=layout))


@pytest.mark.parametrize("k", [63, 101])
def test_more_taps_than_a_tile_has_channels(k):
    check(make_case((2, 40, 3, 3), k=k))


def test_taps_summed_in_many_parts(monkeypatch):
    monkeypatch.setattr(launch, "ROWS", 2)
    monkeypatch.setattr(launch, "ROWS_AT_ONCE", 1)
    check(make_case((9, 70, 2, 2)))


def test_a_new_batch_size_tunes_nothing(monkeypatch):
    timed = []

    def benchmark(call, quantiles):
        call()
        timed.append(call)
        return [1.0 / len(timed)] * 3

    from triton.runtime.autotuner import Autotuner

    monkeypatch.setattr(Autotuner, "do_bench", staticmethod(benchmark))
    monkeypatch.setattr(tuning, "enabled", True)
    tuning._tuned.cache_clear()
    check(make_case((2, 9, 5, 7)))
    assert len(timed) >= 4  # several configurations, forward and backward
    before = len(timed)
    check(make_case((5, 9, 5, 7)))
    assert len(timed) == before
    tuning._tuned.cache_clear()


@pytest.mark.skipif(DEVICE == "cpu", reason="needs a GPU")
class TestOnGpu:
    @pytest.mark.parametrize("layout", LAYOUTS)
    @pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
    @pytest.mark.parametrize(
        "shape",
        [(2, 8), (3, 1, 5), (8, 256, 56, 56), (8, 2048, 7, 7), (2, 64, 224, 224), (2, 70, 9, 11)],
        ids=name_of,
    )
    def test_shapes(self, shape, dtype, layout):
        check(make_case(shape, 5, dtype, layout))

    @pytest.mark.parametrize("layout", LAYOUTS)
    @pytest.mark.parametrize("shape", [(4, 64, 14, 14), (2, 8, 120, 120)], ids=name_of)
    def test_bitwise_the_same_on_every_run_and_in_place(self, shape, layout):
        case = on_device(make_case(shape, layout=layout))

        def results():
            return run(lambda x, w: eca_fused.eca(x, w, backend="triton"), case)

        first = results()
        for _ in range(3):
            assert all(torch.equal(a, b) for a, b in zip(first, results(), strict=True))
        with torch.no_grad():
            assert torch.equal(eca_fused.eca_(case.x, case.weight, backend="triton"), first[0])

    def test_compiles_without_a_graph_break_for_any_batch_size(self):
        layer = eca_fused.ECALayer(64, backend="triton").to(DEVICE)
        compiled = torch.compile(layer, fullgraph=True, dynamic=True)
        for samples in (32, 48):
            case = on_device(make_case((samples, 64, 14, 14)))
            grads = []
            for function in (layer, compiled):
                x = case.x.clone().requires_grad_()
                function(x).backward(case.dy)
                grads.append(x.grad)
            torch.testing.assert_close(*grads)
