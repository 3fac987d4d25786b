"""The Triton backend without a GPU: its choice, its plan, tracing, code for three architectures,
and the common suite in Triton's interpreter."""

import functools
import math
import os
import types
import warnings

import pytest
import torch

from eca_fused import kernel_size
from eca_fused.ops import backend as backend_module, native
from helpers.cases import LAYOUTS, READ_IN_PLACE, in_layout, name_of
from helpers.processes import python, run_tests

pytestmark = pytest.mark.every_torch

pytest.importorskip("triton", reason="needs Triton")
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
compiles = pytest.mark.skipif(INTERPRETED, reason="the interpreter compiles nothing")

# All that select() looks at.
GPU = types.SimpleNamespace(device=torch.device("cuda", 0), is_cpu=False)


# The processes do not get the settings of this run.
fresh = functools.partial(python, without=("ECA_FUSED_BACKEND", "TRITON_INTERPRET"))

# ---- choice ----


@pytest.mark.parametrize("error", ["ImportError('no triton')", "OSError('undefined symbol')"])
def test_a_missing_triton_is_reported(error):
    done = fresh(
        f"""
import sys, torch
class Finder:
    def find_spec(self, name, path=None, target=None):
        if name == "triton":
            raise {error}
sys.meta_path.insert(0, Finder())
import eca_fused
print(eca_fused.backends()["triton"])
eca_fused.eca(torch.ones(1, 1), torch.ones(1, 1, 1))
try:
    eca_fused.eca(torch.ones(1, 1), torch.ones(1, 1, 1), backend="triton")
except RuntimeError as refused:
    print(refused)
"""
    )
    assert done.returncode == 0, done.stderr
    status, refused = done.stdout.splitlines()
    assert status.startswith("not usable: Triton could not be imported (")
    assert error.split("'")[1] in status
    assert "pip install triton" in refused


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a driver")
def test_a_missing_driver_is_reported():
    done = fresh("import eca_fused; print(eca_fused.backends()['triton'])")
    assert done.stdout.startswith("not usable: Triton finds no GPU driver ("), done.stderr


def test_the_interpreter_makes_it_usable_on_the_cpu():
    code = (
        "import torch, eca_fused, sys\n"
        "assert 'triton' not in sys.modules\n"
        "x, w = torch.randn(2, 4, 3), torch.randn(1, 1, 3)\n"
        "y = eca_fused.eca(x, w)\n"
        "torch.testing.assert_close(y, eca_fused.reference.eca(x, w))\n"
        "from eca_fused.ops.backend import select\n"
        "print(select(x, 'auto').name, eca_fused.backends()['triton'])"
    )
    done = fresh(code, TRITON_INTERPRET="1", ECA_FUSED_BACKEND="triton")
    assert done.stdout.startswith("triton usable: its interpreter"), done.stderr


@pytest.fixture
def no_warning_yet(monkeypatch):
    monkeypatch.setattr(backend_module, "_warned", set())
    monkeypatch.setattr(backend_module, "_default", "auto")


def chosen_on_gpu():
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        kernels = [backend_module.select(GPU, "auto") for _ in range(3)]
    assert kernels[0] is kernels[1] is kernels[2]
    assert len(seen) == 1
    return kernels[0], str(seen[0].message)


def test_auto_falls_to_triton_and_says_why_once(monkeypatch, no_warning_yet):
    monkeypatch.setattr(native, "devices", frozenset({"cpu"}))
    monkeypatch.setattr(native, "missing", None)
    monkeypatch.setattr(backend_module, "_triton_missing", lambda: None)
    kernels, message = chosen_on_gpu()
    assert kernels.name == "triton"
    assert message == (
        "eca_fused runs its Triton kernels on cuda: "
        "the extension was compiled without kernels for cuda"
    )


def test_auto_falls_to_triton_on_another_architecture(monkeypatch, no_warning_yet):
    monkeypatch.setattr(native, "devices", frozenset({"cpu", "cuda"}))
    monkeypatch.setattr(native, "missing", None)
    monkeypatch.setattr(native, "unsupported", lambda device: "compiled for 9.0, this one has 8.0")
    monkeypatch.setattr(backend_module, "_triton_missing", lambda: None)
    kernels, message = chosen_on_gpu()
    assert kernels.name == "triton"
    assert "this one has 8.0" in message


