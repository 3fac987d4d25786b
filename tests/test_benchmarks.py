"""The benchmark scripts: what they report follows from what they measured."""

import argparse
import contextlib
import gc
import itertools
import json
import os
import shutil
import subprocess
import sys
import weakref
from pathlib import Path

import pytest
import torch
from support import needs_extension

import eca_fused

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / "benchmarks"))

import again  # noqa: E402
import cases  # noqa: E402
import checking  # noqa: E402
import contenders  # noqa: E402
import devices  # noqa: E402
import gpu_probe  # noqa: E402
import gpu_timing  # noqa: E402
import harness  # noqa: E402
import microbench  # noqa: E402
import network  # noqa: E402
import overhead  # noqa: E402
import report  # noqa: E402
import scaling  # noqa: E402
import tables  # noqa: E402
import tune  # noqa: E402

RESULTS = report.committed()
CASE = cases.Case((3, 8, 4, 4), 3, "bfloat16", "channels_last")


def times(**ratios):
    """Contenders whose time in units of ours is given, with a spread of five percent."""

    def spread(value):
        return {"median": value, "p20": 0.95 * value, "p80": 1.05 * value}

    return {
        name.replace("_", " "): {
            "us": spread(10 * value),
            "gbps": 1.0,
            "of_copy": spread(ratios.get("copy", 1.0) / value),
            "times_ours": spread(value),
        }
        for name, value in ratios.items()
    }


def row(shape=(32, 256, 56, 56), k=3, direction="forward", ideal=10**6, **ratios):
    return {
        "shape": list(shape), "k": k, "dtype": "bfloat16", "layout": "contiguous",
        "direction": direction, "ideal_bytes": ideal, "failed": [],
        "contenders": times(native=1.0, **ratios),
    }  # fmt: skip


def result(*rows, device="cpu"):
    place = {"device": device, "dry_run": True}
    return {"script": "microbench", "machine": place, "rows": list(rows), "left_out": []}


# ---- the committed results, and the README ----


def test_there_are_results():
    assert RESULTS


@pytest.mark.parametrize("path", RESULTS, ids=lambda p: p.stem)
def test_a_result_says_where_it_was_measured(path):
    found = report.load(path)
    place = found["machine"]
    assert {"cpu", "threads", "torch", "commit", "malloc", "date"} <= place.keys()
    assert not place["dry_run"]
    assert not place["commit"].endswith("dirty")
    assert "-" not in place["commit"]
    assert all(entry["failed"] == [] for entry in found["rows"])


def test_no_layer_of_resnet50_and_mobilenetv2_is_slower_on_a_cpu():
    results = [report.load(path) for path in RESULTS]
    layers = [r for r in results if r["script"] == "microbench" and r["machine"]["device"] == "cpu"]
    whole = [r for r in layers if r["machine"]["malloc"] == "recycled"]
    assert whole
    names = {"resnet50", "mobilenetv2"}
    for found in whole:
        rows = [one for one in found["rows"] if names & {*tables.network_of(one)}]
        assert {name for one in rows for name in tables.network_of(one)} >= names
        assert {one["dtype"] for one in rows} == set(cases.DTYPES)
        assert tables.losses({**found, "rows": rows}) == []


@pytest.mark.parametrize("path", report.FIGURES, ids=lambda p: p.parent.name)
def test_the_figures_in_texts_are_those_of_the_results(path):
    text = path.read_text()
    assert report.renew(text, report.FIGURES[path]()) == text
    assert "share of copy" in text


# ---- what tables say ----


def test_names_are_listed_once():
    assert report.listed(["a", "b", "a", "c"]) == "a, b and c"
    assert report.listed(["a", "a"]) == "a"


def test_of_the_forms_of_torch_compile_the_fastest_counts():
    one = row(compile_a=1.7, compile_b=1.4, eager=2.0)
    assert tables.named(one, "compile") == "compile b"
    assert tables.ratio(one, "compile") == 1.4
    assert tables.ratio(one, "timm") is None


def test_goals_count_the_rows_that_reach_them():
    rows = [row(copy=0.9, eager=1.4, compile_a=1.7), row(copy=0.8, eager=1.6, compile_a=1.9)]
    rows.append(row(direction="backward", copy=0.9, eager=3.8, compile_a=1.5))
    lines = dict(line[2:].split(" | ", 1) for line in tables.goals(result(*rows)).splitlines()[2:])
    assert lines["forward: copy / ours at least 0.87"] == "1 of 2 | 0.80 | 0.90 |"
    assert lines["forward: eager / ours at least 1.50"] == "1 of 2 | 1.40 | 1.60 |"
    assert lines["forward: compile / ours at least 1.60"] == "2 of 2 | 1.70 | 1.90 |"
    assert lines["backward: compile / ours at least 1.60"] == "0 of 1 | 1.50 | 1.50 |"


