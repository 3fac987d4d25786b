"""The benchmark scripts: how times are taken, of whom, and what is written of them."""

import argparse
import contextlib
import gc
import itertools
import json
import re
import weakref

import cases
import checking
import cliffs
import contenders
import devices
import gpu_timing
import harness
import microbench
import network
import options
import overhead
import plots
import pytest
import report
import scaling
import tables
import torch
from helpers.cases import needs_extension

from eca_fused import ECALayer

pytestmark = pytest.mark.every_torch

CASE = cases.Case((3, 8, 4, 4), 3, "bfloat16", "channels_last")


@needs_extension
def test_large_maps_are_measured_one_contender_at_a_time(device, monkeypatch):
    seen = []

    def recorded(direction, inputs, running, *rest, **options):
        seen.append(sorted(running))
        return microbench.measure_direction(direction, inputs, running, *rest, **options)

    monkeypatch.setattr(scaling, "measure_direction", recorded)
    args = argparse.Namespace(compile=False, direction=["forward", "backward"], rounds=1)
    together = list(scaling.measure(CASE, "N", args, device))
    assert seen == 2 * [["eager", "native", "timm"]]
    monkeypatch.setattr(scaling, "ALONE", 1)
    seen.clear()
    apart = list(scaling.measure(CASE, "N", args, device))
    assert seen == 2 * [["native"], ["eager"], ["timm"]]
    for some, alone in zip(together, apart, strict=True):
        assert set(some["contenders"]) == set(alone["contenders"])
        assert alone["failed"] == []


# ---- how times are taken ----


def test_rounds_are_interleaved_in_any_order_and_the_first_do_not_count():
    order = []

    def sample(name):
        order.append(name)
        return float(len(order))

    found = harness.interleaved(sample, ["a", "b", "c"], rounds=40)
    rounds = ["".join(order[i : i + 3]) for i in range(0, len(order), 3)]
    assert len(rounds) == 40 + harness.WARM_UP_ROUNDS
    assert set(rounds) == {"abc", "acb", "bac", "bca", "cab", "cba"}
    counted = 3 * harness.WARM_UP_ROUNDS
    for name, values in found.items():
        assert values == [i + 1 for i in range(counted, len(order)) if order[i] == name]


def test_a_short_call_is_made_once_before_it_is_timed_and_keeps_its_output(monkeypatch):
    clock, alive, most = [0.0], [], []

    def call():
        clock[0] += 1 if len(seen) else 100  # the first one of a sample finds cold caches
        seen.append(clock[0])
        made = torch.zeros(1)
        alive.append(weakref.ref(made))
        most.append(sum(ref() is not None for ref in alive))
        return (made,)

    seen = []
    monkeypatch.setattr(devices.time, "perf_counter", lambda: clock[0])
    recording = devices.Direct([call])
    recording.forget()
    seen.clear(), alive.clear(), most.clear()
    assert recording.sample(5) == 1000.0
    assert most == [1, 1, 2, 2, 2, 2]
    seen.clear()
    assert recording.sample(1) == 100_000.0


def test_statistics():
    values = [5.0, 1.0, 3.0, 2.0, 4.0, 100.0]
    assert harness.statistics_of(values) == {"median": 3.5, "p20": 2.0, "p80": 5.0, "samples": 6}


def test_ratios_are_taken_round_by_round():
    # The machine was ten times slower in one of the rounds: that must not show in a ratio.
    found = harness.summarise({"native": [1.0, 10.0, 1.0], "copy": [2.0, 20.0, 2.0]}, 4000)
    assert found["copy"]["times_ours"] == {"median": 2.0, "p20": 2.0, "p80": 2.0, "samples": 3}
    assert found["native"]["of_copy"]["p80"] == 2.0
    assert found["native"]["gbps"] == 4.0


def test_what_comes_before_a_call_is_not_timed(monkeypatch):
    clock = [0.0]
    monkeypatch.setattr(devices.time, "perf_counter", lambda: clock[0])

    def passes(seconds):
        clock[0] += seconds
        return ()

    recording = devices.Direct([lambda: passes(2)], before=lambda: passes(100))
    assert recording.sample(3) == 2000.0
    assert devices.Direct([lambda: passes(2), lambda: passes(3)]).sample(4) == 5000.0


