"""The GPU scripts without a GPU: the tuner, the output of a profiler, and gpu_check.py."""

import json
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest

import eca_fused
import gpu_check
import tune
from helpers.cases import needs_extension
from helpers.processes import ROOT, run_tests
from lib import gpu_probe, plans
from lib.cases import Case

pytestmark = pytest.mark.every_torch

# ---- tuning ----


@needs_extension
@pytest.mark.skipif("cuda" not in eca_fused.ops.native.devices, reason="needs a build with CUDA")
def test_tuning_times_plans_and_marks_the_planners_choice(tmp_path, capsys):
    path = tmp_path / "tune.json"
    arguments = ["--shape", "2", "32", "8", "8", "--taps", "5", "--rounds", "2"]
    assert tune.main([*arguments, "--device", "dry-run", "--output", str(path)]) == 0
    layers = json.loads(path.read_text())["layers"]
    assert [layer["direction"] for layer in layers] == ["forward", "backward"]
    for layer in layers:
        names = {one["name"] for one in layer["plans"]}
        assert {"copy", "planner", "two_pass", "rows 7, tile 16, 128 threads"} <= names
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
    assert "two_pass" in text


# ---- what a profiler saw ----

COUNTED = ("us", "read", "written", "instructions")


def rows_of_ncu(kernels: int, values: dict[str, str]) -> list[str]:
    """The output of Nsight Compute, a line for each counter."""
    head = '"ID","Kernel Name","Metric Name","Metric Unit","Metric Value"'
    rows = [
        f'"{i}","k{i}","{gpu_probe.COUNTERS[name]}","byte","{value}"'
        for i in range(kernels)
        for name, value in values.items()
    ]
    return ["==PROF== Connected", head, *rows]


def test_counters_of_each_call_from_the_output_of_ncu(tmp_path, capsys):
    plan = {"strategy": "two_pass", "launches": 2}
    call = {"shape": [1, 2, 16, 16], "k": 3, "dtype": "float32", "layout": "contiguous"}
    calls = [{**call, "direction": "forward", "plan": plan, "ideal": 4e6}]
    values = {"read": "1,500,000", "written": "1000000", "us": "2,000", "instructions": "40"}
    lines = rows_of_ncu(2, {**values, "stall long": "n/a"})
    seen = gpu_probe.kernels(lines)
    assert [kernel["read"] for kernel in seen] == [1.5e6, 1.5e6]
    assert seen[0]["us"] == 2  # from nanoseconds
    assert "stall long" not in seen[0]
    (tmp_path / "calls.json").write_text(json.dumps(calls))
    (tmp_path / "ncu.csv").write_text("\n".join(lines))
    files = [str(tmp_path / name) for name in ("calls.json", "ncu.csv", "counters.json")]
    assert gpu_probe.main(["read", *files]) == 0
    # 5 MB of 4 ideal; 80 instructions for four times 512 bytes of x.
    assert "| two_pass | 4.0 | 1.250 | 20 |" in capsys.readouterr().out
    (found,) = json.loads((tmp_path / "counters.json").read_text())
    assert len(found["kernels"]) == 2
    (tmp_path / "ncu.csv").write_text("\n".join(rows_of_ncu(1, values)))
    assert gpu_probe.main(["read", *files]) == 1
    assert "expected 2 kernels, saw 1" in capsys.readouterr().out
    (tmp_path / "ncu.csv").write_text("==ERROR== ERR_NVGPUCTRPERM")
    assert gpu_probe.main(["read", *files]) == 3
    raw = [f'"ID","Kernel Name","{gpu_probe.COUNTERS["read"]}","{gpu_probe.COUNTERS["written"]}"']
    assert gpu_probe.kernels([*raw, '"","","byte","byte"', '"0","k","7","8"'])[0]["written"] == 8


# ---- gpu_check.py ----

CHECK = ROOT / "benchmarks" / "gpu_check.py"
MOST_FILES = 8  # that a run leaves in its folder


def say(text: str, status: int = 0) -> list[str]:
    return [sys.executable, "-c", f"print({text!r}); raise SystemExit({status})"]


def part(command: list[str], verdict=gpu_check.last_line, limit: float = 60) -> gpu_check.Part:
    return gpu_check.Part(limit, command, command, verdict)


