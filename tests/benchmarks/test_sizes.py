"""benchmarks/sizes.py: the sizes, the steps between them, and which of these are cliffs."""

import argparse
import itertools
import json

import pytest

import layers
import report
import sizes
from helpers.cases import needs_extension
from lib import (
    cases,
    plots,
    script,
    steps,
)

pytestmark = pytest.mark.every_torch

CASE = cases.Case((3, 8, 4, 4), 3, "bfloat16", "channels_last")


@needs_extension
def test_sizes_grow_from_one_pixel(tmp_path, capsys):
    path, picture = tmp_path / "sizes.json", tmp_path / "sizes.png"
    arguments = ["--device", "dry-run", "--rounds", "1", "--layout", "contiguous"]
    arguments += ["--axis", "S", "N", "--no-compile", "--output", str(path)]
    pytest.importorskip("matplotlib", reason="needs matplotlib: pip install eca-fused[demo]")
    more = ["--most-bytes", "500000", "--plot", str(picture)]
    assert sizes.main([*arguments, *more]) == 0
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
    ("native", "copy", "again", "cliff"),
    [
        (1.5, 1.0, None, True),
        (1.5, 1.4, None, False),  # the copy's step
        (1.5, 1.0, (1.4, 1.0), True),
        (1.5, 1.0, (1.4, 1.3), False),
        (1.5, 1.4, (1.4, 1.0), True),  # the copy's first step was noise
        (1.5, 1.0, (1.1, 0.8), False),  # not there again
    ],
)
def test_a_cliff_is_a_step_that_the_copy_has_not(native, copy, again, cliff):
    rows = [size(1, 1.0, 1.0), size(2, native, copy, again=again)]
    (step,) = steps.steps_of(rows)
    assert step.is_cliff == cliff
    assert (str(step) in steps.markdown({"rows": rows})) == cliff
    if again:
        assert f"again {again[0]:.2f}x (the copy {again[1]:.2f}x)" in str(step)


def test_a_step_is_beyond_15_percent_and_the_spreads():
    assert not list(steps.steps_of([size(1, 1.0, 1.0), size(2, 1.14, 1.0)]))
    assert not list(steps.steps_of([size(1, 1.0, 1.0, 0.3), size(2, 1.5, 1.0, 0.3)]))
    backward = {**size(2, 9.0, 1.0), "direction": "backward"}
    assert not list(steps.steps_of([size(1, 1.0, 1.0), backward]))


def test_cliffs_are_named_and_other_steps_counted():
    rows = [size(1, 1.0, 1.0), size(2, 1.5, 1.0, again=(1.6, 1.0)), size(3, 2.0, 1.4)]
    rows += [size(4, 2.8, 1.4, again=(1.0, 1.0)), size(5, 4.2, 2.0)]
    head = "Cliffs, where the time per element grows by 15 % more than the copy's: "
    assert steps.markdown({"rows": rows}).splitlines() == [
        head[:-1],
        "",
        "- native, contiguous, forward, S grows, 8x64x1x1 k=5 to 8x64x2x1 k=5: "
        "1.50x (the copy 1.00x), again 1.60x (the copy 1.00x)",
        "",
        "Other steps beyond 15 %: 3. The copy has them too, or a rerun has not.",
    ]
    assert steps.markdown({"rows": rows[:1]}) == head + "none."


STEP = "native, contiguous, forward, S grows, 8x64x1x1 k=5 to 8x64x2x2 k=5: 3.00x (the copy 1.00x)"


@pytest.fixture
def with_a_step(monkeypatch):
    """Sizes whose second takes three times the time per element; a list of what is timed again."""
    timed = []

    def measured(direction, inputs, running, *rest, **options):
        row = layers.measure_direction(direction, inputs, running, *rest, **options)
        side = inputs.case.shape[-1]
        for name, entry in row["contenders"].items():
            each = (3 if side > 1 and name == "native" else 1) * side * side
            entry["us"] |= {"median": each, "p20": 0.95 * each, "p80": 1.05 * each}
        return row

    def timed_again(device, recordings, rounds):
        timed.append(list(recordings))
        return {name: [12.0 if name == "native 1" else 4.0] * rounds for name in recordings}

    monkeypatch.setattr(sizes, "measure_direction", measured)
    monkeypatch.setattr(sizes, "call_times", timed_again)
    return timed