def test_auto_without_either_gives_both_reasons(monkeypatch, no_warning_yet):
    monkeypatch.setattr(native, "devices", frozenset({"cpu"}))
    monkeypatch.setattr(native, "missing", None)
    monkeypatch.setattr(backend_module, "_triton_missing", lambda: "Triton is not there")
    kernels, message = chosen_on_gpu()
    assert kernels is None
    assert "in plain PyTorch" in message
    assert "without kernels for cuda; Triton is not there" in message


@pytest.mark.parametrize(
    ("capability", "compiled", "runs"),
    [
        ((9, 0), "8.0;9.0", True),
        ((8, 6), "7.5;8.0", True),
        ((8, 0), "8.6", False),
        ((10, 0), "8.0;9.0", False),
        ((10, 0), "8.0;9.0+PTX", True),
        ((7, 0), "7.5+PTX", False),
        ((9, 0), "9.0a", True),
        ((10, 3), "10.0a+PTX", False),
        ((9, 0), "8.0 9.0", True),
        ((10, 0), "8.0 9.0", False),
        ((9, 0), "Ampere;Hopper", True),
    ],
)
def test_architectures_that_run(capability, compiled, runs):
    assert native.runs_on(capability, compiled) == runs


# ---- plan ----


def shape_of(samples, channels, side, k=5, planes=True, itemsize=2):
    from eca_fused.ops.triton.plan import Shape

    return Shape(samples, channels, side * side, k, planes, itemsize)


@pytest.mark.parametrize(
    ("channels", "side"), [(64, 56), (256, 56), (512, 28), (1024, 14), (2048, 7), (2048, 1)]
)
@pytest.mark.parametrize("maps", [1, 2])
def test_planes_of_a_resnet_stay_in_registers_whatever_the_batch(channels, side, maps):
    from eca_fused.ops.triton import plan

    tiles = {plan.resident(shape_of(n, channels, side), maps) for n in (128, 256, 1000)}
    assert len(tiles) == 1
    tile = tiles.pop()
    assert tile.pixels >= side * side
    assert tile.channels >= plan.halo_rows(5)


def test_large_planes_take_two_passes():
    from eca_fused.ops.triton import plan

    for planes in (True, False):
        shape = shape_of(32, 64, 224, planes=planes)
        assert plan.resident(shape, 1) is None
        pass_ = plan.two_passes(shape)
        assert pass_.splits * pass_.blocks * pass_.tile.pixels >= shape.pixels
        assert pass_.splits <= plan.SPLITS_MOST


# ---- maps ----


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("view", READ_IN_PLACE)
def test_views_are_read_in_place(view, layout):
    from eca_fused.ops.triton.maps import in_planes, readable, rows

    x = READ_IN_PLACE[view](in_layout(torch.randn(5, 12, 6, 7), layout))
    planes = in_planes(x)
    assert planes == (layout == "contiguous")
    assert readable(x, planes) is x
    assert rows(x, planes) == (
        x.stride(0) if len(x) > 1 else x[0].numel(),
        x.stride(1 if planes else 3),
    )
    assert readable(x[..., 1:5], planes) is not x


# ---- tracing ----


@compiles
@pytest.mark.parametrize("layout", LAYOUTS)
def test_tracing_sees_the_kernels_and_the_strides(layout):
    from torch._subclasses.fake_tensor import FakeTensorMode
    from torch.fx.experimental.proxy_tensor import make_fx

    from eca_fused.ops.triton import launch

    with FakeTensorMode():
        x = in_layout(torch.empty(8, 64, 14, 14, device="meta"), layout).to("meta")
        weight = torch.empty(1, 1, 3, device="meta")

        def forward(x, weight):
            y = torch.empty_like(x)
            launch.forward(x, weight, False, y, keep=False)
            return y

        graph = make_fx(forward)(x, weight)
        y = torch.ops.eca_fused.triton_inference(x, weight)
    assert "triton_kernel_wrapper_mutation" in graph.code
    assert y.stride() == x.stride()