@pytest.mark.parametrize("direction", cases.DIRECTIONS)
def test_on_a_cpu_the_map_of_a_call_has_just_been_written(direction):
    device = devices.Cpu()
    inputs = contenders.make_inputs(CASE, device)
    first = inputs.xs[0].clone(), inputs.dys[0].clone()
    written = inputs.dys[0] if direction == "backward" else inputs.xs[0]
    layer = contenders.with_taps(contenders.plain, inputs.taps)
    recording = contenders.record(direction, layer, inputs, device)
    calls = recording.replay, recording.replay, lambda: recording.sample(2)
    versions = []
    for call in calls:
        versions.append(written._version)
        call()
    assert [later - earlier for earlier, later in itertools.pairwise(versions)] == [1, 1]
    assert written._version == versions[-1] + 3  # one call of this sample is not timed
    assert torch.equal(inputs.xs[0], first[0])
    assert torch.equal(inputs.dys[0], first[1])


def test_on_a_gpu_calls_rotate_among_maps_that_nothing_writes():
    device = devices.device_named("dry-run")
    inputs = contenders.make_inputs(CASE, device)
    assert len(inputs.xs) > 1
    assert device.writer(inputs.xs[0]) is None


def test_short_calls_are_repeated_and_long_ones_have_fewer_rounds():
    class Fixed(devices.Cpu):
        def sample(self, recording, replays):
            seen.append((recording.ms, replays))
            return recording.ms

    class Fake:
        calls = 1

        def __init__(self, ms):
            self.ms = ms

    seen = []
    found = harness.call_times(Fixed(), {"short": Fake(0.01), "long": Fake(400.0)}, rounds=25)
    assert {replays for ms, replays in seen[2:] if ms == 0.01} == {100}
    assert len(found["long"]) == Fixed.fewest_rounds
    assert found["short"][0] == 10.0
    # Who is repeated finds its maps in the caches, so if one is, then all are.
    assert {replays for ms, replays in seen[2:] if ms == 400.0} == {2}
    seen.clear()
    harness.call_times(Fixed(), {"less": Fake(1.1), "long": Fake(400.0)}, rounds=25)
    assert {replays for _, replays in seen} == {1}


def test_the_maps_of_a_graph_are_larger_than_the_cache():
    for case in cases.gpu_cases():
        calls = gpu_timing.rotation(2 * case.map_bytes, 60 << 20)
        assert calls >= 2
        assert calls * 2 * case.map_bytes >= 3 * (60 << 20) or calls == gpu_timing.LONGEST_ROTATION


def test_layers_come_once_and_the_full_grid_has_all():
    usual, whole = cases.gpu_cases(), cases.all_cases()
    assert len(set(usual)) == len(usual)
    assert len(set(whole)) == len(whole)
    for name in ("resnet50", "mobilenetv2"):
        for layer in cases.NETWORKS[name]:
            found = [c for c in whole if (*c.shape[1:], c.k) == layer]
            assert {(c.shape[0], c.dtype, c.layout) for c in found} == {
                (n, dtype, layout)
                for n in (1, 32, 256) for dtype in cases.DTYPES for layout in cases.LAYOUTS
            }  # fmt: skip


def test_options_choose_the_layers():
    cpu = devices.Cpu()

    def chosen(*argv):
        return microbench.selected(microbench.parse(list(argv)), cpu)

    assert chosen() == cases.cpu_cases()
    assert chosen("--shape", "2", "8", "4", "4", "--taps", "5", "--dtype", "float16") == [
        cases.Case((2, 8, 4, 4), 5, "float16", "contiguous")
    ]
    found = chosen("--layers", "mobilenetv2", "--batch", "1", "--layout", *cases.LAYOUTS)
    assert len(found) == 2 * len(cases.NETWORKS["mobilenetv2"])
    small = chosen("--full", "--dtype", "float32", "--largest-map", "1")
    assert small
    assert all(case.map_bytes <= 1e6 and case.dtype == "float32" for case in small)
    assert microbench.parse([]).seconds == microbench.DEFAULT_SECONDS
    assert microbench.parse(["--full"]).seconds == float("inf")
    for wrong in (["--full", "--shape", "1", "1", "1", "1"], ["--shape", "1", "1", "1", "0"]):
        with pytest.raises(SystemExit):
            microbench.parse(wrong)
    with pytest.raises(SystemExit):
        microbench.parse(["--shape", "1", "1", "1", "1", "--taps", "4"])


# ---- contenders ----


@pytest.fixture(params=["cpu", "dry-run"])
def device(request):
    return devices.device_named(request.param)


def does_not_compile(form, mode, taps):
    raise RuntimeError(f"no compiler for {form}")


