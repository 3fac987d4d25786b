"""Detectors: torchvision's weights, freezing, training, fused against plain, examples/detect.py."""

import copy
import csv
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import detect
from detecting import scenes
from eca_fused import attention
from eca_fused.cli.common.photographs import Photograph
from eca_fused.cli.tables.count import count_parameters
from eca_fused.models import resnet, set_fused
from helpers.cases import needs_extension

try:
    from eca_fused.models import detection
except ImportError:
    pytest.skip(
        "the detectors need a torchvision that fits torch: make test", allow_module_level=True
    )

pytestmark = pytest.mark.usefixtures("one_thread")

SIZE = 96  # of images, in pixels
NAMES = list(detection.DETECTORS)


def noise() -> list[Photograph]:
    """A stand-in for photographs that needs no scikit-learn."""
    generator = torch.Generator().manual_seed(3)
    pixels = torch.randint(0, 256, (120, 150, 3), generator=generator, dtype=torch.uint8)
    return [Photograph("noise", pixels)]


def some_scenes(count: int, size: int = SIZE) -> list[scenes.Scene]:
    generator = torch.Generator().manual_seed(0)
    return [scenes.make_scene(noise(), size, generator) for _ in range(count)]


def small(name: str, **options: Any) -> nn.Module:
    """A detector of two classes on ResNet-18."""
    given: dict[str, Any] = {"num_classes": 2, "channels": 64, "min_size": SIZE, "max_size": SIZE}
    if name != "retinanet":  # a sample of the regions is enough
        given |= {"rpn_post_nms_top_n_train": 100, "box_batch_size_per_image": 32}
    return detection.detector(name, 18, **(given | options))


def targets_of(name: str, found: list[scenes.Scene]) -> list[dict[str, Tensor]]:
    first_label = detection.DETECTORS[name].first_label
    return [scene.target(first_label, torch.device("cpu")) for scene in found]


# ---- what it is made of ----


@pytest.mark.parametrize(
    ("name", "theirs"),
    [("faster_rcnn", "fasterrcnn_resnet50_fpn"), ("mask_rcnn", "maskrcnn_resnet50_fpn")],
)
def test_torchvisions_detectors_load(name: str, theirs: str) -> None:
    with torch.device("meta"):
        state = getattr(detection.library, theirs)(
            weights=None, weights_backbone=None, num_classes=81
        ).state_dict()
    ours = detection.detector(name, 50, "none", device="meta")
    ours.load_state_dict(state, strict=True, assign=True)
    assert list(ours.state_dict()) == list(state)


def test_torchvisions_retinanet_has_the_same_names_and_p6_from_another_map() -> None:
    with torch.device("meta"):
        state = detection.library.retinanet_resnet50_fpn(
            weights=None, weights_backbone=None, num_classes=80
        ).state_dict()
    ours = detection.retinanet(50, "none", device="meta").state_dict()
    assert list(ours) == list(state)
    other = {key for key in ours if ours[key].shape != state[key].shape}
    assert other == {"backbone.fpn.extra_blocks.p6.weight"}
    assert ours[other.pop()].shape == (256, 2048, 3, 3)


def test_without_attention_it_is_torchvisions_detector() -> None:
    options = {"min_size": SIZE, "max_size": SIZE, "box_score_thresh": 0.0}
    theirs = detection.library.fasterrcnn_resnet50_fpn(
        weights=None, weights_backbone=None, num_classes=3, **options
    ).eval()
    ours = detection.faster_rcnn(50, "none", num_classes=2, **options).eval()
    ours.load_state_dict(theirs.state_dict())
    images = [scene.image for scene in some_scenes(2)]
    with torch.no_grad():
        for a, b in zip(ours(images), theirs(images), strict=True):
            assert len(a["boxes"]) > 10
            torch.testing.assert_close(a, b)


def test_an_imagenet_networks_weights_load() -> None:
    model = detection.retinanet(18, device="meta", channels=8)
    weights = resnet(18, device="meta").state_dict()
    body = model.get_submodule("backbone.body")
    missing, unexpected = body.load_state_dict(weights, strict=False, assign=True)
    assert (missing, unexpected) == ([], ["fc.weight", "fc.bias"])


