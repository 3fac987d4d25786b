"""The planner of the CUDA kernels: its model, limits of GPUs, plan()'s errors, the command."""

import dataclasses
import json
import math
import random
import re
import subprocess
import sys
from typing import Any

import pytest
import torch

import eca_fused
from eca_fused import kernel_size
from eca_fused.__main__ import main
from eca_fused.cli import plan as plan_command
from eca_fused.ops import cuda_plan as planning, native
from helpers.cases import DTYPES, IN_REGISTERS, LAYOUTS, grid, name_of

pytestmark = pytest.mark.every_torch

_C: Any = pytest.importorskip("eca_fused._C", reason="needs the compiled planner: make build")

FORMATS = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}
PASSES = [False, True]  # backward
RESNET50 = [(256, 56, 56), (512, 28, 28), (1024, 14, 14), (2048, 7, 7)]
SMALL = [
    *RESNET50,
    *[(64, 56, 56), (128, 28, 28), (256, 14, 14), (512, 7, 7)],  # ResNet-18
    *[(16, 112, 112), (24, 56, 56), (32, 28, 28), (96, 14, 14), (320, 7, 7)],  # MobileNetV2
    *[(64, 7, 7), (2048, 1, 1), (1, 1, 1), (3, 5, 7)],
]
STRATEGIES = {*IN_REGISTERS, "two_pass"}
OF_PIXELS, OF_PLANES = ("columns", "kept"), ("rows", "runs")
GPUS = ["sm_75", "sm_80", "sm_86", "sm_89", "sm_90", "sm_100", "sm_120", "sm_90:1", "sm_80:7"]
BLOCKS, THREADS = 2**31, 1024  # of any GPU


def random_problem(r: random.Random) -> dict[str, Any]:
    """Arguments of _C.plan but for the GPU: usual sizes and the extremes of each."""
    channels = r.choice([1, 2, 3, 7, 64, 256, 2048, r.randint(1, 5000)])
    side = r.choice([0, 1, 2, 7, 14, 28, 56, 112, 224, 4096, r.randint(1, 400)])
    widest = [1, 3, 5, 7, 9, 2 * r.randint(0, channels) + 1]
    circular = r.random() < 0.3
    k = r.choice(widest if circular else [*widest, 2 * channels + 101, 99999])
    return {
        "backward": r.random() < 0.5,
        "dtype": r.choice([str(dtype).removeprefix("torch.") for dtype in DTYPES]),
        "channels_last": r.random() < 0.5,
        "samples": r.choice([1, 2, 3, 32, 256, r.randint(1, 3000)]),
        "channels": channels,
        "pixels": side * r.choice([side, side + 1]),
        "kernel_size": k if k // 2 <= channels or not circular else 1,
        "own_taps": r.random() < 0.3,
        "circular": circular,
        "aligned": r.random() < 0.8,
        "in_place": False,
    }


def problems(count: int, seed: int = 0) -> list[dict[str, Any]]:
    r = random.Random(seed)
    return [random_problem(r) for _ in range(count)]


