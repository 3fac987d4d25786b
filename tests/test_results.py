"""The committed results, the figures and tables made from them, and what counts as a loss."""

import json
import sys
from pathlib import Path

import pytest
from support import needs_extension

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / "benchmarks"))

import again  # noqa: E402
import cases  # noqa: E402
import microbench  # noqa: E402
import report  # noqa: E402
import scaling  # noqa: E402
import tables  # noqa: E402

RESULTS = report.committed()


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
    measured = again.measure_again(result(one), arguments, lambda _: row(compile_a=next(left)))
    assert list(measured) == [one]
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
    assert said.startswith("On none of 1 rows another is faster in four of five rounds and")
    assert text in said


def test_nothing_is_said_of_rows_without_a_rival():
    without = row(copy=0.9)
    assert report.where_another_is_faster(result(without)) == ""
    alone = row(eager=0.9)
    del alone["contenders"]["native"]
    assert report.where_another_is_faster(result(alone)) == ""
    both = report.where_another_is_faster(result(without, row(eager=1.2)))
    assert both == "On none of 1 rows another is faster in four of five rounds."


def test_four_of_five_processes_need_five(capsys):
    for wrong in ("-1", "4"):
        with pytest.raises(SystemExit):
            microbench.parse(["--again", wrong])
        assert "--again: expected 0, or processes from 5 up" in capsys.readouterr().err


def test_ours_are_the_kernels_that_a_row_has():
    one = row(eager=0.9)
    one["contenders"]["triton"] = one["contenders"].pop("native")
    arguments = again.command(one, ["eager"], microbench.parse(["--again", "5"]))
    assert arguments[arguments.index("--contender") + 1 :][:2] == ["eager", "triton"]


def test_what_cannot_be_measured_again_is_lost_and_shown():
    def fails(arguments):
        raise RuntimeError("exit status 1: no")

    one = result(row(eager=0.9))
    assert len(list(again.measure_again(one, microbench.parse(["--again", "5"]), fails))) == 1
    assert len(tables.losses(one)) == 1
    assert one["rows"][0]["failed"] == ["again: RuntimeError: exit status 1: no"]


@needs_extension
def test_a_row_is_measured_again_in_a_process_of_its_own():
    lost = row((1, 2, 3, 4), 5, "backward", eager=0.9, compile_conv=0.8)
    arguments = microbench.parse(["--again", "5", "--device", "dry-run", "--rounds", "2"])
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
