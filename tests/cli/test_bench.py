"""`python -m eca_fused bench`: checks before times, and files. No time is judged."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch

from eca_fused.__main__ import main
from eca_fused.cli import bench
from eca_fused.cli.common.timing import RESNET50, Effort
from eca_fused.ops import native
from helpers.cases import needs_extension

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two small layers, two rounds, and no compiler."""

    def no_compiler(*_: Any, **__: Any) -> None:
        raise RuntimeError("no compiler")

    monkeypatch.setattr(torch, "compile", no_compiler)
    monkeypatch.setattr(bench, "RESNET50", [(16, 6, 6, 3), (24, 3, 3, 5)])
    monkeypatch.setattr(bench, "QUICK", Effort(0, (2, 2), True, False))


ARGUMENTS = ["bench", "--quick", "--device", "cpu"]


@pytest.mark.usefixtures("small")
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_run(dtype: str, layout: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = tmp_path / "bench.json"
    assert main([*ARGUMENTS, "--dtype", dtype, "--layout", layout, "--output", str(output)]) == 0
    text = capsys.readouterr().out
    assert max(map(len, text.partition("Times\n")[2].splitlines())) <= 100
    assert "stage 2 2x24x3x3 forward + backward" in text
    found = json.loads(output.read_text())
    assert (found["dtype"], found["layout"], found["batch"]) == (dtype, layout, 2)
    assert found["passed"] is True
    assert len(found["checks"]) == 6  # y, dx and dw of two layers
    assert len(found["times"]) == 4
    assert "vs copy" in text
    forward, both = (found["times"][i]["contenders"] for i in (0, 1))
    assert both["copy"]["times_fused"]["median"] > 0
    assert {name for name, one in forward.items() if one["seconds"]} == {"copy", "plain", "fused"}
    assert forward["compiled"]["missing"] == "RuntimeError: no compiler"
    assert all(one["seconds"]["median"] > 0 for one in forward.values() if one["seconds"])


@needs_extension
@pytest.mark.usefixtures("small")
@pytest.mark.parametrize("factor", [1.01, math.nan])
def test_what_is_wrong_is_not_timed(
    factor: float,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    inference = native.inference
    monkeypatch.setattr(
        native,
        "inference",
        lambda x, *others: inference(x, *others) * (factor if x.shape[1] == 24 else 1),
    )
    output = tmp_path / "bench.json"
    assert main([*ARGUMENTS, "--output", str(output)]) == 1
    text, error = capsys.readouterr()
    assert "FAILED and not timed: stage 2, y of the ECA layers" in text
    assert "error: the check failed: stage 2, y" in error
    found = json.loads(output.read_text())
    assert found["passed"] is False
    assert {case["place"] for case in found["times"]} == {"stage 1"}


@pytest.mark.usefixtures("small")
def test_a_picture(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib", reason="draws with it: pip install matplotlib")
    path = tmp_path / "bench.png"
    assert main([*ARGUMENTS, "--picture", str(path)]) == 0
    assert path.read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"


def test_a_picture_without_matplotlib(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(bench, "missing_packages", lambda _: ["matplotlib"])
    assert main([*ARGUMENTS, "--picture", "bench.png"]) == 3
    assert "error: matplotlib not installed; pip install" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--batch", "0"], "expected a whole number from 1 up"),
        (["--output", "none/b.json"], "there is no folder none"),
        (["--output", "/"], "got the folder /"),
        (["--picture", "bench.txt"], "expected a file that ends with .pdf, .png, .svg"),
        (["--dtype", "int8"], "invalid choice"),
    ],
)
def test_bad_arguments(argv: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main([*ARGUMENTS, *argv])
    assert ended.value.code == 2
    assert message in capsys.readouterr().err


def test_the_layers_are_those_of_the_network() -> None:
    assert [layer[0] for layer in RESNET50] == [256, 512, 1024, 2048]
    assert "".join(str(layer[3]) for layer in RESNET50) == "3557"