def wrong_contenders(taps):
    def broken(x, w):
        raise RuntimeError("nothing works")

    class Half(torch.autograd.Function):
        @staticmethod
        def forward(ctx, y):
            return y.clone()

        @staticmethod
        def backward(ctx, dy):
            return dy / 2

    found = {
        "native": contenders.plain,
        "eager": lambda x, w: contenders.plain(x, w) * 1.1,
        "timm": broken,
        "compile": lambda x, w: Half.apply(contenders.plain(x, w)),
    }
    return {name: contenders.with_taps(layer, taps) for name, layer in found.items()}


@needs_extension
def test_a_wrong_contender_is_reported_and_not_timed(device, monkeypatch):
    inputs = contenders.make_inputs(CASE, device)
    judge = checking.Judge(inputs)
    running = wrong_contenders(inputs.taps)
    found = {
        direction: microbench.measure_direction(direction, inputs, running, judge, device, rounds=1)
        for direction in cases.DIRECTIONS
    }
    failed = {direction: " ".join(one["failed"]) for direction, one in found.items()}
    assert re.search(r"eager: y of input 0 has relative error 0\.(1|09\d),", failed["forward"])
    assert "timm: RuntimeError: nothing works" in failed["forward"]
    assert "compile:" not in failed["forward"]
    assert "compile: dx of input 0 has relative error 0.5" in failed["backward"]
    assert "dweight of input 0" in failed["forward and backward"]
    assert {"copy", "native", "compile"} <= set(found["forward"]["contenders"])
    assert set(found["backward"]["contenders"]) == {"copy", "native"}
    for direction, maps in zip(cases.DIRECTIONS, (2, 3, 5), strict=True):
        assert found[direction]["ideal_bytes"] == maps * 3 * 8 * 4 * 4 * 2


def test_a_graph_keeps_what_its_replays_read(monkeypatch):
    # What a backward pass saved is memory that only the captured calls refer to.
    class Stub:
        capture_begin = capture_end = replay = lambda self: None

    monkeypatch.setattr(torch.cuda, "CUDAGraph", Stub)
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: contextlib.nullcontext())
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    read = torch.ones(3)
    alive = weakref.ref(read)
    recording = gpu_timing.Recording([lambda read=read: (read + 1,)], None)
    del read
    gc.collect()
    assert alive() is not None
    del recording
    gc.collect()
    assert alive() is None


def test_outputs_that_a_call_does_not_write_are_found(monkeypatch):
    device = devices.device_named("dry-run")
    inputs = contenders.make_inputs(CASE, device)
    layer = contenders.with_taps(contenders.plain, inputs.taps)
    recording = contenders.record("forward", layer, inputs, device)
    judge = checking.Judge(inputs)
    assert judge.faults(recording, "forward") == []
    monkeypatch.setattr(recording, "replay", lambda: None)
    assert "relative error nan" in judge.faults(recording, "forward")[0]


@needs_extension
def test_contenders_that_write_into_existing_memory_are_right():
    device = devices.Cpu()
    inputs = contenders.make_inputs(CASE, device)
    judge = checking.Judge(inputs)
    found = contenders.record_existing_memory(inputs, device)
    assert set(found) == {"native in place", "native given", "eager given", "copy given"}
    for name, recording in found.items():
        assert bool(judge.faults(recording, "forward")) == (name == "copy given"), name


def test_the_form_for_compilation_is_the_same_function():
    x = torch.randn(2, 9, 4, 4, dtype=torch.float64)
    for k in (1, 3, 7):
        weight = torch.randn(1, 1, k, dtype=torch.float64)
        torch.testing.assert_close(contenders.shifted(x, weight), contenders.plain(x, weight))


# ---- the scripts, on a GPU that is pretended ----


@needs_extension
def test_a_layer_that_fails_half_way_keeps_what_was_measured(monkeypatch, tmp_path):
    def copy(direction, case, device):
        if direction == "backward":
            raise RuntimeError("out of memory")
        return contenders.record_copy(direction, case, device)

    monkeypatch.setattr(microbench, "record_copy", copy)
    path = tmp_path / "bench.json"
    arguments = ["--device", "dry-run", "--shape", "2", "4", "2", "2", "--rounds", "1"]
    arguments += ["--contender", "native", "--output", str(path)]
    assert microbench.main(arguments) == 1
    found = json.loads(path.read_text())
    assert [one["direction"] for one in found["rows"]] == ["forward"]
    assert found["left_out"] == ["bfloat16 contiguous 2x4x2x2 k=3: RuntimeError: out of memory"]


def test_a_picture_that_cannot_be_made_is_refused_before_anything_is_measured(monkeypatch):
    monkeypatch.setattr(options, "find_spec", lambda name: None)
    for script in (microbench, scaling):
        with pytest.raises(SystemExit, match="a picture needs matplotlib"):
            script.main(["--device", "dry-run", "--plot", "picture.png"])