def broken_limits(p: dict[str, Any], found: dict[str, Any], gpu: dict[str, Any]) -> list[str]:
    """What a plan asks for that the GPU, or the problem, does not have."""
    maps = 3 if p["backward"] else 2
    size = {"float64": 8, "float32": 4}.get(p["dtype"], 2)
    reserved = 1024 if gpu["capability"] >= 80 else 0
    in_registers = found["strategy"] in IN_REGISTERS
    all_channels = found["tile"] == p["channels"]
    resident = found["occupancy"] * gpu["multiprocessors"]
    rules = {
        "a known strategy": found["strategy"] in STRATEGIES,
        "planes, or pixels": found["strategy"]
        not in (OF_PLANES if p["channels_last"] else OF_PIXELS),
        "what a thread holds": in_registers == (found["depth"] > 0),
        "shared memory of a block": 0 <= found["shared_bytes"] <= gpu["shared_per_block"],
        "shared memory of a multiprocessor": found["occupancy"] * (found["shared_bytes"] + reserved)
        <= gpu["shared_per_multiprocessor"],
        "a block fits": found["occupancy"] >= 1,
        "threads of a block": 32 <= found["threads"] <= THREADS and found["threads"] % 32 == 0,
        "threads of a multiprocessor": found["occupancy"] * found["threads"]
        <= gpu["threads_per_multiprocessor"],
        "blocks": 1 <= found["blocks"] < BLOCKS,
        "launches": found["launches"] == 1 + p["backward"]  # the second makes dweight
        if in_registers
        else found["launches"] >= 1,
        "tile": 1 <= found["tile"] <= p["channels"],
        "tiles are all channels": (found["tiles"] - 1) * found["tile"]
        < p["channels"]
        <= found["tiles"] * found["tile"],
        "no halo around all channels": not all_channels or found["halo"] == 0,
        "the halo is as wide as the taps": not in_registers
        or found["strategy"] == "stream"  # whose blocks hand over their sums
        or all_channels
        or found["halo"] >= min(p["kernel_size"] // 2, p["channels"]),
        "a block for each tile of each sample": found["strategy"] in ("two_pass", "kept", "stream")
        or found["blocks"] == p["samples"] * found["tiles"],
        "blocks of a sample have room": found["strategy"] != "kept" or found["parts"] <= resident,
        "what else is kept": found["spare"] == 0 or found["strategy"] == "kept",
        "chunk": 1 <= found["chunk"] <= p["samples"],
        "parts": found["parts"] >= 1,
        "vectors": p["aligned"] or not found["vectors"],
        "workspace": found["workspace_bytes"] >= 0,
        "bytes of the maps": found["map_bytes"]
        == maps * p["samples"] * p["channels"] * p["pixels"] * size,
        "traffic": found["map_bytes"] <= found["dram_bytes"] <= found["l2_bytes"],
    }
    return [rule for rule, kept in rules.items() if not kept]


def faults(name: str, count: int) -> list[str]:
    """The broken limits of the plans of random problems on a GPU."""
    gpu = _C.gpu_by_name(name)
    found = [(p, _C.plan(**p, gpu=gpu)) for p in problems(count)]
    return [f"{b}: {p} gets {f}" for p, f in found for b in broken_limits(p, f, gpu)]


# ---- the model ----


@pytest.mark.parametrize("shape", RESNET50, ids=name_of)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=name_of)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_maps_move_once_in_the_model(
    shape: tuple[int, ...], dtype: torch.dtype, layout: str
) -> None:
    for samples, backward in [(n, b) for n in (1, 32, 256) for b in PASSES]:
        full = (samples, *shape)
        found = eca_fused.plan(full, dtype, FORMATS[layout], device="sm_90", backward=backward)
        x_bytes = math.prod(full) * dtype.itemsize
        # Mean and gate in float32, and each part's sums: 8 % of x at most, those of kept apart.
        numbers = 2
        if found.strategy in ("kept", "stream"):
            numbers += 2 * found.parts + (2 if backward else 0)
        small = numbers * samples * shape[0] * 4
        most = (3.05 if backward else 2.05) * x_bytes
        assert found.map_bytes == (3 if backward else 2) * x_bytes
        assert found.map_bytes <= found.dram_bytes - small <= most
        if small < 0.03 * x_bytes:
            assert found.dram_bytes <= most
        assert found.launches == 1 + backward


def test_most_layers_count_mean_and_gate() -> None:
    """The test above judges the total too, for all layers but those of 7x7."""
    sizes = [h * w * d.itemsize for _, h, w in RESNET50 for d in (torch.float32, torch.bfloat16)]
    assert [0.03 * size > 8 for size in sizes] == 6 * [True] + 2 * [False]


