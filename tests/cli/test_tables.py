"""`python -m eca_fused tables`, and the counts under it: the poster's figures, thop's rules."""

import copy
import importlib.util
import json
import sys
from dataclasses import replace
from decimal import Decimal
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from eca_fused import attention
from eca_fused.__main__ import main
from eca_fused.cli.tables import command as tables_command, published
from eca_fused.cli.tables.count import MMDETECTION, count_flops, count_parameters
from eca_fused.models import ResNet, mobilenetv2, resnet

needs_thop = "thop's own count is compared: pip install thop"
ROWS = {(row.network, row.method): row for row in published.BACKBONES}
needs_torchvision = pytest.mark.skipif(
    importlib.util.find_spec("torchvision") is None,
    reason="the detectors are made of torchvision's parts: make test",
)


def document(capsys: pytest.CaptureFixture[str]) -> dict[str, Any]:
    assert main(["tables", "--format", "json"]) == 0
    return json.loads(capsys.readouterr().out)  # type: ignore[no-any-return]


@pytest.fixture
def two_rows(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """The tables with two networks and no detector, which are quick to count."""
    rows = (ROWS["ResNet-18", "ECA"], replace(ROWS["ResNet-18", "SENet"], note="a note"))
    monkeypatch.setattr(tables_command, "BACKBONES", rows)
    monkeypatch.setattr(tables_command, "DETECTORS", ())
    return monkeypatch


def test_the_reported_figures_add_up_to_the_posters() -> None:
    """Control totals of the poster's columns: a typing error in one figure changes one."""

    def totals(rows: Any, *columns: str) -> list[str]:
        return [str(sum(Decimal(getattr(row, column)) for row in rows)) for column in columns]

    assert totals(published.METHODS, "top1", "top5") == ["768.07", "932.90"]
    columns = ("parameters", "flops", "top1", "top5")
    assert totals(published.BACKBONES, *columns) == ["436.394", "1029.240", "1419.79", "1750.78"]
    columns = ("parameters", "flops", "ap")
    assert totals(published.DETECTORS, *columns) == ["555.44", "2851.65", "355.5"]


def test_every_figure_is_within_its_tolerance(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tables_command, "DETECTORS", ())  # they have a test of their own
    found = document(capsys)
    assert len(found["methods"]) == 10
    for row in found["methods"]:
        assert row["parameters"] == row["parameters_reported"], row["method"]
    assert len(found["backbones"]) == 19
    loose = []
    for row in found["backbones"]:
        if row["agrees"] is None:
            loose.append((row["backbone"], row["method"]))
            continue
        network, method = row["backbone"], row["method"]
        printed = ROWS[network, method].parameters
        digits = len(printed.split(".")[1])
        assert f"{row['parameters'] / 2**20:.{digits}f}" == printed, (network, method)
        tolerance = 0.025 if network == "MobileNetV2" else 0.005
        assert row["flops"] == pytest.approx(row["flops_reported"], rel=tolerance)
        assert row["agrees"] is True
    assert loose == [("ResNet-50", "GSoP-Net")]
    plain = {r["backbone"]: r["parameters"] for r in found["backbones"] if r["method"] == "vanilla"}
    assert plain == {
        "ResNet-18": 11_689_512,
        "ResNet-34": 21_797_672,
        "ResNet-50": 25_557_032,
        "ResNet-101": 44_549_160,
        "MobileNetV2": 3_504_872,
    }


def test_accuracy_is_only_ever_reported(capsys: pytest.CaptureFixture[str], two_rows: Any) -> None:
    found = document(capsys)
    assert found["accuracy"] == "as reported, not measured here"
    for row in (*found["methods"], *found["backbones"]):
        assert {key for key in row if "top" in key} == {"top1_reported", "top5_reported"}
    for form in ("text", "markdown"):
        assert main(["tables", "--format", form]) == 0
        text = capsys.readouterr().out
        assert "nothing of it was measured here" in text
        assert text.count("Top-1") == text.count("Top-1 reported") == 2


def test_text_and_markdown(capsys: pytest.CaptureFixture[str], two_rows: Any) -> None:
    assert main(["tables"]) == 0
    lines = capsys.readouterr().out.splitlines()
    row = next(line.split() for line in lines if line.startswith("ResNet-18") and "SENet" in line)
    assert row[:6] == ["ResNet-18", "SENet", "[1]", "11.231", "11.231", "0.000"]
    assert lines[-1] == "[1] a note."
    assert main(["tables", "--format", "markdown"]) == 0
    lines = capsys.readouterr().out.splitlines()
    tables = [line for line in lines if line.startswith("|")]
    assert len(tables) == 2 + 10 + 2 + 2 + 2
    assert "| ECA | s(C1D_k(y)) | k = 3 | 3 | 3 | 0 | yes | 77.43 | 93.65 |" in tables
    start = "| ResNet-18 | ECA | 11.148 | 11.148 | 0.000 | 1.700 G |"
    assert sum(line.startswith(start) for line in tables) == 1


@pytest.mark.parametrize(
    "changes", [{"parameters": "11.149"}, {"flops": "1.709"}, {"flops": "1.690"}]
)
def test_a_backbone_outside_its_tolerance_fails(
    capsys: pytest.CaptureFixture[str], two_rows: pytest.MonkeyPatch, changes: dict[str, str]
) -> None:
    rows = tables_command.BACKBONES
    two_rows.setattr(tables_command, "BACKBONES", (replace(rows[0], **changes), rows[1]))
    assert main(["tables"]) == 1
    captured = capsys.readouterr()
    assert " NO " in captured.out
    assert captured.err == "error: 1 rows are outside their tolerance: agrees is NO\n"


def test_a_method_outside_its_formula_fails(
    capsys: pytest.CaptureFixture[str], two_rows: pytest.MonkeyPatch
) -> None:
    wrong = replace(published.METHODS[1], parameters=lambda c: 2 * c * c // 16 + (c == 2048))
    two_rows.setattr(tables_command, "METHODS", (wrong,))
    assert main(["tables", "--format", "json"]) == 1
    assert json.loads(capsys.readouterr().out)["methods"][0]["agrees"] is False


def test_bad_arguments(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        main(["tables", "--format", "html"])
    assert "--format" in capsys.readouterr().err


# ---- detectors ----


@needs_torchvision
def test_detectors_agree_in_every_digit(capsys: pytest.CaptureFixture[str], two_rows: Any) -> None:
    two_rows.setattr(tables_command, "DETECTORS", published.DETECTORS)
    found = document(capsys)["detectors"]
    printed = {(row.title, row.method): row for row in published.DETECTORS}
    assert len(found) == len(printed) == 9
    for row in found:
        reported = printed[row["detector"], row["method"]]
        assert f"{row['parameters'] / 1e6:.2f}" == reported.parameters, reported
        # torchvision's ReLUs of the region proposals, but not those of the box head.
        relus = 256 * (64000 + 16000 + 4000 + 1000 + 260) - 2 * 1000 * 1024
        flops = row["flops"] - (0 if row["detector"] == "RetinaNet" else relus)
        assert f"{flops / 1e9:.2f}" == reported.flops, reported
        assert row["flops_reported"] == float(reported.flops) * 1e9
        assert row["ap_reported"] == float(reported.ap)
        assert row["agrees"] is True


@needs_torchvision
@pytest.mark.parametrize(
    ("name", "parameters", "flops"),
    [("faster_rcnn", "41.53", "207.18"), ("mask_rcnn", "44.18", "275.69")],
)
def test_the_authors_detectors_on_resnet50(name: str, parameters: str, flops: str) -> None:
    """The table of the authors' checkpoints, with their kernel sizes."""
    from eca_fused.models.detection import FixedRegions, detector

    model = detector(name, 50, device="meta", body={"fused": False})
    counted = count_flops(FixedRegions(model), tables_command.DETECTOR_INPUT, MMDETECTION)
    assert f"{count_parameters(model, trainable=True) / 1e6:.2f}" == parameters
    assert counted / 1e9 == pytest.approx(float(flops), rel=published.DETECTOR_TOLERANCE)


@needs_torchvision
@pytest.mark.parametrize("changes", [{"parameters": "60.51"}, {"flops": "283.00"}])
def test_a_detector_outside_its_tolerance_fails(
    capsys: pytest.CaptureFixture[str], two_rows: pytest.MonkeyPatch, changes: dict[str, str]
) -> None:
    row = replace(published.DETECTORS[0], **changes)
    two_rows.setattr(tables_command, "DETECTORS", (row,))
    assert main(["tables"]) == 1
    captured = capsys.readouterr()
    line = next(line for line in captured.out.splitlines() if line.startswith("Faster R-CNN"))
    assert line.split()[-2:] == ["NO", "38.7"]
    assert captured.err == "error: 1 rows are outside their tolerance: agrees is NO\n"


def test_without_torchvision_the_rows_say_so(
    capsys: pytest.CaptureFixture[str], two_rows: pytest.MonkeyPatch
) -> None:
    two_rows.setattr(tables_command, "DETECTORS", published.DETECTORS)
    two_rows.setitem(sys.modules, "torchvision.models", None)
    two_rows.delitem(sys.modules, "eca_fused.models.detection", raising=False)
    assert main(["tables"]) == 0
    out = capsys.readouterr().out
    line = next(line for line in out.splitlines() if line.startswith("Mask R-CNN"))
    assert " ".join(line.split()) == "Mask R-CNN vanilla [2] 63.17 - - 351.65 - - - 39.4"
    last = out.splitlines()[-1]
    assert last.startswith("[2] not counted: the detectors need torchvision, in the release that ")
    assert last.endswith("pip install 'eca-fused[detection]'.")
    row = document(capsys)["detectors"][0]
    assert [row[key] for key in ("parameters", "flops", "flops_difference", "agrees")] == [None] * 4


# ---- the count ----


def test_mmdetections_rules() -> None:
    layers = nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.ConvTranspose2d(8, 4, 2, 2),
        attention.make("eca", 4, kernel_size=3),
        attention.make("se", 4, reduction=2),
        attention.ECAVariant(4, 5),
        nn.Flatten(),
        nn.Linear(4 * 64, 5),
    )
    convolution = 8 * 64 * (3 * 9 + 1)  # with the biases
    norm, relu, pool = 2 * 8 * 64, 8 * 64, 8 * 64
    transposed = 4 * 64 * (8 * 4 + 1)  # on the map that it writes
    eca, se, variant = 4 * 64 + 4 * 3, 4 * 64 + 2 * 4 * 2 + 2, 4 * 64 + 4 * 5
    total = convolution + norm + relu + pool + transposed + eca + se + variant + 4 * 64 * 5
    assert count_flops(layers, (1, 3, 8, 8), MMDETECTION) == total
    with pytest.raises(ValueError, match="MMDetection has a rule for, got LayerNorm"):
        count_flops(nn.Sequential(nn.LayerNorm(4)), (1, 4), MMDETECTION)


def test_trainable_parameters() -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 5))
    model[0].requires_grad_(False)
    assert (count_parameters(model), count_parameters(model, trainable=True)) == (16 + 25, 25)