@pytest.mark.parametrize("script", [microbench, network, scaling, overhead])
def test_a_result_that_cannot_be_written_is_refused_before_anything_is_measured(script, tmp_path):
    (tmp_path / "file").touch()
    for place, message in (
        (tmp_path, "expected a file to write, got the folder"),
        (tmp_path / "file" / "result.json", "cannot make the folder"),
    ):
        with pytest.raises(SystemExit, match=f"--output: {message}"):
            script.main(["--device", "dry-run", "--output", str(place)])
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


@pytest.mark.parametrize("script", [microbench, network, scaling])
def test_a_picture_of_an_unknown_kind_is_refused_before_anything_is_measured(script):
    pytest.importorskip("matplotlib", reason="draws with it: pip install matplotlib")
    with pytest.raises(SystemExit, match=r"ends in .*\.png.*, got picture.xyz"):
        script.main(["--device", "dry-run", "--plot", "picture.xyz"])


@pytest.mark.parametrize(
    ("script", "arguments", "message"),
    [
        (microbench, ["--seconds", "-1"], "expected a number from 0 up, got -1"),
        (microbench, ["--seconds", "nan"], "expected a number from 0 up, got nan"),
        (microbench, ["--taps", "5"], "--taps is for --shape, which is not given"),
        (microbench, ["--largest-map", "9"], "--largest-map is for --full"),
        (microbench, ["--shape", "1", "8", "4", "4", "--taps", "4"], "an odd number of --taps"),
        (microbench, ["--shape", "1", "8", "0", "4"], "expected a number from 1 up, got 0"),
        (microbench, ["--batch", "0"], "expected a number from 1 up, got 0"),
        (microbench, ["--compile-mode"], "expected at least one argument"),
        (network, ["--batch", "-1"], "expected a number from 1 up, got -1"),
        (network, ["--size", "0"], "expected a number from 1 up, got 0"),
        (overhead, ["--plot", "picture.png"], "unrecognized arguments: --plot"),
    ],
)
def test_options_that_make_no_sense(script, arguments, message, capsys):
    with pytest.raises(SystemExit) as done:
        script.main(["--device", "dry-run", *arguments])
    assert done.value.code == 2
    assert message in capsys.readouterr().err


def test_contenders_that_are_not_here_are_named_where_they_are_asked_for(monkeypatch, tmp_path):
    monkeypatch.setattr(contenders, "timm_module", lambda taps: None)
    path = tmp_path / "bench.json"
    arguments = ["--device", "dry-run", "--shape", "2", "4", "2", "2", "--rounds", "1"]
    asked = ["--contender", "eager", "eager", "timm", "triton", "--direction", "forward"]
    assert microbench.main([*arguments, *asked, "--output", str(path)]) == 0
    found = json.loads(path.read_text())
    assert [what.split(":")[0] for what in found["left_out"]] == ["triton", "timm"]
    assert found["options"]["contender"] == ["eager", "timm", "triton"]
    assert set(found["rows"][0]["contenders"]) == {"copy", "eager"}
    text = tables.for_terminal(found)
    assert "forward, eager" in text
    assert "timm.layers.eca cannot be imported" in text


@pytest.mark.parametrize("script", [network, overhead])
def test_what_was_measured_before_an_interruption_is_shown(script, monkeypatch, tmp_path, capsys):
    measure, calls = script.measure, []

    def measure_one(*args):
        calls.append(args)
        if len(calls) > 1:
            raise KeyboardInterrupt
        return measure(*args)

    monkeypatch.setattr(script, "measure", measure_one)
    path = tmp_path / "result.json"
    small = ["--network", "mobilenetv2", "--batch", "1", "--size", "32"]
    arguments = ["--device", "dry-run", "--rounds", "1", "--output", str(path)]
    assert script.main([*arguments, *(small if script is network else [])]) == 130
    assert len(json.loads(path.read_text())["rows"]) == 1
    assert "interrupted: what follows was not measured" in capsys.readouterr().out