@needs_extension
def test_a_step_is_measured_again(with_a_step, monkeypatch, tmp_path, capsys):
    path = tmp_path / "sizes.json"
    arguments = [*SIZES, "--output", str(path)]
    # Four times the pixels: the copy takes the same time, ours three times as long.
    monkeypatch.setattr(steps, "STEP", 0.5)
    assert sizes.main(arguments) == 0
    found = json.loads(path.read_text())
    assert with_a_step[0] == ["native 0", "native 1", "copy 0", "copy 1"]
    again = found["rows"][1]["again"]["native"]
    assert (again["ours"]["median"], again["copy"]["median"]) == (0.75, 0.25)
    line = f"- {STEP}, again 0.75x (the copy 0.25x)\n"
    assert line in capsys.readouterr().out
    with_a_step.clear()
    monkeypatch.setattr(sizes, "ALONE", 1)
    assert sizes.main(arguments) == 0
    assert with_a_step[:2] == [["native 0", "native 1"], ["copy 0", "copy 1"]]


@needs_extension
def test_steps_are_measured_again_within_a_time_limit(with_a_step, capsys):
    assert sizes.main([*SIZES, "--again-seconds", "0"]) == 0
    assert with_a_step == []
    assert (
        "S grows, 8x64x1x1 k=5 to 8x64x2x2 k=5: 3.00x (the copy 1.00x)\n" in capsys.readouterr().out
    )


@needs_extension
def test_a_step_that_cannot_be_measured_again_is_a_failure(with_a_step, monkeypatch, capsys):
    def fails(*_):
        raise RuntimeError("out of memory")

    monkeypatch.setattr(sizes, "call_times", fails)
    assert sizes.main(SIZES) == 1
    assert f"- FAILED again: {STEP}: RuntimeError: out of memory" in capsys.readouterr().out


@needs_extension
@pytest.mark.parametrize(("what", "rows"), [("measure_direction", 1), ("call_times", 3)])
def test_what_was_measured_before_an_interrupt_is_kept(
    with_a_step, monkeypatch, tmp_path, capsys, what, rows
):
    calls = itertools.count()
    measured = getattr(sizes, what)

    def interrupted(*args, **options):
        if next(calls) == (what == "measure_direction"):
            raise KeyboardInterrupt
        return measured(*args, **options)

    monkeypatch.setattr(sizes, what, interrupted)
    path = tmp_path / "sizes.json"
    assert sizes.main([*SIZES, "--output", str(path)]) == script.INTERRUPTED
    assert len(json.loads(path.read_text())["rows"]) == rows
    text = capsys.readouterr().out
    assert "| S | 8x64x1x1 k=5 | contiguous | forward |" in text
    assert "- interrupted: what follows was not measured" in text


@pytest.mark.parametrize("most", ["-1", "0", "nan", "200703"])
def test_a_size_that_holds_no_map_is_refused(most, capsys):
    with pytest.raises(SystemExit, match="2"):
        sizes.main(["--device", "dry-run", f"--most-bytes={most}"])
    assert "--most-bytes: the smallest map of axis N has 200704 bytes" in capsys.readouterr().err


@needs_extension
def test_sizes_are_compiled_too(tmp_path):
    path = tmp_path / "sizes.json"
    arguments = ["--device", "dry-run", "--rounds", "1", "--layout", "contiguous", "--axis", "C"]
    arguments += ["--direction", "forward", "--most-bytes", "30000", "--output", str(path)]
    assert sizes.main(arguments) == 0
    (one,) = json.loads(path.read_text())["rows"]
    assert {"copy", "native", "eager", "compile shifted"} <= one["contenders"].keys()


@needs_extension
def test_large_maps_are_measured_one_contender_at_a_time(device, monkeypatch):
    seen = []

    def recorded(direction, inputs, running, *rest, **options):
        seen.append(sorted(running))
        return layers.measure_direction(direction, inputs, running, *rest, **options)

    monkeypatch.setattr(sizes, "measure_direction", recorded)
    args = argparse.Namespace(compile=False, direction=["forward", "backward"], rounds=1)
    together = list(sizes.measure(CASE, "N", args, device))
    assert seen == 2 * [["eager", "native", "timm"]]
    monkeypatch.setattr(sizes, "ALONE", 1)
    seen.clear()
    apart = list(sizes.measure(CASE, "N", args, device))
    assert seen == 2 * [["native"], ["eager"], ["timm"]]
    for some, alone in zip(together, apart, strict=True):
        assert set(some["contenders"]) == set(alone["contenders"])
        assert alone["failed"] == []


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


def test_sizes_are_more_than_powers_of_two():
    shapes = [case.shape for case in sizes.sizes("C", "float32", "contiguous", 10e6)]
    channels = [1, 2, 3, 4, 6, 8, 11, 16, 23, 32, 45, 64, 91, 128, 181, 256, 362]
    assert shapes == [(8, c, 28, 28) for c in channels]
    sides = [case.shape[2:] for case in sizes.sizes("S", "float32", "contiguous", 1e5)]
    assert sides == [(1, 1), (2, 2), (3, 3), (4, 4), (6, 6)]
