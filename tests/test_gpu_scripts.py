"""The scripts for a GPU, without one: the tuner, what a profiler saw, and gpu_check.sh."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from support import needs_extension

import eca_fused

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / "benchmarks"))

import gpu_probe  # noqa: E402
import tune  # noqa: E402

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
