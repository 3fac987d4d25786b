"""load_checkpoint(): what is inferred, unwrapped, refused, and that it is all or nothing."""

import argparse
import os
import sys
import threading
import time
import zipfile
from collections import OrderedDict
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import eca_fused
from eca_fused import CheckpointError, ECALayer, load_checkpoint, models
from eca_fused.conversion import architectures
from eca_fused.models import BasicBlock, MobileNetV2, ResNet

State = dict[str, Tensor]


def small(**arguments: Any) -> ResNet:
    """A ResNet-12 whose two blocks of the first stage have different kernel sizes."""
    return ResNet(BasicBlock, (2, 1, 1, 1), (3, 9, 5, 5, 7), 10, **arguments)


@pytest.fixture(scope="module")
def state() -> State:
    torch.manual_seed(0)
    model = small()
    for name, buffer in model.named_buffers():
        if name.endswith("running_mean"):
            buffer.normal_()
    return model.state_dict()


def kernel_sizes(model: nn.Module) -> list[int]:
    return [m.conv.weight.shape[2] for m in model.modules() if isinstance(m, ECALayer)]


def assert_holds(model: nn.Module, state: State) -> None:
    own = model.state_dict()
    assert list(own) == list(state)
    assert all(torch.equal(own[name], state[name]) for name in state)


def copied(model: nn.Module) -> State:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


# ---- what is inferred ----


def inferred(model: nn.Module) -> nn.Module:
    """The network that a model's state dict describes, on the meta device."""
    found = architectures.infer(model.state_dict())
    assert found is not None
    return found.build(device="meta")


def shapes(model: nn.Module) -> dict[str, torch.Size]:
    return {name: tensor.shape for name, tensor in model.state_dict().items()}


@pytest.mark.parametrize("depth", models.RESNETS)
@pytest.mark.parametrize("attention", ["eca", "none"])
def test_resnets(depth: int, attention: str) -> None:
    model = models.resnet(depth, attention, num_classes=7, device="meta")
    found = inferred(model)
    assert shapes(found) == shapes(model)
    assert kernel_sizes(found) == kernel_sizes(model)
    assert type(found.layer1[0]) is type(model.layer1[0])  # type: ignore[index]


@pytest.mark.parametrize("sizes", ["1111333", None, [2 * i + 1 for i in range(17)]])
def test_mobilenetv2(sizes: Any) -> None:
    model = models.mobilenetv2("eca", sizes, 7, device="meta")
    found = inferred(model)
    assert isinstance(found, MobileNetV2)
    assert shapes(found) == shapes(model)
    assert kernel_sizes(found) == kernel_sizes(model)


@pytest.mark.parametrize("name", ["resnet18", "resnet34", "resnet50", "resnet152", "mobilenet_v2"])
def test_torchvisions_networks(name: str) -> None:
    torchvision = pytest.importorskip("torchvision", reason="needs torchvision: make test")
    with torch.device("meta"):
        theirs = getattr(torchvision.models, name)(num_classes=3)
    found = inferred(theirs)
    assert shapes(found) == shapes(theirs)
    assert kernel_sizes(found) == []


def test_torchvisions_backbone_computes_the_same() -> None:
    torchvision = pytest.importorskip("torchvision", reason="needs torchvision: make test")
    theirs = torchvision.models.mobilenet_v2(num_classes=3).eval()
    ours = load_checkpoint(theirs.state_dict()).eval()
    x = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        torch.testing.assert_close(ours(x), theirs(x))


def test_every_layers_own_kernel_size_and_options(state: State) -> None:
    model = load_checkpoint(state, fused=False, backend="reference", dtype=torch.float64)
    assert kernel_sizes(model) == [3, 9, 5, 5, 7]
    layers = [m for m in model.modules() if isinstance(m, ECALayer)]
    assert {(m.fused, m.backend, m.training) for m in layers} == {(False, "reference", True)}
    assert {p.dtype for p in model.parameters()} == {torch.float64}
    assert all(p.requires_grad for p in model.parameters())


