"""`python -m eca_fused gates`: whose gates they are, the picture, and what it refuses."""

import importlib.util
import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from eca_fused import ECALayer, attention
from eca_fused.__main__ import main
from eca_fused.cli.common import photographs
from eca_fused.cli.common.networks import hooked
from eca_fused.cli.gates import class_gates, command as gates_command
from eca_fused.models import BasicBlock, ResNet, mobilenetv2, resnet

image = pytest.importorskip("PIL.Image", reason="needs pillow: make test installs it")
pytest.importorskip("matplotlib", reason="needs matplotlib: make test installs it")

from eca_fused.cli.gates import pictures  # noqa: E402

pytestmark = pytest.mark.usefixtures("one_thread")

SMALL = ["--model", "resnet18", "--size", "64"]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Two images of noise in `sharks`, one of stripes in `ambulance.png`."""
    generator = torch.Generator().manual_seed(0)
    (tmp_path / "sharks").mkdir()
    for name in ("a.png", "b.JPG"):
        noise = torch.randint(256, (70, 90, 3), generator=generator, dtype=torch.uint8)
        image.fromarray(noise.numpy()).save(tmp_path / "sharks" / name)
    stripes = torch.zeros(80, 80, 3, dtype=torch.uint8)
    stripes[::8] = 255
    image.fromarray(stripes.numpy()).save(tmp_path / "ambulance.png")
    return tmp_path


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The figures that are saved."""
    figures = []
    save = pictures.Figure.savefig

    def spy(self: Any, path: Any, **options: Any) -> None:
        figures.append(self)
        save(self, path, **options)

    monkeypatch.setattr(pictures.Figure, "savefig", spy)
    return figures