@compiles
@pytest.mark.parametrize("layout", LAYOUTS)
def test_tracing_sees_the_kernels_of_a_tail(layout):
    from torch._subclasses.fake_tensor import FakeTensorMode
    from torch.fx.experimental.proxy_tensor import make_fx

    from eca_fused.ops.triton import tail_launch

    with FakeTensorMode():
        x = in_layout(torch.empty(8, 20, 14, 14, device="meta"), layout).to("meta")
        planes, channels = (torch.empty(k, device="meta") for k in ((2, 8, 20), (3, 20)))
        written = torch.empty(8 * 20 * 25, dtype=torch.uint8, device="meta")

        def tail(x, planes, channels, mask):
            y = torch.empty_like(x)
            tail_launch.tail(x, x, planes, channels, 1, y, mask)
            return y

        graph = make_fx(tail)(x, planes, channels, written)
        y, mask = torch.ops.eca_fused.triton_tail(x, x, planes, channels, 1, True)
    assert "triton_kernel_wrapper_mutation" in graph.code
    assert y.stride() == x.stride()
    assert mask.numel() == 8 * max(20 * 25, 196 * 3)


# ---- code for GPUs ----

SHAPES = [
    ((32, 256, 56, 56), 5, torch.bfloat16, "contiguous"),
    ((32, 512, 28, 28), 5, torch.float32, "contiguous"),
    ((32, 1024, 14, 14), 5, torch.float16, "channels_last"),
    ((32, 2048, 7, 7), 7, torch.bfloat16, "contiguous"),
    ((32, 64, 224, 224), 3, torch.bfloat16, "channels_last"),
    ((2, 3, 5, 7), 3, torch.float64, "contiguous"),
]


@compiles
@pytest.mark.parametrize("architecture", [80, 90, 100])
@pytest.mark.parametrize(("shape", "k", "dtype", "layout"), SHAPES, ids=name_of)
def test_compiles_without_spills(shape, k, dtype, layout, architecture, tmp_path, monkeypatch):
    from eca_fused.ops.triton import launch
    from helpers.triton_aot import recorded

    x = torch.empty(shape, dtype=dtype, device="meta")
    if layout == "channels_last":
        x = x.to(memory_format=torch.channels_last)
    weight = torch.empty(1, 1, k, device="meta")
    sums = torch.float64 if dtype == torch.float64 else torch.float32
    mean = torch.empty(shape[:2], dtype=sums, device="meta")

    def both_passes():
        launch.forward(x, weight, False, torch.empty_like(x), keep=True)
        outputs = torch.empty_like(x), torch.empty_like(weight)
        launch.backward(x, x, weight, mean, mean, False, *outputs)

    launches = recorded(both_passes, monkeypatch)
    assert {"forward_resident", "gates"} & {one.kernel.__name__ for one in launches}
    check_code(launches, architecture, tmp_path, whole_lines=shape[-1] % 28 == 0)


# Kernels that write a map.
IN_LINES = (
    *("scale", "forward_resident"),
    *("tail_result", "gradient_maps", "block_tail_result", "block_tail_gradients"),
    *("gated_result", "gated_gradient"),
)


def check_code(launches, architecture, folder, whole_lines):
    from helpers.triton_aot import compiled, usage

    for one in launches:
        kernel = compiled(one, architecture)
        used = usage(kernel, folder)
        assert used.stack == 0, f"{one.kernel.__name__} spills: {used}"
        assert used.shared <= 48 * 1024, f"{one.kernel.__name__}: {used}"
        if whole_lines and one.kernel.__name__ in IN_LINES:
            assert "ld.global.v4.b32" in kernel.asm["ptx"]
            assert "st.global.v4.b32" in kernel.asm["ptx"]