@needs_extension
def test_the_microbenchmark_writes_a_result_that_the_report_reads(monkeypatch, tmp_path, capsys):
    small = [CASE, cases.Case((2, 16, 5, 5), 5, "float32", "contiguous")]
    monkeypatch.setattr(microbench, "gpu_cases", lambda: small)
    monkeypatch.setenv("ECA_FUSED_COMMIT", "abc123")
    monkeypatch.setattr(harness, "commit", lambda: None)
    path = tmp_path / "bench.json"
    arguments = ["--device", "dry-run", "--rounds", "3", "--compile-seconds", "0"]
    arguments += ["--direction", *cases.DIRECTIONS, "--output", str(path)]
    assert microbench.main(arguments) == 0
    found = json.loads(path.read_text())
    assert found["left_out"] == []
    assert found["machine"]["commit"] == "abc123"
    assert [one["direction"] for one in found["rows"]] == 2 * list(cases.DIRECTIONS)
    for one in found["rows"]:
        assert one["failed"] == []
        assert {"copy", "native", "eager"} <= one["contenders"].keys()
        for entry in one["contenders"].values():
            assert entry["us"]["samples"] == 3
            assert entry["us"]["p20"] <= entry["us"]["median"] <= entry["us"]["p80"]
    assert found["rows"][0]["plan"]["strategy"] in tables.LETTERS.values()
    assert "no time left for it" in found["rows"][0]["left_out"][0]
    assert "3x8x4x4 k=3 bfloat16 channels_last backward" in capsys.readouterr().out
    pytest.importorskip("matplotlib", reason="needs matplotlib: pip install eca-fused[demo]")
    picture = tmp_path / "bench.png"
    assert report.main([str(path), "--plot", str(picture)]) == 0
    text = capsys.readouterr().out
    assert "| 3x8x4x4 k=3 | bfloat16 | channels_last | backward |" in text
    assert "Measured on a dry run" in text
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert picture.stat().st_size > 5_000


@needs_extension
def test_the_microbenchmark_compiles_both_forms(capsys, tmp_path):
    path = tmp_path / "bench.json"
    shape = ["--shape", "2", "4", "2", "2", "--dtype", "float32"]
    arguments = [*shape, "--device", "dry-run", "--rounds", "1", "--output", str(path)]
    assert microbench.main(arguments) == 0
    found = json.loads(path.read_text())["rows"][0]
    assert found["left_out"] == []
    forms = {f"compile {form}, default" for form in contenders.FORMS}
    assert forms <= set(found["contenders"])


@needs_extension
def test_a_form_that_does_not_compile_has_failed(monkeypatch, capsys):
    monkeypatch.setattr(microbench, "compiled", does_not_compile)
    arguments = ["--device", "dry-run", "--shape", "2", "4", "2", "2", "--rounds", "1"]
    assert microbench.main([*arguments, "--contender", "eager", "compile"]) == 1
    printed = capsys.readouterr()
    assert "compile conv, default: RuntimeError: no compiler for conv" in printed.err
    # What was not asked for has not failed.
    row = next(line for line in printed.out.splitlines() if line.startswith("2x4x2x2 k=3"))
    assert "failed" not in row


@needs_extension
def test_maps_that_fit_the_cache_are_measured_in_it_too(tmp_path):
    path = tmp_path / "bench.json"
    arguments = ["--device", "dry-run", "--shape", "1", "2", "2", "2", "--rounds", "1"]
    arguments += ["--contender", "native", "eager", "--output", str(path)]
    assert microbench.main(arguments) == 0
    rows = json.loads(path.read_text())["rows"]
    assert [one["direction"] for one in rows] == ["forward", "backward", "warm forward"]
    assert set(rows[2]["contenders"]) == {"copy", "native", "eager"}


@needs_extension
def test_the_full_grid_names_the_layers_that_are_too_large(tmp_path):
    path = tmp_path / "bench.json"
    arguments = ["--device", "cpu", "--full", "--largest-map", "0.001", "--output", str(path)]
    assert microbench.main([*arguments, "--malloc", "default"]) == 0
    found = json.loads(path.read_text())
    assert found["rows"] == []
    assert len(found["left_out"]) == len(cases.all_cases())


@needs_extension
def test_a_failing_contender_shows_in_the_exit_status(monkeypatch, capsys):
    monkeypatch.setattr(microbench, "contenders", wrong_contenders)
    arguments = ["--device", "dry-run", "--shape", "2", "4", "2", "2", "--compile-seconds", "0"]
    assert microbench.main([*arguments, "--rounds", "1"]) == 1
    printed = capsys.readouterr()
    assert "FAILED 2x4x2x2 k=3 bfloat16 contiguous forward: eager: y of input 0" in printed.out
    assert "FAILED" in printed.err


@needs_extension
def test_the_time_limit_leaves_layers_out(tmp_path):
    path = tmp_path / "bench.json"
    arguments = ["--device", "dry-run", "--seconds", "0", "--layers", "resnet50"]
    assert microbench.main([*arguments, "--output", str(path)]) == 0
    found = json.loads(path.read_text())
    assert found["rows"] == []
    assert len(found["left_out"]) == len(cases.NETWORKS["resnet50"])


