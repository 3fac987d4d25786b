"""benchmarks/layers.py, and the options of every script, on a pretended GPU."""

import json

import pytest

import calls
import layers
import networks
import report
import sizes
from helpers.cases import needs_extension
from helpers.results import wrong_contenders
from lib import cases, contenders, devices, machine, script, tables

pytestmark = pytest.mark.every_torch

CASE = cases.Case((3, 8, 4, 4), 3, "bfloat16", "channels_last")


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
        return layers.selected(layers.parse(list(argv)), cpu)

    assert chosen() == cases.cpu_cases()
    assert chosen("--shape", "2", "8", "4", "4", "--taps", "5", "--dtype", "float16") == [
        cases.Case((2, 8, 4, 4), 5, "float16", "contiguous")
    ]
    found = chosen("--layers", "mobilenetv2", "--batch", "1", "--layout", *cases.LAYOUTS)
    assert len(found) == 2 * len(cases.NETWORKS["mobilenetv2"])
    small = chosen("--full", "--dtype", "float32", "--largest-map", "1")
    assert small
    assert all(case.map_bytes <= 1e6 and case.dtype == "float32" for case in small)
    assert layers.parse([]).seconds == layers.DEFAULT_SECONDS
    assert layers.parse(["--full"]).seconds == float("inf")
    for wrong in (["--full", "--shape", "1", "1", "1", "1"], ["--shape", "1", "1", "1", "0"]):
        with pytest.raises(SystemExit):
            layers.parse(wrong)
    with pytest.raises(SystemExit):
        layers.parse(["--shape", "1", "1", "1", "1", "--taps", "4"])


def does_not_compile(form, mode, taps):
    raise RuntimeError(f"no compiler for {form}")


@needs_extension
def test_a_layer_that_fails_half_way_keeps_what_was_measured(monkeypatch, tmp_path):
    def copy(direction, case, device):
        if direction == "backward":
            raise RuntimeError("out of memory")
        return contenders.record_copy(direction, case, device)

    monkeypatch.setattr(layers, "record_copy", copy)
    path = tmp_path / "bench.json"
    arguments = ["--device", "dry-run", "--shape", "2", "4", "2", "2", "--rounds", "1"]
    arguments += ["--contender", "native", "--output", str(path)]
    assert layers.main(arguments) == 1
    found = json.loads(path.read_text())
    assert [one["direction"] for one in found["rows"]] == ["forward"]
    assert found["left_out"] == ["bfloat16 contiguous 2x4x2x2 k=3: RuntimeError: out of memory"]


def test_a_picture_that_cannot_be_made_is_refused_before_anything_is_measured(monkeypatch):
    monkeypatch.setattr(script, "find_spec", lambda name: None)
    for one in (layers, sizes):
        with pytest.raises(SystemExit, match="a picture needs matplotlib"):
            one.main(["--device", "dry-run", "--plot", "picture.png"])


@pytest.mark.parametrize("script", [layers, networks, sizes, calls])
def test_a_result_that_cannot_be_written_is_refused_before_anything_is_measured(script, tmp_path):
    (tmp_path / "file").touch()
    for place, message in (
        (tmp_path, "expected a file to write, got the folder"),
        (tmp_path / "file" / "result.json", "cannot make the folder"),
    ):
        with pytest.raises(SystemExit, match=f"--output: {message}"):
            script.main(["--device", "dry-run", "--output", str(place)])
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


@pytest.mark.parametrize("script", [layers, networks, sizes])
def test_a_picture_of_an_unknown_kind_is_refused_before_anything_is_measured(script):
    pytest.importorskip("matplotlib", reason="draws with it: pip install matplotlib")
    with pytest.raises(SystemExit, match=r"ends in .*\.png.*, got picture.xyz"):
        script.main(["--device", "dry-run", "--plot", "picture.xyz"])


@pytest.mark.parametrize(
    ("script", "arguments", "message"),
    [
        (layers, ["--seconds", "-1"], "expected a number from 0 up, got -1"),
        (layers, ["--seconds", "nan"], "expected a number from 0 up, got nan"),
        (layers, ["--taps", "5"], "--taps is for --shape, which is not given"),
        (layers, ["--largest-map", "9"], "--largest-map is for --full"),
        (layers, ["--shape", "1", "8", "4", "4", "--taps", "4"], "an odd number of --taps"),
        (layers, ["--shape", "1", "8", "0", "4"], "expected a number from 1 up, got 0"),
        (layers, ["--batch", "0"], "expected a number from 1 up, got 0"),
        (layers, ["--compile-mode"], "expected at least one argument"),
        (networks, ["--batch", "-1"], "expected a number from 1 up, got -1"),
        (networks, ["--size", "0"], "expected a number from 1 up, got 0"),
        (calls, ["--plot", "picture.png"], "unrecognized arguments: --plot"),
    ],
)
def test_options_that_make_no_sense(script, arguments, message, capsys):
    with pytest.raises(SystemExit) as done:
        script.main(["--device", "dry-run", *arguments])
    assert done.value.code == 2
    assert message in capsys.readouterr().err


def test_contenders_that_are_not_here_are_named_where_they_are_asked_for(monkeypatch, tmp_path):
    monkeypatch.setattr(contenders, "timm_module", lambda taps: None)
    path = tmp_path / "bench.json"
    arguments = ["--device", "dry-run", "--shape", "2", "4", "2", "2", "--rounds", "1"]
    asked = ["--contender", "eager", "eager", "timm", "triton", "--direction", "forward"]
    assert layers.main([*arguments, *asked, "--output", str(path)]) == 0
    found = json.loads(path.read_text())
    assert [what.split(":")[0] for what in found["left_out"]] == ["triton", "timm"]
    assert found["options"]["contender"] == ["eager", "timm", "triton"]
    assert set(found["rows"][0]["contenders"]) == {"copy", "eager"}
    text = tables.for_terminal(found)
    assert "forward, eager" in text
    assert "timm.layers.eca cannot be imported" in text


