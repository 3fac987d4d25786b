"""The main job: its input, its check (and that the check can fail), times, pictures, status."""

import importlib.util
import io
import json
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import eca_fused
from eca_fused import __main__ as program
from eca_fused.__main__ import main
from eca_fused.cli.common import console, environment, photographs
from eca_fused.cli.common.comparison import Comparison
from eca_fused.cli.common.measure import Contender, Spread, interleave, ratio
from eca_fused.cli.common.timing import Effort
from eca_fused.cli.demo import command, network, timing
from eca_fused.cli.demo.check import check_layers, check_network
from eca_fused.cli.demo.comparison import Check, TopFive
from eca_fused.cli.demo.main_job import Settings, run
from eca_fused.ops import native
from helpers.cases import needs_extension
from helpers.processes import ROOT, path_with, python

pytestmark = pytest.mark.usefixtures("one_thread")

CPU = torch.device("cpu")


def settings(output: Path, **changes: Any) -> Settings:
    """A run on images of 64x64 without times."""
    chosen = {
        "batch": 2,
        "dtype": torch.float32,
        "device": CPU,
        "channels_last": False,
        "output": output,
        "effort": None,
        "size": 64,
    }
    return Settings(**(chosen | changes))


def png_size(path: str) -> tuple[int, int]:
    """Width and height; the file must be a PNG."""
    data = Path(path).read_bytes()
    assert data[:8] == b"\x89PNG\r\n\x1a\n"
    return int.from_bytes(data[16:20], "big"), int.from_bytes(data[20:24], "big")


# ---- photographs ----


def test_photographs_are_those_of_scikit_learn() -> None:
    found = photographs.load_photographs()
    assert [p.name for p in found] == ["china", "flower"]
    assert [tuple(p.pixels.shape) for p in found] == [(427, 640, 3)] * 2
    assert all(p.pixels.dtype == torch.uint8 for p in found)