@pytest.mark.parametrize("method", attention.METHODS)
@pytest.mark.parametrize("name", NAMES)
def test_every_attention(name: str, method: str) -> None:
    model = detection.detector(name, 50, method, device="meta")
    blocks = [m for m in model.modules() if hasattr(m, "key")]
    kind = attention.METHODS[method].build(64)
    found = [block for block in blocks if isinstance(getattr(block, block.key), type(kind))]
    assert len(blocks) == 16
    assert len(found) == (4 if method == "gsop" else 16)


@pytest.mark.parametrize(
    ("name", "depth", "given", "expected"),
    [
        ("faster_rcnn", 50, "authors", "5555"),
        ("mask_rcnn", 50, "authors", "3377"),
        ("retinanet", 50, "authors", "3557"),
        ("faster_rcnn", 101, "authors", "3357"),
        ("mask_rcnn", 101, "authors", "3357"),
        ("mask_rcnn", 50, "1111", "1111"),
        ("mask_rcnn", 50, None, "5557"),
    ],
)
def test_kernel_sizes(name: str, depth: int, given: str | None, expected: str) -> None:
    model = detection.detector(name, depth, "eca", given, device="meta")
    body = model.get_submodule("backbone.body")
    found = [
        {m.kernel_size[0] for m in body.get_submodule(f"layer{i}").modules() if is_conv1d(m)}
        for i in (1, 2, 3, 4)
    ]
    assert found == [{int(k)} for k in expected]


def is_conv1d(module: nn.Module) -> bool:
    return isinstance(module, nn.Conv1d)


def test_the_parts_of_faster_rcnn() -> None:
    model = detection.faster_rcnn(50, "none", device="meta")
    parts = {
        name: count_parameters(model.get_submodule(name))
        for name in ("backbone.body", "backbone.fpn", "rpn", "roi_heads")
    }
    assert parts == {
        "backbone.body": 25_557_032 - 2_049_000,  # of ResNet-50, without its classifier
        "backbone.fpn": 3_344_384,
        "rpn": 593_935,
        "roi_heads": 14_310_805,
    }
    frozen = 64 * 3 * 49 + 2 * 64 + 215_808  # the stem and the first stage
    assert count_parameters(model, trainable=True) == sum(parts.values()) - frozen


# ---- what trains ----


@pytest.mark.parametrize(
    ("trainable_layers", "first"),
    [(0, None), (1, "layer4"), (3, "layer2"), (4, "layer1"), (5, "conv1")],
)
def test_frozen_parts(trainable_layers: int, first: str | None) -> None:
    model = detection.faster_rcnn(18, device="meta", trainable_layers=trainable_layers)
    body = model.get_submodule("backbone.body")
    order = list(dict.fromkeys(name.partition(".")[0] for name, _ in body.named_parameters()))
    trained = {n.partition(".")[0] for n, p in body.named_parameters() if p.requires_grad}
    assert order == ["conv1", "bn1", "layer1", "layer2", "layer3", "layer4"]
    assert trained == set(order[order.index(first) :] if first else [])
    others = [p for n, p in model.named_parameters() if ".body." not in n]
    assert all(p.requires_grad for p in others)


@pytest.mark.parametrize(("norm_eval", "expected"), [(True, set()), (False, {"layer3", "layer4"})])
def test_which_batch_norms_keep_their_statistics(norm_eval: bool, expected: set[str]) -> None:
    model = detection.retinanet(18, trainable_layers=2, norm_eval=norm_eval, device="meta")
    body = model.get_submodule("backbone.body")

    def training() -> set[str]:
        found = body.named_modules()
        norms = {n: m for n, m in found if isinstance(m, nn.BatchNorm2d)}
        return {name.partition(".")[0] for name, norm in norms.items() if norm.training}

    assert training() == expected  # a new module is in training mode
    assert model.train() is model
    assert training() == expected
    assert not any(module.training for module in model.eval().modules())