@pytest.mark.parametrize("gpu", GPUS)
def test_plans_are_within_the_limits_of_the_gpu(gpu: str) -> None:
    assert faults(gpu, 1500) == []


def test_random_problems_reach_every_strategy() -> None:
    """And every limit can be broken: a judge that finds nothing would let everything pass."""
    gpu = _C.gpu_by_name("sm_90")
    drawn = problems(1500)
    found = [_C.plan(**p, gpu=gpu) for p in drawn]
    assert {f["strategy"] for f in found} == STRATEGIES
    assert 0 in {p["pixels"] for p in drawn}
    changes: list[dict[str, Any]] = [
        {"shared_bytes": 10**6},
        {"occupancy": 0},
        {"threads": 200},
        {"threads": 2048},
        {"blocks": 2**31},
        {"launches": 3},
        {"halo": 0},
        {"tile": 0},
        {"strategy": "kept", "parts": 10**4},
        {"dram_bytes": 0},
        {"l2_bytes": 0},
    ]
    p, plan = next(pair for pair in zip(drawn, found, strict=True) if pair[1]["halo"] > 0)
    assert broken_limits(p, plan, gpu) == []
    for change in changes:
        assert broken_limits(p, plan | change, gpu) != [], change


@pytest.mark.parametrize("gpu", GPUS)
@pytest.mark.parametrize("shape", SMALL, ids=name_of)
def test_small_problems_are_one_launch(shape: tuple[int, ...], gpu: str) -> None:
    """Other than float64, and maps whose samples do not begin at multiples of 16 bytes."""
    for dtype in DTYPES:
        for layout in LAYOUTS:
            for backward in PASSES:
                found = eca_fused.plan(
                    (1, *shape), dtype, FORMATS[layout], device=gpu, backward=backward
                )
                aligned = math.prod(shape) * dtype.itemsize % 16 == 0
                if layout == "channels_last":
                    aligned = shape[0] * dtype.itemsize % 16 == 0
                # One multiprocessor has no room for blocks that wait for each other.
                if aligned and dtype != torch.float64 and gpu != "sm_90:1":
                    assert found.launches == 1 + backward, (dtype, layout)
                assert (found.launches == 1 + backward) == (found.strategy != "two_pass")


@pytest.mark.parametrize("gpu", GPUS)
def test_no_halo_in_place(gpu: str) -> None:
    """A tile's neighbours would read what it has already written."""
    limits = _C.gpu_by_name(gpu)
    drawn = [p | {"in_place": True} for p in problems(600, seed=2)]
    found = [_C.plan(**p, gpu=limits) for p in drawn]
    assert {f["halo"] for f in found} == {0}
    for p, f in zip(drawn, found, strict=True):
        alone = p["kernel_size"] == 1  # and so needs no halo
        assert f["strategy"] in ("two_pass", "stream") or alone or f["tile"] == p["channels"]
        assert broken_limits(p, f, limits) == []
    assert any(f["strategy"] != "two_pass" for f in found)
    elsewhere = [_C.plan(**p | {"in_place": False}, gpu=limits)["halo"] for p in drawn]
    assert max(elsewhere) > 0


@pytest.mark.parametrize("backward", [False, True])
@pytest.mark.parametrize("pixels", [49, 196, 784, 3136])
def test_small_planes_that_begin_anywhere_are_streamed(pixels: int, backward: bool) -> None:
    """two_pass would move a few elements at a time."""
    sample = {"samples": 32, "channels": 512, "pixels": pixels, "kernel_size": 5}
    sample |= {"dtype": "bfloat16", "backward": backward, "own_taps": False, "circular": False}
    sample |= {"channels_last": False, "in_place": False, "aligned": False}
    assert _C.plan(**sample, gpu=_C.gpu_by_name("sm_90"))["strategy"] == "stream"