@needs_extension
def test_sizes_grow_from_one_pixel(tmp_path, capsys):
    path, picture = tmp_path / "scaling.json", tmp_path / "scaling.png"
    arguments = ["--device", "dry-run", "--rounds", "1", "--layout", "contiguous"]
    arguments += ["--axis", "S", "N", "--no-compile", "--output", str(path)]
    pytest.importorskip("matplotlib", reason="needs matplotlib: pip install eca-fused[demo]")
    more = ["--most-bytes", "500000", "--plot", str(picture)]
    assert scaling.main([*arguments, *more]) == 0
    found = json.loads(path.read_text())
    assert not [what for what in found["remarks"] if what.startswith("FAILED")]
    rows = found["rows"]
    shapes = {
        axis: [
            one["shape"] for one in rows if one["axis"] == axis and one["direction"] == "forward"
        ]
        for axis in "SN"
    }
    assert shapes["S"][:3] == [[8, 64, 1, 1], [8, 64, 2, 2], [8, 64, 3, 3]]
    assert shapes["N"] == [[1, 256, 14, 14], [2, 256, 14, 14]]
    assert all(one["contenders"]["native"]["ps_per_element"] > 0 for one in rows)
    assert report.main([str(path)]) == 0
    assert "| S | 8x64x1x1 k=5 | contiguous | forward | 0.00 |" in capsys.readouterr().out
    assert picture.read_bytes().startswith(b"\x89PNG")


SIZES = ["--device", "dry-run", "--rounds", "1", "--layout", "contiguous", "--axis", "S"]
SIZES += ["--direction", "forward", "--most-bytes", "20000", "--no-compile"]  # 1, 2 and 3 pixels


def size(side, native, copy, spread=0.05, again=None):
    """A row of an axis: times per element, of any unit."""
    us = {
        name: {"us": {"median": t, "p20": (1 - spread) * t, "p80": (1 + spread) * t}}
        for name, t in (("native", side * native), ("copy", side * copy))
    }
    row = {"shape": [8, 64, side, 1], "k": 5, "dtype": "float32", "layout": "contiguous"}
    row |= {"direction": "forward", "axis": "S", "ideal_bytes": side, "map_bytes": side}
    row |= {"contenders": us, "failed": []}
    if again:
        both = zip(("ours", "copy"), again, strict=True)
        row["again"] = {"native": {name: {"median": value} for name, value in both}}
    return row


@pytest.mark.parametrize(
    ("native", "copy", "spread", "again", "kind"),
    [
        (1.5, 1.0, 0.05, (1.4, 1.0), cliffs.CLIFF),
        (1.5, 1.0, 0.05, None, cliffs.UNMEASURED),
        (1.5, 1.4, 0.05, None, cliffs.WITH_COPY),
        (1.5, 1.0, 0.05, (1.4, 1.3), cliffs.WITH_COPY),
        # The copy's first step was noise.
        (1.5, 1.4, 0.05, (1.4, 1.0), cliffs.CLIFF),
        (1.5, 1.0, 0.05, (1.1, 0.8), cliffs.GONE),
        (1.5, 1.0, 0.3, None, cliffs.NOISE),
    ],
)
def test_steps_are_of_a_kind(native, copy, spread, again, kind):
    rows = [size(1, 1.0, 1.0, spread), size(2, native, copy, spread, again)]
    (step,) = cliffs.steps_of(rows)
    assert step.kind == kind
    named = kind not in cliffs.OTHERS
    assert (str(step) in cliffs.markdown({"rows": rows})) == named
    assert str(step).endswith(")" if named else f", {kind}")
    if again:
        assert f"again {again[0]:.2f}x (the copy {again[1]:.2f}x)" in str(step)


def test_cliffs_are_named_and_other_steps_counted():
    rows = [size(1, 1.0, 1.0), size(2, 1.5, 1.0, again=(1.6, 1.0)), size(3, 2.0, 1.4)]
    rows += [size(4, 2.8, 1.4, again=(1.0, 1.0)), size(5, 4.2, 2.0)]
    found = cliffs.markdown({"rows": rows}).splitlines()
    assert found == [
        "Cliffs (steps beyond 15 % and beyond 1.15 times the copy's own, seen again):",
        "",
        "- native, contiguous, forward, S grows: 1.50x per element from 8x64x1x1 k=5 to "
        "8x64x2x1 k=5 (the copy 1.00x), again 1.60x (the copy 1.00x)",
        "",
        "Other steps beyond 15 %, which the result file lists: 2 within 1.15 times the copy's, "
        "1 not seen again.",
    ]
    assert cliffs.markdown({"rows": rows[:1]}).endswith("seen again): none.")


