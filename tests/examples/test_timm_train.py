"""examples/timm_train.py: timm's models with fused ECA, and timm's own means of training them."""

import copy
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from eca_fused import ECALayer

try:
    import timm
except Exception as error:  # a torchvision that does not fit torch fails with a RuntimeError
    reason = f"needs timm, and a torchvision that fits torch: make test ({error})"
    pytest.skip(reason, allow_module_level=True)


from timm.data import create_dataset, create_loader
from timm.layers import eca as timm_eca
from timm.loss import LabelSmoothingCrossEntropy
from timm.models import resume_checkpoint
from timm.optim import create_optimizer_v2
from timm.scheduler import create_scheduler_v2
from timm.utils import CheckpointSaver, ModelEmaV3, NativeScaler, accuracy

import timm_train

pytestmark = pytest.mark.usefixtures("one_thread")

# One block in each stage, and a quarter of the channels.
SMALL = {"layers": (1, 1, 1, 1), "channels": (16, 32, 64, 128)}
MODEL = "ecaresnet26t"


def layers(model: nn.Module, kind: type) -> dict[str, nn.Module]:
    return {name: module for name, module in model.named_modules() if type(module) is kind}


# ---- the models ----


def test_every_eca_model_of_timm_has_a_fused_one() -> None:
    theirs = timm.list_models("*eca*", exclude_filters="fused_*")
    assert len(theirs) > 15
    assert set(timm.list_models("fused_*")) == {f"fused_{name}" for name in theirs}
    # One of each kind of block; the others differ in depth and width.
    for name in (MODEL, "eca_nfnet_l0", "eca_vovnet39b", "eca_botnext26ts_256"):
        with torch.device("meta"):
            plain, fused = timm.create_model(name), timm.create_model(f"fused_{name}")
        before = layers(plain, timm_eca.EcaModule)
        assert before, name
        assert layers(fused, ECALayer).keys() == before.keys()
        assert not layers(fused, timm_eca.EcaModule)
        shapes = [{k: v.shape for k, v in m.state_dict().items()} for m in (plain, fused)]
        assert shapes[0] == shapes[1]


def test_fused_model_is_timms() -> None:
    plain = timm.create_model(MODEL, num_classes=7, **SMALL).double().eval()
    fused = timm.create_model(f"fused_{MODEL}", num_classes=7, **SMALL).double().eval()
    fused.load_state_dict(plain.state_dict())
    x = torch.randn(2, 3, 64, 64, dtype=torch.float64)
    for model in (plain, fused):
        model(x).square().sum().backward()
    with torch.no_grad():
        torch.testing.assert_close(fused(x), plain(x))
    for a, b in zip(fused.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad)


def test_a_seed_gives_a_fused_model_what_it_gives_timms() -> None:
    """The same weights, and then the same random state, which decides the order of the images."""
    made = []
    for name in (MODEL, f"fused_{MODEL}"):
        torch.manual_seed(0)
        made.append((timm.create_model(name, **SMALL).state_dict(), torch.get_rng_state()))
    torch.testing.assert_close(made[1], made[0], rtol=0, atol=0)


def test_circular_modules_wrap_around_and_parameters_stay() -> None:
    model = nn.Sequential(timm_eca.CecaModule(kernel_size=5), timm_eca.EcaModule(256)).eval()
    x = torch.randn(2, 16, 4, 4)
    parameters, expected = list(model.parameters()), model(x)
    timm_train.fuse(model)
    assert [layer.padding_mode for layer in model] == ["circular", "zeros"]  # type: ignore[union-attr]
    assert all(a is b for a, b in zip(model.parameters(), parameters, strict=True))
    assert not any(layer.training for layer in model)
    torch.testing.assert_close(model(x), expected)


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (nn.Linear(1, 1), "with timm's EcaModule or CecaModule, found none in Linear"),
        (
            nn.Sequential(timm_eca.EcaModule(64, use_mlp=True)),
            "has conv.bias, .* besides its taps: 0",
        ),
        (nn.Sequential(timm_eca.EcaModule(64, gate_layer="hard_sigmoid")), "gate is Hard.*: 0"),
    ],
)
def test_models_that_cannot_be_fused(model: nn.Module, message: str) -> None:
    before = list(model.modules())
    with pytest.raises(ValueError, match=message):
        timm_train.fuse(model)
    assert list(model.modules()) == before


# ---- the command line ----


def test_a_script_sees_its_own_arguments_and_the_models(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "beside.py").write_text("NUMBER = 5\n")
    script = tmp_path / "train.py"
    script.write_text(
        "import sys, timm, beside\n"
        "assert __name__ == '__main__'\n"
        "print(sys.argv[1:], timm.is_model('fused_ecaresnet50d'), beside.NUMBER)\n"
    )
    monkeypatch.setattr(sys, "argv", sys.argv)
    monkeypatch.setattr(sys, "path", list(sys.path))
    assert timm_train.main([str(script), "data", "--model", "x"]) == 0
    assert capsys.readouterr().out == "['data', '--model', 'x'] True 5\n"