def test_goals_on_a_gpu():
    rows = [
        row((256, 8, 56, 56), ideal=300 * 10**6, copy=0.98, eager=2.0),
        row((256, 9, 56, 56), ideal=300 * 10**6, copy=0.90, eager=1.3),
        row((1, 256, 56, 56), copy=0.5),
    ]
    text = tables.goals(result(*rows, device="cuda"))
    lines = dict(line[2:].split(" | ", 1) for line in text.splitlines()[2:])
    assert lines["forward, 256 MB and more: copy / ours at least 0.97"].startswith("1 of 2")
    assert lines["backward, 256 MB and more: copy / ours at least 0.95"].startswith("not meas")
    assert lines["forward, 256 MB and more: eager / ours at least 1.45"] == "1 of 2 | 1.30 | 2.00 |"
    # 10 us, where 4 are the goal.
    assert lines["forward, ResNet-50, batch 1: at most 4 us"] == "0 of 1 | 10.00 | 10.00 |"


def test_a_loss_is_one_beyond_the_spread():
    rows = [row(eager=0.97, copy=0.5), row(eager=2.0, compile_a=0.9, compile_b=1.2)]
    assert tables.losses(result(*rows)) == [
        "32x256x56x56 k=3 bfloat16 contiguous forward: compile a takes 0.90x our time"
    ]


def measured_again(*medians):
    """A row that is lost in its own process, after so many others."""
    one = row(compile_a=0.9)
    left = iter(medians)
    arguments = microbench.parse(["--again", str(len(medians)), "--device", "cpu"])
    again.measure_again(result(one), arguments, lambda _: row(compile_a=next(left)))
    return one


def test_a_loss_counts_if_other_processes_have_it_too():
    text = "32x256x56x56 k=3 bfloat16 contiguous forward: compile a takes 0.90x our time"
    lost = result(measured_again(0.99, 0.8, 1.2, 0.9, 0.7))
    assert tables.losses(lost) == [f"{text}, in other processes 0.70, 0.80, 0.90, 0.99, 1.20"]
    assert tables.unconfirmed(lost) == []
    assert "Where another is faster" in report.where_another_is_faster(lost)
    noise = result(measured_again(0.99, 0.8, 1.2, 1.0, 0.7))
    assert tables.losses(noise) == []
    assert tables.unconfirmed(noise) == [f"{text}, in other processes 0.70, 0.80, 0.99, 1.00, 1.20"]
    said = report.where_another_is_faster(noise)
    assert said.startswith("On none of the 1 rows another is faster in four of five rounds and")
    assert text in said


def test_what_cannot_be_measured_again_is_lost_and_shown():
    def fails(arguments):
        raise RuntimeError("exit status 1: no")

    one = result(row(eager=0.9))
    again.measure_again(one, microbench.parse(["--again", "5"]), fails)
    assert len(tables.losses(one)) == 1
    assert one["rows"][0]["failed"] == ["again: RuntimeError: exit status 1: no"]


@needs_extension
def test_a_row_is_measured_again_in_a_process_of_its_own():
    lost = row((1, 2, 3, 4), 5, "backward", eager=0.9, compile_conv=0.8)
    arguments = microbench.parse(["--again", "1", "--device", "dry-run", "--rounds", "2"])
    rivals = tables.faster_rivals(lost)
    found = again.run_microbench(again.command(lost, rivals, arguments))
    assert {name: found[name] for name in ("shape", "k", "dtype", "layout", "direction")} == {
        name: lost[name] for name in ("shape", "k", "dtype", "layout", "direction")
    }
    assert {"native", "eager", "compile conv, default"} <= found["contenders"].keys()
    assert "timm" not in found["contenders"]
    with pytest.raises(RuntimeError, match="exit status 2"):
        again.run_microbench(["--shape", "none"])


def test_the_summary_gives_the_range_over_the_layers_of_a_network():
    rows = [row(eager=1.5, copy=0.9), row((32, 512, 28, 28), 5, eager=1.25, copy=0.8)]
    lines = tables.summary(result(*rows)).splitlines()
    assert lines[2].startswith(
        "| resnet50 | 32 | bfloat16 | contiguous | forward | 2 | 0.80 to 0.90 | 1.25 to 1.50x | - |"
    )
    assert len(lines) == 3