class PlainSE(nn.Module):
    """SE of modules that thop has rules for."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Sequential(
            nn.Linear(channels, channels // 16, bias=False),
            nn.ReLU(),
            nn.Linear(channels // 16, channels, bias=False),
            nn.Sigmoid(),
        )

    def forward(self, x: Tensor) -> Tensor:
        return x * self.fc(self.pool(x).flatten(1))[..., None, None]


class PlainECA(nn.Module):
    """ECA of modules that thop has rules for."""

    def __init__(self, k: int) -> None:
        super().__init__()
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.conv = nn.Conv1d(1, 1, k, padding=k // 2, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv(self.pool(x).flatten(2).transpose(1, 2))
        return x * torch.sigmoid(y.transpose(1, 2).unsqueeze(-1))


def thops(model: nn.Module) -> tuple[int, int]:
    """FLOPs and parameters by thop itself."""
    thop = pytest.importorskip("thop", reason=needs_thop, exc_type=ImportError)
    x = torch.zeros(1, 3, 224, 224, device="meta")
    flops, parameters = thop.profile(copy.deepcopy(model), (x,), verbose=False)
    return int(flops), int(parameters)


@pytest.mark.parametrize(
    "model",
    [
        pytest.param(lambda: resnet(18, "none", device="meta"), id="resnet18"),
        pytest.param(lambda: resnet(50, "none", device="meta"), id="resnet50"),
        pytest.param(lambda: resnet(50, "gsop", device="meta"), id="gsop"),
        pytest.param(lambda: mobilenetv2("none", device="meta"), id="mobilenetv2"),
    ],
)
def test_the_count_is_thops(model: Any) -> None:
    built = model()
    assert (count_flops(built), count_parameters(built)) == thops(built)


@pytest.mark.parametrize("name", ["se", "eca"])
def test_the_count_of_attention_is_thops(name: str) -> None:
    ours = resnet(18, name, device="meta")
    theirs = copy.deepcopy(ours)
    for module in theirs.modules():
        if isinstance(getattr(module, name, None), nn.Module):
            old = getattr(module, name)
            new = PlainSE(old.channels) if name == "se" else PlainECA(old.conv.weight.shape[2])
            setattr(module, name, new.to("meta"))
    assert (count_flops(ours), count_parameters(ours)) == thops(theirs)


@pytest.mark.parametrize(
    ("name", "gate"),
    [
        ("se_var1", 0),
        ("se_var2", 32),
        ("se_var3", 32 * 32),
        ("se_gc1", 2 * 32),
        ("eca_ns", 3 * 32),
        ("eca", 3 * 32),
    ],
)
def test_the_count_of_a_gate(name: str, gate: int) -> None:
    options = {"kernel_size": 3} if attention.METHODS[name].sized else {}
    module = attention.make(name, 32, **options)
    pooling = 2 * 32 * (7 * 5 + 1)
    assert count_flops(module, (2, 32, 7, 5)) == pooling + 2 * gate


@pytest.mark.parametrize(("use_mlp", "gate"), [(False, 3), (True, 8 + 8 * 3)])
def test_the_count_of_a_variant(use_mlp: bool, gate: int) -> None:
    module = attention.ECAVariant(32, 3, use_mlp=use_mlp)
    assert count_flops(module, (1, 32, 4, 4)) == 32 * 17 + 32 * gate


def test_counting_leaves_the_model_as_it_was() -> None:
    model: ResNet = resnet(18, device="meta").train()
    model.bn1.eval()
    first = count_flops(model)
    assert count_flops(model) == first
    assert model.training
    assert not model.bn1.training
    assert not any(m._forward_hooks for m in model.modules())


def test_a_layer_without_a_rule() -> None:
    with pytest.raises(ValueError, match=r"thop has a rule for, got LayerNorm; add its rule"):
        count_flops(nn.Sequential(nn.LayerNorm(4)), (1, 4))