def test_forced_plans_need_room_for_the_blocks_that_wait() -> None:
    """The blocks of a sample wait for each other, beside those of eight streams."""
    sample = {"samples": 4, "channels": 256, "pixels": 3136, "kernel_size": 5, "dtype": "bfloat16"}
    sample |= {"backward": False, "own_taps": False, "circular": False, "aligned": True}
    sample |= {"channels_last": True, "in_place": False}
    forced = {"strategy": "kept", "depth": 20}
    found = _C.plan(**sample, gpu=_C.gpu_by_name("sm_90:132"), forced=forced)
    needed = math.ceil(8 * found["parts"] / found["occupancy"])  # multiprocessors
    assert 1 < needed < 132
    _C.plan(**sample, gpu=_C.gpu_by_name(f"sm_90:{needed}"), forced=forced)
    with pytest.raises(ValueError, match="cannot run kept with"):
        _C.plan(**sample, gpu=_C.gpu_by_name(f"sm_90:{needed - 1}"), forced=forced)


# ---- plan() ----


def test_a_field_for_each_entry() -> None:
    entries = _C.plan(**problems(1)[0], gpu=_C.gpu_by_name("sm_90"))
    assert [field.name for field in dataclasses.fields(eca_fused.Plan)] == list(entries)
    documented = eca_fused.Plan.__doc__ or ""
    assert all(f" {name}: " in documented for name in entries)


def test_a_plan_says_what_moves() -> None:
    found = eca_fused.plan((32, 256, 56, 56), torch.bfloat16, backward=True)
    assert found.dram_ratio == found.dram_bytes / (3 * 2 * 32 * 256 * 56 * 56)
    assert found.l2_ratio == found.l2_bytes / found.map_bytes >= found.dram_ratio
    assert found.seconds(4e12) == found.dram_bytes / 4e12
    assert found.seconds(4e12, issue_rate=1e9) == found.instructions / 1e9 > found.seconds(4e12)
    with pytest.raises(dataclasses.FrozenInstanceError):
        found.tile = 1  # type: ignore[misc]
    empty = eca_fused.plan((2, 4, 0, 3))
    assert (empty.map_bytes, math.isnan(empty.dram_ratio), math.isnan(empty.l2_ratio)) == (
        (0, True, True)
    )
    for wrong in (0, -1.0, math.inf, math.nan):
        with pytest.raises(ValueError, match="bytes per second, finite and above 0, got"):
            found.seconds(wrong)
    for wrong in (0, -1.0, math.nan):
        with pytest.raises(ValueError, match="instructions per second, above 0, got"):
            found.seconds(4e12, issue_rate=wrong)


@pytest.mark.parametrize(
    "case",
    grid(dtype=DTYPES, layout=LAYOUTS, own_taps=[False, True], padding_mode=["zeros", "circular"]),
    ids=lambda c: "-".join(name_of(v) or str(v) for v in c.values()),
)
def test_arguments_reach_the_planner(case: dict[str, Any]) -> None:
    for backward in PASSES:
        found = eca_fused.plan(
            (3, 40, 9, 8),
            case["dtype"],
            FORMATS[case["layout"]],
            device="sm_80:20",
            backward=backward,
            kernel_size=7,
            own_taps=case["own_taps"],
            padding_mode=case["padding_mode"],
        )
        direct = _C.plan(
            backward=backward,
            dtype=name_of(case["dtype"]) or "",
            channels_last=case["layout"] == "channels_last",
            samples=3,
            channels=40,
            pixels=72,
            kernel_size=7,
            own_taps=case["own_taps"],
            circular=case["padding_mode"] == "circular",
            aligned=True,
            in_place=False,
            gpu=_C.gpu_by_name("sm_80:20"),
        )
        assert dataclasses.asdict(found) == direct


