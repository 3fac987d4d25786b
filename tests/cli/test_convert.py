"""`python -m eca_fused convert`: its report, the file that it writes, and what it refuses."""

import json
import os
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from eca_fused import models
from eca_fused.__main__ import main
from eca_fused.cli import convert as command
from eca_fused.models import BasicBlock, ResNet
from helpers.processes import ROOT, path_with, python

pytestmark = pytest.mark.usefixtures("one_thread")

SIZES = (3, 9, 5, 5)


def small() -> ResNet:
    return ResNet(BasicBlock, (1, 1, 1, 1), SIZES, 10)


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    """As a training script under DataParallel saves it."""
    state = {f"module.{name}": tensor for name, tensor in small().state_dict().items()}
    torch.save({"state_dict": state, "epoch": 7}, tmp_path / "weights.pth")
    return tmp_path / "weights.pth"


def run(capsys: pytest.CaptureFixture[str], *argv: object) -> dict[str, Any]:
    """The JSON document of a run."""
    assert main(["convert", *map(str, argv), "--json"]) == 0
    return json.loads(capsys.readouterr().out)  # type: ignore[no-any-return]


def refused(capsys: pytest.CaptureFixture[str], *argv: object, status: int = 2) -> str:
    """The message of a run that ends with an error."""
    assert main(["convert", *map(str, argv)]) == status
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("error: ")
    return err


# ---- the report ----