def test_half_precision_stays(state: State) -> None:
    half = {n: t.bfloat16() if t.is_floating_point() else t for n, t in state.items()}
    assert_holds(load_checkpoint(half), half)


def test_the_model_has_memory_of_its_own(state: State) -> None:
    model = load_checkpoint(state)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(1)
    assert_holds(load_checkpoint(state), state)
    assert not torch.equal(model.fc.weight, state["fc.weight"])  # type: ignore[union-attr]


# ---- files, wrappers and prefixes ----


def authors_file(state: State) -> dict[str, Any]:
    """As the authors' training script saves it, under DataParallel."""
    optimizer = torch.optim.SGD(small().parameters(), lr=0.1, momentum=0.9)
    return {
        "epoch": 100,
        "arch": "eca_resnet18",
        "state_dict": OrderedDict((f"module.{n}", t) for n, t in state.items()),
        "best_prec1": torch.tensor(70.9),
        "optimizer": optimizer.state_dict(),
    }


def prefixed(prefix: str) -> Callable[[State], Any]:
    return lambda state: {prefix + name: tensor for name, tensor in state.items()}


WRAPPED: dict[str, Callable[[State], Any]] = {
    "none": lambda state: state,
    "authors": authors_file,
    "module": prefixed("module."),
    "compiled": prefixed("_orig_mod."),
    "compiled in parallel": prefixed("module._orig_mod."),
    "parallel in compiled": prefixed("_orig_mod.module."),
    "compiled parts": lambda s: {n.replace("layer1.", "layer1._orig_mod."): s[n] for n in s},
    "average": lambda s: {"n_averaged": torch.tensor(5)} | prefixed("module.")(s),
    "model": lambda state: {"model": state, "epoch": 3},
    "model_state": lambda state: {"model_state": state},
    "two wrappers": lambda state: {"state_dict": {"model": state}},
    "ema": lambda state: {"state_dict_ema": prefixed("module.")(state)},
    "timm": lambda state: {"state_dict": state, "args": argparse.Namespace(lr=0.1, model="x")},
}


@pytest.mark.parametrize("how", WRAPPED)
def test_wrappers(state: State, tmp_path: Path, how: str) -> None:
    torch.save(WRAPPED[how](state), tmp_path / "checkpoint.pth.tar")
    assert_holds(load_checkpoint(tmp_path / "checkpoint.pth.tar"), state)
    given = small()
    assert load_checkpoint(WRAPPED[how](state), given) is given
    assert_holds(given, state)


@pytest.mark.parametrize("marked", [[], [argparse.Namespace]])
def test_what_the_caller_marked_as_safe_stays(state: State, tmp_path: Path, marked: Any) -> None:
    torch.save(WRAPPED["timm"](state), tmp_path / "checkpoint.pth")
    with torch.serialization.safe_globals(marked):
        before = set(torch.serialization.get_safe_globals())
        load_checkpoint(tmp_path / "checkpoint.pth")
        assert set(torch.serialization.get_safe_globals()) == before


