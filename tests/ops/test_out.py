"""eca(out=): y in preallocated memory."""

import json
import re

import pytest
import torch

import eca_fused
from eca_fused import reference
from helpers.cases import (
    BACKENDS,
    DEVICE,
    DTYPES,
    LAYOUTS,
    MODES,
    VIEWS,
    assert_near,
    in_layout,
    make_case,
    name_of,
    needs_extension,
)

pytestmark = pytest.mark.any_device

NAMES = [*BACKENDS, "reference"]
SHAPE = (3, 8, 4, 5)


def filled(shape, dtype=torch.float32, layout="contiguous"):
    """Memory with numbers in it that are no result."""
    return in_layout(torch.full(shape, 7.0, dtype=dtype, device=DEVICE), layout)


def larger(dim, by=3):
    return tuple(size + by * (i == dim) for i, size in enumerate(SHAPE))


def assert_is_y(found, x, weight, backend):
    """Not the bits of another call: rows that are not adjacent are summed in another order."""
    if backend == "reference":
        assert torch.equal(found, eca_fused.eca(x, weight, backend=backend))
        return
    exact = reference.eca(x.double(), weight.double())
    assert_near("out", found, exact, x.double().abs(), x.dtype, torch.float32)


# The shape of a buffer, and the part of it that a result of SHAPE is written to.
PARTS = {
    "whole": (SHAPE, lambda t: t),
    "samples": (larger(0), lambda t: t[2:-1]),
    "channels": (larger(1), lambda t: t[:, 1:-2]),
    "rows": (larger(2), lambda t: t[:, :, 3:]),
    "columns": (larger(3), lambda t: t[..., :-3]),
    "transposed": ((3, 8, 5, 4), lambda t: t.transpose(2, 3)),
}


@pytest.mark.parametrize("part", PARTS)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("x_layout", LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=name_of)
@pytest.mark.parametrize("backend", NAMES)
def test_what_is_written_is_y_and_nothing_else(backend, dtype, x_layout, layout, part):
    case = make_case(SHAPE, dtype=dtype, layout=x_layout)
    shape, part_of = PARTS[part]
    buffer = filled(shape, dtype, layout)
    out = part_of(buffer)
    assert eca_fused.eca(case.x, case.weight, backend=backend, out=out) is out
    assert_is_y(out, case.x, case.weight, backend)
    wanted = filled(shape, dtype, layout)
    part_of(wanted).copy_(out)
    assert torch.equal(buffer, wanted)


@pytest.mark.parametrize("padding_mode", MODES)
@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
@pytest.mark.parametrize(
    "shape",
    [(2, 8), (2, 1, 5), (2, 4, 1, 1), (1, 4, 2, 3, 2), (0, 4, 3, 3), (2, 4, 0), (2, 64, 7, 7)],
    ids=name_of,
)
@pytest.mark.parametrize("backend", NAMES)
def test_every_shape_and_dtype(backend, shape, dtype, padding_mode):
    case = make_case(shape, 3, dtype, padding_mode=padding_mode, own_taps=True)
    modes = {"padding_mode": padding_mode, "backend": backend}
    out = torch.full_like(case.x, 7.0)
    eca_fused.eca(case.x, case.weight, **modes, out=out)
    assert torch.equal(out, eca_fused.eca(case.x, case.weight, **modes))


@pytest.mark.parametrize("view", VIEWS)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("backend", NAMES)
def test_x_that_is_a_view(backend, layout, view):
    case = make_case(SHAPE, layout=layout)
    x = VIEWS[view](case.x)
    before, out = x.clone(), filled(x.shape, layout=layout)
    eca_fused.eca(x, case.weight, backend=backend, out=out)
    assert torch.equal(out, eca_fused.eca(x, case.weight, backend=backend))
    assert torch.equal(x, before)


@pytest.mark.parametrize("again", [lambda t: t, lambda t: t[:], lambda t: t.detach().view(-1)],
                         ids=["x", "a view of x", "reshaped"])  # fmt: skip
