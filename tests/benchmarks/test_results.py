"""The committed results, the figures and tables made from them, and what counts as a loss."""

import copy
import json

import pytest

import layers
import report
from helpers.cases import needs_extension
from helpers.results import result, row, written
from lib import again, cases, tables

RESULTS = report.committed()


# ---- the committed results, and the texts with their figures ----


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


def recycled(path):
    """The rows of ResNet-50's and MobileNetV2's layers on a CPU, or none."""
    found = report.load(path)
    place = found["machine"]
    if found["script"] != "layers" or (place["device"], place["malloc"]) != ("cpu", "recycled"):
        return []
    return [one for one in found["rows"] if {"resnet50", "mobilenetv2"} & {*tables.network_of(one)}]


@pytest.mark.parametrize("path", [*filter(recycled, RESULTS)], ids=lambda p: p.stem)
def test_no_layer_of_resnet50_and_mobilenetv2_is_slower_on_a_cpu(path):
    assert tables.losses({**report.load(path), "rows": recycled(path)}) == []


def test_the_whole_grid_was_measured_on_a_cpu():
    path = report.RESULTS / "cpu-layers.json"
    measured = {(*one["shape"], one["dtype"], one["layout"]) for one in recycled(path)}
    arguments = layers.parse(["--full", "--device", "cpu"])
    grid = [one for one in cases.all_cases() if not layers.too_large(one, arguments)]
    names = ("resnet50", "mobilenetv2")
    wanted = {layer for name in names for layer in cases.NETWORKS[name]}
    assert measured == {
        (*one.shape, one.dtype, one.layout) for one in grid if (*one.shape[1:], one.k) in wanted
    }
    left_out = report.load(path)["left_out"]
    assert all(what.endswith("larger than 256 MB") for what in left_out)


@pytest.mark.parametrize("path", report.FIGURES, ids=lambda p: p.parent.name)
def test_the_figures_in_texts_are_those_of_the_results(path):
    text = path.read_text()
    assert report.renew(text, report.FIGURES[path]()) == text
    assert "share of copy" in text


def test_results_are_small():
    files = [path for path in report.RESULTS.rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) < 1.1e6
    assert len((report.RESULTS / "README.md").read_text().splitlines()) <= 340


def spread(median):
    return {"median": median, "p20": 0.9 * median, "p80": 1.1 * median, "samples": 9}


def test_a_packed_result_says_the_same(tmp_path):
    one = row(copy=0.81234, eager=1.98766)
    for name, entry in one["contenders"].items():
        us = {"native": 100.0, "copy": 81.234, "eager": 198.766}[name]
        entry |= {"us": spread(us), "times_ours": spread(us / 100), "profiler_us": None}
    one |= {"map_bytes": 2 * 32 * 256 * 56 * 56}
    written, again = tmp_path / "written.json", tmp_path / "again.json"
    written.write_text(json.dumps(result(one)))
    assert report.main([str(written), "--pack", str(again)]) == 0
    assert again.stat().st_size < written.stat().st_size
    (found,) = report.load(again)["rows"]
    assert found["shape"] == one["shape"]
    eager = found["contenders"]["eager"]
    assert eager["us"] == {"median": 198.8, "p20": 178.9, "p80": 218.6, "samples": 9}
    assert eager["times_ours"]["median"] == 1.988
    assert eager["gbps"] == pytest.approx(10**6 / 198.8 / 1e3)
    assert eager["ps_per_element"] == pytest.approx(1e6 * 198.8 / (32 * 256 * 56 * 56))
    assert found["contenders"]["native"]["of_copy"]["median"] == 0.8123
    with pytest.raises(SystemExit):
        report.main([str(written), "--pack", str(again), "--readme"])


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
    assert not any(what.startswith("backward") for what in lines)  # not measured
    assert lines["forward, 256 MB and more: eager / ours at least 1.45"] == "1 of 2 | 1.30 | 2.00 |"
    # 10 us, where 4 are the goal.
    assert lines["forward, ResNet-50, batch 1: at most 4 us"] == "0 of 1 | 10.00 | 10.00 |"


def test_a_loss_is_one_beyond_the_spread():
    rows = [row(eager=0.97, copy=0.5), row(eager=2.0, compile_a=0.9, compile_b=1.2)]
    assert tables.losses(result(*rows)) == [
        "32x256x56x56 k=3 bfloat16 contiguous forward: compile a takes 0.90x our time"
    ]


def measured_again(time):
    """A row that is lost at first, after a rerun."""
    one = row(compile_a=0.9)
    arguments = layers.parse(["--again", "--device", "cpu"])
    assert list(again.measure_again(result(one), arguments, lambda _: row(compile_a=time))) == [one]
    return one


def test_a_loss_counts_if_a_rerun_has_it_too():
    text = "32x256x56x56 k=3 bfloat16 contiguous forward: compile a takes 0.90x our time, again "
    lost = result(measured_again(0.8))
    assert tables.losses(lost) == [text + "0.80x (0.76 to 0.84)"]
    assert tables.unconfirmed(lost) == []
    assert "Where a rival was faster" in report.where_another_is_faster(lost)
    noise = result(measured_again(0.97))
    assert tables.losses(noise) == []
    assert tables.unconfirmed(noise) == [text + "0.97x (0.92 to 1.02)"]
    said = report.where_another_is_faster(noise)
    assert said.startswith("No rival was faster on any of 1 rows. A rival counts as faster if it")
    assert text in said