@pytest.mark.parametrize("name", NAMES)
def test_it_learns_a_batch(name: str) -> None:
    model = small(name, trainable_layers=3).train()
    found = some_scenes(2)
    images, targets = [scene.image for scene in found], targets_of(name, found)
    optimizer = torch.optim.AdamW(model.parameters(), 3e-4)
    statistics = {n: b.clone() for n, b in model.named_buffers()}
    losses = []
    for _ in range(10):
        parts = model(images, targets)
        loss = torch.stack([*parts.values()]).sum()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append({part: float(value.detach()) for part, value in parts.items()})
    assert ("loss_mask" in losses[0]) == (name == "mask_rcnn")
    assert all(torch.tensor([*parts.values()]).isfinite().all() for parts in losses)
    # The box regression loss counts regions that match a shape; at first none does.
    totals = [sum(value for key, value in p.items() if key != "loss_box_reg") for p in losses]
    assert sum(totals[-2:]) < 0.8 * sum(totals[:2])
    for key, parameter in model.named_parameters():
        frozen = key.startswith(
            ("backbone.body.conv1", "backbone.body.bn1", "backbone.body.layer1")
        )
        assert (parameter.grad is None) == frozen, key
    taps = {key: p for key, p in model.named_parameters() if key.endswith("eca.conv.weight")}
    assert len(taps) == 8
    assert all(p.grad is None or p.grad.abs().max() > 0 for p in taps.values())
    assert all(torch.equal(b, statistics[n]) for n, b in model.named_buffers())


@pytest.mark.parametrize("name", NAMES)
def test_where_labels_begin(name: str) -> None:
    model = small(name, num_classes=2).train()
    scene = some_scenes(1)[0]
    last = targets_of(name, [replace(scene, classes=torch.ones_like(scene.classes))])
    assert all(loss.isfinite() for loss in model([scene.image], last).values())
    beyond = targets_of(name, [replace(scene, classes=torch.full_like(scene.classes, 2))])
    with pytest.raises(IndexError, match="out of bounds"):
        model([scene.image], beyond)


@needs_extension
@pytest.mark.parametrize("name", NAMES)
def test_fused_trains_as_plain(name: str) -> None:
    plain = small(name, dtype=torch.float64, body={"fused": False}).train()
    fused = copy.deepcopy(plain)
    assert set_fused(fused, True) == 8
    found = some_scenes(2)
    images = [scene.image.double() for scene in found]
    results = []
    for model in (plain, fused):
        torch.manual_seed(0)  # the regions are a random sample
        targets = targets_of(name, found)
        for target in targets:
            target["boxes"] = target["boxes"].double()
        losses = model(images, targets)
        torch.stack([*losses.values()]).sum().backward()
        gradients = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
        results.append((losses, gradients))
    torch.testing.assert_close(results[0], results[1])


# ---- what it finds ----


@pytest.mark.parametrize("name", NAMES)
def test_detections(name: str) -> None:
    threshold = "score_thresh" if name == "retinanet" else "box_score_thresh"
    model = small(name, num_classes=3, **{threshold: 0.0}).eval()
    images = [torch.rand(3, 80, 100), torch.rand(3, 100, 70)]  # resized to SIZE and padded
    with torch.no_grad():
        found = model(images)
    keys = {"boxes", "labels", "scores"} | ({"masks"} if name == "mask_rcnn" else set())
    first = detection.DETECTORS[name].first_label
    for image, detections in zip(images, found, strict=True):
        assert set(detections) == keys
        count = len(detections["boxes"])
        assert count > 0
        assert detections["boxes"].shape == (count, 4)
        # A resized image may be a pixel short of the ratio of its sides.
        sides = torch.tensor([*image.shape[1:]]).flip(0).repeat(2)
        assert ((detections["boxes"] >= 0) & (detections["boxes"] <= sides + 1e-3)).all()
        assert first <= detections["labels"].min() <= detections["labels"].max() < first + 3
        if name == "mask_rcnn":
            assert detections["masks"].shape == (count, 1, *image.shape[1:])
            assert ((detections["masks"] >= 0) & (detections["masks"] <= 1)).all()