@compiles
@pytest.mark.parametrize("layout", LAYOUTS)
def test_pooling_and_rescaling_compile_without_spills(layout, tmp_path, monkeypatch):
    from eca_fused.ops.triton import launch
    from helpers.triton_aot import recorded

    x = in_layout(torch.empty(32, 256, 56, 56, dtype=torch.bfloat16, device="meta"), layout)
    half = torch.empty(32, 256, dtype=torch.bfloat16, device="meta")
    gate = torch.empty(32, 256, device="meta")

    def both_passes():
        launch.pool(x, half)
        launch.rescale(x, gate, None, torch.empty_like(x))
        launch.rescale_backward(x, x, gate, None, gate)
        launch.rescale(x, gate, gate, torch.empty_like(x))

    launches = recorded(both_passes, monkeypatch)
    names = [one.kernel.__name__ for one in launches]
    assert names == ["sums", "finish", "scale", "sums", "finish", "scale"]
    check_code(launches, 90, tmp_path, whole_lines=True)


TAILS = [
    ((32, 256, 56, 56), torch.bfloat16, "contiguous", "relu"),
    ((32, 256, 56, 56), torch.bfloat16, "channels_last", "gelu"),
    ((32, 512, 28, 28), torch.float32, "channels_last", "relu"),
    ((32, 2048, 7, 7), torch.float16, "contiguous", "silu"),
    ((1, 3, 200, 200), torch.float64, "contiguous", "relu"),
]


@compiles
@pytest.mark.parametrize("architecture", [80, 90, 100])
@pytest.mark.parametrize(("shape", "dtype", "layout", "activation"), TAILS, ids=name_of)
def test_tails_compile_without_spills(
    shape, dtype, layout, activation, architecture, tmp_path, monkeypatch
):
    from eca_fused.ops.checks import ACTIVATIONS
    from eca_fused.ops.triton import tail_launch
    from helpers.triton_aot import recorded

    x = in_layout(torch.empty(shape, dtype=dtype, device="meta"), layout).to("meta")
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    number, (n, c) = ACTIVATIONS.index(activation), shape[:2]
    mask = torch.empty(0, dtype=torch.uint8, device="meta")

    def some(*shape, of=wide):
        return torch.empty(shape, dtype=of, device="meta")

    planes, channels = some(2, n, c), some(3, c)

    def every_pass():
        maps, results = (x, x, x, mask), (torch.empty_like(x), torch.empty_like(x))
        tail_launch.moments(x, some(2, n, c, of=torch.float64))
        kept = mask if activation == "relu" else None
        tail_launch.tail(x, x, planes, channels, number, results[0], kept)
        sums = some(3, n, c, of=torch.float64)
        tail_launch.tail_sums(*maps, planes, channels, number, sums)
        gradients = planes, some(4, c), number, True, True
        tail_launch.tail_gradients(*maps, planes, channels, *gradients, *results)

    launches = recorded(every_pass, monkeypatch)
    names = {one.kernel.__name__ for one in launches}
    assert {"plane_moments", "tail_result", "gradient_sums", "gradient_maps"} <= names
    assert ("merge_moments" in names) == ("finish" in names)
    check_code(launches, architecture, tmp_path, whole_lines=shape[-1] % 28 == 0)


# Those whose planes fit into a program.
BLOCK_TAILS = [
    ((32, 256, 56, 56), 5, torch.bfloat16, "contiguous", "relu"),
    ((32, 512, 28, 28), 5, torch.float32, "contiguous", "silu"),
    ((32, 1024, 14, 14), 5, torch.float16, "channels_last", "relu"),
    ((32, 2048, 7, 7), 7, torch.bfloat16, "channels_last", "gelu"),
    ((32, 2048, 7, 7), 7, torch.float16, "contiguous", "none"),
    ((2, 3, 5, 7), 3, torch.float64, "contiguous", "gelu"),
]