def refused(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    """The message of a command that ends with exit status 2."""
    with pytest.raises(SystemExit) as ended:
        main(["gates", *SMALL, *arguments])
    assert ended.value.code == 2
    return capsys.readouterr().err


def document(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> dict[str, Any]:
    assert main(["gates", *SMALL, "--json", *arguments]) == 0
    found: dict[str, Any] = json.loads(capsys.readouterr().out)
    return found


# ---- whose gates ----


@pytest.mark.parametrize("name", [name for name in gates_command.GATED if name != "cbam"])
def test_gates_are_what_the_layer_multiplies_by(name: str) -> None:
    layer = attention.make(name, 64, dtype=torch.float64).eval()
    x = torch.randn(3, 64, 6, 5, dtype=torch.float64)
    with torch.no_grad():
        ratio = layer(x) / x
    gates = class_gates.gates_of(layer, x)
    torch.testing.assert_close(ratio, gates[:, :, None, None].expand_as(x))
    assert not gates.requires_grad


def test_gates_of_cbam_are_those_of_the_channels() -> None:
    layer = attention.CBAM(64, dtype=torch.float64).eval()
    with torch.no_grad():
        layer.conv.weight.zero_()  # every pixel's gate is a half
        x = torch.randn(3, 64, 6, 5, dtype=torch.float64)
        ratio = 2 * layer(x) / x
    gates = class_gates.gates_of(layer, x)
    torch.testing.assert_close(ratio, gates[:, :, None, None].expand_as(x))


def test_gates_of_circular_layers() -> None:
    layer = ECALayer(kernel_size=5, padding_mode="circular", dtype=torch.float64)
    x = torch.randn(2, 8, 3, 3, dtype=torch.float64)
    with torch.no_grad():
        ratio = layer(x) / x
    gates = class_gates.gates_of(layer, x)
    torch.testing.assert_close(ratio, gates[:, :, None, None].expand_as(x))


def test_a_layer_without_gates() -> None:
    with pytest.raises(TypeError, match=r"that has gates, got Identity"):
        class_gates.gates_of(nn.Identity(), torch.ones(1, 2, 3, 3))


def test_the_last_layers_of_the_stages() -> None:
    with torch.device("meta"):
        assert list(class_gates.last_layers(resnet(50))) == [
            *("layer1.2.eca", "layer2.3.eca", "layer3.5.eca", "layer4.2.eca")
        ]
        assert list(class_gates.last_layers(resnet(18, "gsop"))) == [
            *("layer1.1.gsop", "layer2.1.gsop", "layer3.1.gsop", "layer4.1.gsop")
        ]
        found = class_gates.last_layers(mobilenetv2("se"))
    places = (1, 3, 6, 10, 13, 16, 17)  # of the last blocks of stages of 1, 2, 3, 4, 3, 3 and 1
    assert [name.split(".")[1] for name in found] == [str(place) for place in places]
    assert all(type(layer) is attention.SE for layer in found.values())


def test_gates_of_a_class_are_the_mean_over_its_images(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(class_gates, "BATCH", 2)  # the third image has its own batch
    model = resnet(18, num_classes=2, dtype=torch.float64).eval()
    photographs_ = [photographs.read_photograph(path) for path in sorted(folder.glob("*/*"))]
    x = photographs.preprocess([*photographs_, photographs_[0]], 64).double()
    layers = class_gates.last_layers(model)
    want: dict[int, Tensor] = {}

    def measure(index: int, layer: nn.Module, inputs: tuple[Tensor], y: Tensor) -> None:
        want[index] = (y * inputs[0]).sum((2, 3)) / inputs[0].square().sum((2, 3))

    with torch.no_grad(), hooked(list(layers.values()), measure):
        model(x)
    batches = class_gates.batches
    monkeypatch.setattr(class_gates, "batches", lambda *a: (b.double() for b in batches(*a)))
    classes = {"sharks": [*photographs_, photographs_[0]], "one": photographs_[:1]}
    found = class_gates.mean_gates(model, classes, 64)
    assert [stage.layer for stage in found] == list(layers)
    for index, stage in enumerate(found):
        torch.testing.assert_close(stage.gates[0], want[index].mean(0))
        torch.testing.assert_close(stage.gates[1], want[index][0])
    for stage in class_gates.mean_gates(model, {"one": photographs_[:1]}, 64):
        assert stage.difference is None


# ---- the command ----


def test_random_weights_say_so(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], drawn: list[Any]
) -> None:
    output = tmp_path / "made" / "gates.png"
    arguments = [str(folder / "sharks"), f"ambulance={folder / 'ambulance.png'}"]
    assert main(["gates", *SMALL, *arguments, "--output", str(output)]) == 0
    printed = capsys.readouterr().out
    notice = "random weights: the gates say nothing about the classes"
    assert printed.startswith(f"ResNet-18 with ECA, {notice}\n")
    assert "numbers of images: sharks (2), ambulance (1)" in printed
    assert [line.split()[0] for line in printed.splitlines() if line.startswith("layer")] == [
        *("layer", "layer1.1.eca", "layer2.1.eca", "layer3.1.eca", "layer4.1.eca")
    ]
    (figure,) = drawn
    assert notice[1:] in figure.get_suptitle()
    panels = [axes for axes in figure.axes if axes.get_visible()]
    assert len(panels) == 4
    assert {len(axes.get_lines()) for axes in panels} == {2}
    (legend,) = figure.legends
    labels = [text.get_text() for text in legend.get_texts()]
    assert labels == ["sharks (2 images)", "ambulance (1 image)"]
    assert output.read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"


def test_lines_are_the_gates(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], drawn: list[Any]
) -> None:
    paths = [str(folder / "sharks"), str(folder / "ambulance.png")]
    for order in ("channel", "gate"):
        arguments = [*paths, "--order", order, "--output", str(tmp_path / "g.svg")]
        found = document(arguments, capsys)
        panels = [axes for axes in drawn.pop().axes if axes.get_visible()]
        for axes, stage in zip(panels, found["stages"], strict=True):
            gates = torch.tensor(list(stage["gates"].values()), dtype=torch.float64)
            assert list(stage["gates"]) == ["sharks", "ambulance"]
            assert 0 < gates.min() < gates.max() < 1
            # The weights are random, but the gates can be told apart.
            assert gates.std() > 0.01
            spread = (gates[0] - gates[1]).abs().mean().item()
            assert stage["difference"] == pytest.approx(spread)
            if order == "gate":
                gates = gates[:, gates.mean(0).argsort()]
            for line, values in zip(axes.get_lines(), gates, strict=True):
                assert line.get_ydata().tolist() == values.tolist()
        assert found["classes"]["sharks"] == [
            str(folder / "sharks" / name) for name in ("a.png", "b.JPG")
        ]


def test_the_weights_of_a_checkpoint(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], drawn: list[Any]
) -> None:
    model = resnet(18)
    with torch.no_grad():
        for parameter in class_gates.last_layers(model)["layer2.1.eca"].parameters():
            parameter.zero_()
    torch.save(model.state_dict(), tmp_path / "own.pt")
    arguments = [str(folder / "sharks"), "--checkpoint", str(tmp_path / "own.pt")]
    found = document([*arguments, "--output", str(tmp_path / "g.png")], capsys)
    assert found["weights"] == str(tmp_path / "own.pt")
    assert set(found["stages"][1]["gates"]["sharks"]) == {0.5}  # the sigmoid of zero
    assert len(set(found["stages"][2]["gates"]["sharks"])) > 200
    assert "Weights of own.pt" in drawn[0].get_suptitle()
    assert "andom" not in drawn[0].get_suptitle()