def test_what_was_left_out_is_named_or_counted():
    one = result() | {"left_out": ["a: no time left", "b: no time left", "all that follows"]}
    assert tables.remarks(one) == ["left out, no time left: a, b", "left out: all that follows"]
    many = result() | {"left_out": [f"{i}: larger than 1 MB" for i in range(9)]}
    assert tables.remarks(many) == ["left out, larger than 1 MB: 9 layers"]
    late = [row((n, 8, 4, 4)) | {"left_out": ["compile conv: no time"]} for n in range(1, 10)]
    assert tables.remarks(result(*late)) == ["left out of 9 layers: compile conv: no time"]
    assert tables.remarks(result(late[0])) == [
        "left out of 1x8x4x4 k=3 bfloat16 contiguous: compile conv: no time"
    ]


def test_a_comparison_names_what_changed_beyond_the_spread(tmp_path, capsys):
    before = result(row(copy=0.9), row((1, 2, 3, 4), copy=0.8), row((5, 6, 7, 8), copy=0.5))
    after = result(row(copy=0.93), row((1, 2, 3, 4), copy=0.6), row((5, 6, 7, 8), copy=0.7))
    for name, what in (("a.json", before), ("b.json", after)):
        (tmp_path / name).write_text(json.dumps(what))
    paths = [str(tmp_path / name) for name in ("a.json", "b.json")]
    assert report.main(["--compare", *paths]) == 1
    text = capsys.readouterr().out
    assert "3 in both, 1 slower, 1 faster, 0 missing" in text
    assert "SLOWER 1x2x3x4 3 bfloat16 contiguous forward native: 1.33x the time" in text
    assert "faster 5x6x7x8 3 bfloat16 contiguous forward native: 0.71x the time" in text
    assert report.main(["--compare", paths[0], paths[0]]) == 0
    # A contender that is gone is worse than a slow one, and nothing in common is no comparison.
    (tmp_path / "b.json").write_text(json.dumps(result(row(copy=0.9), device="cuda")))
    assert report.main(["--compare", *paths]) == 1
    text = capsys.readouterr().out
    assert "MISSING 1x2x3x4 3 bfloat16 contiguous forward native" in text
    assert "measured with another device: cpu and cuda" in text
    (tmp_path / "b.json").write_text(json.dumps(result()))
    assert report.main(["--compare", *paths]) == 2


def test_the_report_says_what_is_no_result(tmp_path):
    path = tmp_path / "x.json"
    for text in ("", "[1", "5", '{"rows": []}', '{"script": 1, "rows": [], "machine": {}}'):
        path.write_text(text)
        with pytest.raises(SystemExit, match="is no result of these scripts"):
            report.main([str(path)])
    with pytest.raises(SystemExit, match="No such file"):
        report.main([str(tmp_path / "nothing.json")])


def grown(samples, direction="forward", low=0.95, high=1.05, **us):
    """A row of an axis: times in us, with their spread."""
    entries = {
        name: {"us": {"median": value, "p20": low * value, "p80": high * value}}
        for name, value in us.items()
    }
    return {**row((samples, 1, 1, 1), direction=direction, ideal=samples), "axis": "N",
            "contenders": entries}  # fmt: skip


def test_a_step_in_time_per_element_is_found():
    rows = [grown(1, native=100, copy=50), grown(2, native=220, copy=100)]
    rows += [grown(4, native=528, copy=200), grown(1, "backward", native=900, copy=60)]
    assert scaling.steps(rows) == [
        "native, contiguous, forward, N grows: 1.20x per element from 2x1x1x1 k=3 to "
        "4x1x1x1 k=3 (the copy 1.00x)"
    ]


def test_a_step_within_the_noise_is_called_so():
    wide = {"low": 0.7, "high": 1.3}
    (found,) = scaling.steps(
        [grown(1, native=100, copy=50), grown(2, native=240, copy=100, **wide)]
    )
    assert found.endswith("1.20x per element from 1x1x1x1 k=3 to 2x1x1x1 k=3 (the copy 1.00x), "
                          "within the noise")  # fmt: skip