@compiles
@pytest.mark.parametrize("architecture", [80, 90, 100])
@pytest.mark.parametrize(("shape", "k", "dtype", "layout", "activation"), BLOCK_TAILS, ids=name_of)
def test_tails_in_one_pass_compile_without_spills(
    shape, k, dtype, layout, activation, architecture, tmp_path, monkeypatch
):
    from eca_fused.ops.checks import ACTIVATIONS
    from eca_fused.ops.triton import block_tail_launch
    from helpers.triton_aot import recorded

    x = in_layout(torch.empty(shape, dtype=dtype, device="meta"), layout).to("meta")
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    number, (n, c) = ACTIVATIONS.index(activation), shape[:2]
    kept = torch.empty(0, dtype=torch.uint8, device="meta") if activation == "relu" else None

    def some(*shape, of=wide):
        return torch.empty(shape, dtype=of, device="meta")

    given = some(1, 1, k), some(n), some(6, c)

    def both_directions():
        results = torch.empty_like(x), kept, some(n, c), some(n, c)
        assert block_tail_launch.block_tail(x, x, *given, False, number, *results)
        saved = some(n, c), some(n, c), False, number
        results = some(3, n, c, of=torch.float64), some(n, c), torch.empty_like(x)
        assert block_tail_launch.block_tail_backward(
            x, x, x, kept, *given, *saved, *results, torch.empty_like(x), given[0]
        )

    launches = recorded(both_directions, monkeypatch)
    names = ["block_tail_result", "block_tail_gradients", "tap_gradients", "tap_totals"]
    assert [one.kernel.__name__ for one in launches] == names
    check_code(launches, architecture, tmp_path, whole_lines=shape[-1] % 28 == 0)


GATINGS = [
    ((32, 256, 56, 56), torch.bfloat16, "contiguous", "hardswish"),
    ((32, 256, 56, 56), torch.bfloat16, "channels_last", "silu"),
    ((32, 512, 28, 28), torch.float32, "channels_last", "relu"),
    ((32, 2048, 7, 7), torch.float16, "contiguous", "gelu"),
    ((1, 3, 200, 200), torch.float64, "contiguous", "hardswish"),
]


@compiles
@pytest.mark.parametrize("architecture", [80, 90, 100])
@pytest.mark.parametrize(("shape", "dtype", "layout", "activation"), GATINGS, ids=name_of)
def test_attention_after_an_activation_compiles_without_spills(
    shape, dtype, layout, activation, architecture, tmp_path, monkeypatch
):
    from eca_fused.ops.gating import ACTIVATIONS
    from eca_fused.ops.triton import gating_launch
    from helpers.triton_aot import recorded

    x = in_layout(torch.empty(shape, dtype=dtype, device="meta"), layout).to("meta")
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    number, (n, c) = ACTIVATIONS.index(activation), shape[:2]

    def some(*shape, of=wide):
        return torch.empty(shape, dtype=of, device="meta")

    planes, channels, result = some(2, n, c), some(3, c), torch.empty_like(x)

    def every_pass():
        for kinds, dy in ((1, None), (1, x), (5, x)):
            sums = some(kinds, n, c, of=torch.float64)
            gating_launch.activated_sums(dy, x, channels, number, sums)
        gating_launch.gated(x, planes[0], channels, number, result)
        for by_x in (False, True):
            given = planes, channels, some(2, c), number, by_x
            gating_launch.gated_gradients(x, x, *given, result)

    launches = recorded(every_pass, monkeypatch)
    names = [one.kernel.__name__ for one in launches if one.kernel.__name__ != "finish"]
    assert names == 3 * ["activated_parts"] + ["gated_result"] + 2 * ["gated_gradient"]
    check_code(launches, architecture, tmp_path, whole_lines=shape[-1] % 28 == 0)