def test_preprocessing_is_torchvisions() -> None:
    transforms = pytest.importorskip("torchvision.transforms.v2", reason="the usual preprocessing")
    usual = transforms.Compose(
        [
            transforms.ToDtype(torch.float32, scale=True),
            transforms.Resize(256, antialias=True),
            transforms.CenterCrop(224),
            transforms.Normalize((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
        ]
    )
    found = photographs.load_photographs()
    upright = photographs.Photograph("upright", found[0].pixels.transpose(0, 1).contiguous())
    images = photographs.preprocess([*found, upright])
    for image, photograph in zip(images, [*found, upright], strict=True):
        torch.testing.assert_close(image, usual(photograph.pixels.permute(2, 0, 1)))


def test_bad_pixels() -> None:
    with pytest.raises(ValueError, match=r"\(H, W, 3\) and dtype uint8, got \(3, 8, 8\)"):
        photographs.crop(torch.zeros(3, 8, 8))


def test_batch_alternates() -> None:
    images = torch.tensor([[1.0], [2.0]])
    assert photographs.fill_batch(images, 5).flatten().tolist() == [1, 2, 1, 2, 1]


# ---- the network ----


def images(size: int = 64) -> Tensor:
    return photographs.preprocess(photographs.load_photographs(), size)


def test_network_is_the_same_every_time_and_leaves_the_generator_alone() -> None:
    torch.manual_seed(5)
    expected = torch.rand(1)
    torch.manual_seed(5)
    first, second = network.build(images(), 3), network.build(images(), 3)
    assert torch.rand(1) == expected
    for a, b in zip(first.state_dict().values(), second.state_dict().values(), strict=True):
        assert torch.equal(a, b)
    other = network.build(images(), 4)
    assert not torch.equal(first.fc.weight, other.fc.weight)


def test_activations_fit_half_precision() -> None:
    plain = network.build(images(), 0)
    assert not plain.training
    for output in network.outputs(plain, images()):
        assert 0.1 < output.abs().max() < 100


def test_gates_are_those_of_the_reference() -> None:
    plain = network.build(images(), 0).double()
    x = images().double()
    found = network.gates(network.fused_copy(plain), x)
    layers = network.last_eca_layers(plain)
    for gate, layer, map_ in zip(found, layers, network.layer_inputs(plain, x), strict=True):
        expected = eca_fused.reference.gate(map_, layer.conv.weight)
        torch.testing.assert_close(gate, expected, rtol=1e-9, atol=1e-9)
        assert gate.std() > 0.01  # the gates differ


# ---- the check ----


def broken(monkeypatch: pytest.MonkeyPatch, change: Callable[[Tensor], Tensor]) -> None:
    """Make the fused forward, in inference and in training, change its result."""
    inference, forward = native.inference, native.forward

    def broken_forward(*args: Any) -> tuple[Tensor, Tensor, Tensor]:
        y, mean, gate = forward(*args)
        return change(y), mean, gate

    monkeypatch.setattr(native, "inference", lambda *args: change(inference(*args)))
    monkeypatch.setattr(native, "forward", broken_forward)


def one_channel(y: Tensor, factor: float) -> Tensor:
    y = y.clone()
    y[:, -1] *= factor
    return y


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("channels_last", [False, True])
def test_check_passes(tmp_path: Path, dtype: torch.dtype, channels_last: bool) -> None:
    out = io.StringIO()
    chosen = settings(tmp_path, dtype=dtype, channels_last=channels_last, batch=3)
    found = run(chosen, out)
    assert found["check"]["passed"], found["check"]["failures"]
    assert found["check"]["failures"] == []
    places = [(c["place"], c["quantity"]) for c in found["check"]["layers"]]
    assert places == [(f"stage {i}", q) for i in (1, 2, 3, 4) for q in ("y", "dx", "dw")]
    assert [c["place"] for c in found["check"]["network"]][-1] == "logits"
    assert [t["photograph"] for t in found["check"]["top5"]] == ["china", "flower"]
    assert found["input"]["shape"] == [3, 3, 64, 64]
    assert found["times"] is None
    assert "The check passed." in out.getvalue()
    assert png_size(found["pictures"]["gates"]) == (1920, 1024)


def test_a_batch_of_one(tmp_path: Path) -> None:
    found = run(settings(tmp_path, batch=1), io.StringIO())
    assert found["check"]["passed"], found["check"]["failures"]
    assert [t["photograph"] for t in found["check"]["top5"]] == ["china"]
    assert png_size(found["pictures"]["gates"]) == (1920, 1024)


@needs_extension
@pytest.mark.parametrize(
    "change",
    [
        pytest.param(lambda y: y * (1 + 1e-5), id="gates 0.001 % too large"),
        pytest.param(lambda y: one_channel(y, 1.001), id="one channel"),
        pytest.param(lambda y: y.roll(1, 1), id="channels shifted"),
        pytest.param(torch.zeros_like, id="zeros"),
        pytest.param(lambda y: y * torch.nan, id="NaN"),
    ],
)
def test_check_finds_a_wrong_forward(
    monkeypatch: pytest.MonkeyPatch, change: Callable[[Tensor], Tensor]
) -> None:
    plain = network.build(images(), 0)
    fused = network.fused_copy(plain)
    broken(monkeypatch, change)
    layers = check_layers(plain, fused, images())
    wrong = [c.place for c in layers if c.quantity == "y" and not c.passed]
    assert wrong == [f"stage {i}" for i in (1, 2, 3, 4)]
    stages, top5 = check_network(plain, fused, images(), ["china", "flower"])
    assert not Check(layers, stages, top5).passed


@needs_extension
@pytest.mark.parametrize("wrong", ["dx", "dw"])
def test_check_finds_a_wrong_backward(monkeypatch: pytest.MonkeyPatch, wrong: str) -> None:
    backward = native.backward

    def broken_backward(*args: Any) -> tuple[Tensor, Tensor]:
        dx, dw = backward(*args)
        return (dx * 1.0001, dw) if wrong == "dx" else (dx, dw * 1.0001)

    plain = network.build(images(), 0)
    fused = network.fused_copy(plain)
    monkeypatch.setattr(native, "backward", broken_backward)
    found = check_layers(plain, fused, images())
    assert {c.quantity for c in found if not c.passed} == {wrong}


@needs_extension
def test_check_finds_a_fault_between_the_layers_that_are_timed() -> None:
    plain = network.build(images(), 0)
    fused = network.fused_copy(plain)
    with torch.no_grad():
        fused.layer3[2].eca.conv.weight += 1e-3
    failed = {c.place for c in check_layers(plain, fused, images()) if not c.passed}
    assert failed == {"stage 3"}
    stages, _ = check_network(plain, fused, images(), ["china", "flower"])
    assert [c.place for c in stages if not c.passed] == ["stage 3", "stage 4", "logits"]


@needs_extension
def test_a_failing_check_is_exit_status_1_and_says_where(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    broken(monkeypatch, lambda y: y * 1.01)
    small = settings(tmp_path)
    monkeypatch.setattr(command, "settings", lambda argv: (small, "--json" in argv))
    assert main([]) == 1
    out, err = capsys.readouterr()
    assert "FAILED: stage 1, y of the ECA layers: fused is 0.01 of the largest value" in out
    assert "NO" in out
    assert "error: the check failed: stage 1, y of the ECA layers: fused is 0.01 of" in err
    assert main(["--json"]) == 1
    document = json.loads(capsys.readouterr().out)
    assert document["check"]["passed"] is False
    assert document["check"]["failures"][0].startswith("stage 1, y of the ECA layers")
    assert document["times"] is None
    assert document["pictures"] == {}


def test_nan_does_not_pass_and_is_valid_json() -> None:
    nan = Comparison("stage 1", "y", 1.0, plain=1e-7, fused=float("nan"), floor=1e-6)
    assert not nan.passed
    assert nan.used == float("inf")
    assert not Comparison("stage 1", "y", 1.0, float("nan"), 0.5, 1e-6).passed
    assert Comparison("stage 1", "y", 1.0, 1e-7, 1.1e-6, 1e-6).passed
    assert not Comparison("stage 1", "y", 1.0, 1e-7, 1.2e-6, 1e-6).passed
    assert command.finite({"a": [float("nan"), 1.0], "b": (float("inf"),)}) == {
        "a": ["nan", 1.0],
        "b": ["inf"],
    }


def test_top_five_tells_near_ties_from_differences() -> None:
    classes = [5, 4, 3, 2, 1]
    assert TopFive("china", classes, classes, 0.0, 0.0).verdict == "same"
    near = TopFive("china", classes, [4, 5, 3, 2, 1], 0.001, 0.002)
    assert (near.verdict, near.passed) == ("same but for near-ties", True)
    far = TopFive("china", classes, [9, 4, 3, 2, 1], 0.5, 0.002)
    assert (far.verdict, far.passed) == ("different", False)
    assert Check([], [], [far]).failures == [
        "top-5 of china: fused gives [9, 4, 3, 2, 1], plain [5, 4, 3, 2, 1], and logits 0.5 apart "
        "have changed places; near-ties end at 0.002"
    ]


# ---- times ----


def test_spread_and_ratio() -> None:
    spread = Spread.of([5.0, 1.0, 2.0, 3.0, 4.0, 100.0])
    assert (spread.median, spread.p20, spread.p80, spread.samples) == (3.5, 2.0, 5.0, 6)
    a, b = (
        Contender("a", None, seconds=[2.0, 9.0, 4.0]),
        Contender("b", None, seconds=[1.0, 3.0, 4]),
    )
    found = ratio(a, b)
    assert found is not None
    assert (found.median, found.p20, found.p80) == (2.0, 1.0, 3.0)
    assert ratio(a, Contender("c", None)) is None


def test_contenders_take_turns_and_one_that_fails_drops_out() -> None:
    order: list[str] = []

    def fail() -> None:
        raise RuntimeError("backend='x' raised:\nNoCompiler: none found\nand more")

    contenders = [
        Contender("a", lambda: order.append("a")),
        Contender("b", fail),
        Contender("c", lambda: order.append("c")),
        Contender("d", None, "left out"),
    ]
    interleave(contenders, CPU, budget_s=0, rounds=(3, 9))
    assert [len(c.seconds) for c in contenders] == [3, 0, 3, 0]
    assert contenders[1].missing == "NoCompiler: none found"
    changes = [name for i, name in enumerate(order) if i == 0 or order[i - 1] != name]
    assert {*order} == {"a", "c"}
    assert len(changes) >= 4  # the two take turns


def test_run_with_times(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_compiler(*args: object, **kwargs: object) -> None:
        raise RuntimeError("no compiler")

    monkeypatch.setattr(torch, "compile", no_compiler)
    out = io.StringIO()
    effort = Effort(0, (2, 2), compile_training=True, compile_network=True)
    found = run(settings(tmp_path, effort=effort), out)
    cases = found["times"]
    assert len(cases) == timing.CASES
    assert [tuple(case["shape"]) for case in cases[::2]] == [
        (2, 256, 16, 16),
        (2, 512, 8, 8),
        (2, 1024, 4, 4),
        (2, 2048, 2, 2),
        (2, 3, 64, 64),
    ]
    for case in cases:
        for name in ("plain", "fused"):
            spread = case["contenders"][name]["seconds"]
            assert 0 < spread["p20"] <= spread["median"] <= spread["p80"]
        assert case["contenders"]["compiled"]["seconds"] is None
    assert cases[0]["ideal_bytes"] == 2 * 4 * 2 * 256 * 16 * 16
    assert cases[1]["ideal_bytes"] == 5 * 4 * 2 * 256 * 16 * 16
    assert cases[0]["contenders"]["compiled"]["missing"] == "RuntimeError: no compiler"
    assert "network inference: RuntimeError: no compiler" in out.getvalue()
    assert "malloc" in out.getvalue()
    assert png_size(found["pictures"]["times"]) == (2240, 832)


def test_malloc_setting_is_stated(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("MALLOC_MMAP_MAX_", "MALLOC_TRIM_THRESHOLD_", "MALLOC_TOP_PAD_", "LD_PRELOAD"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.delenv("GLIBC_TUNABLES", raising=False)
    assert environment.malloc() == "default"
    monkeypatch.setenv("MALLOC_MMAP_MAX_", "0")
    assert environment.malloc() == "MALLOC_MMAP_MAX_=0"


# ---- the command line ----


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--batch", "0"], "expected a whole number from 1 up, got '0'"),
        (["--batch", "two"], "expected a whole number from 1 up, got 'two'"),
        (["--dtype", "int8"], "invalid choice: 'int8'"),
        (["--device", "tpu"], "invalid choice: 'tpu'"),
        (["--fast"], "unrecognized arguments: --fast"),
        (["run", "--fast"], "unrecognized arguments: --fast"),
    ],
)
def test_bad_arguments(argv: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(argv)
    assert ended.value.code == 2
    assert message in capsys.readouterr().err


def test_unknown_command(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["tablets"]) == 2
    assert "expected a command (run" in capsys.readouterr().err


@pytest.mark.parametrize("argv", [["--help"], ["-h"]])
def test_help_lists_the_commands(argv: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(argv) == 0
    text = capsys.readouterr().out
    listed = [line.split()[0] for line in text.splitlines() if line.startswith("  ")]
    assert listed == list(program.COMMANDS)
    assert max(map(len, text.splitlines())) <= 100


@pytest.mark.parametrize("command", program.COMMANDS)
def test_help_of_a_command_shows_examples(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main([command, "--help"])
    assert ended.value.code == 0
    text = capsys.readouterr().out
    assert f"\nusage: python -m eca_fused {command}" in f"\n{text}"
    assert "Exit status: 0" in text
    _, _, examples = text.partition("\nexamples:\n")
    assert examples.startswith(f"  python -m eca_fused {command}")


def test_the_console_script(tmp_path: Path) -> None:
    """The file that pip writes for it, by the name in pyproject.toml."""
    settings = (ROOT / "pyproject.toml").read_text()
    found = re.search(r'\[project.scripts\]\n(\S+) = "(\S+):(\S+)"\n', settings)
    assert found is not None
    path = tmp_path / found[1]
    path.write_text(f"import sys\nfrom {found[2]} import {found[3]}\nsys.exit({found[3]}())\n")

    def run(*arguments: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, str(path), *arguments]
        env = os.environ | {"PYTHONPATH": path_with(ROOT)}
        return subprocess.run(command, env=env, capture_output=True, text=True)

    done = run("plan", "--help")
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith("usage: eca-fused plan")
    assert "\n  eca-fused plan --device" in done.stdout
    done = run("tablets")
    assert (done.returncode, done.stdout) == (2, "")
    assert "expected a command" in done.stderr


def test_a_reader_that_wants_no_more() -> None:
    """As `python -m eca_fused plan | head` does."""
    command = [sys.executable, "-m", "eca_fused", "plan", "--shape", "64x7x7"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        process.stdout.close()
        errors = process.stderr.read()
    assert process.returncode == 141
    assert b"BrokenPipe" not in errors


COMMANDS = {
    "plan": ["plan", "--shape", "64x7x7"],
    "doctor": ["doctor"],
    "json": ["plan", "--shape", "64x7x7", "--json"],
    "tables": ["tables"],
}


def in_a_shell(arguments: list[str], rest: str = "", **environment: str) -> Any:
    command = shlex.join([sys.executable, "-m", "eca_fused", *arguments])
    return subprocess.run(
        ["sh", "-c", f"{command} {rest}"],
        capture_output=True,
        text=True,
        env={**os.environ, **environment},
    )


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs Linux's /dev/full")
@pytest.mark.parametrize("command", COMMANDS)
def test_a_full_disk(command: str) -> None:
    done = in_a_shell(COMMANDS[command], "> /dev/full")
    assert (done.returncode, done.stderr) == (1, "error: No space left on device\n")


@pytest.mark.parametrize("closed", [">&-", ">&- 2>&-", "2>&-", "<&-"])
def test_streams_that_are_closed(closed: str) -> None:
    done = in_a_shell(COMMANDS["plan"], closed)
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.parametrize(
    "arguments",
    [
        ["--batch", "99999999999999999999"],
        ["--batch", "9999999999"],
        ["gates", "--size", "1000000"],
    ],
)
def test_sizes_beyond_any_memory(arguments: list[str], tmp_path: Path) -> None:
    done = in_a_shell([*arguments, "--output", str(tmp_path / "of.png")])
    assert done.returncode in (1, 2)
    assert "Traceback" not in done.stderr
    assert "for these sizes" in done.stderr


def test_an_interruption() -> None:
    code = (
        "import os, signal, sys\n"
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"  # a background job ignores it
        "from eca_fused import __main__ as program\n"
        "program.main = lambda argv: os.kill(os.getpid(), signal.SIGINT)\n"
        "sys.exit(program.process([]))"
    )
    done = python(code)
    assert (done.returncode, done.stderr) == (130, "error: interrupted\n")


def test_a_fault_of_the_program_keeps_its_traceback() -> None:
    code = (
        "import sys, torch\n"
        "from eca_fused import __main__ as program\n"
        "program.main = lambda argv: torch.ones(2) @ torch.ones(3)\n"
        "sys.exit(program.process([]))"
    )
    done = python(code)
    assert done.returncode == 1
    assert "Traceback" in done.stderr


def test_output_that_cannot_be_made(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(SystemExit) as ended:
        main(["--output", str(tmp_path / "file")])
    assert ended.value.code == 2
    assert "cannot make this folder: File exists" in capsys.readouterr().err


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_cuda_where_there_is_none(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["--device", "cuda"])
    assert ended.value.code == 2
    assert "no CUDA device; use --device cpu" in capsys.readouterr().err


def test_defaults(tmp_path: Path) -> None:
    output = ["--output", str(tmp_path / "made" / "here")]
    full, as_json = command.settings([*output, "--device", "cpu"])
    assert (full.batch, full.dtype, full.channels_last, as_json) == (8, torch.float32, False, False)
    assert full.effort == command.FULL
    assert (tmp_path / "made" / "here").is_dir()
    quick, as_json = command.settings(
        [*output, "--device", "cpu", "--quick", "--json", "--channels-last", "--dtype", "float16"]
    )
    assert (quick.batch, quick.dtype, quick.channels_last) == (2, torch.float16, True)
    assert (quick.effort, as_json) == (command.QUICK, True)


def test_missing_packages_are_one_line(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    find_spec = importlib.util.find_spec
    absent = {"matplotlib", "sklearn"}
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if name in absent else find_spec(name)
    )
    assert main(["--output", str(tmp_path)]) == 3
    message = "error: matplotlib, scikit-learn not installed; pip install 'eca-fused[demo]'\n"
    assert capsys.readouterr().err == message


def test_table_for_a_pipe() -> None:
    text = console.table(["what", "ms"], [["a", "1.5"], ["longer", "10"]], io.StringIO())
    assert text.splitlines() == ["what     ms", "-----------", "a       1.5", "longer   10"]


def test_the_whole_job_without_a_compiler(tmp_path: Path) -> None:
    """As a user runs it, on a machine where torch.compile cannot work."""
    env = os.environ | {
        "CXX": str(tmp_path / "no-such-compiler"),
        "OMP_NUM_THREADS": "1",
        "TORCHINDUCTOR_CACHE_DIR": str(tmp_path / "cache"),
    }
    argv = ["--quick", "--json", "--device", "cpu", "--output", str(tmp_path / "out")]
    done = subprocess.run(
        [sys.executable, "-m", "eca_fused", *argv],
        env=env,
        cwd=Path(eca_fused.__file__).parents[1],
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    document = json.loads(done.stdout)
    assert document["check"]["passed"] is True
    assert document["environment"]["torch"] == torch.__version__
    assert document["environment"]["eca_fused"] == eca_fused.__version__
    assert document["input"]["shape"] == [2, 3, 224, 224]
    forward = document["times"][0]["contenders"]
    assert forward["compiled"]["seconds"] is None
    assert "compiler" in forward["compiled"]["missing"].lower()
    assert document["times"][8]["contenders"]["compiled"]["missing"] == "left out by --quick"
    assert forward["fused"]["seconds"]["median"] > 0
    assert sorted(document["pictures"]) == ["gates", "times"]
    for path in document["pictures"].values():
        assert png_size(path)[0] > 1000
    assert "[ 2/13]" in done.stderr  # progress, as plain lines


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("ECA_FUSED_BACKEND", "bogus"),
        ("ECA_FUSED_CPU_CACHE_BYTES", "bogus"),
        ("ECA_FUSED_CPU_CACHE_BYTES", "-1"),
    ],
)
def test_a_wrong_setting_of_the_environment_is_one_line(name: str, value: str) -> None:
    done = in_a_shell(["gates", "--model", "resnet18", "--size", "64"], **{name: value})
    assert done.returncode in (1, 2)
    assert done.stdout == ""
    assert "Traceback" not in done.stderr
    assert f"expected {name} as" in done.stderr.splitlines()[-1]


def test_matplotlibs_backend_does_not_matter(tmp_path: Path) -> None:
    output = tmp_path / "gates.png"
    arguments = ["gates", "--model", "resnet18", "--size", "64", "--output", str(output)]
    done = in_a_shell(arguments, MPLBACKEND="bogus")
    assert done.returncode == 0, done.stderr
    assert png_size(output)[0] > 500


@pytest.mark.parametrize("ending", ["png", "pdf", "svg"])
def test_a_full_disk_under_a_picture(tmp_path: Path, ending: str) -> None:
    (tmp_path / f"full.{ending}").symlink_to("/dev/full")
    output = ["--output", str(tmp_path / f"full.{ending}")]
    done = in_a_shell(["gates", "--model", "resnet18", "--size", "64", *output])
    assert done.returncode != 0
    assert "No space left on device" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize("seconds", ["0.1", "0.4", "0.8"])
def test_an_interruption_while_torch_is_imported(seconds: str) -> None:
    """SIGINT of the shell's own child, which ignores none, ends the program without a traceback."""
    command = ["timeout", "-s", "INT", seconds, sys.executable, "-m", "eca_fused", "plan"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert "Traceback" not in done.stderr