def test_older_results_have_their_steps_among_the_remarks():
    rows = [size(1, 1.0, 1.0), size(2, 1.5, 1.0)]
    (line,) = scaling.steps(rows)
    place = {"device": "cpu", "dry_run": True}
    old = {"script": "scaling", "machine": place, "rows": rows, "remarks": ["FAILED x: y", line]}
    for row in rows:
        for entry in row["contenders"].values():
            entry["ps_per_element"] = 1.0
    text = report.markdown(old)
    assert text.count(line) == 1
    assert f"not measured again:\n\n- {line}" in text
    assert "- FAILED x: y" in text
    assert report.failures(old) == ["FAILED x: y"]


@pytest.fixture
def with_a_step(monkeypatch):
    """Sizes whose second takes three times the time per element; a list of what is timed again."""
    timed = []

    def measured(direction, inputs, running, *rest, **options):
        row = microbench.measure_direction(direction, inputs, running, *rest, **options)
        side = inputs.case.shape[-1]
        for name, entry in row["contenders"].items():
            each = (3 if side > 1 and name == "native" else 1) * side * side
            entry["us"] |= {"median": each, "p20": 0.95 * each, "p80": 1.05 * each}
        return row

    def timed_again(device, recordings, rounds):
        timed.append(list(recordings))
        return {name: [12.0 if name == "native 1" else 4.0] * rounds for name in recordings}

    monkeypatch.setattr(scaling, "measure_direction", measured)
    monkeypatch.setattr(scaling, "call_times", timed_again)
    return timed


@needs_extension
def test_a_step_is_measured_again(with_a_step, monkeypatch, tmp_path, capsys):
    path = tmp_path / "scaling.json"
    arguments = [*SIZES, "--output", str(path)]
    # The fourfold pixels in the same time: the copy is four times as fast, ours almost as fast.
    monkeypatch.setattr(cliffs, "STEP", 0.5)
    assert scaling.main(arguments) == 0
    found = json.loads(path.read_text())
    assert with_a_step[0] == ["native 0", "native 1", "copy 0", "copy 1"]
    again = found["rows"][1]["again"]["native"]
    assert (again["ours"]["median"], again["copy"]["median"]) == (0.75, 0.25)
    (line,) = [line for line in found["steps"] if "from 8x64x1x1 k=5" in line]
    assert line.endswith("3.00x per element from 8x64x1x1 k=5 to 8x64x2x2 k=5 (the copy 1.00x), "
                         "again 0.75x (the copy 0.25x)")  # fmt: skip
    assert f"seen again):\n\n- {line}" in capsys.readouterr().out
    with_a_step.clear()
    monkeypatch.setattr(scaling, "ALONE", 1)
    assert scaling.main(arguments) == 0
    assert with_a_step[:2] == [["native 0", "native 1"], ["copy 0", "copy 1"]]


@needs_extension
def test_steps_are_measured_again_within_a_time_limit(with_a_step, capsys):
    assert scaling.main([*SIZES, "--again-seconds", "0"]) == 0
    assert with_a_step == []
    assert "As large, but not measured again:\n\n- native" in capsys.readouterr().out


@needs_extension
def test_a_step_that_cannot_be_measured_again_is_a_failure(with_a_step, monkeypatch, capsys):
    def fails(*_):
        raise RuntimeError("out of memory")

    monkeypatch.setattr(scaling, "call_times", fails)
    assert scaling.main(SIZES) == 1
    text = capsys.readouterr().out
    assert "As large, but not measured again:" in text
    assert "- FAILED again: native, contiguous, forward, S grows: 3.00x" in text


@needs_extension
@pytest.mark.parametrize(("what", "rows"), [("measure_direction", 1), ("call_times", 3)])
def test_what_was_measured_before_an_interrupt_is_kept(
    with_a_step, monkeypatch, tmp_path, capsys, what, rows
):
    calls = itertools.count()
    measured = getattr(scaling, what)

    def interrupted(*args, **options):
        if next(calls) == (what == "measure_direction"):
            raise KeyboardInterrupt
        return measured(*args, **options)

    monkeypatch.setattr(scaling, what, interrupted)
    path = tmp_path / "scaling.json"
    assert scaling.main([*SIZES, "--output", str(path)]) == options.INTERRUPTED
    assert len(json.loads(path.read_text())["rows"]) == rows
    text = capsys.readouterr().out
    assert "| S | 8x64x1x1 k=5 | contiguous | forward |" in text
    assert "- interrupted: what follows was not measured" in text