@pytest.mark.parametrize("script", [networks, calls])
def test_what_was_measured_before_an_interruption_is_shown(script, monkeypatch, tmp_path, capsys):
    measure, calls = script.measure, []

    def measure_one(*args):
        calls.append(args)
        if len(calls) > 1:
            raise KeyboardInterrupt
        return measure(*args)

    monkeypatch.setattr(script, "measure", measure_one)
    path = tmp_path / "result.json"
    small = ["--network", "mobilenetv2", "--batch", "1", "--size", "32"]
    arguments = ["--device", "dry-run", "--rounds", "1", "--output", str(path)]
    assert script.main([*arguments, *(small if script is networks else [])]) == 130
    assert len(json.loads(path.read_text())["rows"]) == 1
    assert "interrupted: what follows was not measured" in capsys.readouterr().out


@needs_extension
def test_the_layers_script_writes_a_result_that_the_report_reads(monkeypatch, tmp_path, capsys):
    small = [CASE, cases.Case((2, 16, 5, 5), 5, "float32", "contiguous")]
    monkeypatch.setattr(layers, "gpu_cases", lambda: small)
    monkeypatch.setenv("ECA_FUSED_COMMIT", "abc123")
    monkeypatch.setattr(machine, "commit", lambda: None)
    path = tmp_path / "bench.json"
    arguments = ["--device", "dry-run", "--rounds", "3", "--compile-seconds", "0"]
    arguments += ["--direction", *cases.DIRECTIONS, "--output", str(path)]
    assert layers.main(arguments) == 0
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
    assert found["rows"][0]["plan"]["strategy"] in tables.LETTERS.values()
    assert "no time left for it" in found["rows"][0]["left_out"][0]
    assert "3x8x4x4 k=3 bfloat16 channels_last backward" in capsys.readouterr().out
    pytest.importorskip("matplotlib", reason="needs matplotlib: pip install eca-fused[demo]")
    picture = tmp_path / "bench.png"
    assert report.main([str(path), "--plot", str(picture)]) == 0
    text = capsys.readouterr().out
    assert "| 3x8x4x4 k=3 | bfloat16 | channels_last | backward |" in text
    assert "Measured on a dry run" in text
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert picture.stat().st_size > 5_000


@needs_extension
def test_the_layers_script_compiles_both_forms(capsys, tmp_path):
    path = tmp_path / "bench.json"
    shape = ["--shape", "2", "4", "2", "2", "--dtype", "float32"]
    arguments = [*shape, "--device", "dry-run", "--rounds", "1", "--output", str(path)]
    assert layers.main(arguments) == 0
    found = json.loads(path.read_text())["rows"][0]
    assert found["left_out"] == []
    forms = {f"compile {form}, default" for form in contenders.FORMS}
    assert forms <= set(found["contenders"])


@needs_extension
def test_a_form_that_does_not_compile_has_failed(monkeypatch, capsys):
    monkeypatch.setattr(layers, "compiled", does_not_compile)
    arguments = ["--device", "dry-run", "--shape", "2", "4", "2", "2", "--rounds", "1"]
    assert layers.main([*arguments, "--contender", "eager", "compile"]) == 1
    printed = capsys.readouterr()
    assert "compile conv, default: RuntimeError: no compiler for conv" in printed.err
    # A contender that was not asked for has not failed.
    row = next(line for line in printed.out.splitlines() if line.startswith("2x4x2x2 k=3"))
    assert "failed" not in row


@needs_extension
def test_maps_that_fit_the_cache_are_measured_in_it_too(tmp_path):
    path = tmp_path / "bench.json"
    arguments = ["--device", "dry-run", "--shape", "1", "2", "2", "2", "--rounds", "1"]
    arguments += ["--contender", "native", "eager", "--output", str(path)]
    assert layers.main(arguments) == 0
    rows = json.loads(path.read_text())["rows"]
    assert [one["direction"] for one in rows] == ["forward", "backward", "warm forward"]
    assert set(rows[2]["contenders"]) == {"copy", "native", "eager"}


@needs_extension
def test_the_full_grid_names_the_layers_that_are_too_large(tmp_path):
    path = tmp_path / "bench.json"
    arguments = ["--device", "cpu", "--full", "--largest-map", "0.001", "--output", str(path)]
    assert layers.main([*arguments, "--malloc", "default"]) == 0
    found = json.loads(path.read_text())
    assert found["rows"] == []
    assert len(found["left_out"]) == len(cases.all_cases())


@needs_extension
def test_a_failing_contender_shows_in_the_exit_status(monkeypatch, capsys):
    monkeypatch.setattr(layers, "contenders", wrong_contenders)
    arguments = ["--device", "dry-run", "--shape", "2", "4", "2", "2", "--compile-seconds", "0"]
    assert layers.main([*arguments, "--rounds", "1"]) == 1
    printed = capsys.readouterr()
    assert "FAILED 2x4x2x2 k=3 bfloat16 contiguous forward: eager: y of input 0" in printed.out
    assert "FAILED" in printed.err


@needs_extension
def test_the_time_limit_leaves_layers_out(tmp_path):
    path = tmp_path / "bench.json"
    arguments = ["--device", "dry-run", "--seconds", "0", "--layers", "resnet50"]
    assert layers.main([*arguments, "--output", str(path)]) == 0
    found = json.loads(path.read_text())
    assert found["rows"] == []
    assert len(found["left_out"]) == len(cases.NETWORKS["resnet50"])