def test_sizes_are_more_than_powers_of_two():
    shapes = [case.shape for case in scaling.sizes("C", "float32", "contiguous", 10e6)]
    channels = [1, 2, 3, 4, 6, 8, 11, 16, 23, 32, 45, 64, 91, 128, 181, 256, 362]
    assert shapes == [(8, c, 28, 28) for c in channels]
    sides = [case.shape[2:] for case in scaling.sizes("S", "float32", "contiguous", 1e5)]
    assert sides == [(1, 1), (2, 2), (3, 3), (4, 4), (6, 6)]


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
    assert {replays for ms, replays in seen if ms == 400.0} == {1}
    assert len(found["long"]) == Fixed.fewest_rounds
    assert found["short"][0] == 10.0


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
    assert "eager: y of input 0 has relative error 0.1" in failed["forward"]
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
    assert set(found) == {"native in place", "eager given", "copy given"}
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
    monkeypatch.setattr(harness, "find_spec", lambda name: None)
    for script in (microbench, scaling):
        with pytest.raises(SystemExit, match="a picture needs matplotlib"):
            script.main(["--device", "dry-run", "--plot", "picture.png"])


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
    assert found["rows"][0]["plan"]["strategy"] in "ABCD"
    assert "no time left for it" in found["rows"][0]["left_out"][0]
    assert "3x8x4x4 k=3 bfloat16 channels_last backward" in capsys.readouterr().out
    pytest.importorskip("matplotlib", reason="needs matplotlib: pip install eca-fused[demo]")
    picture = tmp_path / "bench.png"
    assert report.main([str(path), "--plot", str(picture)]) == 0
    text = capsys.readouterr().out
    assert "| 3x8x4x4 k=3 | bfloat16 | channels_last | backward |" in text
    assert "Measured on a dry run" in text
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert picture.stat().st_size > 20_000


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


# ---- tuning ----