@pytest.mark.parametrize(
    ("shape", "memory_format", "channels_last"),
    [
        ((2, 8, 3, 3), torch.contiguous_format, False),
        ((2, 8, 3, 3), torch.channels_last, True),
        ((2, 8, 5), torch.channels_last, True),
        ((2, 8, 2, 3, 4), torch.channels_last_3d, True),
        ((2, 8, 1, 1), torch.contiguous_format, True),
        ((2, 8), torch.contiguous_format, True),
        ((2, 1, 3, 3), torch.channels_last, False),
        ((2, 1, 1, 1), torch.contiguous_format, True),
    ],
)
def test_layout_is_that_of_the_operators(
    monkeypatch: pytest.MonkeyPatch,
    shape: tuple[int, ...],
    memory_format: torch.memory_format,
    channels_last: bool,
) -> None:
    asked = []
    make = _C.plan
    monkeypatch.setattr(_C, "plan", lambda **given: asked.append(given) or make(**given))
    eca_fused.plan(shape, memory_format=memory_format)
    assert [given["channels_last"] for given in asked] == [channels_last]


def test_kernel_size_is_that_of_the_layer() -> None:
    shape = (4, 2048, 7, 7)
    assert eca_fused.plan(shape) == eca_fused.plan(shape, kernel_size=kernel_size(2048))
    assert eca_fused.plan(shape) != eca_fused.plan(shape, kernel_size=101)


def test_more_multiprocessors_get_more_blocks() -> None:
    few, many = (eca_fused.plan((1, 512, 28, 28), device=d) for d in ("sm_90:8", "sm_90:132"))
    assert few.blocks < many.blocks
    assert eca_fused.plan((1, 512, 28, 28), device="sm_90") == many


def test_shapes_are_sequences() -> None:
    x = torch.empty(2, 8, 3, 3)
    assert eca_fused.plan(x.shape) == eca_fused.plan([2, 8, 3, 3]) == eca_fused.plan((2, 8, 3, 3))


SHAPE = {"shape": (2, 8, 3, 3)}
ERRORS: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "no sequence": ({"shape": 5}, TypeError, r"expected shape as \(N, C, \*spatial\), got 5"),
    "floats": ({"shape": (2, 8.0)}, TypeError, r"of ints, got \(2, 8.0\)"),
    "bools": ({"shape": (True, 8)}, TypeError, "of ints"),
    "text": ({"shape": "256x56x56"}, TypeError, "of ints, got '256x56x56'"),
    "one dimension": ({"shape": (8,)}, ValueError, r"0 to 3 spatial dimensions, got \(8,\)"),
    "six dimensions": ({"shape": (2, 8, 1, 1, 1, 1)}, ValueError, "0 to 3 spatial dimensions"),
    "negative size": ({"shape": (2, 8, -1)}, ValueError, "from 0 up, got"),
    "no samples": ({"shape": (0, 8, 3)}, ValueError, "without samples or channels no kernel"),
    "no channels": ({"shape": (2, 0, 3)}, ValueError, "without samples or channels no kernel"),
    "too large": ({"shape": (2, 2**40, 3)}, ValueError, "at most 4 TiB.*use a smaller batch"),
    "far too large": ({"shape": (2**40, 2**40)}, ValueError, "at most 4 TiB"),
    "large taps": (SHAPE | {"kernel_size": 2**70 + 1}, ValueError, "at most 4 TiB"),
    "integers": (SHAPE | {"dtype": torch.int32}, TypeError, "or bfloat16, got torch.int32"),
    "dtype by name": (SHAPE | {"dtype": "float32"}, TypeError, "or bfloat16, got 'float32'"),
    "preserve_format": (
        SHAPE | {"memory_format": torch.preserve_format},
        ValueError,
        "contiguous_format or torch.channels_last, got torch.preserve_format",
    ),
    "format by name": (
        SHAPE | {"memory_format": "channels_last"},
        TypeError,
        "as a torch.memory_format, got 'channels_last'",
    ),
    "even k": (SHAPE | {"kernel_size": 4}, ValueError, "odd kernel_size from 1 up, got 4"),
    "k as float": (SHAPE | {"kernel_size": 3.0}, TypeError, "kernel_size as an int, got 3.0"),
    "padding": (SHAPE | {"padding_mode": "same"}, ValueError, "'zeros' or 'circular', got 'same'"),
    "wrapping twice": (
        SHAPE | {"padding_mode": "circular", "kernel_size": 19},
        ValueError,
        "k = 19 needs 9 channels or more, x has 8; use fewer",
    ),
    "device is a number": (SHAPE | {"device": 90}, TypeError, "as a str or torch.device, got 90"),
    "CPU": (SHAPE | {"device": "cpu"}, ValueError, "'sm_90' or 'sm_90:132'.*got 'cpu'"),
    "torch's CPU": (SHAPE | {"device": torch.device("cpu")}, ValueError, "got 'cpu'"),
    "a name": (SHAPE | {"device": "H200"}, ValueError, "'sm_90' or 'sm_90:132'.*got 'H200'"),
    "sign": (SHAPE | {"device": "sm_+90"}, ValueError, "got 'sm_\\+90'"),
    "suffix": (SHAPE | {"device": "sm_90a"}, ValueError, "got 'sm_90a'"),
    "no number": (SHAPE | {"device": "sm_90:"}, ValueError, "got 'sm_90:'"),
    "no multiprocessors": (SHAPE | {"device": "sm_90:0"}, ValueError, "got 'sm_90:0'"),
    "too many": (SHAPE | {"device": "sm_90:99999"}, ValueError, "got 'sm_90:99999'"),
    "too old": (SHAPE | {"device": "sm_61"}, ValueError, "got 'sm_61'; the kernels need .* 7.5"),
}  # fmt: skip