def summary(folder: Path) -> dict[str, str]:
    found = json.loads((folder / "summary.json").read_text())
    return {name: entry["verdict"] for name, entry in found.items()}


@pytest.mark.parametrize(
    ("verdict", "status", "lines", "wanted"),
    [
        (gpu_check.last_line, 0, ["a", "b", ""], "ok: b"),
        (gpu_check.last_line, 3, [], "FAILED: status 3: no output"),
        (gpu_check.of_pytest, 0, ["== 3 passed, 1 skipped in 0.1s =="], "ok: 3 passed, 1 skipped"),
        (gpu_check.of_pytest, 1, ["1 failed, 2 passed in 9.10s"], "FAILED: 1 failed, 2 passed"),
        (gpu_check.of_pytest, 5, ["9 deselected in 0.1s"], "FAILED: no test was selected"),
        (gpu_check.of_sanitizer, 0, ["== ERROR SUMMARY: 0 errors"], "ok: ERROR SUMMARY: 0 errors"),
        (gpu_check.of_sanitizer, 9, ["== ERROR SUMMARY: 2 errors"], "FAILED: status 9: ERROR"),
        (gpu_check.of_sanitizer, 0, ["34 calls, 0 wrong"], "FAILED: the sanitizer did not say"),
        (gpu_check.of_sanitizer, 1, ["== Device not supported"], "not available: Device not supp"),
        (gpu_check.of_rows, 0, ["fine"], "ok"),
        (gpu_check.of_rows, 0, ["FAILED x: y"], "FAILED: status 0; 1 faults; FAILED x: y"),
        (gpu_check.of_rows, 1, ["x"], "FAILED: status 1"),
    ],
)
def test_verdicts(verdict, status, lines, wanted):
    assert verdict(status, lines).startswith(wanted)


def test_a_part_that_fails_or_is_not_there_does_not_hide_the_next(tmp_path):
    run = gpu_check.Run(tmp_path, dry=False, seconds=60)
    run.run("wrong", part(say("no", 1)))
    run.run("absent", part([str(tmp_path / "no such tool")]))
    run.run("right", part(say("yes")))
    verdicts = summary(tmp_path)
    assert verdicts["wrong"] == "FAILED: status 1: no"
    assert verdicts["absent"].startswith("not available: ")
    assert verdicts["right"] == "ok: yes"
    log = (tmp_path / "log.txt").read_text()
    assert "wrong| no" in log
    assert "right| yes" in log
    assert gpu_check.show(run) == 1


def test_a_part_that_takes_too_long_is_stopped_with_its_children(tmp_path):
    run = gpu_check.Run(tmp_path, dry=False, seconds=60)
    code = "import subprocess, sys; print('begun', flush=True); subprocess.run(['sleep', '60'])"
    began = time.monotonic()
    run.run("slow", part([sys.executable, "-c", code], limit=6))
    assert time.monotonic() - began < 40
    assert summary(tmp_path)["slow"].startswith("FAILED: not done in 6 s; begun")


def test_what_has_been_seen_is_on_disk_while_a_part_runs(tmp_path):
    """A run may be killed at any time: the log and the verdicts must be there."""
    code = "import time; print('half', flush=True); time.sleep(60)"
    command = [
        sys.executable, "-c",
        "import sys; sys.path[:0] = [sys.argv[1]]\n"
        "import gpu_check as g; from pathlib import Path\n"
        "run = g.Run(Path(sys.argv[2]), False, 100)\n"
        "run.run('done', g.Part(60, [sys.executable, '-c', 'print(1)'], [], g.last_line))\n"
        "run.run('half', g.Part(60, [sys.executable, '-c', sys.argv[3]], [], g.last_line))",
        str(ROOT / "benchmarks"), str(tmp_path), code,
    ]  # fmt: skip
    child = subprocess.Popen(command)
    try:
        end = time.monotonic() + 50
        while (
            "half| half" not in (tmp_path / "log.txt").read_text()
            if (tmp_path / "log.txt").exists()
            else True
        ):
            assert time.monotonic() < end
            time.sleep(0.1)
    finally:
        child.kill()
        child.wait()
    assert summary(tmp_path) == {"done": "ok: 1", "half": "running"}