def test_threads_share_what_is_marked_as_safe(
    state: State, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.save(WRAPPED["timm"](state), tmp_path / "checkpoint.pth")
    load, inside, first_done = torch.load, threading.Event(), threading.Event()

    def slow_load(*args: Any, **options: Any) -> Any:
        if inside.is_set():
            first_done.wait(10)  # until the first has unmarked what it marked
        else:
            inside.set()
            time.sleep(0.2)  # the second comes meanwhile
        return load(*args, **options)

    def first() -> nn.Module:
        try:
            return load_checkpoint(tmp_path / "checkpoint.pth")
        finally:
            first_done.set()

    def second() -> nn.Module:
        inside.wait(10)
        return load_checkpoint(tmp_path / "checkpoint.pth")

    monkeypatch.setattr(torch, "load", slow_load)
    with ThreadPoolExecutor() as threads:
        for found in [threads.submit(first), threads.submit(second)]:
            assert_holds(found.result(), state)


def test_old_files(state: State, tmp_path: Path) -> None:
    """Files of PyTorch before 1.6, and without the batch norms' counts, which are new in 0.4.1."""
    path = str(tmp_path / "old.pth.tar")
    old = {n: t for n, t in state.items() if not n.endswith("num_batches_tracked")}
    torch.save({"state_dict": old}, path, _use_new_zipfile_serialization=False)
    for model in (load_checkpoint(path), load_checkpoint(path, small())):
        counts = [t for n, t in model.state_dict().items() if n.endswith("num_batches_tracked")]
        assert len(counts) + len(old) == len(state)
        assert all(count == 0 for count in counts)
        assert_holds(model, {n: old.get(n, torch.tensor(0)) for n in state})


def test_key_chooses_between_wrappers(state: State) -> None:
    ema = {name: tensor + 1 for name, tensor in state.items()}
    both = {"state_dict_ema": ema, "state_dict": state}
    assert_holds(load_checkpoint(both), state)
    assert_holds(load_checkpoint(both, key="state_dict_ema"), ema)
    with pytest.raises(CheckpointError, match=r"an entry 'net', got state_dict_ema \(dict\), stat"):
        load_checkpoint(both, key="net")


def test_safetensors(state: State, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    safetensors = pytest.importorskip("safetensors.torch", reason="needs safetensors: make test")
    path = tmp_path / "model.safetensors"
    safetensors.save_file({n: t.contiguous() for n, t in state.items()}, path)
    assert_holds(load_checkpoint(path), state)
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(CheckpointError, match="is not a safetensors file"):
        load_checkpoint(path)
    monkeypatch.setitem(__import__("sys").modules, "safetensors", None)
    with pytest.raises(ImportError, match=r"needs safetensors: pip install safetensors"):
        load_checkpoint(path)


# ---- what is refused ----


class Code:
    """What a hostile file may hold: loading it without care would run a command."""

    def __init__(self, command: str) -> None:
        self.command = command

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, (self.command,)


@pytest.mark.parametrize("zipped", [True, False])
def test_code_in_a_file_is_not_run(state: State, tmp_path: Path, zipped: bool) -> None:
    path, trace = tmp_path / "hostile.pth", tmp_path / "trace"
    hostile = {"state_dict": state, "extra": Code(f"touch {trace}")}
    torch.save(hostile, path, _use_new_zipfile_serialization=zipped)
    model = small()
    before = copied(model)
    for given in (None, model):
        with pytest.raises(CheckpointError, match=r"hostile.pth is refused, .*got posix.system,"):
            load_checkpoint(path, given)
    assert not trace.exists()
    assert_holds(model, before)
    torch.load(path, weights_only=False)
    assert trace.exists()  # it would have run


def test_a_whole_module_and_torchscript_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "module.pt"
    torch.save(small(), path)
    with pytest.raises(CheckpointError, match=r"got eca_fused.models.resnet.ResNet, which"):
        load_checkpoint(path)
    torch.jit.save(torch.jit.script(nn.Linear(1, 1)), path)
    with pytest.raises(CheckpointError, match=r"is refused, .*got TorchScript, which loads by"):
        load_checkpoint(path)


@pytest.mark.parametrize("contents", [b"", b"not a checkpoint", b"PK\x03\x04 cut off"])
def test_broken_files(tmp_path: Path, contents: bytes) -> None:
    path = tmp_path / "broken.pth"
    path.write_bytes(contents)
    with pytest.raises(
        CheckpointError, match=r"broken.pth is not a complete file .*; download it again"
    ):
        load_checkpoint(path)
    with pytest.raises(FileNotFoundError):
        load_checkpoint(tmp_path / "nowhere.pth")


@pytest.mark.parametrize(
    ("contents", "message"),
    [
        ({}, "got no entries"),
        ({"epoch": 3, "lr": 0.1}, r"got epoch \(int\), lr \(float\)"),
        ({f"e{i}": i for i in range(9)}, r"e5 \(int\) and 3 more"),
        ({"state_dict": {"a": 1}}, r"got a \(int\)"),
        ({"fc.weight": torch.ones(2)}, r"the names of a ResNet or MobileNetV2.*got fc.weight and"),
    ],
)
def test_what_is_no_checkpoint(contents: Any, message: str) -> None:
    with pytest.raises(CheckpointError, match=message):
        load_checkpoint(contents)


def test_wrong_arguments(state: State) -> None:
    with pytest.raises(TypeError, match="expected no options beside a model, got fused, dtype"):
        load_checkpoint(state, small(), fused=False, dtype=None)
    with pytest.raises(TypeError):
        load_checkpoint(5)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"model as a torch.nn.Module, got int"):
        load_checkpoint(state, 3)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"attention, num_classes, .*the tensors decide"):
        load_checkpoint(state, num_classes=5, attention="se")
    with pytest.raises(CheckpointError, match="got one on the meta device"):
        load_checkpoint(state, small(device="meta"))


def test_a_file_that_holds_itself() -> None:
    endless: dict[str, Any] = {}
    endless["model"] = endless
    with pytest.raises(CheckpointError, match=r"got model \(dict\)"):
        load_checkpoint(endless)


def test_a_name_that_comes_twice(state: State) -> None:
    twice = state | {"_orig_mod.fc.bias": torch.zeros_like(state["fc.bias"])}
    with pytest.raises(CheckpointError, match=r"one tensor of each name, got two of fc.bias"):
        load_checkpoint(twice)


# ---- all or nothing ----


def without(*names: str) -> Callable[[State], State]:
    return lambda state: {n: t for n, t in state.items() if not n.startswith(names)}


def with_one_more(state: State) -> State:
    return state | {"layer1.0.se.fc.0.weight": torch.zeros(4, 64)}


def with_other_taps(state: State) -> State:
    return state | {"layer2.0.eca.conv.weight": torch.zeros(1, 1, 4)}


def as_other_kind(change: Callable[[torch.Tensor], torch.Tensor]) -> Callable[[State], State]:
    return lambda state: state | {"fc.weight": change(state["fc.weight"])}


UNFIT: dict[str, tuple[Callable[[State], State], tuple[int, int, int], str]] = {
    "missing": (without("layer1.1.eca"), (1, 0, 0), r"missing: layer1.1.eca.conv.weight \(1, 1, "),
    "missing stage": (without("layer4."), (16, 0, 0), r"layer4.0.conv1.weight .* and \d+ more"),
    "missing head": (without("fc."), (2, 0, 0), r"missing: fc.weight \(\d+, 512\), fc.bias"),
    "left over": (with_one_more, (0, 1, 0), r"left over: layer1.0.se.fc.0.weight \(4, 64\)"),
    "shapes": (
        with_other_taps,
        (0, 0, 1),
        r"other shapes: layer2.0.eca.conv.weight \(1, 1, 4\), expected \(1, 1, ",
    ),
    **{
        kind: (
            as_other_kind(change),
            (0, 0, 1),
            rf"not plain floating-point numbers: fc.weight \({kind}",
        )
        for kind, change in {
            "torch.int8": lambda t: t.to(torch.int8),
            "torch.complex64": lambda t: t.to(torch.complex64),
            "torch.sparse_coo": lambda t: t.to_sparse(),
            "meta": lambda t: t.to("meta"),
        }.items()
    },
}


@pytest.mark.parametrize("case", UNFIT)
@pytest.mark.parametrize("own", [False, True])
def test_what_does_not_fit(state: State, case: str, own: bool) -> None:
    change, counts, message = UNFIT[case]
    model = small() if own else None
    before = copied(model) if model is not None else {}
    with pytest.raises(CheckpointError, match=message) as caught:
        load_checkpoint(change(dict(state)), model)
    error = caught.value
    found = tuple(map(len, (error.missing, error.unexpected, error.mismatched)))
    # The batch norms' counts may be missing.
    assert found == counts
    assert "nothing was loaded" in str(error)
    assert ("pass model=timm.create_model" in str(error)) == (not own)
    assert len(str(error)) < 1000
    if model is not None:
        assert_holds(model, before)