@compiles
@pytest.mark.parametrize("own_taps", [False, True], ids=["shared", "own_taps"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64], ids=name_of)
def test_numbers_between_the_passes_compile_without_spills(dtype, own_taps, tmp_path, monkeypatch):
    """With everything that they can have, and with as little as they can."""
    from eca_fused.ops.triton import coefficient_launch as launch
    from helpers.triton_aot import recorded

    n, c = 32, 256
    x = torch.empty(n, c, 14, 14, dtype=dtype, device="meta")
    sums = torch.float64 if dtype == torch.float64 else torch.float32

    def some(*shape, of=sums):
        return torch.empty(shape, dtype=of, device="meta")

    def doubles(*shape):
        return some(*shape, of=torch.float64)

    weight = some(c if own_taps else 1, 1, 5, of=dtype)
    norm = launch.NormTensors(doubles(c), doubles(c), some(c), some(c))
    no_norm = launch.NormTensors(*(None,) * 4)
    nothing, parameters = (None,) * 4, tuple(some(c) for _ in range(4))

    def every_launch():
        launch.batch_statistics(doubles(2, n, c), 196, doubles(c), doubles(c))
        for own, other in ((norm, norm), (no_norm, no_norm)):
            both = own, 1e-5, other, 1e-3
            launch.tail_coefficients(
                *(x, weight, doubles(n, c), None, some(n), *both, True),
                *(some(2, n, c), some(6, c), some(n, c), some(n, c)),
            )
            taps = weight, some(n, c), some(n), some(n, c), some(n, c)
            gradients = None, some(n), weight
            launch.tail_totals(
                x, doubles(3, n, c), *taps, own, 1e-5, False, doubles(4, c), *gradients
            )
            gate = None, some(n, c, of=dtype), *nothing[:3]
            launch.tail_totals(
                *(x, doubles(2, n, c), *gate, own, 1e-5, False),
                *(doubles(4, c), some(n, c, of=dtype), None, None),
            )
            launch.tail_gradient_coefficients(
                *(x, doubles(4, c), None, 6272.0, 0.0, some(n, c), some(n), some(n, c), *both),
                *(some(2, n, c), some(4, c), parameters),
            )
            given = x, doubles(4, c), doubles(4, c), 1.0, 1.0, *nothing[:3]
            launch.tail_gradient_coefficients(*given, *both, None, None, parameters)
        launch.tail_coefficients(
            *(x, *nothing, no_norm, 0.0, no_norm, 0.0, False, None, some(6, c), None, None)
        )

    launches = recorded(every_launch, monkeypatch)
    assert len(launches) == 1 + 2 * (1 + 5 - own_taps + 2 + 1 + 1) + 1
    check_code(launches, 90, tmp_path, whole_lines=False)


# Warp instructions in the machine code of sm_90 for 512 bytes of x, forward and backward, for these
# releases of Triton. Hardly anything of a kernel with tiles in registers is a loop or a branch, so
# each of its instructions is executed once. 256 samples.
RELEASES = ["3.6", "3.8"]
COUNTED = {
    (256, 56, "contiguous", torch.float32): ((83.3, 147.4), (81.3, 152.7)),
    (256, 56, "contiguous", torch.bfloat16): ((175.2, 303.0), (177.3, 320.7)),
    (512, 28, "contiguous", torch.float32): ((140.1, 145.0), (149.7, 152.0)),
    (512, 28, "contiguous", torch.bfloat16): ((235.1, 260.2), (231.2, 262.5)),
    (1024, 14, "contiguous", torch.float32): ((141.1, 139.8), (142.0, 144.2)),
    (1024, 14, "contiguous", torch.bfloat16): ((301.4, 313.1), (307.6, 322.6)),
    (2048, 7, "contiguous", torch.float32): ((270.2, 247.8), (310.9, 297.8)),
    (2048, 7, "contiguous", torch.bfloat16): ((565.2, 530.6), (644.9, 632.2)),
    (1024, 14, "channels_last", torch.float32): ((112.5, 121.0), (111.3, 124.1)),
    (1024, 14, "channels_last", torch.bfloat16): ((155.8, 273.3), (156.6, 273.0)),
    (2048, 7, "channels_last", torch.float32): ((106.8, 118.9), (120.5, 136.3)),
    (2048, 7, "channels_last", torch.bfloat16): ((259.3, 290.0), (281.1, 302.4)),
}


