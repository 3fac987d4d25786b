"""The benchmark scripts: what they report follows from what they measured."""

import json
import sys
from pathlib import Path

import pytest
import torch
from support import needs_extension

import eca_fused

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / "benchmarks"))

import harness  # noqa: E402
import microbench  # noqa: E402
import report  # noqa: E402

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