@pytest.mark.parametrize("channels", [8, 96])
@pytest.mark.parametrize("backend", NAMES)
def test_over_x_itself(backend, channels, again):
    case = make_case((3, channels, 9, 9), k=5)
    with torch.no_grad():  # on a GPU, what is written in place is summed in another order
        wanted = eca_fused.eca_(case.x.clone(), case.weight, backend=backend)
        out = again(case.x).view(case.x.shape)
        assert eca_fused.eca(case.x, case.weight, backend=backend, out=out) is out
    assert torch.equal(case.x, wanted)


# x and out in one buffer, samples, channels or rows apart.
OVERLAPS = {
    "a sample later": lambda t: (t[:-1, :8], t[1:, :8]),
    "a sample earlier": lambda t: (t[1:, :8], t[:-1, :8]),
    "a channel later": lambda t: (t[1:, :8], t[1:, 1:9]),
    "a channel earlier": lambda t: (t[1:, 1:9], t[1:, :8]),
    "a row later": lambda t: (t[1:, :8, :-1], t[1:, :8, 1:]),
    "channels beside channels": lambda t: (t[1:, :8], t[1:, 8:]),
    "samples after samples": lambda t: (t[:2, :8], t[2:, :8]),
}


@pytest.mark.parametrize("overlap", OVERLAPS)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("backend", NAMES)
def test_memory_that_x_has_a_part_of(backend, layout, overlap):
    case = make_case((4, 16, 6, 6), layout=layout)
    x, out = OVERLAPS[overlap](case.x)
    wanted = case.x.clone()
    OVERLAPS[overlap](wanted)[1].copy_(eca_fused.eca(x, case.weight, backend=backend))
    eca_fused.eca(x, case.weight, backend=backend, out=out)
    assert torch.equal(case.x, wanted)


@pytest.mark.parametrize("part", [lambda t: (t, t), lambda t: (t[:-1], t[1:])],
                         ids=["all of it", "a sample later"])  # fmt: skip
@pytest.mark.parametrize("backend", NAMES)
def test_memory_of_two_storages(backend, part):
    case = make_case((4, 16, 6, 6))
    again = torch.from_dlpack(case.x)  # the same memory, but torch does not know it
    x, out = part(case.x)[0], part(again)[1]
    wanted = eca_fused.eca(x, case.weight, backend="reference")
    eca_fused.eca(x, case.weight, backend=backend, out=out)
    torch.testing.assert_close(out, wanted)


@pytest.mark.parametrize("in_place", [False, True])
@pytest.mark.parametrize("shape", [(4, 2, 8, 8), (2, 4, 3, 3), (4, 8, 5, 5)], ids=name_of)
@pytest.mark.parametrize("backend", NAMES)
def test_taps_in_the_memory_that_is_written(backend, shape, in_place):
    out = make_case(shape, seed=1).x
    x, weight = out if in_place else make_case(shape).x, out.view(-1)[:3].view(1, 1, 3)
    wanted = eca_fused.eca(x, weight.clone(), backend="reference")
    if in_place:
        eca_fused.eca_(x, weight, backend=backend)
    else:
        eca_fused.eca(x, weight, backend=backend, out=out)
    torch.testing.assert_close(out, wanted)


@pytest.mark.parametrize("backend", NAMES)
def test_memory_that_counts_with_the_other_sign(backend):
    case = make_case(SHAPE)
    wanted = eca_fused.eca(case.x, case.weight, backend="reference")
    out, x = (torch.zeros(SHAPE, dtype=torch.complex64, device=DEVICE).conj().imag for _ in "ab")
    assert out.is_neg()
    eca_fused.eca(case.x, case.weight, backend=backend, out=out)
    torch.testing.assert_close(out, wanted)
    x.copy_(case.x)
    torch.testing.assert_close(eca_fused.eca_(x, case.weight, backend=backend), wanted)