@compiles
@pytest.mark.parametrize("backward", [False, True], ids=["forward", "backward"])
@pytest.mark.parametrize("layer", COUNTED, ids=str)
def test_instructions(layer, backward, tmp_path, monkeypatch):
    """5 % more than above are too many; a tenth less asks for the number to be renewed."""
    import triton

    from eca_fused.ops.triton import launch
    from helpers.sass_text import read_kernel
    from helpers.triton_aot import compiled, machine_code, recorded

    release = ".".join(triton.__version__.split(".")[:2])
    if release not in RELEASES:
        pytest.skip(f"numbers are of Triton {' and '.join(RELEASES)}; this is {release}")
    channels, side, layout, dtype = layer
    x = in_layout(torch.empty(256, channels, side, side, dtype=dtype, device="meta"), layout)
    x = x.to("meta")
    weight = torch.empty(1, 1, kernel_size(channels), device="meta")
    mean = torch.empty(x.shape[:2], device="meta")

    def call():
        if backward:
            outputs = torch.empty_like(x), torch.empty_like(weight)
            launch.backward(x, x, weight, mean, mean, False, *outputs)
        else:
            launch.forward(x, weight, False, torch.empty_like(x), keep=True)

    resident = recorded(call, monkeypatch)[0]
    assert resident.kernel.__name__ == ("backward_resident" if backward else "forward_resident")
    kernel = compiled(resident, 90)
    code = read_kernel(machine_code(kernel, tmp_path))
    # Behind the last exit there is padding.
    count = 1 + max(i for i, a in enumerate(sorted(code)) if code[a].opcode == "EXIT")
    warps = kernel.metadata.num_warps * math.prod(resident.grid)
    found = count * warps / (x.numel() * x.element_size() / 512)
    number = COUNTED[layer][RELEASES.index(release)][backward]
    assert 0.9 * number <= found <= 1.05 * number, f"{found:.1f} instead of {number}"


def training_step(x, weight, gamma):
    """What autograd/tail.py calls on the Triton backend, for batch norm, ECA and ReLU."""
    from eca_fused.ops.triton import coefficients, tails

    n, pixels = x.shape[0], math.prod(x.shape[2:])
    none = (None,) * 4
    planes = tails.compute_moments(x)
    norm = *coefficients.compute_statistics(planes, pixels), gamma, gamma, 1e-5
    both = *norm, *none, 0.0
    planes, rows, gate, distance = coefficients.compute_coefficients(
        x, weight, planes[0], None, None, *both, False, True
    )
    y, mask = tails.compute_tail(x, x, planes, rows[3:], 1, True)
    maps = y, x, None, mask, planes, rows[3:]
    sums = tails.compute_tail_sums(*maps, 1, False)
    flags = False, False, False, True
    totals, _, _, dmean, dweight = coefficients.compute_totals(
        x, sums, weight, gate, None, None, distance, *norm, *flags
    )
    shares = totals / (n * pixels)
    found = coefficients.compute_gradient_coefficients(
        x, totals, shares, 1.0, 0.0, gate, None, dmean, *both, True
    )
    results = tails.compute_tail_gradients(*maps, *found[:2], 1, True, False, True, True)
    return y, *results, dweight, *found[2:4]


@compiles
def test_launches_of_a_training_step(monkeypatch):
    """docs/how_it_works.md says how many."""
    from helpers.triton_aot import recorded

    x = torch.empty(32, 1024, 14, 14, dtype=torch.bfloat16, device="meta")
    weight, gamma = torch.empty(1, 1, 5, device="meta"), torch.empty(1024, device="meta")
    assert len(recorded(lambda: training_step(x, weight, gamma), monkeypatch)) == 11