@needs_extension
@pytest.mark.skipif("cuda" not in eca_fused.native.devices, reason="needs a build with CUDA")
def test_tuning_times_plans_and_marks_the_planners_choice(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(tune, "GROUPS", (1, 2))
    path = tmp_path / "tune.json"
    arguments = ["--shape", "2", "32", "8", "8", "--taps", "5", "--rounds", "2"]
    assert tune.main([*arguments, "--device", "dry-run", "--output", str(path)]) == 0
    layers = json.loads(path.read_text())["layers"]
    assert [layer["direction"] for layer in layers] == ["forward", "backward"]
    for layer in layers:
        names = {one["name"] for one in layer["plans"]}
        assert {"copy", "planner", "two passes", "tile 8, group 2, 128 threads"} <= names
        times = [one["us"]["median"] for one in layer["plans"]]
        assert times == sorted(times)
    text = capsys.readouterr().out
    assert "* planner" in text
    assert "FAILED" not in text


@needs_extension
def test_candidates_of_the_tuner_need_no_gpu(capsys):
    assert tune.main(["--list", "--gpu", "sm_90:132", "--shape", "8", "64", "14", "14"]) == 0
    text = capsys.readouterr().out
    assert "bfloat16 contiguous 8x64x14x14 k=3 forward" in text
    assert "two passes" in text


# ---- what a profiler saw ----


def test_bytes_of_each_call_from_the_output_of_ncu():
    plan = {"strategy": "C", "group": 1, "launches": 2, "dram_bytes": 4e6}
    call = {"shape": [1, 2, 3, 4], "layout": "contiguous", "direction": "forward"}
    calls = [{**call, "plan": plan, "ideal": 4e6}]
    head = '"ID","Kernel Name","Metric Name","Metric Unit","Metric Value"'
    rows = [
        f'"{i}","k{i}","{name}","byte","{value}"'
        for i in (0, 1)
        for name, value in ((gpu_probe.READ, "1,500,000"), (gpu_probe.WRITTEN, "1000000"))
    ]
    seen = gpu_probe.kernels(["==PROF== Connected", head, *rows])
    assert [kernel[gpu_probe.READ] for kernel in seen] == [1.5e6, 1.5e6]
    assert "3.0, 2.0, 4.0, 4.0; 1.250" in gpu_probe.traffic(calls, seen)
    assert "expected 2 kernels, saw 1" in gpu_probe.traffic(calls, seen[:1])
    raw = [f'"ID","Kernel Name","{gpu_probe.READ}","{gpu_probe.WRITTEN}"', '"","","byte","byte"']
    assert gpu_probe.kernels([*raw, '"0","k","7","8"'])[0][gpu_probe.WRITTEN] == 8
    assert gpu_probe.kernels(["==ERROR== ERR_NVGPUCTRPERM"]) == []


# ---- gpu_check.sh ----

CHECK = ROOT / "benchmarks" / "gpu_check.sh"

# Stands for a Python with a GPU. A test named in $FAIL fails.
STUB = r"""#!/usr/bin/env bash
case "$*" in
  *get_device_name*) echo 'Pretend GPU 1' ;;
  *get_device_capability*) echo 9.0 ;;
  *device_count*) echo 1 ;;
  *eca_fused.native*) exit 0 ;;
  *find_spec*) exit 1 ;;
  *-m\ pytest*)
    if [ -n "${FAIL:-}" ] && [[ "$*" == *"$FAIL"* ]]; then
      echo 'FAILED tests/test_cuda.py::test_x - wrong'
      echo '1 failed, 2 passed in 0.10s'
      exit 1
    fi
    echo '3 passed in 0.10s' ;;
  *triton*) echo 'not usable: no Triton'; exit 1 ;;
  -\ *) shift; exec REAL - "$@" ;;
  *) echo "stub $*" ;;
esac
"""


def check(*arguments, cwd=ROOT, **env):
    return subprocess.run(
        [str(CHECK), *map(str, arguments)],
        cwd=cwd, env={**os.environ, **env}, capture_output=True, text=True, timeout=100,
    )  # fmt: skip


needs_bash = pytest.mark.skipif(not shutil.which("bash"), reason="needs bash")


@needs_bash
def test_parts_of_the_gpu_check(tmp_path):
    listed = check("--list").stdout.split()
    assert listed[0] == "build"
    assert {"tests", "sanitizer", "determinism", "graphs", "profile", "bench", "tune"} <= {*listed}
    assert listed[-3:] == ["networks", "sizes", "calls"]
    chosen = check("--dry-run", "out", "bench", "tests", cwd=tmp_path).stdout.splitlines()
    assert chosen == [f"DIR {tmp_path}/out", "would run bench", "would run tests"]
    usual = check("--dry-run", cwd=tmp_path).stdout.splitlines()[1:]
    asked = ("tune", "networks", "sizes", "calls", "compile")
    assert usual == [f"would run {part}" for part in listed if part not in asked]
    for wrong in (["out", "nonsense"], ["--nonsense"]):
        done = check(*wrong)
        assert done.returncode == 2
        assert "nonsense" in done.stderr
    assert "summary.json" in check("--help").stdout


@needs_bash
@pytest.mark.parametrize("fail", ["", "same_bits"])
def test_a_part_of_the_gpu_check_that_fails_does_not_hide_the_next(tmp_path, fail):
    stub = tmp_path / "python"
    stub.write_text(STUB.replace("REAL", sys.executable))
    stub.chmod(0o755)
    out = tmp_path / "out"
    parts = ["build", "tests", "determinism", "graphs", "devices", "triton", "sanitizer"]
    done = check(out, *parts, cwd=tmp_path, PYTHON=str(stub), FAIL=fail, PATH="/usr/bin:/bin")
    assert done.returncode == (1 if fail else 0), done.stdout + done.stderr
    summary = json.loads((out / "summary.json").read_text())
    assert summary["gpu"] == "Pretend GPU 1"
    verdicts = {part["part"]: part["verdict"] for part in summary["parts"]}
    assert list(verdicts) == parts
    assert verdicts["tests"] == "ok: 3 passed in 0.10s"
    assert verdicts["graphs"].startswith("ok")
    assert verdicts["devices"] == "not available: needs two GPUs, there is 1"
    assert verdicts["triton"].startswith("not available: not usable: no Triton")
    assert verdicts["sanitizer"].startswith("not available: no compute-sanitizer")
    assert verdicts["determinism"].startswith("FAILED: 1 failed, 2 passed" if fail else "ok")
    table = done.stdout.splitlines()[-len(parts) :]
    assert [line.split()[0] for line in table] == parts
    assert ("test_x - wrong" in done.stdout) == bool(fail)
    log = (out / "log.txt").read_text()
    assert all(f"######## {part}" in log for part in parts)
    assert sorted(path.name for path in out.iterdir()) == ["log.txt", "summary.json"]


@needs_bash
def test_the_gpu_check_says_that_there_is_no_gpu(tmp_path):
    done = check("out", "tests", cwd=tmp_path, CUDA_VISIBLE_DEVICES="", PYTHON=sys.executable)
    assert done.returncode == 2
    assert "no GPU" in done.stderr
    assert not (tmp_path / "out").exists()


@pytest.mark.skipif(not shutil.which("shellcheck"), reason="needs shellcheck")
def test_the_gpu_check_passes_shellcheck():
    done = subprocess.run(["shellcheck", str(CHECK)], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout
