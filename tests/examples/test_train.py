"""examples/train.py: alone, DDP, FSDP2, killed and resumed, its options, fused against plain."""

import csv
import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import train
from eca_fused import ECALayer
from eca_fused.models import BasicBlock, ResNet, set_fused
from helpers.processes import ROOT, path_with
from training import digits, loop, options, processes

# Two epochs of four steps, with checkpoints after 3, 4, 6 and 8.
SMALL = ["--layers", "1", "1", "1", "1", "--samples", "64", "--batch-size", "16"]
TINY = [*SMALL, "--epochs", "2", "--save-every", "3"]
CHILD = os.environ | {
    "OMP_NUM_THREADS": "1",
    "CUDA_VISIBLE_DEVICES": "",
    # After a restart, a store shared with torchrun still has the old processes' addresses.
    "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1",
    "PYTHONPATH": path_with(ROOT),
}
EPS = torch.finfo(torch.float32).eps
LIMIT = 300  # seconds for a child that would otherwise hang


@pytest.fixture(autouse=True)
def one_cpu_thread(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """As in the children: the same bits need the same device and the same number of threads."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def child(*arguments: str, env: Mapping[str, str] = CHILD) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *arguments],
        env=env,
        capture_output=True,
        text=True,
        timeout=LIMIT,
        check=False,
    )


def two_processes(
    *arguments: str, restarts: int = 0, env: Mapping[str, str] = CHILD
) -> subprocess.CompletedProcess[str]:
    """torchrun at a free port; on the CPU, unless `env` says otherwise."""
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    return child(*launcher, "--max-restarts", str(restarts), *arguments, env=env)


def here(output: Path, *arguments: str) -> dict[str, Any]:
    """A run in this process; its history."""
    assert train.main([*TINY, "--output", str(output), *arguments]) == 0
    return history(output)


def history(output: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((output / "history.json").read_text())
    return found


def assert_same_bits(first: Path, second: Path) -> None:
    """Weights and history of two runs are the same."""
    a, b = (torch.load(output / "weights.pt") for output in (first, second))
    assert a.keys() == b.keys()
    assert [name for name in a if not torch.equal(a[name], b[name])] == []
    for key in ("losses", "correct"):
        assert history(first)[key] == history(second)[key]


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An uninterrupted run in one process."""
    output = tmp_path_factory.mktemp("alone")
    done = child(str(ROOT / "examples" / "train.py"), *TINY, "--output", str(output))
    assert done.returncode == 0, done.stderr
    assert "epoch 2 of 2: training loss" in done.stderr
    assert done.stdout.startswith("Held-out accuracy ")
    return output


@pytest.fixture(scope="module")
def ddp(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An uninterrupted run in two processes under DDP."""
    output = tmp_path_factory.mktemp("ddp")
    done = two_processes(str(ROOT / "examples" / "train.py"), *TINY, "--output", str(output))
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("Held-out accuracy ") == 1  # one process speaks for both
    return output


# ---- data ----


def test_every_image_held_out_counts_once() -> None:
    for world in (1, 2, 3, 7):
        shares = [list(digits.portions(33, 16, rank, world)) for rank in range(world)]
        assert {len(share) for share in shares} == {3}  # FSDP needs all equally often
        counted = [mine for share in shares for mine, counts in share if counts]
        assert torch.cat(counted).sort().values.tolist() == list(range(33))


def test_an_epoch_has_an_order_of_its_own_and_no_image_twice() -> None:
    epochs = [
        torch.cat([digits.training_batch(70, 16, 0, epoch, i) for i in range(4)])
        for epoch in (0, 1)
    ]
    assert all(epoch.unique().numel() == 64 for epoch in epochs)
    assert not torch.equal(epochs[0], epochs[1])


def test_images_move_by_two_pixels_at_most() -> None:
    images = torch.rand(50, 3, 9, 8)
    padded = nn.functional.pad(images, (2, 2, 2, 2), mode="replicate")
    moved = digits.shifted(images)
    offsets = set()
    for image, wide in zip(moved, padded, strict=True):
        places = [(y, x) for y in range(5) for x in range(5)]
        found = [p for p in places if torch.equal(image, wide[:, p[0] :, p[1] :][:, :9, :8])]
        assert len(found) == 1
        offsets.add(found[0])
    assert len(offsets) > 10


def test_held_out_images_are_the_same_for_every_run() -> None:
    few, held_out = digits.load_digits(10)
    many, same = digits.load_digits()
    assert (len(few), len(many), len(held_out)) == (10, 1437, 360)
    assert torch.equal(held_out.images, same.images)
    assert torch.equal(few.images, many.images[:10])


# ---- what a run leaves ----


def test_what_a_run_leaves(alone: Path) -> None:
    found = history(alone)
    assert (len(found["losses"]), len(found["correct"]), found["held_out"]) == (8, 2, 360)
    assert found["accuracy"] == found["correct"][-1] / 360
    assert found["processes"] == 1
    rows = list(csv.DictReader((alone / "history.csv").open()))
    assert [float(row["training_loss"]) for row in rows] == found["losses"]
    assert [bool(row["held_out_accuracy"]) for row in rows] == [False, False, False, True] * 2
    assert (alone / "curve.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    assert [path.name for path in (alone / "checkpoints").iterdir()] == ["step-00000008"]


def test_the_weights_have_the_accuracy_that_is_stated(alone: Path) -> None:
    model = ResNet(BasicBlock, (1, 1, 1, 1), None, 10).eval()
    model.load_state_dict(torch.load(alone / "weights.pt"))
    _, held_out = digits.load_digits()
    with torch.no_grad():
        found = torch.cat([model(images).argmax(1) for images in held_out.images.split(16)])
    assert (found == held_out.labels).sum() == history(alone)["correct"][-1]


# ---- killed and resumed ----


@pytest.mark.parametrize("place", ["0:step:5", "0:write:6"])
def test_killed_and_resumed_alone(alone: Path, tmp_path: Path, place: str) -> None:
    output = ["--output", str(tmp_path)]
    done = child(str(ROOT / "tests" / "examples" / "killed_train.py"), place, *TINY, *output)
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert (tmp_path / "checkpoints" / "step-00000004").is_dir()
    here(tmp_path, "--resume")
    assert_same_bits(tmp_path, alone)
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["step-00000008"]


@pytest.mark.parametrize("parallel", ["ddp", "fsdp"])
def test_one_of_two_processes_killed(ddp: Path, tmp_path: Path, parallel: str) -> None:
    """FSDP gives the bits of DDP: there is only one order in which to add two gradients."""
    arguments = [*TINY, "--output", str(tmp_path), "--parallel", parallel, "--resume"]
    script = str(ROOT / "tests" / "examples" / "killed_train.py")
    done = two_processes(script, "1:step:5", *arguments, restarts=1)
    assert done.returncode == 0, done.stderr
    assert "Going on after step 4 of 8" in done.stderr
    assert_same_bits(tmp_path, ddp)
    assert history(tmp_path)["processes"] == 2
    # One process can go on from what two have saved; here nothing is left to train.
    shutil.copytree(tmp_path / "checkpoints", tmp_path / "copy" / "checkpoints")
    here(tmp_path / "copy", "--resume")
    assert_same_bits(tmp_path / "copy", ddp)


@pytest.mark.parametrize("launched", [True, False])
def test_among_others_a_process_leaves_at_once(launched: bool) -> None:
    """If a thread of gloo frees a tensor while the interpreter ends, the process aborts."""
    code = (
        "import atexit, sys; sys.path.insert(0, sys.argv[1]); from training import processes\n"
        "atexit.register(print, 'interpreter ends')\n"
        "processes.start(); processes.stop(); print('last words'); processes.leave(3)"
    )
    one = {"RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "localhost", "MASTER_PORT": "0"}
    done = child("-c", code, str(ROOT / "examples"), env=CHILD | (one if launched else {}))
    assert done.returncode == 3, done.stderr
    assert done.stdout.splitlines() == ["last words", *["interpreter ends"] * (not launched)]


def test_a_checkpoint_half_written_is_never_taken(alone: Path, tmp_path: Path) -> None:
    checkpoints = tmp_path / "checkpoints"
    for name in (".writing-step-00000007", ".removing-step-00000003"):
        shutil.copytree(alone / "checkpoints" / "step-00000008", checkpoints / name)
    here(tmp_path, "--resume")
    assert_same_bits(tmp_path, alone)
    assert [path.name for path in checkpoints.iterdir()] == ["step-00000008"]


def test_everything_comes_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(digits, "HELD_OUT", 4)
    chosen = [*SMALL, "--samples", "8", "--batch-size", "4", "--epochs", "1", "--seed", "2"]
    chosen += ["--precision", "float16", "--output", str(tmp_path)]
    first = loop.Run(options.parse(chosen), processes.start())
    first.train(lambda: None)
    path = tmp_path / "checkpoints" / "step-00000002" / "state.json"
    state = json.loads(path.read_text())
    state["scaler"]["scale"] = 1024.0  # not what a run begins with
    path.write_text(json.dumps(state))
    second = loop.Run(options.parse([*chosen, "--resume"]), processes.start())
    assert (second.step, second.history) == (2, first.history)
    assert second.scaler.get_scale() == 1024
    assert second.scheduler.state_dict() == first.scheduler.state_dict()
    for name, value in first.model.state_dict().items():
        assert torch.equal(value, second.model.state_dict()[name]), name
    a, b = first.optimizer.state_dict(), second.optimizer.state_dict()
    assert a["param_groups"] == b["param_groups"]
    assert len(a["state"]) == len(list(first.model.parameters()))
    for i, entry in a["state"].items():
        assert torch.equal(entry["momentum_buffer"], b["state"][i]["momentum_buffer"])


# ---- fused layers in PyTorch's engine ----


def test_fsdp_in_bfloat16_and_channels_last(ddp: Path, tmp_path: Path) -> None:
    """The first loss is near that of DDP in float32, as it comes from the same weights.

    The convolutions of 8 layers and of 3 shortcuts, and the classifier, round to bfloat16: 12 times
    half a unit, times 2 for the batch norms.
    """
    chosen = ["--precision", "bfloat16", "--channels-last", "--parallel", "fsdp", "--epochs", "1"]
    script = str(ROOT / "examples" / "train.py")
    done = two_processes(script, *SMALL, *chosen, "--output", str(tmp_path))
    assert done.returncode == 0, done.stderr
    found, single = history(tmp_path), history(ddp)
    assert (found["processes"], len(found["losses"])) == (2, 4)
    eps = torch.finfo(torch.bfloat16).eps
    assert found["losses"][0] == pytest.approx(single["losses"][0], rel=12 * eps / 2 * 2)
    assert found["losses"][0] != single["losses"][0]


@pytest.mark.skipif(
    torch.cuda.device_count() < 2,
    reason="needs two CUDA devices, for NCCL: run this file where there are two",
)
@pytest.mark.parametrize("parallel", ["ddp", "fsdp"])
def test_two_gpus_begin_as_two_cpus(ddp: Path, tmp_path: Path, parallel: str) -> None:
    """NCCL is used, and the first loss, which comes from the same weights, is that of the CPU.

    A sum of up to 4608 products has an error of about 68 random roundings. Both runs have 8
    convolutions and 3 shortcuts; a factor of 16 is for the batch norms and the classifier.
    """
    env = {name: value for name, value in CHILD.items() if name != "CUDA_VISIBLE_DEVICES"}
    env |= {"NCCL_DEBUG": "VERSION", "NVIDIA_TF32_OVERRIDE": "0"}
    script = str(ROOT / "examples" / "train.py")
    arguments = [*TINY, "--parallel", parallel, "--output", str(tmp_path)]
    done = two_processes(script, *arguments, env=env)
    assert done.returncode == 0, done.stderr
    assert "NCCL version" in done.stdout + done.stderr
    found, cpu = history(tmp_path), history(ddp)
    assert (found["processes"], len(found["losses"])) == (2, len(cpu["losses"]))
    assert found["losses"][0] == pytest.approx(cpu["losses"][0], rel=68 * 11 * 2 * 16 * EPS)
    here(tmp_path, "--resume")  # what two GPUs have saved, a CPU can load


def test_gradients_over_two_processes_are_those_of_the_whole_batch() -> None:
    done = two_processes(str(ROOT / "tests" / "examples" / "distributed_checks.py"))
    assert done.returncode == 0, done.stderr
    expected = ["ddp", "static_graph", "gradient_as_bucket_view", "find_unused_parameters", "fsdp"]
    expected += ["ddp, compiled, channels_last", "fsdp, compiled, channels_last"]
    assert done.stdout.splitlines() == [f"passed {name}" for name in expected]


def test_synchronised_batch_norms_leave_the_layers_alone() -> None:
    model = ResNet(BasicBlock, (1, 1, 1, 1), None, 10)
    layers = {name: m for name, m in model.named_modules() if isinstance(m, ECALayer)}
    norms = [name for name, m in model.named_modules() if isinstance(m, nn.BatchNorm2d)]
    state = {name: value.clone() for name, value in model.state_dict().items()}
    converted = nn.SyncBatchNorm.convert_sync_batchnorm(model)
    assert len(layers) == 4
    assert all(converted.get_submodule(name) is layer for name, layer in layers.items())
    assert all(isinstance(converted.get_submodule(name), nn.SyncBatchNorm) for name in norms)
    assert converted.state_dict().keys() == state.keys()
    assert all(torch.equal(value, state[name]) for name, value in converted.state_dict().items())


def float64_losses(fused: bool) -> torch.Tensor:
    """The losses of eight steps in double precision."""
    torch.manual_seed(0)
    model = ResNet(BasicBlock, (1, 1, 1, 1), None, 10, dtype=torch.float64)
    assert set_fused(model, fused) == 4
    optimizer = torch.optim.SGD(model.parameters(), 0.01, momentum=0.9)
    training, _ = digits.load_digits(64)
    losses = []
    for step in range(8):
        mine = digits.training_batch(64, 16, 0, *divmod(step, 4))
        optimizer.zero_grad()
        logits = model(training.images[mine, :, ::2, ::2].double())
        loss = nn.functional.cross_entropy(logits, training.labels[mine])
        loss.backward()
        optimizer.step()
        losses.append(loss.detach())
    return torch.stack(losses)


def test_fused_and_plain_train_alike() -> None:
    """Both are right to rounding, so in float64 only rounding separates them."""
    fused, plain = float64_losses(True), float64_losses(False)
    torch.testing.assert_close(fused, plain)
    assert (fused[1:] - fused[:-1]).abs().min() > 1e-3  # the weights do change


def test_fused_and_plain_reach_the_same_accuracy(tmp_path: Path) -> None:
    """Rounding errors in float32 grow with each step, so only beginning and end are compared.

    The first losses come from the same weights: each of 4 layers rounds about 8 times in either
    form, and a factor of 16 is for the batch norms and the classifier. The accuracies, near 97 % of
    360 images, each have a standard error of 0.9 percentage points: a difference of 3 is chance.
    """
    longer = ["--samples", "704", "--batch-size", "32", "--epochs", "3", "--save-every", "1000"]
    fused = here(tmp_path / "fused", *longer)
    plain = here(tmp_path / "plain", *longer, "--plain")
    assert fused["losses"][0] == pytest.approx(plain["losses"][0], rel=4 * 8 * 2 * 16 * EPS)
    assert min(fused["accuracy"], plain["accuracy"]) > 0.9
    assert abs(fused["accuracy"] - plain["accuracy"]) < 0.03


# ---- options ----


@pytest.fixture
def double_precision(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Networks and images in float64; the loss stays in float32."""
    prepared = loop.Run.prepared
    monkeypatch.setattr(loop.Run, "prepared", lambda run, x: prepared(run, x).double())
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


@pytest.mark.usefixtures("double_precision")
def test_compiled_and_eager_train_alike(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In float64 only rounding separates them, far below the last place of the losses.

    The losses are in float32: subtraction of the maximum, exponential, sum, logarithm and mean
    round about once each, and the networks' difference may tip each. 16 units are twice as many.
    """
    monkeypatch.setattr(digits, "HELD_OUT", 20)
    # With the channels innermost the kernels train, compiled or not.
    eager = here(tmp_path / "eager", "--epochs", "1", "--channels-last")
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    compiled = here(
        tmp_path / "compiled", "--epochs", "1", "--channels-last", "--compile", "aot_eager"
    )
    counters = torch._dynamo.utils.counters
    assert counters["stats"]["unique_graphs"] >= 2  # to train and to evaluate
    assert not counters["graph_break"]
    assert compiled["losses"] == pytest.approx(eager["losses"], rel=16 * EPS)
    assert compiled["correct"] == eager["correct"]
    steps = torch.tensor(eager["losses"]).diff().abs()
    assert steps.min() > 1000 * EPS  # the weights do change


@pytest.mark.parametrize(
    "chosen",
    [
        ["--precision", "bfloat16", "--channels-last"],
        ["--plain", "--seed", "3"],
    ],
    ids=" ".join,
)
def test_options(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, chosen: list[str]) -> None:
    monkeypatch.setattr(digits, "HELD_OUT", 20)
    seen = []
    forward = ECALayer.forward

    def watched(self: ECALayer, x: torch.Tensor) -> torch.Tensor:
        y = forward(self, x)
        last = x.is_contiguous(memory_format=torch.channels_last) and not x.is_contiguous()
        seen.append((self.fused, x.dtype, y.dtype, self.conv.weight.dtype, last))
        return y

    monkeypatch.setattr(ECALayer, "forward", watched)
    found = here(tmp_path, "--epochs", "1", "--samples", "16", "--batch-size", "8", *chosen)
    assert len(found["losses"]) == 2
    # Random weights make all ten classes about as likely: the loss is about log(10).
    assert 1.5 < found["losses"][0] < 4
    dtype = getattr(torch, chosen[1]) if chosen[0] == "--precision" else torch.float32
    assert {s[:4] for s in seen} == {("--plain" not in chosen, dtype, dtype, torch.float32)}
    assert any(s[4] for s in seen) == ("--channels-last" in chosen)


# ---- bad use ----


def refused(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    """The message of a run that ends at once."""
    assert train.main(arguments) == 2
    text = capsys.readouterr().err
    assert text.startswith("error: ")
    return text


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--fast"], "unrecognized arguments: --fast"),
        (["--epochs", "0"], "expected a whole number from 1 up, got '0'"),
        (["--seed", "-1"], "expected a whole number from 0 up, got '-1'"),
        (["--lr", "nan"], "expected a number above 0, such as 0.05, got 'nan'"),
        (["--precision", "int8"], "invalid choice: 'int8'"),
        (["--layers", "2", "2"], "expected 4 arguments"),
        (["--samples", "2000"], "--samples 2000: expected at most 1437"),
        (["--samples", "10"], "--batch-size 64: expected at most 10"),
        (["--compile", "fast"], "--compile fast: expected one of "),
        (["--parallel", "fsdp"], "torchrun --nproc-per-node 2 examples/train.py --parallel fsdp"),
    ],
)
def test_bad_arguments(
    arguments: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert message in refused([*arguments, "--output", str(tmp_path)], capsys)
    assert list(tmp_path.iterdir()) == []


def test_more_processes_than_images_in_a_step() -> None:
    chosen = options.parse(["--batch-size", "4"])
    with pytest.raises(options.UsageError, match=r"a multiple of 6, as 6 processes .*; use 6"):
        loop.check(chosen, 6, 1437)
    loop.check(chosen, 4, 1437)


def test_output_that_cannot_be_made(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").touch()
    message = refused(["--output", str(tmp_path / "file")], capsys)
    assert "cannot make this folder: File exists" in message


def test_a_checkpoint_that_does_not_fit(alone: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = ["--output", str(alone)]
    assert "continue it with --resume" in refused([*TINY, *output], capsys)
    message = refused([*TINY, *output, "--resume", "--lr", "0.1", "--plain"], capsys)
    assert "was made with --lr 0.05, no --plain, this run has --lr 0.1, --plain" in message
    assert [path.name for path in (alone / "checkpoints").iterdir()] == ["step-00000008"]


def test_a_folder_that_is_no_checkpoint(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "checkpoints" / "step-00000004").mkdir(parents=True)
    message = refused([*TINY, "--output", str(tmp_path), "--resume"], capsys)
    assert "step-00000004 is not a checkpoint of this script" in message
