"""The benchmark scripts: what they report follows from what they measured."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from support import needs_extension

import eca_fused

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / "benchmarks"))

import gpu_bench  # noqa: E402
import gpu_probe  # noqa: E402
import gpu_report  # noqa: E402
import gpu_timing  # noqa: E402
import harness  # noqa: E402
import microbench  # noqa: E402
import pretend_gpu  # noqa: E402
import report  # noqa: E402
import tune  # noqa: E402

RESULTS = sorted((ROOT / "benchmarks" / "results").glob("*.json"))


def test_there_are_results():
    assert RESULTS


@pytest.mark.parametrize("path", RESULTS, ids=lambda p: p.stem)
def test_the_readme_shows_the_figures_of_the_result_files(path):
    result = json.loads(path.read_text())
    readme = (ROOT / "README.md").read_text()
    for text in report.summary(result), report.host_table(result), report.goals(result):
        for line in text.splitlines():
            assert line in readme
    assert {"cpu", "threads", "torch", "commit", "malloc"} <= result["machine"].keys()


def test_goals_count_the_layers_that_reach_them():
    def times(**ratios):
        return {
            name: {"ms": {"median": 1}, "times_ours": {"median": r}} for name, r in ratios.items()
        }

    layer = {
        "forward": {"contenders": times(copy=0.9, eager=1.4, compile_a=1.7, compile_b=1.9)},
        "backward": {"contenders": times(eager=3.8, compile_a=1.5)},
    }
    host = {d: times(eager=5.0) for d in ("forward", "forward and backward")}
    lines = report.goals({"layers": [layer, layer], "host": host}).splitlines()
    assert [line.split("|")[2].strip() for line in lines[2:]] == [
        "2 of 2 layers", "0 of 2 layers", "2 of 2 layers", "2 of 2 layers", "0 of 2 layers",
        "reached", "reached",
    ]  # fmt: skip
    assert "0.20" in lines[-1]


def test_steps_are_interleaved_and_the_first_rounds_do_not_count():
    order = []

    def step(name):
        return (lambda: order.append("prepare"), lambda _: order.append(name))

    seconds = harness.interleaved({"a": step("a"), "b": step("b")}, rounds=3, repeat=2)
    assert order == ["prepare", "a", "a", "prepare", "b", "b"] * 5
    assert {name: len(values) for name, values in seconds.items()} == {"a": 3, "b": 3}


def test_statistics():
    values = [5.0, 1.0, 3.0, 2.0, 4.0, 100.0]
    assert harness.statistics_of(values) == {"median": 3.5, "p20": 2.0, "p80": 5.0, "samples": 6}


def test_ratios_are_taken_round_by_round():
    # The machine was ten times slower in one of the rounds: that must not show in a ratio.
    times = harness.summarise({"native": [1.0, 10.0, 1.0], "copy": [2.0, 20.0, 2.0]})
    assert times["copy"]["times_ours"] == {"median": 2.0, "p20": 2.0, "p80": 2.0, "samples": 3}
    assert times["copy"]["ms"]["median"] == 2000.0


@needs_extension
def test_a_wrong_contender_is_reported_and_not_timed(monkeypatch):
    wrong = {
        "native": eca_fused.eca,
        "eager": microbench.plain,
        "compile wrong": lambda x, w: eca_fused.eca(x, w) * 1.01,
        "compile broken": lambda x, w: (_ for _ in ()).throw(RuntimeError("no compiler")),
        "compile": microbench.shifted,
    }
    monkeypatch.setattr(microbench, "contenders", lambda: wrong)
    row = microbench.measure((2, 8, 4, 4), 3, torch.float32, "channels_last", rounds=1)
    failed = " ".join(row["failed"])
    assert len(row["failed"]) == 2
    assert "compile wrong: y has relative error 0.01" in failed
    assert "compile broken: RuntimeError: no compiler" in failed
    assert set(row["forward"]["contenders"]) == {
        "copy", "native", "eager", "compile", "native in place",
    }  # fmt: skip
    assert row["backward"]["ideal_bytes"] == 3 * 2 * 8 * 4 * 4 * 4


def test_a_wrong_gradient_is_reported(monkeypatch):
    class Half(torch.autograd.Function):
        @staticmethod
        def forward(ctx, y):
            return y.clone()

        @staticmethod
        def backward(ctx, dy):
            return dy / 2

    layers = {
        "native": microbench.plain,
        "eager": microbench.plain,
        "compile": lambda x, w: Half.apply(microbench.plain(x, w)),
    }
    monkeypatch.setattr(microbench, "contenders", lambda: layers)
    monkeypatch.setattr(microbench.eca_fused, "eca_", lambda x, w: x)
    row = microbench.measure((2, 8, 4, 4), 3, torch.float32, "contiguous", rounds=1)
    assert len(row["failed"]) == 1
    assert "compile: dx has relative error 0.5" in row["failed"][0]


def test_the_form_for_compilation_is_the_same_function():
    x = torch.randn(2, 9, 4, 4, dtype=torch.float64)
    for k in (1, 3, 7):
        weight = torch.randn(1, 1, k, dtype=torch.float64)
        torch.testing.assert_close(microbench.shifted(x, weight), microbench.plain(x, weight))


def test_plot(tmp_path):
    pytest.importorskip("matplotlib", reason="needs matplotlib: pip install eca-fused[demo]")
    path = tmp_path / "plot.png"
    report.plot(json.loads(RESULTS[0].read_text()), path)
    assert path.read_bytes().startswith(b"\x89PNG")
    assert path.stat().st_size > 20_000


# ---- the benchmark of a GPU, on a GPU that is pretended ----

SMALL = [
    gpu_bench.Case((3, 8, 4, 4), 3, "bfloat16", "channels_last"),
    gpu_bench.Case((2, 16, 5, 5), 5, "float32", "contiguous"),
]


@needs_extension
def test_gpu_benchmark_writes_a_result_that_the_report_reads(monkeypatch, tmp_path, capsys):
    pretend_gpu.install(monkeypatch)
    monkeypatch.setattr(gpu_bench, "quick_cases", lambda: SMALL)
    monkeypatch.setenv("ECA_FUSED_COMMIT", "abc123")
    monkeypatch.setattr(harness, "commit", lambda: None)
    path = tmp_path / "bench.json"
    assert gpu_bench.main(["--quick", "--rounds", "3", "--output", str(path)]) == 0
    result = json.loads(path.read_text())
    assert result["left_out"] == []
    assert {"gpu", "torch", "cuda", "commit", "l2_bytes"} <= result["machine"].keys()
    assert result["machine"]["commit"] == "abc123"
    assert [case["shape"] for case in result["cases"]] == [[3, 8, 4, 4], [2, 16, 5, 5]]
    for case in result["cases"]:
        for direction, maps in (("forward", 2), ("backward", 3), ("forward and backward", 5)):
            row = case[direction]
            assert row["ideal_bytes"] == maps * case["map_bytes"]
            assert row["failed"] == []
            assert {"copy", "native", "eager"} <= row["contenders"].keys()
            for times in row["contenders"].values():
                assert times["us"]["samples"] == 3
                assert times["us"]["p20"] <= times["us"]["median"] <= times["us"]["p80"]
        assert case["forward"]["plan"]["strategy"] in "ABCD"
    assert {"native", "eager"} <= result["host"]["forward"].keys()
    capsys.readouterr()
    picture = tmp_path / "bench.png"
    pytest.importorskip("matplotlib", reason="needs matplotlib: pip install eca-fused[demo]")
    assert report.main([str(path), "--plot", str(picture)]) == 0
    text = capsys.readouterr().out
    assert "| 3x8x4x4 k=3 | bfloat16 | channels_last | backward |" in text
    assert "Measured on none, driver unknown" in text
    assert picture.read_bytes().startswith(b"\x89PNG")


@needs_extension
def test_gpu_benchmark_reports_a_wrong_contender_and_does_not_time_it(monkeypatch):
    pretend_gpu.install(monkeypatch)

    def wrong(taps):
        return {
            "native": gpu_bench.with_taps(gpu_bench.fused("native"), taps),
            "eager": gpu_bench.with_taps(lambda x, w: microbench.plain(x, w) * 1.1, taps),
            "broken": gpu_bench.with_taps(lambda x, w: x.nothing, taps),
        }

    monkeypatch.setattr(gpu_bench, "contenders", wrong)
    row = gpu_bench.measure(
        SMALL[0], gpu_bench.Clock(60, 0), l2=1, rounds=1, compile_=False, profile=False
    )
    failed = row["forward"]["failed"]
    assert [text.split(":")[0] for text in failed] == ["eager", "broken"]
    assert "y of input 0 has relative error 0.1" in failed[0]
    assert "AttributeError" in failed[1]
    assert set(row["forward"]["contenders"]) == {"copy", "native"}
    assert "dx of input 1" in row["backward"]["failed"][0]


def test_outputs_that_a_replay_does_not_write_are_found(monkeypatch):
    pretend_gpu.install(monkeypatch)
    inputs = gpu_bench.make_inputs(SMALL[1], 1)
    layer = gpu_bench.with_taps(microbench.plain, inputs.taps)
    recording = gpu_bench.record_forward(layer, inputs, None)
    allowed = gpu_bench.limits(SMALL[1], inputs)
    assert gpu_bench.faults(recording, "forward", inputs, allowed) == []
    monkeypatch.setattr(recording, "replay", lambda: None)
    assert "relative error nan" in gpu_bench.faults(recording, "forward", inputs, allowed)[0]


def test_the_maps_of_a_graph_are_larger_than_the_cache():
    for case in gpu_bench.usual_cases():
        calls = gpu_timing.rotation(2 * case.map_bytes, 60 << 20)
        assert calls >= 2
        assert calls * 2 * case.map_bytes >= 3 * (60 << 20) or calls == gpu_timing.LONGEST_ROTATION


def test_usual_cases_come_once_and_hold_what_is_compiled():
    cases = gpu_bench.usual_cases()
    assert len(set(cases)) == len(cases)
    assert set(gpu_bench.COMPILED) <= set(cases)
    assert set(cases) <= set(gpu_bench.all_cases())


def test_arguments_of_the_gpu_benchmark():
    chosen = gpu_bench.selected(gpu_bench.parse(["--dtype", "float16", "--batch", "32"]))
    assert {(case.dtype, case.shape[0]) for case in chosen} == {("float16", 32)}
    assert gpu_bench.parse(["--quick"]).compile_seconds == 0
    assert gpu_bench.parse(["--quick", "--compile-seconds", "9"]).compile_seconds == 9
    with pytest.raises(SystemExit):
        gpu_bench.parse(["--quick", "--full"])


def test_gpu_goals_follow_from_the_result():
    def times(share, **ratios):
        entry = {"us": {"median": 3.0}, "of_copy": {"median": share}, "gbps": 1}
        found = {"native": {**entry, "times_ours": {"median": 1.0}}}
        for i, (name, ratio) in enumerate(ratios.items()):
            us = {"median": 3.0 + i}
            found[name] = {**entry, "us": us, "times_ours": {"median": ratio}}
        return found

    def layer(size, shape, share):
        both = {"compile a": 1.2, "compile b": 1.5, "eager": 2.0}
        row = {"ideal_bytes": size, "contenders": times(share, **both), "failed": []}
        return {
            "shape": shape, "k": 3, "dtype": "bfloat16", "layout": "contiguous",
            "forward": row, "left_out": [],
        }  # fmt: skip

    result = {
        "cases": [
            layer(300 * 10**6, [256, 8, 56, 56], 0.98),
            layer(300 * 10**6, [256, 9, 56, 56], 0.90),
            layer(10**6, [1, 256, 56, 56], 0.5),
        ],
        "left_out": [],
    }
    lines = dict(line.split(" | ", 1) for line in gpu_report.goals(result).splitlines()[2:])
    assert lines["| forward, 256 MB and more: share of copy at least 0.97"].startswith("1 of 2")
    assert lines["| backward, 256 MB and more: share of copy at least 0.95"].startswith("not meas")
    # Of torch.compile's forms the faster one, which here is the first.
    assert "1.20 | 1.20" in lines["| forward, 256 MB and more: compile / ours at least 1.45"]
    assert lines["| forward, ResNet-50, batch 1: at most 4 us"].startswith("1 of 1")


# ---- tuning ----


@needs_extension
@pytest.mark.skipif("cuda" not in eca_fused.native.devices, reason="needs a build with CUDA")
def test_tuning_times_plans_and_marks_the_planners_choice(monkeypatch, tmp_path, capsys):
    pretend_gpu.install(monkeypatch)
    monkeypatch.setattr(tune, "gpu", gpu_bench.gpu)
    monkeypatch.setattr(tune, "GROUPS", (1, 2))
    path = tmp_path / "tune.json"
    arguments = ["--shape", "2", "32", "8", "8", "--taps", "5", "--rounds", "2"]
    assert tune.main([*arguments, "--output", str(path)]) == 0
    layers = json.loads(path.read_text())["layers"]
    assert [layer["direction"] for layer in layers] == ["forward", "backward"]
    for layer in layers:
        names = {row["name"] for row in layer["plans"]}
        assert {"copy", "planner", "two passes", "tile 8, group 2, 128 threads"} <= names
        times = [row["us"]["median"] for row in layer["plans"]]
        assert times == sorted(times)
    text = capsys.readouterr().out
    assert "* planner" in text
    assert "FAILED" not in text


@needs_extension
def test_candidates_of_the_tuner_need_no_gpu(monkeypatch, capsys):
    monkeypatch.setattr(gpu_bench, "gpu_limits", gpu_bench.gpu_limits)
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
    chosen = check("--dry-run", "out", "bench", "tests", cwd=tmp_path).stdout.splitlines()
    assert chosen == [f"DIR {tmp_path}/out", "would run bench", "would run tests"]
    usual = check("--dry-run", cwd=tmp_path).stdout.splitlines()[1:]
    assert usual == [f"would run {part}" for part in listed if part != "tune"]
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