@compiles
def test_no_size_is_fixed_while_tracing():
    """Batch, height and width stay open, of passes and of tails in one pass."""
    from torch._subclasses.fake_tensor import FakeTensorMode
    from torch._subclasses.functional_tensor import dispatch_functionalize
    from torch.fx.experimental.proxy_tensor import make_fx
    from torch.fx.experimental.symbolic_shapes import (
        DimDynamic,
        ShapeEnv,
        StatelessSymbolicContext,
    )

    from eca_fused.ops.triton import block_tails

    def one_pass(x, weight, rows):
        y, mask, *saved = block_tails.compute_block_tail(x, x, weight, None, rows, False, 1, True)
        flags = False, 1, False, True, True, True
        saved = mask, weight, None, rows, *saved
        return y, *block_tails.compute_block_tail_backward(y, x, None, *saved, *flags)

    def shapes_of(function, *parameters):
        environment = ShapeEnv()
        mode = FakeTensorMode(shape_env=environment, allow_non_fake_inputs=True)
        opened = StatelessSymbolicContext(
            [DimDynamic.DYNAMIC, DimDynamic.STATIC, DimDynamic.DYNAMIC, DimDynamic.DYNAMIC]
        )
        whole = torch.empty(6, 64, 14, 15, device="meta")
        with mode:
            given = [torch.empty(shape, device="cuda") for shape in parameters]
        x = mode.from_tensor(whole, symbolic_context=opened)
        with mode:
            x = torch.empty(x.shape, device="cuda")
            make_fx(dispatch_functionalize(function), tracing_mode="real")(x, *given)
        return [size.node.expr.is_number for size in (x.shape[0], *x.shape[2:])]

    assert shapes_of(training_step, (1, 1, 3), (64,)) == [False] * 3
    assert shapes_of(one_pass, (1, 1, 3), (6, 64)) == [False] * 3


@compiles
def test_torch_finds_the_kernels_of_each_operator():
    """They are in the keys of its caches, so no compiled graph with older kernels is used."""
    from torch._library.triton import get_triton_kernels_for_op

    from eca_fused.ops import triton  # noqa: F401  # registers them

    taps = {"tap_gradients", "tap_totals"}
    passes = {"plane_moments", "coefficients", "tail_result"}
    backward_passes = {"gradient_sums", "plane_gradients", "channel_totals", "gradient_maps"}
    expected = {
        "triton_forward": {"forward_resident", "sums", "gates", "scale"},
        "triton_inference": {"forward_resident", "sums", "gates", "scale"},
        "_triton_inference_": {"forward_resident", "sums", "gates", "scale"},
        "_triton_inference_into": {"forward_resident", "sums", "gates", "scale"},
        "triton_backward": {"backward_resident", "gate_gradients"} | taps,
        "triton_pool": {"sums", "finish"},
        "triton_rescale": {"scale"},
        "triton_rescale_backward": {"sums", "finish", "scale"},
        "triton_moments": {"plane_moments", "merge_moments"},
        "triton_tail": {"tail_result"},
        "triton_tail_sums": {"gradient_sums", "finish"},
        "triton_tail_gradients": {"gradient_maps"},
        "triton_batch_statistics": {"statistics_of_batch"},
        "triton_tail_coefficients": {"coefficients"},
        "triton_tail_totals": {"plane_gradients", "scale_gradients", "channel_totals"} | taps,
        "triton_tail_gradient_coefficients": {"gradient_coefficients"},
        "triton_block_tail": {"block_tail_result"} | passes,
        "triton_block_tail_backward": {"block_tail_gradients"} | backward_passes | taps,
        "triton_activated_sums": {"activated_parts", "finish"},
        "triton_gated": {"gated_result"},
        "triton_gated_gradients": {"gated_gradient"},
    }
    found = {
        name: {kernel.__name__ for kernel in get_triton_kernels_for_op(f"eca_fused::{name}")}
        for name in expected
    }
    assert [name for name, kernels in expected.items() if not kernels <= found[name]] == []
    own = {name for name in dir(torch.ops.eca_fused) if "triton_" in name}
    assert own - {"triton_inference_", "triton_inference_into"} == expected.keys()


# ---- the common suite ----


@pytest.mark.skipif(INTERPRETED, reason="this is the run inside")
@pytest.mark.parametrize(
    "folders",
    [["tests/ops"], ["tests/autograd", "tests/frameworks", "tests/modules"]],
    ids=["operators", "layers"],
)
def test_the_common_suite_in_the_interpreter(folders):
    whole = os.environ.get("ECA_FUSED_TRITON_SUITE") == "whole"
    env = {"TRITON_INTERPRET": "1", "ECA_FUSED_BACKEND": "triton"}
    env["ECA_FUSED_TEST_SAMPLE"] = "1" if whole else "61"
    chosen = ["-p", "helpers.sample", "-m", "any_device and not needs_gpu", *folders]
    print(run_tests(*chosen, "--durations=5", **env))