def test_a_model_whose_hook_fails_is_as_before(state: State) -> None:
    model = small()
    before = copied(model)

    def fail(*_: Any) -> None:
        raise RuntimeError("no")

    model.layer4.register_load_state_dict_pre_hook(fail)  # after three stages are loaded
    with pytest.raises(CheckpointError, match="it is as it was: RuntimeError: no"):
        load_checkpoint(state, model)
    assert_holds(model, before)


# ---- sizes that a file only claims ----


def claimed(state: State, name: str, shape: tuple[int, ...]) -> State:
    """The state with a tensor of any shape, which repeats one number."""
    return state | {name: torch.zeros((), dtype=state[name].dtype).expand(shape)}


@pytest.mark.parametrize("into", ["a network of its own", "a model"])
@pytest.mark.parametrize("kind", ["state dict", "file"])
@pytest.mark.parametrize("classes", [10, 2**33])
def test_a_tensor_with_less_memory_than_its_shape(
    state: State, tmp_path: Path, into: str, kind: str, classes: int
) -> None:
    given: Any = claimed(state, "fc.weight", (classes, state["fc.weight"].shape[1]))
    given = claimed(given, "fc.bias", (classes,))
    if kind == "file":
        torch.save(given, tmp_path / "small.pth")
        assert (tmp_path / "small.pth").stat().st_size < 10 * sum(t.nbytes for t in state.values())
        given = tmp_path / "small.pth"
    model = small() if into == "a model" else None
    before = copied(model) if model is not None else {}
    with pytest.raises(CheckpointError, match=r"fc\.weight \(.*, which has 4 bytes") as error:
        load_checkpoint(given, model)
    assert error.value.mismatched[:1] == ("fc.weight",)
    if model is not None:
        assert_holds(model, before)


def test_tensors_that_share_their_memory_in_a_file(state: State, tmp_path: Path) -> None:
    largest = max(state.values(), key=lambda t: t.numel())
    memory = torch.zeros(largest.numel())
    shared = {
        n: memory[: t.numel()].view(t.shape) if t.is_floating_point() else t
        for n, t in state.items()
    }
    torch.save(shared, tmp_path / "shared.pth")
    with pytest.raises(CheckpointError, match=r"no more than its \d+ bytes, got \d+ bytes"):
        load_checkpoint(tmp_path / "shared.pth")
    assert_holds(load_checkpoint(shared, small()), shared)  # a state dict in memory may


def test_more_blocks_than_any_network(state: State) -> None:
    many = {f"layer1.{i}.conv1.weight": state["layer1.0.conv1.weight"] for i in range(20_000)}
    with pytest.raises(CheckpointError, match="at most 1000 blocks, got the names of 20"):
        load_checkpoint(state | many)


@pytest.mark.parametrize("into", ["a network of its own", "a model"])
@pytest.mark.parametrize(
    ("make", "what"),
    [
        (lambda t: torch.nested.nested_tensor([t, t]), "nested"),
        (lambda t: nn.parameter.UninitializedParameter(), "without a shape yet"),
    ],
)
@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
def test_tensors_without_a_shape(
    state: State, into: str, make: Callable[[Tensor], Tensor], what: str
) -> None:
    given = state | {"layer1.0.conv1.weight": make(state["layer1.0.conv1.weight"])}
    with pytest.raises(CheckpointError, match=rf"layer1\.0\.conv1\.weight \({what}\)"):
        load_checkpoint(given, small() if into == "a model" else None)


def test_a_first_convolution_that_needs_scales(state: State) -> None:
    given = state | {"conv1.weight": state["conv1.weight"].to(torch.float8_e4m3fn)}
    with pytest.raises(
        CheckpointError, match=r"expected numbers in .*got conv1.weight \(torch\.float8"
    ):
        load_checkpoint(given)