def most_allocated(function, folder):
    """Bytes of the largest allocation of a tensor on the CPU in a call, freed again or not."""
    with torch.no_grad(), torch.profiler.profile(profile_memory=True) as profile:
        function()
    profile.export_chrome_trace(str(folder / "trace.json"))
    events = json.loads((folder / "trace.json").read_text())["traceEvents"]
    return max((e["args"]["Bytes"] for e in events if e["name"] == "[memory]"), default=0)


@pytest.mark.skipif(DEVICE != "cpu", reason="of the CPU: run it without ECA_FUSED_TEST_DEVICE")
@pytest.mark.parametrize("layout", LAYOUTS)
@needs_extension
def test_no_map_is_made_where_memory_is_given(layout, tmp_path):
    case = make_case((2, 16, 20, 20), layout=layout)
    x, weight = case.x, case.weight
    out, part = torch.empty_like(x), filled((2, 32, 20, 20), layout=layout)[:, 16:]
    map_bytes = x.numel() * x.itemsize
    one = {"backend": "native"}
    assert most_allocated(lambda: eca_fused.eca(x, weight, **one), tmp_path) >= map_bytes
    assert most_allocated(lambda: eca_fused.eca_(x, weight, **one), tmp_path) < map_bytes
    for memory in (out, part, x, x[:]):
        most = most_allocated(lambda o=memory: eca_fused.eca(x, weight, **one, out=o), tmp_path)
        assert most < map_bytes


# ---- what is refused ----


def arguments():
    case = make_case(SHAPE)
    return case.x, case.weight


@pytest.mark.parametrize("backend", NAMES)
class TestErrors:
    @pytest.mark.parametrize("shape", [(3, 8, 4, 4), (1, 3, 8, 4, 5)], ids=name_of)
    def test_shape(self, backend, shape):
        out = filled(shape)
        expected = f"out of the shape and .* of x, {SHAPE} on .*, got {shape} on .*empty_like"
        with pytest.raises(ValueError, match=re.sub(r"([()])", r"\\\1", expected)):
            eca_fused.eca(*arguments(), backend=backend, out=out)
        assert torch.equal(out, filled(shape))

    def test_dtype(self, backend):
        out = filled(SHAPE, torch.float64)
        with pytest.raises(TypeError, match=r"out of torch.float32, .* got torch.float64"):
            eca_fused.eca(*arguments(), backend=backend, out=out)

    def test_device(self, backend):
        with pytest.raises(ValueError, match=r"got \(3, 8, 4, 5\) on meta"):
            eca_fused.eca(*arguments(), backend=backend, out=torch.empty(SHAPE, device="meta"))

    def test_no_tensor(self, backend):
        with pytest.raises(TypeError, match=r"expected out as a torch.Tensor, got list"):
            eca_fused.eca(*arguments(), backend=backend, out=[1.0])

    def test_x_is_checked_too(self, backend):
        x, weight = arguments()
        with pytest.raises(TypeError, match="expected x of dtype"):
            eca_fused.eca(x.int(), weight, backend=backend, out=filled(SHAPE))

    @pytest.mark.parametrize("which", ["x", "weight", "out"])
    def test_a_gradient(self, backend, which):
        x, weight = arguments()
        out = filled(SHAPE)
        {"x": x, "weight": weight, "out": out}[which].requires_grad_()
        with pytest.raises(RuntimeError, match=r"out= has no gradient.*no_grad"):
            eca_fused.eca(x, weight, backend=backend, out=out)
        assert torch.equal(out, filled(SHAPE))
        with torch.no_grad():
            eca_fused.eca(x, weight, backend=backend, out=out)
            assert torch.equal(out, eca_fused.eca(x, weight, backend=backend))

    def test_a_tensor_of_inference_mode_outside_of_it(self, backend):
        with torch.inference_mode():
            out = filled(SHAPE)
            eca_fused.eca(*arguments(), backend=backend, out=out)
        with torch.no_grad(), pytest.raises(RuntimeError, match="out was made in inference mode"):
            eca_fused.eca(*arguments(), backend=backend, out=out)

    def test_elements_that_share_memory(self, backend):
        out = filled((1, 8, 4, 5)).expand(SHAPE)
        with pytest.raises(RuntimeError, match="more than one element of"):
            eca_fused.eca(*arguments(), backend=backend, out=out)

    def test_what_a_gradient_kept_is_missed(self, backend):
        out, factor = filled(SHAPE), torch.ones(1, device=DEVICE).requires_grad_()
        product = (out * factor).sum()
        eca_fused.eca(*arguments(), backend=backend, out=out)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            product.backward()


