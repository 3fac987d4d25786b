"""`report.py --compare`: a change is beyond the spreads, and in a rerun again."""

import copy

import pytest

import report
from helpers.results import result, row, written
from lib import changes


def compared(folder, capsys, *results):
    """Exit status and text of a comparison."""
    paths = written(folder, **{f"r{i}": one for i, one in enumerate(results)})
    status = report.main(["--compare", *paths])
    return status, capsys.readouterr().out


def slower(of, factor, *places):
    """A copy of a result in which our contender takes `factor` times as long on these rows."""
    of = copy.deepcopy(of)
    for place in places:
        own = of["rows"][place]["contenders"]
        name = next(n for n in ("native", "fused ECA") if n in own)
        for what, by in (("us", factor), ("times_none", factor), ("of_copy", 1 / factor)):
            scale(own[name].get(what), by)
        for entry in own.values() if name == "native" else ():
            scale(entry.get("times_ours"), 1 / factor)
    return of


def scale(statistics, factor):
    for name in ("median", "p20", "p80") if statistics else ():
        statistics[name] *= factor


BEFORE = result(row(copy=0.9), row((1, 2, 3, 4), copy=0.8), row((5, 6, 7, 8), copy=0.5))


def test_a_change_is_beyond_the_spread_of_both(tmp_path, capsys):
    """Each row has a spread of five percent."""
    after = slower(slower(slower(BEFORE, 1.05, 0), 1.33, 1), 0.71, 2)
    status, text = compared(tmp_path, capsys, BEFORE, after)
    assert status == 1
    assert "3 in both, 1 slower, 1 faster, 0 missing; a rerun of the new code" in text
    assert "SLOWER 1x2x3x4 3 bfloat16 contiguous forward native: 1.33x the time\n" in text
    assert "faster 5x6x7x8 3 bfloat16 contiguous forward native: 0.71x the time\n" in text
    assert compared(tmp_path, capsys, BEFORE, BEFORE)[0] == 0
    assert compared(tmp_path, capsys, BEFORE, slower(BEFORE, 0.5, 0))[0] == 0


def test_a_change_counts_if_a_rerun_has_it_too(tmp_path, capsys):
    after = slower(slower(BEFORE, 1.33, 1), 1.5, 0)
    status, text = compared(tmp_path, capsys, BEFORE, after, slower(BEFORE, 1.4, 1))
    assert status == 1
    assert "3 in both, 1 slower, 0 faster, 0 missing; 1 changed in one of the two alone" in text
    assert (
        "SLOWER 1x2x3x4 3 bfloat16 contiguous forward native: 1.33x the time, again 1.40x" in text
    )
    assert compared(tmp_path, capsys, BEFORE, after, BEFORE)[0] == 0


def test_a_row_has_changed_if_it_did_beside_all_that_it_was_measured_with(tmp_path, capsys):
    """A copy that was fast in one process alone makes ours look slow beside it."""
    before = result(row(copy=0.9, eager=1.6, compile_a=1.4))
    lucky = result(row(copy=0.45, eager=1.6, compile_a=1.4))
    assert compared(tmp_path, capsys, before, lucky)[0] == 0
    status, text = compared(tmp_path, capsys, before, slower(before, 2, 0))
    assert status == 1
    assert "forward native: 2.00x the time" in text


def test_what_is_gone_is_missing(tmp_path, capsys):
    """A missing contender is worse than a slow one; without a common row nothing is compared."""
    status, text = compared(tmp_path, capsys, BEFORE, result(row(copy=0.9), device="cuda"))
    assert status == 1
    assert "MISSING 1x2x3x4 3 bfloat16 contiguous forward native" in text
    assert "measured with another device: cpu and cuda" in text
    assert compared(tmp_path, capsys, BEFORE, result())[0] == 2
    without = result(row(eager=1.5))
    del without["rows"][0]["contenders"]["native"]["of_copy"]
    status, text = compared(tmp_path, capsys, result(row(copy=0.9)), without)
    assert status == 2
    assert "0 in both, 0 slower, 0 faster, 1 missing" in text


@pytest.mark.parametrize("path", report.committed(), ids=lambda p: p.stem)
def test_every_kind_of_result_can_be_compared(path, tmp_path, capsys):
    found = report.load(path)
    own = sum(name in one["contenders"] for one in found["rows"] for name in changes.OURS)
    status, text = compared(tmp_path, capsys, found, found)
    assert status == 0
    assert f"{own} in both, 0 slower, 0 faster, 0 missing" in text
    status, text = compared(tmp_path, capsys, found, slower(found, 10, 0))
    assert status == 1
    assert text.count("SLOWER ") == 1
    assert ": 10.00x the time" in text
    status, text = compared(tmp_path, capsys, slower(found, 10, 0), found)
    assert (status, text.count("faster ")) == (0, 1)


def test_results_of_different_scripts_are_not_compared(tmp_path, capsys):
    paths = written(tmp_path, a=result(row(copy=0.9)), b={**result(), "script": "networks"})
    with pytest.raises(SystemExit) as error:
        report.main(["--compare", *paths])
    assert error.value.code == 2
    assert "of layers.py and of networks.py cannot be compared" in capsys.readouterr().err