def test_nothing_is_said_of_rows_without_a_rival():
    without = row(copy=0.9)
    assert report.where_another_is_faster(result(without)) == ""
    alone = row(eager=0.9)
    del alone["contenders"]["native"]
    assert report.where_another_is_faster(result(alone)) == ""
    both = report.where_another_is_faster(result(without, row(eager=1.2)))
    assert both.endswith("A rival counts as faster if it wins four of five rounds.")


def test_ours_are_the_kernels_that_a_row_has():
    one = row(eager=0.9)
    one["contenders"]["triton"] = one["contenders"].pop("native")
    arguments = again.command(one, ["eager"], layers.parse(["--again"]))
    assert arguments[arguments.index("--contender") + 1 :][:2] == ["eager", "triton"]


def test_what_cannot_be_measured_again_is_lost_and_shown():
    def fails(arguments):
        raise RuntimeError("exit status 1: no")

    one = result(row(eager=0.9))
    assert len(list(again.measure_again(one, layers.parse(["--again"]), fails))) == 1
    assert len(tables.losses(one)) == 1
    assert one["rows"][0]["failed"] == ["again: RuntimeError: exit status 1: no"]


@needs_extension
def test_a_row_is_measured_again_in_a_process_of_its_own():
    lost = row((1, 2, 3, 4), 5, "backward", eager=0.9, compile_conv=0.8)
    arguments = layers.parse(["--again", "--device", "dry-run", "--rounds", "2"])
    rivals = tables.faster_rivals(lost)
    found = again.run_layers(again.command(lost, rivals, arguments))
    assert {name: found[name] for name in ("shape", "k", "dtype", "layout", "direction")} == {
        name: lost[name] for name in ("shape", "k", "dtype", "layout", "direction")
    }
    assert {"native", "eager", "compile conv, default"} <= found["contenders"].keys()
    assert "timm" not in found["contenders"]
    with pytest.raises(RuntimeError, match="exit status 2"):
        again.run_layers(["--shape", "none"])


def test_the_summary_gives_the_range_over_the_layers_of_a_network():
    rows = [row(eager=1.5, copy=0.9), row((32, 512, 28, 28), 5, eager=1.25, copy=0.8)]
    lines = tables.summary(result(*rows)).splitlines()
    assert lines[0].endswith("| layers | share of copy | eager / ours |")  # none that is empty
    assert lines[2:] == [
        "| resnet50 | 32 | bfloat16 | contiguous | forward | 2 | 0.80 to 0.90 | 1.25 to 1.50x |"
    ]


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


# ---- what the report refuses ----


def refused(arguments, capsys):
    """What the report prints: a line, or the usage and a line."""
    with pytest.raises(SystemExit) as error:
        report.main(arguments)
    assert error.value.code == 2
    said = capsys.readouterr()
    assert said.out == ""
    return said.err


def test_the_report_says_what_is_no_result(tmp_path, capsys):
    path = tmp_path / "x.json"
    for text in ("", "[1", "5", '{"rows": []}', '{"script": 1, "rows": [], "machine": {}}'):
        path.write_text(text)
        said = refused([str(path)], capsys)
        assert "is no result of these scripts" in said
        assert said.count("\n") == 1
    assert "No such file" in refused([str(tmp_path / "nothing.json")], capsys)


@pytest.mark.parametrize("options", [[], ["--compare"]])
def test_a_result_of_an_unknown_script_or_without_a_field_is_named(options, tmp_path, capsys):
    good = result(row(copy=0.9))
    other = {**good, "script": "tune"}
    (path,) = written(tmp_path, other=other)
    said = refused([*options, *[path] * (1 + len(options))], capsys)
    assert said == f"{path} is no result of these scripts: there is no script 'tune'\n"
    for field in ("shape", "contenders", "direction"):
        lacking = copy.deepcopy(good)
        del lacking["rows"][0][field]
        (path,) = written(tmp_path, lacking=lacking)
        said = refused([*options, *[path] * (1 + len(options))], capsys)
        assert said == f"{path} is no result of these scripts: it lacks '{field}'\n"
    (path,) = written(tmp_path, wrong={**good, "rows": ["a row"]})
    assert "is no result of these scripts" in refused([path], capsys)


def test_options_that_would_be_ignored_are_refused(tmp_path, capsys):
    a, b = written(tmp_path, a=result(row(copy=0.9)), b=result(row(copy=0.9)))
    picture = tmp_path / "x.png"
    said = refused([a, b, "--plot", str(picture)], capsys)
    assert "--plot: expected one result, got 2" in said
    assert "--plot" in refused(["--compare", a, b, "--plot", str(picture)], capsys)
    assert "two or three of them for --compare" in refused(["--compare", a], capsys)
    (calls,) = written(tmp_path, calls={**result(), "script": "calls", "remarks": []})
    assert "no picture of a result of calls.py" in refused([calls, "--plot", a], capsys)
    assert not picture.exists()
