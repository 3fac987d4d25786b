"""The committed results, the figures and tables made from them, and what counts as a loss."""

import copy
import json
import math
import random

import again
import cases
import microbench
import pytest
import report
import scaling
import tables
from helpers.cases import needs_extension

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
    if found["script"] != "microbench" or (place["device"], place["malloc"]) != ("cpu", "recycled"):
        return []
    return [one for one in found["rows"] if {"resnet50", "mobilenetv2"} & {*tables.network_of(one)}]


@pytest.mark.parametrize("path", [*filter(recycled, RESULTS)], ids=lambda p: p.stem)
def test_no_layer_of_resnet50_and_mobilenetv2_is_slower_on_a_cpu(path):
    assert tables.losses({**report.load(path), "rows": recycled(path)}) == []


def test_the_whole_grid_was_measured_on_a_cpu():
    path = report.RESULTS / "cpu-layers.json"
    measured = {(*one["shape"], one["dtype"], one["layout"]) for one in recycled(path)}
    arguments = microbench.parse(["--full", "--device", "cpu"])
    grid = [one for one in cases.all_cases() if not microbench.too_large(one, arguments)]
    names = ("resnet50", "mobilenetv2")
    layers = {layer for name in names for layer in cases.NETWORKS[name]}
    assert measured == {
        (*one.shape, one.dtype, one.layout) for one in grid if (*one.shape[1:], one.k) in layers
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
    assert sum(path.stat().st_size for path in files if path.suffix == ".json") < 1e6
    assert sum(path.stat().st_size for path in files) < 1.5e6
    assert len((report.RESULTS / "README.md").read_text().splitlines()) <= 300


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
    assert "Where a rival was faster" in report.where_another_is_faster(lost)
    noise = result(measured_again(0.99, 0.8, 1.2, 1.0, 0.7))
    assert tables.losses(noise) == []
    assert tables.unconfirmed(noise) == [f"{text}, in other processes 0.70, 0.80, 0.99, 1.00, 1.20"]
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


# ---- comparisons ----


def written(folder, **results):
    """Result files, and their paths."""
    for name, what in results.items():
        (folder / f"{name}.json").write_text(json.dumps(what))
    return [str(folder / f"{name}.json") for name in results]


def compared(folder, before, after, capsys, *options):
    """Exit status and text of a comparison."""
    paths = written(folder, before=before, after=after)
    status = report.main(["--compare", *paths, *options])
    return status, capsys.readouterr().out


def times_longer(one, factor, names=("native",)):
    """A row in which these contenders take so much longer, round by round."""
    one = copy.deepcopy(one)
    own = one["contenders"]
    for name in names:
        for what, by in (("us", factor), ("times_ours", factor), ("times_none", factor)):
            scale(own[name].get(what), by)
        scale(own[name].get("of_copy"), 1 / factor)
    if "native" in names:
        for entry in own.values():
            scale(entry.get("times_ours"), 1 / factor)
    if "copy" in names:
        for entry in own.values():
            scale(entry.get("of_copy"), factor)
    return one


def scale(statistics, factor):
    for name in ("median", "p20", "p80") if statistics else ():
        statistics[name] *= factor


def another_run(of, seed):
    """A result of the same code in another process: each contender a little off, some far off.

    In size the noise is that between results of the full grid on a CPU that others share.
    """
    draw = random.Random(seed)

    def noise(usual, rare):
        return math.exp(draw.gauss(0, rare if draw.random() < 0.08 else usual))

    rows = []
    for one in of["rows"]:
        for name in list(one["contenders"]):
            ours = name == "native"
            one = times_longer(one, noise(0.03, 0.1) if ours else noise(0.04, 0.2), (name,))
        rows.append(one)
    return {**of, "rows": rows}


def changed(of, factor, which):
    """A result with some of its rows so many times slower."""
    rows = of["rows"]
    return {**of, "rows": [times_longer(r, factor) if which(i) else r for i, r in enumerate(rows)]}


def grid(number=200, **ratios):
    """Rows of either direction, with narrow spreads."""
    ratios = ratios or {"copy": 0.9, "eager": 1.6, "timm": 1.5, "compile_a": 1.4}
    rows = [
        row((n, 8, 4, 4), direction=direction, **ratios)
        for n in range(1, number // 2 + 1)
        for direction in ("forward", "backward")
    ]
    for one in rows:
        for entry in one["contenders"].values():
            for statistics in (entry["us"], entry["of_copy"], entry["times_ours"]):
                middle = statistics["median"]
                statistics |= {"p20": 0.99 * middle, "p80": 1.01 * middle}
    return result(*rows)


def names_of(text, word):
    return [line.split(": ")[0] for line in text.splitlines() if line.startswith(f"{word} ")]


@pytest.mark.parametrize("seed", range(3))
def test_two_runs_of_the_same_code_differ_by_noise_alone(seed, tmp_path, capsys):
    before, after = another_run(grid(), seed), another_run(grid(), seed + 100)
    status, text = compared(tmp_path, before, after, capsys)
    assert status == 0
    assert "200 in both, 0 slower" in text
    assert "noise: estimated from these two results" in text
    assert "backward native, 100 rows: median" in text


@pytest.mark.parametrize("seed", range(3))
def test_what_changed_is_found_in_the_noise(seed, tmp_path, capsys):
    before, after = another_run(grid(), seed), another_run(grid(), seed + 100)
    status, text = compared(tmp_path, before, changed(after, 2, lambda i: i % 20 == 0), capsys)
    assert status == 1
    expected = {f"SLOWER {n}x8x4x4 3 bfloat16 contiguous forward native" for n in range(1, 101, 10)}
    assert len(expected & {*names_of(text, "SLOWER")}) >= 9
    assert {*names_of(text, "SLOWER")} <= expected


def test_a_row_has_changed_if_it_did_beside_all_that_it_was_measured_with(tmp_path, capsys):
    """A copy that was fast in one process alone makes ours look slow beside it."""
    before = grid()
    rows = list(before["rows"])
    rows[0] = times_longer(rows[0], 0.5, ("copy",))
    rows[1] = times_longer(rows[1], 2)
    status, text = compared(tmp_path, before, {**before, "rows": rows}, capsys)
    assert status == 1
    assert names_of(text, "SLOWER") == ["SLOWER 1x8x4x4 3 bfloat16 contiguous backward native"]
    assert "2.00x the time" in text


def test_beside_the_copy_alone_more_is_noise(tmp_path, capsys):
    before, after = (another_run(grid(copy=0.9), seed) for seed in (1, 2))
    after = changed(after, 3, lambda i: i == 6)
    status, text = compared(tmp_path, before, after, capsys)
    assert status == 1
    assert names_of(text, "SLOWER") == ["SLOWER 4x8x4x4 3 bfloat16 contiguous forward native"]


@pytest.mark.parametrize(("factor", "status", "word"), [(1.2, 1, "SLOWER"), (1 / 1.2, 0, "faster")])
def test_that_all_rows_are_slower_is_said(factor, status, word, tmp_path, capsys):
    """Beside each other no row has changed, so that the rows alone would hide it."""
    before = grid()
    after = changed(another_run(before, 5), factor, lambda i: i % 2 == 0)
    found, text = compared(tmp_path, before, after, capsys)
    assert found == status
    assert names_of(text, word) == [f"{word} all 100 rows of forward native"]
    assert "200 in both, 0 slower, 0 faster, 0 missing" in text


def test_a_second_result_of_the_same_code_gives_every_row_its_noise(tmp_path, capsys):
    """What is as far off in a second run of the old code is no change."""
    before = grid()
    rows = list(before["rows"])
    rows[0] = times_longer(rows[0], 1.5)
    (again,) = written(tmp_path, again={**before, "rows": rows})
    rows[2] = times_longer(rows[2], 1.5)
    after = {**before, "rows": rows}
    _, text = compared(tmp_path, before, after, capsys)
    assert len(names_of(text, "SLOWER")) == 2
    status, text = compared(tmp_path, before, after, capsys, "--same-code", again)
    assert status == 1
    assert names_of(text, "SLOWER") == ["SLOWER 2x8x4x4 3 bfloat16 contiguous forward native"]
    assert "noise: measured, from the first result and" in text
    # Farther than the old code was from itself.
    rows[0] = times_longer(rows[0], 2)
    _, text = compared(tmp_path, before, {**before, "rows": rows}, capsys, "--same-code", again)
    assert len(names_of(text, "SLOWER")) == 2


def test_measured_noise_is_not_hidden_by_rows_that_changed(tmp_path, capsys):
    """With three of four rows changed, the results alone do not tell noise from change."""
    before, again, after = (another_run(grid(), seed) for seed in (1, 2, 3))
    after = changed(after, 2, lambda i: i % 8 < 6)
    (path,) = written(tmp_path, again=again)
    status, text = compared(tmp_path, before, after, capsys, "--same-code", path)
    assert status == 1
    assert len(names_of(text, "SLOWER all")) == 2


def test_the_noise_of_few_rows_is_a_floor(tmp_path, capsys):
    few = result(*grid()["rows"][:8])
    status, text = compared(tmp_path, few, changed(few, 1.2, lambda i: i == 0), capsys)
    assert status == 0
    assert "native, 8 rows: too few to estimate the noise: a row counts beyond 1.25x" in text
    status, text = compared(tmp_path, few, changed(few, 1.3, lambda i: True), capsys)
    assert status == 1
    assert "8 in both, 8 slower" in text


@pytest.mark.parametrize("path", RESULTS, ids=lambda p: p.stem)
def test_every_kind_of_result_can_be_compared(path, tmp_path, capsys):
    found = report.load(path)
    own = sum(n in one["contenders"] for one in found["rows"]
              for n in ("native", "triton", "fused ECA", "native ECA"))  # fmt: skip
    status, text = compared(tmp_path, found, found, capsys)
    assert status == 0
    assert f"{own} in both, 0 slower, 0 faster, 0 missing" in text
    rows = list(found["rows"])
    name = "fused ECA" if found["script"] == "network" else "native"
    rows[0] = times_longer(rows[0], 4, (name,))
    status, text = compared(tmp_path, found, {**found, "rows": rows}, capsys)
    assert status == 1
    assert len(names_of(text, "SLOWER")) == 1
    assert f"{name}: 4.00x the time" in text
    status, text = compared(tmp_path, {**found, "rows": rows}, found, capsys)
    assert (status, len(names_of(text, "faster"))) == (0, 1)


def test_results_of_different_scripts_are_not_compared(tmp_path, capsys):
    paths = written(tmp_path, a=result(row(copy=0.9)), b={**result(), "script": "network"})
    with pytest.raises(SystemExit) as error:
        report.main(["--compare", *paths])
    assert error.value.code == 2
    assert "of microbench.py and of network.py cannot be compared" in capsys.readouterr().err


def test_rows_without_anything_measured_beside_both_are_missing(tmp_path, capsys):
    before, after = result(row(copy=0.9)), result(row(eager=1.5))
    del after["rows"][0]["contenders"]["native"]["of_copy"]
    status, text = compared(tmp_path, before, after, capsys)
    assert status == 2
    assert "0 in both, 0 slower, 0 faster, 1 missing" in text


# ---- what the report refuses ----


def refused(arguments, capsys):
    """What is said of it: a line, or the usage and a line."""
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
    assert "--same-code" in refused([a, "--same-code", b], capsys)
    (calls,) = written(tmp_path, calls={**result(), "script": "overhead", "remarks": []})
    assert "no picture of a result of overhead.py" in refused([calls, "--plot", a], capsys)
    assert not picture.exists()


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