def test_the_network_is_that_of_the_checkpoint(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = ResNet(BasicBlock, (1, 2, 1, 1), "3535", 7).half()
    torch.save({"state_dict": model.state_dict()}, tmp_path / "own.pt")
    arguments = [str(folder / "sharks"), "--checkpoint", str(tmp_path / "own.pt"), "--size", "64"]
    assert main(["gates", *arguments, "--output", str(tmp_path / "g.png")]) == 0
    printed = capsys.readouterr().out
    assert printed.startswith("ResNet-12 with ECA, weights of own.pt\n")
    assert "\nlayer2.1.eca       128 " in printed


def test_the_photographs_of_the_main_job_without_arguments(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], drawn: list[Any]
) -> None:
    arguments = ["--model", "mobilenetv2", "--attention", "se", "--output", str(tmp_path / "g.pdf")]
    found = document(arguments, capsys)
    assert found["classes"] == {"china": ["china"], "flower": ["flower"]}
    assert [len(s["gates"]["china"]) for s in found["stages"]] == [16, 24, 32, 64, 96, 160, 320]
    assert sum(axes.get_visible() for axes in drawn[0].axes) == 7


def test_photographs_are_turned_and_grey_ones_read(tmp_path: Path) -> None:
    wide = torch.zeros(4, 6, 3, dtype=torch.uint8)
    wide[:, :3] = 200
    turned = image.Exif()
    turned[274] = 6  # the camera's left is up
    image.fromarray(wide.numpy()).save(tmp_path / "turned.png", exif=turned)
    found = photographs.read_photograph(tmp_path / "turned.png")
    assert found.name == "turned"
    assert torch.equal(found.pixels, wide.transpose(0, 1))
    image.fromarray(wide[:, :, 0].numpy()).save(tmp_path / "grey.png")
    assert torch.equal(photographs.read_photograph(tmp_path / "grey.png").pixels, wide)


# ---- bad use ----