class Called(TorchDispatchMode):
    """Notes the names of the operators that run inside a with block."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.append(func.name())
        return func(*args, **(kwargs or {}))


@needs_extension
def test_fused_finds_what_plain_finds_at_800x1333() -> None:
    torch.set_num_threads(2)
    # In float32, rounding would decide the order of two boxes with equal scores.
    plain = detection.faster_rcnn(
        18,
        num_classes=2,
        channels=64,
        dtype=torch.float64,
        body={"fused": False},
        box_score_thresh=0.0,
        rpn_post_nms_top_n_test=200,
    ).eval()
    fused = copy.deepcopy(plain)
    set_fused(fused, True)
    image = torch.rand(3, 800, 1333, dtype=torch.float64)
    results, counts = [], []
    for model in (plain, fused):
        maps: list[dict[str, Tensor]] = []
        model.get_submodule("backbone").register_forward_hook(lambda m, i, o: maps.append(o))  # noqa: B023
        with torch.no_grad(), Called() as called:
            detections = model([image])[0]
        results.append((dict(maps[0]), detections))
        counts.append(sum(name.startswith("eca_fused::") for name in called.names))
    assert counts == [0, 8]
    maps, detections = results[1]
    assert [tuple(m.shape) for m in maps.values()] == [
        (1, 64, 200, 336),
        (1, 64, 100, 168),
        (1, 64, 50, 84),
        (1, 64, 25, 42),
        (1, 64, 13, 21),
    ]
    assert len(detections["boxes"]) == 100
    torch.testing.assert_close(results[1], results[0])


def test_a_state_dict_comes_back(tmp_path: Path) -> None:
    first = small("mask_rcnn", box_score_thresh=0.0).eval()
    torch.save(first.state_dict(), tmp_path / "weights.pt")
    second = small("mask_rcnn", box_score_thresh=0.0).eval()
    second.load_state_dict(torch.load(tmp_path / "weights.pt"))
    images = [scene.image for scene in some_scenes(1)]
    with torch.no_grad():
        a, b = first(images)[0], second(images)[0]
    assert all(torch.equal(a[key], b[key]) for key in a)


def test_fixed_regions_leave_the_model_as_it_is() -> None:
    model = small("mask_rcnn").eval()
    counted = detection.FixedRegions(model, regions=3, masks=2)
    shapes: list[tuple[int, ...]] = []
    heads: Any = model.get_submodule("roi_heads")
    for part in (heads.box_predictor, heads.mask_predictor):
        part.register_forward_hook(lambda m, inputs, o: shapes.append(tuple(inputs[0].shape)))
    with torch.no_grad():
        maps = counted(torch.rand(1, 3, 64, 96))
    assert [tuple(m.shape) for m in maps] == [
        (1, 64, *side) for side in ((16, 24), (8, 12), (4, 6), (2, 3), (1, 2))
    ]
    assert shapes == [(3, 1024), (2, 256, 14, 14)]


# ---- errors ----


@pytest.mark.parametrize(
    ("arguments", "options", "error", "message"),
    [
        (
            ("fast_rcnn",),
            {},
            ValueError,
            "one of faster_rcnn, mask_rcnn, retinanet, got 'fast_rcnn'",
        ),
        (("retinanet", 26), {}, ValueError, "depth as one of 18, .* got 26"),
        (("retinanet", 18, "senet"), {}, ValueError, "attention as one of none, .* got 'senet'"),
        (("retinanet", 18, "se", "3557"), {}, ValueError, "'se', which has no kernel size"),
        (("retinanet",), {"num_classes": 0}, ValueError, "from 1 up, got 0 and 256"),
        (("retinanet",), {"channels": 0}, ValueError, "from 1 up, got 80 and 0"),
        (("retinanet",), {"trainable_layers": 6}, ValueError, "from 0 to 5, got 6"),
        *(
            ((name,), {"backend": "native"}, TypeError, f"options of {kind}, got backend; .*body=")
            for name, kind in (
                ("faster_rcnn", "FasterRCNN"),
                ("mask_rcnn", "MaskRCNN"),
                ("retinanet", "RetinaNet"),
            )
        ),
    ],
)
def test_errors(
    arguments: tuple[Any, ...], options: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        detection.detector(*arguments, device="meta", **options)


@pytest.mark.parametrize("build", [detection.faster_rcnn, detection.mask_rcnn, detection.retinanet])
def test_the_names_are_those_of_the_classes(build: Callable[..., nn.Module]) -> None:
    model = build(18, device="meta")
    assert type(model).__name__.lower() == build.__name__.replace("_", "")


# ---- examples/detect.py ----


def test_scenes() -> None:
    for scene in some_scenes(20, 64):
        assert scene.image.shape == (3, 64, 64)
        assert 0 <= scene.image.min() <= scene.image.max() <= 1
        assert 1 <= len(scene.boxes) == len(scene.classes) == len(scene.masks) <= scenes.SHAPES
        assert scene.masks.sum(0).max() == 1
        for box, kind, mask in zip(scene.boxes, scene.classes, scene.masks, strict=True):
            rows, columns = mask.any(1).nonzero(), mask.any(0).nonzero()
            around = [columns.min(), rows.min(), columns.max() + 1, rows.max() + 1]
            assert box.tolist() == [int(side) for side in around]
            area = float((box[2:] - box[:2]).prod())
            share = {"disc": torch.pi / 4, "rectangle": 1.0}[scenes.CLASSES[kind]]
            # A disc's edge may be off by a pixel.
            assert float(mask.sum()) / area == pytest.approx(share, abs=0.05)


def test_the_scenes_follow_from_the_seed() -> None:
    first, second = some_scenes(2), some_scenes(2)
    assert all(torch.equal(a.image, b.image) for a, b in zip(first, second, strict=True))
    assert not torch.equal(first[0].image, first[1].image)


def test_matched() -> None:
    boxes = torch.tensor([[0.0, 0, 10, 10], [20, 20, 40, 40]])
    scene = scenes.Scene(
        torch.zeros(3, 64, 64), boxes, torch.tensor([0, 1]), torch.zeros(2, 64, 64)
    )
    both = torch.tensor([0, 1])
    assert scenes.matched(scene, boxes, both) == 2
    assert scenes.matched(scene, boxes, both.flip(0)) == 0
    assert scenes.matched(scene, boxes[[0, 0]], both[[0, 0]]) == 1  # one box for each shape
    assert scenes.matched(scene, boxes[:0], both[:0]) == 0
    # Half of the larger box is in the smaller: an overlap of 0.5, and then less.
    assert scenes.matched(scene, torch.tensor([[0.0, 0, 10, 5]]), both[:1]) == 1
    assert scenes.matched(scene, torch.tensor([[0.0, 0, 10, 4.9]]), both[:1]) == 0


TINY = ["--steps", "3", "--size", "64", "--batch-size", "1"]


@pytest.mark.parametrize(
    "arguments",
    [
        ["--detector", "faster_rcnn", "--plain"],
        ["--detector", "mask_rcnn", "--attention", "se"],
        ["--detector", "retinanet", "--fused", "--depth", "50"],
    ],
    ids=" ".join,
)
def test_the_example(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: list[str]
) -> None:
    pytest.importorskip("sklearn", reason="the photographs: pip install eca-fused[demo]")
    pytest.importorskip("matplotlib", reason="draws: pip install eca-fused[demo]")
    assert detect.main([*TINY, "--output", str(tmp_path), *arguments]) == 0
    printed = capsys.readouterr()
    assert "3 steps" in printed.out
    assert "detections.png" in printed.out
    assert printed.err.count("\n") == 3  # a line for each step
    head, *rows = csv.reader((tmp_path / "losses.csv").open())
    assert head[0] == "step"
    assert [row[0] for row in rows] == ["1", "2", "3"]
    assert torch.tensor([[float(value) for value in row] for row in rows]).isfinite().all()
    assert (tmp_path / "detections.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--size", "32"], "--size 32: expected from 64 up"),
        (["--detector", "yolo"], "invalid choice: 'yolo'"),
        (["--plain", "--fused"], "not allowed with argument"),
        (["--steps", "0"], "a whole number from 1 up, got '0'"),
    ],
)
def test_options_that_do_not_fit(
    capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    with pytest.raises(SystemExit, match="2"):
        detect.main(arguments)
    assert message in capsys.readouterr().err


def test_without_torchvision_the_example_says_so(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(detect, "missing_packages", list)
    monkeypatch.setitem(sys.modules, "torchvision.models", None)
    monkeypatch.delitem(sys.modules, "eca_fused.models.detection")
    assert detect.main([*TINY, "--output", str(tmp_path)]) == 3
    err = capsys.readouterr().err
    assert err.startswith("error: the detectors need torchvision, in the release that belongs to")
    monkeypatch.setattr(detect, "missing_packages", lambda: ["matplotlib", "tqdm"])
    assert detect.main([*TINY, "--output", str(tmp_path)]) == 3
    err = capsys.readouterr().err
    assert err == "error: matplotlib, tqdm not installed; pip install 'eca-fused[demo]'\n"


def test_an_output_that_is_no_folder(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(SystemExit, match="2"):
        detect.main(["--output", str(tmp_path / "file")])
    assert "cannot make this folder" in capsys.readouterr().err