def test_a_carried_extension_does_not_change_the_file_that_is_loaded(monkeypatch, tmp_path):
    """Written into, it would crash the process: its code would be the new file's."""
    package, bundle = tmp_path / "eca_fused", tmp_path / "build"
    for folder, text in ((package, "loaded"), (bundle, "carried")):
        folder.mkdir()
        (folder / "_C.some.so").write_text(text)
    monkeypatch.setattr(gpu_check, "ROOT", tmp_path)
    monkeypatch.setattr(gpu_check, "BUNDLE", bundle)
    monkeypatch.setattr(gpu_check, "loads", lambda: True)
    with (package / "_C.some.so").open() as loaded:
        gpu_check.provide_extension(gpu_check.Run(tmp_path / "out", dry=True, seconds=10))
        assert loaded.read() == "loaded"
    assert [f.name for f in package.iterdir()] == ["_C.some.so"]
    assert (package / "_C.some.so").read_text() == "carried"


@needs_extension
@pytest.mark.parametrize("backward", [False, True])
def test_the_small_probe_forces_plans_that_exist(backward):
    limits = plans.planner().gpu_by_name("sm_90:132")
    for shape, layout, forced in gpu_probe.SMALL:
        for dtype in ("float32", "bfloat16"):
            found = plans.plan_of(Case(shape, 3, dtype, layout), backward, forced, limits)
            assert not isinstance(found, str), (shape, layout, forced, found)


def test_what_there_is_no_time_for_is_said(tmp_path):
    run = gpu_check.Run(tmp_path, dry=False, seconds=1)
    run.run("late", part(say("yes")))
    assert summary(tmp_path) == {"late": "not available: no time left"}


def test_plans_name_parts_that_exist(tmp_path):
    parts = gpu_check.all_parts(tmp_path)
    for stages in gpu_check.SEQUENCES.values():
        for stage in stages:
            assert set(stage) <= set(parts)
    done = subprocess.run(
        [sys.executable, str(CHECK), str(tmp_path / "out"), "nonsense", "--device", "dry-run"],
        capture_output=True, text=True, timeout=100,
    )  # fmt: skip
    assert done.returncode == 2
    assert "unknown: nonsense; there are first, second, third, facts" in done.stderr


@pytest.mark.parametrize(
    ("marks", "folders"),
    [
        (gpu_check.COMMON, {"ops", "autograd", "frameworks", "modules"}),
        (["-m", "needs_gpu"], {"ops"}),
    ],
)
def test_the_tests_own_marks_select_them(marks, folders):
    found = run_tests("--collect-only", *marks)
    assert set(re.findall(r"^tests/(\w+)/", found, re.M)) == folders


@needs_extension
@pytest.mark.skipif("cuda" not in eca_fused.ops.native.devices, reason="needs a build with CUDA")
@pytest.mark.skipif(not shutil.which("git"), reason="needs git, which knows what would travel")
@pytest.mark.parametrize("plan", ["first", "second", "third"])
def test_rehearsal_from_what_would_travel(plan, tmp_path):
    """Each plan runs without a GPU, in a copy of what git knows and of build/gpu alone."""
    copy, out = tmp_path / "copy", tmp_path / "out"
    listed = subprocess.run(
        ["git", "ls-files", "-co", "--exclude-standard"], cwd=ROOT, capture_output=True, text=True
    )
    if listed.returncode != 0:
        pytest.skip("needs a checkout: an unpacked archive has no list of what would travel")
    for name in listed.stdout.splitlines():
        if (ROOT / name).is_file():
            (copy / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, copy / name)
    from eca_fused import _C

    bundle = copy / "build" / "gpu"
    bundle.mkdir(parents=True)
    for built in (_C.__file__, eca_fused.ops.native.LIBRARY):
        shutil.copy2(built, bundle)
    command = [sys.executable, "benchmarks/gpu_check.py", str(out), plan, "--device", "dry-run"]
    done = subprocess.run(command, cwd=copy, capture_output=True, text=True, timeout=400)
    assert done.returncode == 0, done.stdout + done.stderr
    verdicts = summary(out)
    wanted = {name for stage in gpu_check.SEQUENCES[plan] for name in stage} - {"few counters"}
    assert set(verdicts) == {"extension", *wanted}
    assert all(verdict.startswith("ok") for verdict in verdicts.values()), verdicts
    assert len(list(out.iterdir())) <= MOST_FILES