@pytest.mark.parametrize("most", ["-1", "0", "nan", "200703"])
def test_a_size_that_holds_no_map_is_refused(most, capsys):
    with pytest.raises(SystemExit, match="2"):
        scaling.main(["--device", "dry-run", f"--most-bytes={most}"])
    assert "--most-bytes: the smallest map of axis N has 200704 bytes" in capsys.readouterr().err


@pytest.mark.parametrize("ends", [(0.2, 0.4), (0.2, 1.6), (2.1, 2.2), (0.002, 100)])
def test_labels_of_few_sizes_do_not_overlap(ends):
    pytest.importorskip("matplotlib", reason="needs matplotlib: pip install eca-fused[demo]")
    plt = plots.pyplot()
    figure, axes = plt.subplots(1, 2, figsize=(5.5, 2.9), squeeze=False)
    for axis in axes.flat:
        axis.plot(ends, ends)
        axis.set_xscale("log")
        axis.set_yscale("log")
        plots.readable(axis.xaxis)
        plots.readable(axis.yaxis)
    figure.canvas.draw()
    for axis, side in itertools.product(axes.flat, "xy"):
        one = getattr(axis, f"{side}axis")
        low, high = one.get_view_interval()
        labels = [
            tick.label1.get_window_extent()
            for tick in [*one.get_major_ticks(), *one.get_minor_ticks()]
            if tick.label1.get_text() and low <= tick.get_loc() <= high
        ]
        assert len(labels) >= 2
        assert not any(a.overlaps(b) for a, b in itertools.combinations(labels, 2))
    plt.close(figure)


@needs_extension
def test_sizes_are_compiled_too(tmp_path):
    path = tmp_path / "scaling.json"
    arguments = ["--device", "dry-run", "--rounds", "1", "--layout", "contiguous", "--axis", "C"]
    arguments += ["--direction", "forward", "--most-bytes", "30000", "--output", str(path)]
    assert scaling.main(arguments) == 0
    (one,) = json.loads(path.read_text())["rows"]
    assert {"copy", "native", "eager", "compile shifted"} <= one["contenders"].keys()


@needs_extension
def test_host_time_of_small_calls(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(overhead, "SHAPES", overhead.SHAPES[:1])
    path = tmp_path / "overhead.json"
    assert overhead.main(["--device", "dry-run", "--rounds", "2", "--output", str(path)]) == 0
    forward, both = json.loads(path.read_text())["rows"]
    assert {"native", "eager", "compile", "sigmoid", "native, graph"} <= set(forward["contenders"])
    assert {"native", "eager", "compile", "sigmoid"} <= set(both["contenders"])
    assert report.main([str(path)]) == 0
    assert "| 1x64x7x7, float32 | forward and backward |" in capsys.readouterr().out


@needs_extension
@needs_extension
def test_compiled_networks_run_the_kernels_by_name_too():
    found = network.built("mobilenetv2", devices.device_named("cpu"), "contiguous", "compiled")
    layers = {
        kind: {m.backend for m in net.modules() if isinstance(m, ECALayer)}
        for kind, net in found.items()
    }
    assert layers == {
        "none": set(), "plain ECA": {"auto"}, "fused ECA": {"auto"}, "native ECA": {"native"}
    }  # fmt: skip


def test_whole_networks(tmp_path, capsys):
    pytest.importorskip("matplotlib", reason="needs matplotlib: pip install eca-fused[demo]")
    path, picture = tmp_path / "network.json", tmp_path / "network.png"
    arguments = ["--device", "dry-run", "--rounds", "1", "--batch", "2", "--size", "32"]
    arguments += ["--layout", "channels_last", "--output", str(path), "--plot", str(picture)]
    assert network.main(arguments) == 0
    rows = json.loads(path.read_text())["rows"]
    assert [(one["network"], one["pass"]) for one in rows] == [
        (name, pass_) for name in network.NETWORKS for pass_ in network.PASSES
    ]
    for one in rows:
        assert set(one["contenders"]) == set(network.KINDS)
        assert 0 < one["difference"] < 1e-3
        memory = {kind: entry["peak_bytes"] for kind, entry in one["contenders"].items()}
        assert all(value > 0 for value in memory.values())
    assert report.main([str(path)]) == 0
    text = capsys.readouterr().out
    place = "| mobilenetv2 | 2x3x32x32 | float32 | channels_last | eager | training step |"
    assert f"{place} fused ECA |" in text
    assert picture.read_bytes().startswith(b"\x89PNG")