def test_a_checkpoint(checkpoint: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = run(capsys, checkpoint)
    assert found["network"] == "ResNet-10 with attention 'eca'"
    layers = [f"layer{i}.0.eca" for i in (1, 2, 3, 4)]
    assert found["converted"] == dict.fromkeys(layers, "ECALayer")
    assert (found["blocks"], found["left"], found["output"]) == ({}, {}, None)
    assert found["parameters"] == sum(p.numel() for p in small().parameters())
    assert len(run(capsys, checkpoint, "--tails")["blocks"]) == 4


def test_the_text(checkpoint: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["convert", str(checkpoint), "--tails"]) == 0
    text = capsys.readouterr().out
    assert "ResNet-10 with attention 'eca'" in text
    assert "convert(model, tails=True): converted 4, blocks 4, left 0" in text


def test_a_network_of_timm(capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("timm", reason="builds the network: pip install timm")
    found = run(capsys, "timm:ecaresnet26t", "--classes", 3)
    assert set(found["converted"].values()) == {"EcaModule"}
    assert len(found["converted"]) == 8
    assert found["class"] == "timm.models.resnet.ResNet"


def test_what_is_left_has_its_reason(capsys: pytest.CaptureFixture[str], monkeypatch: Any) -> None:
    timm = pytest.importorskip("timm", reason="builds the network: pip install timm")
    create = timm.create_model

    def with_another_gate(name: str, **options: Any) -> Any:
        model = create(name, **options)
        eca = model.layer2[0].se
        forward = eca.forward
        eca.forward = lambda x: 0.5 * forward(x)
        return model

    monkeypatch.setattr(timm, "create_model", with_another_gate)
    found = run(capsys, "timm:ecaresnet26t")
    assert len(found["converted"]) == 7
    assert list(found["left"]) == ["layer2.0.se"]
    assert found["left"]["layer2.0.se"].startswith("EcaModule: ")
    assert main(["convert", "timm:ecaresnet26t"]) == 0
    assert "left EcaModule: " in capsys.readouterr().out


def test_nothing_to_convert_is_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    torch.save(models.resnet(18, "none").state_dict(), tmp_path / "plain.pth")
    assert main(["convert", str(tmp_path / "plain.pth")]) == 0
    text = capsys.readouterr().out
    assert "no ECA modules found" in text
    assert "eca_fused would not change this network" in text


# ---- the file ----


@pytest.mark.parametrize("ending", ["pth", "safetensors"])
def test_the_file_loads_without_eca_fused(
    checkpoint: Path, tmp_path: Path, ending: str, capsys: pytest.CaptureFixture[str]
) -> None:
    if ending == "safetensors":
        pytest.importorskip("safetensors", reason="writes such a file: pip install safetensors")
    output = tmp_path / f"plain.{ending}"
    assert run(capsys, checkpoint, "--tails", "--output", output)["output"] == str(output)
    code = (
        "import sys, torch\n"
        "sys.modules['eca_fused'] = None\n"
        "path = sys.argv[1]\n"
        "if path.endswith('pth'):\n"
        "    found = torch.load(path, weights_only=True)\n"
        "else:\n"
        "    from safetensors.torch import load_file\n"
        "    found = load_file(path)\n"
        "assert type(found) is dict\n"
        "torch.save(found, path + '.again')\n"
    )
    done = python(code, output)
    assert done.returncode == 0, done.stderr
    again = torch.load(f"{output}.again")
    before = torch.load(checkpoint)["state_dict"]
    assert {f"module.{name}" for name in again} == before.keys()
    assert all(torch.equal(tensor, before[f"module.{name}"]) for name, tensor in again.items())


def test_a_file_of_timms_names_keeps_them(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    timm = pytest.importorskip("timm", reason="builds the network: pip install timm")
    model = timm.create_model("ecaresnet26t", num_classes=3)
    torch.save(model.state_dict(), tmp_path / "timms.pth")
    found = run(capsys, tmp_path / "timms.pth", "--output", tmp_path / "plain.pth")
    assert found["network"] == "ecaresnet26t of timm"
    other = timm.create_model("ecaresnet26t", num_classes=3)
    other.load_state_dict(torch.load(tmp_path / "plain.pth"))
    for a, b in zip(model.state_dict().values(), other.state_dict().values(), strict=True):
        assert torch.equal(a, b)


def test_nan_is_written_as_it_is(tmp_path: Path) -> None:
    values = {"a": torch.tensor([float("nan"), 1.0]), "scalar": torch.tensor(3)}
    command.write(tmp_path / "nan.pth", values)
    assert torch.load(tmp_path / "nan.pth")["a"].isnan().tolist() == [True, False]


def test_a_file_that_exists_is_kept(
    checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "mine.pth").write_text("mine")
    message = refused(capsys, checkpoint, "--output", tmp_path / "mine.pth")
    assert "exists; choose another name" in message
    assert (tmp_path / "mine.pth").read_text() == "mine"


@pytest.mark.parametrize("ending", ["pth", "safetensors"])
def test_a_full_disk_leaves_nothing(checkpoint: Path, tmp_path: Path, ending: str) -> None:
    if ending == "safetensors":
        pytest.importorskip("safetensors", reason="writes such a file: pip install safetensors")
    (tmp_path / "out").mkdir()
    code = (
        "import resource, sys\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))\n"
        "from eca_fused.__main__ import process\n"
        "sys.exit(process(['convert', *sys.argv[1:]]))"
    )
    output = tmp_path / "out" / f"plain.{ending}"
    done = python(code, checkpoint, "--output", output, PYTHONPATH=path_with(ROOT))
    assert done.returncode == 2, done.stderr
    assert "cannot be written, and nothing is left of it" in done.stderr
    assert "Traceback" not in done.stderr
    assert list((tmp_path / "out").iterdir()) == []


def test_a_file_that_reads_otherwise_is_not_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch, "load", lambda *_, **__: {"a": torch.zeros(2)})
    with pytest.raises(command.Refused, match="does not read as it was written"):
        command.write(tmp_path / "a.pth", {"a": torch.ones(2)})
    assert list(tmp_path.iterdir()) == []


def test_an_interruption_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "replace", interrupted)
    with pytest.raises(KeyboardInterrupt):
        command.write(tmp_path / "a.pth", {"a": torch.ones(2)})
    assert list(tmp_path.iterdir()) == []


def test_folders_that_cannot_be_written_to(
    checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    message = refused(capsys, checkpoint, "--output", tmp_path / "none" / "a.pth")
    assert "there is no folder" in message


# ---- what is refused ----


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["{folder}/none.pth"], "there is no such file"),
        (["{folder}"], "as a file of weights, got a folder"),
        (["{folder}/text.pth"], "is not a complete file of torch.save()"),
        (["{folder}/list.pth"], "expected a state dict, names to tensors"),
        (["{folder}/other.pth"], "got tensors named a, b and so on; "),
        (["{folder}/weights.pth", "--key", "ema"], "expected an entry 'ema'"),
        (["{folder}/weights.pth", "--arch", "resnet18"], "expected --arch as timm:NAME"),
        (["{folder}/weights.pth", "--pretrained"], "--pretrained is for timm:NAME"),
        (["{folder}/weights.pth", "--classes", "3"], "the file decides"),
        (["timm:ecaresnet26t", "--key", "ema"], "--key is for a file of weights"),
        (["timm:ecaresnet26t", "--output", "{folder}/x.pth"], "would be random"),
    ],
)
def test_refusals(
    argv: list[str],
    message: str,
    checkpoint: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    (tmp_path / "text.pth").write_text("no weights")
    torch.save([1, 2], tmp_path / "list.pth")
    torch.save({"a": torch.ones(1), "b": torch.ones(1)}, tmp_path / "other.pth")
    before = sorted(tmp_path.iterdir())
    assert message in refused(capsys, *(word.format(folder=tmp_path) for word in argv))
    assert sorted(tmp_path.iterdir()) == before


def test_names_that_timm_does_not_know(
    checkpoint: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("timm", reason="knows the names: pip install timm")
    message = refused(capsys, "timm:ecaresnet26")
    assert "got 'ecaresnet26'; similar are ecaresnet26t" in message
    assert "is timm:ecaresnet26t" in refused(capsys, "ecaresnet26t")
    message = refused(capsys, checkpoint, "--arch", "timm:ecaresnet26t")
    assert "does not fit" in message
    assert "missing: " in message


def test_the_number_of_classes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    timm = pytest.importorskip("timm", reason="builds the network: pip install timm")
    torch.save(timm.create_model("eca_resnet33ts", num_classes=3).state_dict(), tmp_path / "w.pth")
    arch = ["--arch", "timm:eca_resnet33ts"]
    message = refused(capsys, tmp_path / "w.pth", *arch)
    assert "the number of its classes is --classes" in message
    assert "expected (1000, " in message
    assert run(capsys, tmp_path / "w.pth", *arch, "--classes", 3)["left"] == {}


def test_without_timm(
    checkpoint: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "timm", None)
    assert "timm" in refused(capsys, "timm:ecaresnet26t", status=3)
    assert "timm" in refused(capsys, checkpoint, "--arch", "timm:ecaresnet26t", status=3)
    assert len(run(capsys, checkpoint)["converted"]) == 4