@pytest.mark.parametrize("argv", [[], ["nowhere/train.py"]])
def test_no_script(argv: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert timm_train.main(argv) == 2
    assert "expected the path of timm's train.py as the first argument" in capsys.readouterr().err


# ---- TorchScript, as timm's --torchscript has it ----


@pytest.mark.skipif(sys.version_info >= (3, 14), reason="TorchScript needs Python 3.13 or older")
@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated")
def test_a_scripted_model_trains_and_validates() -> None:
    """In the order of timm's train.py: the layout, then the script, then the optimiser."""
    made = {"num_classes": 2, "scriptable": True, **SMALL}
    model = timm.create_model(f"fused_{MODEL}", **made).double()
    scripted = torch.jit.script(copy.deepcopy(model).to(memory_format=torch.channels_last))
    optimizer = create_optimizer_v2(scripted, opt="sgd", lr=0.1)
    x = torch.randn(4, 3, 32, 32, dtype=torch.float64)
    for net in (model, scripted):
        net(x.contiguous(memory_format=torch.channels_last)).square().sum().backward()
    for a, b in zip(scripted.parameters(), model.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad)
    optimizer.step()
    with torch.no_grad():
        scripted.eval()
        model.load_state_dict(scripted.state_dict())
        torch.testing.assert_close(scripted(x), model.eval()(x))


# ---- timm's means of training ----


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Noughts and ones of scikit-learn's digits as an ImageFolder, 32 to train and 16 to test."""
    image = pytest.importorskip("PIL.Image", reason="needs pillow: make test installs it")
    datasets = pytest.importorskip("sklearn.datasets", reason="needs scikit-learn: make test")
    digits = datasets.load_digits()
    for digit in (0, 1):
        pixels = digits.images[digits.target == digit]
        for split, first, last in (("train", 0, 16), ("validation", 16, 24)):
            at = tmp_path / split / str(digit)
            at.mkdir(parents=True)
            for i in range(first, last):
                whole = (pixels[i] * 15).astype("uint8")
                image.fromarray(whole).resize((32, 32)).convert("RGB").save(at / f"{i}.png")
    return tmp_path


def loader(folder: Path, split: str) -> Any:
    training = split == "train"
    return create_loader(
        create_dataset("", root=str(folder), split=split, is_training=training, batch_size=8),
        input_size=(3, 32, 32),
        batch_size=8,
        is_training=training,
        use_prefetcher=False,
        scale=(0.8, 1.0),
        hflip=0.0,
        num_workers=0,
        crop_pct=1.0,
        device=torch.device("cpu"),
    )


def test_training_with_timms_means(folder: Path) -> None:
    """In the order of timm's train.py: loaders, optimiser, scaler, average, schedule, saver."""
    model = timm.create_model(f"fused_{MODEL}", num_classes=2, **SMALL)
    model.to(memory_format=torch.channels_last)
    optimizer = create_optimizer_v2(model, opt="lamb", lr=0.005, weight_decay=0.02)
    scaler, average = NativeScaler(device="cpu"), ModelEmaV3(model, decay=0.8)
    batches, held_out = loader(folder, "train"), loader(folder, "validation")
    scheduler, epochs = create_scheduler_v2(
        optimizer, sched="cosine", num_epochs=4, warmup_epochs=1, updates_per_epoch=len(batches)
    )
    saver = CheckpointSaver(
        model=model,
        optimizer=optimizer,
        model_ema=average,
        amp_scaler=scaler,
        checkpoint_dir=str(folder),
        recovery_dir=str(folder),
    )
    loss_of = LabelSmoothingCrossEntropy(0.1)
    taps = [layer.conv.weight.clone() for layer in layers(model, ECALayer).values()]  # type: ignore[union-attr]
    means = []
    for epoch in range(epochs):
        model.train()
        losses = []
        for i, (images, labels) in enumerate(batches):
            images = images.contiguous(memory_format=torch.channels_last)
            with torch.autocast("cpu", torch.bfloat16):
                loss = loss_of(model(images), labels)
            optimizer.zero_grad()
            scaler(loss, optimizer, clip_grad=1.0, parameters=model.parameters())
            average.update(model, step=epoch * len(batches) + i)
            scheduler.step_update(epoch * len(batches) + i + 1)
            losses.append(loss.item())
        means.append(sum(losses) / len(losses))
        scheduler.step(epoch + 1)
        saver.save_checkpoint(epoch, metric=-means[-1])
    assert means[-1] < means[0]
    found = [layer.conv.weight for layer in layers(model, ECALayer).values()]
    assert not any(torch.equal(a, b) for a, b in zip(found, taps, strict=True))
    assert len(layers(average.module, ECALayer)) == len(taps)

    again = timm.create_model(f"fused_{MODEL}", num_classes=2, **SMALL)
    assert resume_checkpoint(again, str(folder / "last.pth.tar"), log_info=False) == epochs
    model.eval()
    again.eval()
    with torch.no_grad():
        for images, labels in held_out:
            logits = model(images)
            torch.testing.assert_close(again(images), logits)
            assert 0 <= accuracy(logits, labels)[0] <= 100