@pytest.mark.parametrize("number", ["float64", "float32", "int64", "bool"])
def test_a_numpy_scalar_beside_the_tensors(state: State, tmp_path: Path, number: str) -> None:
    numpy = pytest.importorskip("numpy", reason="needs numpy")
    torch.save({"state_dict": state, "best": getattr(numpy, number)(1)}, tmp_path / "best.pth")
    assert_holds(load_checkpoint(tmp_path / "best.pth"), state)


def test_no_array_of_objects(state: State, tmp_path: Path) -> None:
    numpy = pytest.importorskip("numpy", reason="needs numpy")
    torch.save({"state_dict": state, "best": numpy.array([{}])}, tmp_path / "objects.pth")
    with pytest.raises(CheckpointError, match="is refused, and nothing of it was run"):
        load_checkpoint(tmp_path / "objects.pth")


def test_no_memory_for_the_network(state: State, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory")

    monkeypatch.setattr(nn.Module, "to_empty", fail)
    with pytest.raises(CheckpointError, match=r"no memory for ResNet-.*can't allocate"):
        load_checkpoint(state)


def test_into_wrapped_and_converted_models(state: State) -> None:
    plain = small(fused=False)
    eca_fused.convert(plain)
    wrapped = nn.DataParallel(torch.compile(plain, backend="eager"))  # type: ignore[arg-type]
    assert load_checkpoint(state, wrapped) is wrapped
    assert_holds(plain, state)


def test_a_part_with_the_name_of_a_prefix() -> None:
    def made() -> nn.Module:
        model = nn.Linear(2, 3)
        model.add_module("module", nn.Linear(2, 3))  # has the same names
        return model

    saved = made()
    for source in (saved, nn.DataParallel(saved)):
        model = made()
        load_checkpoint(source.state_dict(), model)
        assert_holds(model, saved.state_dict())


# ---- timm's ----


def test_timms_resnets_with_torchvisions_stem() -> None:
    timm: Any = pytest.importorskip("timm", reason="needs timm: make test installs it")
    arguments = {"layers": (1, 1, 1, 1), "num_classes": 5}
    theirs = timm.create_model("resnet50", block_args={"attn_layer": "eca"}, **arguments)
    theirs = theirs.double().eval()
    ours = load_checkpoint(theirs.state_dict()).eval()
    assert kernel_sizes(ours) == [5, 5, 5, 7]
    x = torch.randn(2, 3, 64, 64, dtype=torch.float64)
    with torch.no_grad():
        torch.testing.assert_close(ours(x), theirs(x))


@pytest.mark.parametrize("name", ["ecaresnet26t", "eca_resnet33ts"])
@pytest.mark.parametrize("converted", [False, True])
def test_into_timms_models(tmp_path: Path, name: str, converted: bool) -> None:
    timm: Any = pytest.importorskip("timm", reason="needs timm: make test installs it")
    torch.save({"state_dict": timm.create_model(name).state_dict()}, tmp_path / "theirs.pth")
    model = timm.create_model(name)
    if converted:
        assert eca_fused.convert(model).converted
    load_checkpoint(tmp_path / "theirs.pth", model)
    assert_holds(model, torch.load(tmp_path / "theirs.pth")["state_dict"])


@pytest.mark.parametrize("name", ["ecaresnet26t", "ecaresnetlight", "eca_nfnet_l0"])
def test_timms_own_networks(name: str) -> None:
    timm: Any = pytest.importorskip("timm", reason="needs timm: make test installs it")
    theirs = timm.create_model(name, num_classes=7, in_chans=1).double()
    ours = load_checkpoint({"state_dict": theirs.state_dict()})
    assert type(ours) is type(theirs)
    assert any(isinstance(m, eca_fused.ECALayer) and m.fused for m in ours.modules())
    assert_holds(ours, theirs.state_dict())
    x = torch.randn(1, 1, 64, 64, dtype=torch.float64)
    with torch.no_grad():
        torch.testing.assert_close(ours.eval()(x), theirs.eval()(x))
    half = load_checkpoint(theirs.state_dict(), fused=False, dtype=torch.bfloat16)
    assert not any(isinstance(m, eca_fused.ECALayer) for m in half.modules())
    assert next(half.parameters()).dtype is torch.bfloat16


def test_what_is_nearly_a_network_of_timm(monkeypatch: pytest.MonkeyPatch) -> None:
    timm: Any = pytest.importorskip("timm", reason="needs timm: make test installs it")
    # A user's registered network: it has no configuration, and should not be built. A real
    # registration would remain for later tests in this process.
    names = [*timm.list_models("*eca*"), "eca_of_somebody_else"]
    monkeypatch.setattr(timm, "list_models", lambda pattern: names)
    state = timm.create_model("ecaresnet26t", num_classes=7).state_dict()
    state["layer1.0.se.conv.weight"] = torch.zeros(1, 1, 9)  # timm's rule has another k
    with pytest.raises(CheckpointError, match=r"pass model=timm\.create_model"):
        load_checkpoint(state)


def test_without_timm(monkeypatch: pytest.MonkeyPatch) -> None:
    timm: Any = pytest.importorskip("timm", reason="needs timm: make test installs it")
    state = timm.create_model("ecaresnet26t", num_classes=7).state_dict()
    monkeypatch.setitem(sys.modules, "timm", None)
    with pytest.raises(CheckpointError, match=r"for a network of timm install timm"):
        load_checkpoint(state)


def test_a_model_that_shares_a_module(tmp_path: Path) -> None:
    inner = nn.Linear(40, 40)
    model, other = (nn.ModuleDict({"a": inner, "b": inner}) for _ in range(2))
    torch.save(model.state_dict(), tmp_path / "tied.pth")
    assert load_checkpoint(tmp_path / "tied.pth", other) is other
    assert_holds(other, model.state_dict())


def test_a_compressed_file_is_not_read_into_memory(state: State, tmp_path: Path) -> None:
    torch.save(state, tmp_path / "stored.pth")
    path = tmp_path / "packed.pth"
    stored = zipfile.ZipFile(tmp_path / "stored.pth")
    with stored, zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as packed:
        for entry in stored.infolist():
            packed.writestr(entry.filename, stored.read(entry))
    with pytest.raises(CheckpointError, match="got a compressed archive"):
        load_checkpoint(path)


def test_a_folder_is_no_checkpoint(tmp_path: Path) -> None:
    for name in ("a.pth", "a.safetensors"):
        (tmp_path / name).mkdir()
        with pytest.raises(CheckpointError, match=f"expected .*{name} as a file of weights"):
            load_checkpoint(tmp_path / name)


def test_numbers_that_need_scales_anywhere(state: State) -> None:
    model = small()
    before = {name: t.clone() for name, t in model.state_dict().items()}
    name = "fc.weight"
    given = state | {name: state[name].to(torch.float8_e5m2)}
    for target in (None, model):
        with pytest.raises(CheckpointError, match=r"got fc.weight \(torch\.float8_e5m2\), which"):
            load_checkpoint(given, target)
    assert_holds(model, before)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"device": "bogus"}, ValueError, "expected device as one that torch can use here"),
        ({"dtype": torch.int32}, TypeError, "expected dtype as .*, got torch.int32"),
    ],
)
def test_options_that_no_network_can_have(
    state: State, options: Any, error: Any, message: str
) -> None:
    with pytest.raises(error, match=message):
        load_checkpoint(state, **options)


@pytest.mark.parametrize("make_value", ["complex128", "str_"])
def test_other_scalars_of_numpy(state: State, tmp_path: Path, make_value: str) -> None:
    numpy = pytest.importorskip("numpy", reason="needs numpy")
    torch.save({"state_dict": state, "best": getattr(numpy, make_value)(1)}, tmp_path / "b.pth")
    assert_holds(load_checkpoint(tmp_path / "b.pth"), state)