def test_images_that_cannot_be_used(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (folder / "empty" / "inside").mkdir(parents=True)
    (folder / "text.png").write_text("no image")
    whole = (folder / "sharks" / "a.png").read_bytes()
    (folder / "cut.png").write_bytes(whole[: len(whole) // 2])
    output = ["--output", str(folder / "out" / "g.png")]
    for argument, message in (
        ("nowhere.png", "expected an image or a folder of images, there is no nowhere.png"),
        ("shark=nowhere.png", "there is no nowhere.png"),
        ("=nowhere.png", "as CLASS=path, got '=nowhere.png'"),
        (str(folder / "empty"), "expected images in the folder"),
        (str(folder / "text.png"), "text.png as an image, cannot read it: UnidentifiedImageError"),
        (str(folder / "cut.png"), "cut.png as an image, cannot read it"),
    ):
        assert message in refused([argument, *output], capsys)
    many = [f"{i}={folder / 'ambulance.png'}" for i in range(15)]
    assert "expected at most 14 classes" in refused([*many, *output], capsys)
    assert not (folder / "out").exists()


def test_checkpoints_that_cannot_be_used(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    torch.save(resnet(18, "se").state_dict(), folder / "se.pt")
    torch.save(resnet(18, "none").state_dict(), folder / "none.pt")
    (folder / "text.pt").write_text("no checkpoint")
    for name, message in (
        ("nowhere.pt", "No such file or directory: "),
        ("text.pt", "text.pt"),
        ("se.pt", "se.pt"),
    ):
        arguments = [str(folder / "sharks"), "--checkpoint", str(folder / name)]
        assert message in refused(arguments, capsys)
    for name, message in (
        ("none.pt", "none.pt as weights of a network with attention, got none"),
        ("se.pt", "if its attention is not ECA, give --model and --attention"),
    ):
        with pytest.raises(SystemExit, match="2"):
            main(["gates", str(folder / "sharks"), "--checkpoint", str(folder / name)])
        assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--size", "32"], "expected a whole number of pixels from 64 to 1048576, got '32'"),
        (["--size", "9" * 20], "of pixels from 64 to 1048576, got '99999999999999999999'"),
        (["--model", "vgg"], "invalid choice: 'vgg'"),
        (["--attention", "none"], "invalid choice: 'none'"),
        (["--output", "gates.txt"], "expected a file that ends with .pdf, .png, .svg"),
    ],
)
def test_bad_arguments(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert message in refused(arguments, capsys)


def test_a_picture_that_cannot_be_written(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (folder / "g.png").mkdir()
    arguments = [str(folder / "sharks"), "--output", str(folder / "g.png")]
    assert "g.png: cannot write there: Is a directory" in refused(arguments, capsys)


def test_missing_packages_are_one_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    find_spec = importlib.util.find_spec
    absent = {"matplotlib", "sklearn"}
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if name in absent else find_spec(name)
    )
    for arguments, names in (([], "matplotlib, scikit-learn"), (["x.png"], "matplotlib")):
        assert main(["gates", *arguments]) == 3
        message = f"error: {names} not installed; pip install 'eca-fused[demo]'\n"
        assert capsys.readouterr().err == message


@pytest.mark.parametrize(
    ("mode", "suffix"), [("I;16", "png"), ("I;16", "tif"), ("I", "tif"), ("I", "pgm")]
)
def test_grey_levels_of_16_bits_are_scaled(tmp_path, mode, suffix):
    levels = torch.arange(0, 65536, 257, dtype=torch.int32).reshape(16, 16)
    file = tmp_path / f"grey.{suffix}"
    grey = image.fromarray(levels.numpy())
    (grey.convert("I;16") if mode == "I;16" else grey).save(file)
    pixels = photographs.read_photograph(file).pixels
    assert pixels[..., 0].flatten().tolist() == list(range(256))
    assert (pixels == pixels[..., :1]).all()


@pytest.mark.parametrize(
    ("levels", "message"),
    [
        (torch.tensor([[0.0, 1.0]]), "grey levels are floating-point numbers; save it"),
        (torch.tensor([[-1, 7]], dtype=torch.int32), "grey levels go from -1 to 7; save it"),
        (torch.tensor([[0, 70000]], dtype=torch.int32), "grey levels go from 0 to 70000; save it"),
    ],
)
def test_grey_levels_whose_white_is_unknown_are_refused(tmp_path, levels, message):
    image.fromarray(levels.numpy()).save(tmp_path / "grey.tif")
    with pytest.raises(ValueError, match=message):
        photographs.read_photograph(tmp_path / "grey.tif")


@pytest.mark.skipif(os.name != "posix", reason="needs file names that may be any bytes")
def test_class_names_that_are_no_mathematics_and_no_unicode(tmp_path, capsys, monkeypatch):
    folder = Path(os.fsdecode(os.fsencode(tmp_path) + b"/sh\xe4rk"))
    try:
        folder.mkdir()
    except OSError:
        pytest.skip("needs a file system whose names may be any bytes")
    image.new("RGB", (80, 80), "red").save(folder / "a.png")
    other = tmp_path / "b.png"
    image.new("RGB", (80, 80), "blue").save(other)
    output = tmp_path / "gates.png"
    arguments = [*SMALL, "--output", str(output), str(folder), f"$^{{={other}"]
    assert main(["gates", *arguments]) == 0
    assert "sh\\xe4rk (1), $^{ (1)" in capsys.readouterr().out
    assert image.open(output).size[0] > 100