@pytest.mark.parametrize(("given", "error", "message"), ERRORS.values(), ids=ERRORS)
def test_errors(given: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        eca_fused.plan(**given)


@pytest.mark.parametrize("device", ["cuda", "cuda:1", torch.device("cuda", 1)], ids=str)
def test_a_device_of_this_machine(
    monkeypatch: pytest.MonkeyPatch, device: str | torch.device
) -> None:
    asked = []

    def gpu_of_device(index: int) -> Any:
        asked.append(index)
        return _C.gpu_by_name("sm_80:20")

    monkeypatch.setattr(native, "devices", frozenset({"cpu", "cuda"}))
    monkeypatch.setattr(native, "gpu_of_device", gpu_of_device)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    shape = (1, 256, 56, 56)
    assert eca_fused.plan(shape, device=device) == eca_fused.plan(shape, device="sm_80:20")
    assert asked == [0 if device == "cuda" else 1]
    with pytest.raises(RuntimeError, match=r"got 'cuda:2', and PyTorch finds only 2; name a GPU"):
        eca_fused.plan(shape, device="cuda:2")


def test_no_device_on_this_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    monkeypatch.setattr(native, "devices", frozenset({"cpu", "cuda"}))
    for device in ("cuda", "cuda:0"):
        with pytest.raises(RuntimeError, match=f"got '{device}', and PyTorch finds none; name"):
            eca_fused.plan((2, 8), device=device)
    monkeypatch.setattr(native, "devices", frozenset({"cpu"}))
    with pytest.raises(RuntimeError, match="this build of the extension lacks; name the GPU"):
        eca_fused.plan((2, 8), device="cuda")


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_the_device_of_this_machine_is_known() -> None:
    if "cuda" not in native.devices:
        pytest.skip("needs an extension with CUDA kernels")
    limits, properties = planning.gpu_limits("cuda"), torch.cuda.get_device_properties()
    assert limits["multiprocessors"] == properties.multi_processor_count
    assert limits["capability"] == 10 * properties.major + properties.minor


def test_without_the_planner(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "eca_fused._C", None)
    message = "plans need the compiled planner, eca_fused._C, which does not load"
    with pytest.raises(RuntimeError, match=rf"{message} .*; build it for this Python"):
        eca_fused.plan((2, 8))
    assert main(["plan"]) == plan_command.PLANNER_MISSING
    assert f"error: {message}" in capsys.readouterr().err


# ---- the command ----


def printed(capsys: pytest.CaptureFixture[str], *argv: str) -> str:
    assert main(["plan", *argv]) == 0
    out, err = capsys.readouterr()
    assert err == ""
    return str(out)


def test_command_prints_every_layer(capsys: pytest.CaptureFixture[str]) -> None:
    lines = printed(capsys).splitlines()
    assert max(map(len, lines)) <= 120
    assert lines[0].startswith("Modelled plans of the CUDA kernels: sm_90, 132 multiprocessors")
    assert "batch 32, bfloat16" in lines[0]
    assert any("4800 GB/s, assumed: datasheet of H200; a floor" in line for line in lines)
    shapes = [s for _, shapes in plan_command.MODELS.values() for s in shapes]
    assert len(set(shapes)) == 22
    assert set(RESNET50) < set(shapes)
    for shape in shapes:
        mine = [line.split() for line in lines if line.startswith("x".join(map(str, shape)) + " ")]
        assert [row[2:4] for row in mine] == [
            [layout, pass_] for layout in ("NCHW", "NHWC") for pass_ in ("forward", "backward")
        ]
        assert {row[1] for row in mine} == {str(kernel_size(shape[0]))}
    for title, _ in plan_command.MODELS.values():
        assert title in lines
    assert lines[-1].startswith("2048x1x1")


def test_command_prints_the_plan(capsys: pytest.CaptureFixture[str]) -> None:
    argv = ["--shape", "256x56x56", "--layout", "channels_last", "--pass", "backward"]
    argv += ["--device", "sm_80:50", "--batch", "4", "--dtype", "float32", "--bandwidth", "1500"]
    lines = printed(capsys, *argv).splitlines()
    found = eca_fused.plan(
        (4, 256, 56, 56), torch.float32, torch.channels_last, device="sm_80:50", backward=True
    )
    x_bytes = 4 * 4 * 256 * 56 * 56
    strategy = [found.strategy] + ([f"x{found.launches}"] if found.launches > 2 else [])
    assert lines[-1].split() == [
        *("256x56x56", "5", "NHWC", "backward", *strategy),
        *(str(found.tile), str(found.halo), str(found.threads), str(found.blocks)),
        *(f"{found.shared_bytes / 1024:.1f}", str(found.occupancy)),
        *(f"{found.dram_bytes / x_bytes:.2f}", f"{found.l2_bytes / x_bytes:.2f}"),
        f"{found.instructions / (x_bytes / 512):.0f}",
        f"{1e6 * found.dram_bytes / 1.5e12:.3g}",
    ]
    assert lines[-2] == "Your shapes"
    assert any("DRAM bytes at 1500 GB/s; a floor" in line for line in lines)
    assert "assumed" not in "\n".join(lines)


def test_command_says_how_many_launches(capsys: pytest.CaptureFixture[str]) -> None:
    assert "two_pass x" in printed(capsys, "--device", "sm_80", "--shape", "64x2000x2000")


def test_command_selects(capsys: pytest.CaptureFixture[str]) -> None:
    found = printed(capsys, "--model", "resnet18", "extremes", "--pass", "forward")
    assert "ResNet-18" in found
    assert "ResNet-50" not in found
    assert "backward" not in found
    assert found.count("64x224x224") == 2
    both = printed(capsys, "--model", "resnet18", "--shape", "8", "8x9", "8x2x3x4")
    assert [line for line in both.splitlines() if line.startswith("8x2x3x4 ")]
    assert "512x7x7" in both


def test_command_as_json(capsys: pytest.CaptureFixture[str]) -> None:
    found = json.loads(printed(capsys, "--json", "--device", "sm_86"))
    assert found["modelled"] is True
    assert (found["device"], found["gpu"]["multiprocessors"]) == ("sm_86", 80)
    assert (found["bandwidth"], found["bandwidth_source"]) == (
        912e9,
        "assumed: datasheet of RTX 3080 Ti",
    )
    assert len(found["plans"]) == 4 * 22
    entries = {field.name for field in dataclasses.fields(eca_fused.Plan)}
    for row in found["plans"]:
        assert entries < set(row)
        plan = eca_fused.plan(
            row["shape"],
            torch.bfloat16,
            FORMATS[row["layout"]],
            device="sm_86",
            backward=row["pass"] == "backward",
            kernel_size=row["kernel_size"],
        )
        assert dataclasses.asdict(plan) == {name: row[name] for name in entries}
        # 80 multiprocessors issue 4 instructions in a cycle at 1.665 GHz, six tenths of them ours.
        by_instructions = row["instructions"] / (80 * 4 * 1.665e9 * 0.6)
        assert row["seconds"] == pytest.approx(max(row["dram_bytes"] / 912e9, by_instructions))
        assert row["instructions_per_512_bytes"] == row["instructions"] * 512 / row["x_bytes"]
        assert row["x_bytes"] == 2 * math.prod(row["shape"])
    slower = [row["seconds"] > row["dram_bytes"] / 912e9 for row in found["plans"]]
    assert any(slower)
    assert not all(slower)
    chosen = json.loads(printed(capsys, "--json", "--shape", "8x9", "--bandwidth", "100"))
    assert (chosen["bandwidth"], chosen["bandwidth_source"]) == (100e9, "argument")


@pytest.mark.parametrize(
    ("capability", "card"),
    [(75, "T4"), (87, "RTX 3080 Ti"), (90, "H200"), (103, "B200"), (121, "RTX 5090")],
)
def test_bandwidth_is_that_of_the_capability(capability: int, card: str) -> None:
    assert plan_command.datasheet(capability)[0] == card


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--device", "sm_61"], "--device: .*got 'sm_61'; the kernels need compute capability 7.5"),
        (["--device", "gpu"], "'sm_90' or 'sm_90:132'.*got 'gpu'"),
        (["--batch", "0"], "expected a whole number from 1 up, got '0'"),
        (["--batch", "many"], "expected a whole number from 1 up, got 'many'"),
        (["--dtype", "int8"], "invalid choice: 'int8'"),
        (["--layout", "NCHW"], "invalid choice: 'NCHW'"),
        (["--pass", "both"], "invalid choice: 'both'"),
        (["--model", "vgg"], "invalid choice: 'vgg'"),
        (["--bandwidth", "0"], "expected GB/s above 0, such as 4800, got '0'"),
        (["--bandwidth", "inf"], "expected GB/s above 0"),
        (["--bandwidth", "fast"], "expected GB/s above 0"),
        (["--shape", "256x"], "such as 256x56x56, got '256x'"),
        (["--shape", "0x56x56"], "such as 256x56x56, got '0x56x56'"),
        (["--shape", "8x1x1x1x1"], "0 to 3 spatial sizes"),
        (["--shape", "9999999x9999999"], "at most 4 TiB, more than any GPU holds"),
        (["--fast"], "unrecognized arguments: --fast"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_bad_options(argv: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["plan", *argv])
    assert ended.value.code == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert re.search(message, " ".join(err.split()))


def test_help(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["plan", "--help"])
    assert ended.value.code == 0
    out = " ".join(capsys.readouterr().out.split())
    assert "Everything is modelled" in out
    options = ("device", "batch", "dtype", "layout", "pass", "model", "shape", "bandwidth", "json")
    assert all(f"--{option}" in out for option in options)


def test_runs_as_a_program() -> None:
    run = subprocess.run(
        [sys.executable, "-m", "eca_fused", "plan", "--model", "extremes"],
        capture_output=True,
        text=True,
    )
    assert (run.returncode, run.stderr) == (0, "")
    assert run.stdout.splitlines()[-1].startswith("2048x1x1")