@needs_extension
@pytest.mark.parametrize("bad", [filled((3, 8, 4, 4)), filled(SHAPE, torch.float64)])
def test_the_operator_checks_by_itself(bad):
    with pytest.raises(RuntimeError, match="eca_fused: expected out"):
        torch.ops.eca_fused.inference_into(*arguments(), bad)


# ---- in the rest of PyTorch ----


@pytest.mark.parametrize("layout", LAYOUTS)
@needs_extension
def test_opcheck(layout):
    case = make_case(SHAPE, layout=layout)
    operator = torch.ops.eca_fused.inference_into
    torch.library.opcheck(operator, (case.x, case.weight, filled(SHAPE, layout=layout)))
    torch.library.opcheck(operator, (case.x, case.weight, filled(larger(1), layout=layout)[:, 3:]))


@pytest.mark.parametrize("backend", ["auto", *NAMES])
def test_compiled(backend):
    def function(x, weight, out):
        y = eca_fused.eca(x + 1, weight, backend=backend, out=out)
        return y is out, out * 2

    case = make_case(SHAPE)
    found, wanted = filled(SHAPE), filled(SHAPE)
    got = torch.compile(function, fullgraph=True)(case.x, case.weight, found)
    want = function(case.x, case.weight, wanted)
    assert got[0] is want[0] is True
    torch.testing.assert_close((got[1], found), (want[1], wanted))


@pytest.mark.parametrize("backend", NAMES)
def test_in_vmap(backend):
    xs, weight = (
        torch.stack([make_case(SHAPE, seed=i).x for i in range(3)]),
        make_case(SHAPE).weight,
    )
    outs = filled((3, *SHAPE))
    torch.vmap(lambda x, o: eca_fused.eca(x, weight, backend=backend, out=o))(xs, outs)
    wanted = torch.stack([eca_fused.eca(x, weight, backend=backend) for x in xs])
    torch.testing.assert_close(outs, wanted)


def in_script(x: torch.Tensor, weight: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
    return eca_fused.eca(x, weight, padding_mode="circular", backend="native", out=out)


def plain_in_script(x: torch.Tensor, weight: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
    return eca_fused.eca(x, weight, padding_mode="circular", backend="reference", out=out)


@pytest.mark.parametrize(
    "function", [pytest.param(in_script, marks=needs_extension), plain_in_script]
)
def test_scripted_and_traced(function):
    case = make_case(SHAPE)
    script = torch.jit.script(function)
    trace = torch.jit.trace(function, (case.x, case.weight, filled(SHAPE)))
    wanted = function(case.x, case.weight, filled(SHAPE))
    for same in (script, trace):
        out = filled(SHAPE)
        assert same(case.x, case.weight, out).data_ptr() == out.data_ptr()
        torch.testing.assert_close(out, wanted)
    for bad in (filled((1, *SHAPE)), filled(SHAPE, torch.float64), filled(SHAPE).requires_grad_()):
        with pytest.raises(torch.jit.Error, match="out"):
            script(case.x, case.weight, bad)


def test_in_a_graph_of_fx():
    case = make_case(SHAPE)
    graph = torch.fx.symbolic_trace(lambda x, w, out: eca_fused.eca(x, w, out=out))
    out = filled(SHAPE)
    assert graph(case.x, case.weight, out) is out
    assert torch.equal(out, eca_fused.eca(case.x, case.weight))
