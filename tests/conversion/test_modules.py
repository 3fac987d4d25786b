"""convert() and revert(): what is converted, and what stays the same."""

import copy
import io
import pickle
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.utils import parametrizations, parametrize

import eca_fused
from eca_fused import ECALayer, convert, revert
from helpers.cases import needs_extension
from helpers.eca_modules import (
    C2f,
    Decoder,
    Functional,
    Sequences,
    WrapAround,
    assert_same,
    eca_layer,
    image,
    mean_of_a_sequence,
    mean_of_pixels,
    pooled_by_its_size,
    pooled_to_one,
    results,
)

pytestmark = pytest.mark.every_torch


# ---- what is converted ----


@pytest.mark.parametrize(
    ("module", "shape", "padding_mode"),
    [
        (eca_layer(8), (2, 8, 6, 5), "zeros"),
        (eca_layer(8, 1), (2, 8, 6, 5), "zeros"),
        (WrapAround(5), (2, 8, 6, 5), "circular"),
        (Sequences(), (2, 8, 6), "zeros"),
        (Functional(mean_of_pixels), (2, 8, 6, 5), "zeros"),
        (Functional(pooled_to_one, 5), (2, 8, 6, 5), "zeros"),
        (Functional(pooled_by_its_size), (2, 8, 6, 5), "zeros"),
        (Functional(mean_of_a_sequence), (2, 8, 6), "zeros"),
        (ECALayer(8, fused=False), (2, 8, 6, 5), "zeros"),
        (ECALayer(8, fused=False, padding_mode="circular"), (2, 8, 6), "circular"),
    ],
)
def test_modules(module: Any, shape: tuple[int, ...], padding_mode: str) -> None:
    module, x = copy.deepcopy(module).double(), image(*shape)
    before, want, name = type(module), results(module, x), type(module).__name__
    report = convert(module)
    assert report.converted == {"": name}
    assert report.left == {}
    assert type(module) is ECALayer
    assert (module.fused, module.padding_mode) == (True, padding_mode)
    assert (module.backend, module.overwrites) == ("auto", False)
    assert_same(results(module, x), want)
    assert revert(module) == 1
    assert type(module) is before
    assert all(torch.equal(a, b) for a, b in zip(results(module, x), want, strict=True))


@pytest.mark.parametrize(
    ("network", "shape", "number"), [(C2f, (2, 8, 6, 5), 3), (Decoder, (2, 3, 8, 12), 2)]
)
def test_networks(network: Any, shape: tuple[int, ...], number: int) -> None:
    model = (network(8) if network is C2f else network()).double()
    x = image(*shape)
    want = results(model, x)
    report = convert(model)
    assert len(report.converted) == number
    assert not any(type(m) is eca_layer for m in model.modules())
    assert_same(results(model, x), want)


def test_taps_of_zero_do_not_hide_the_padding() -> None:
    module = WrapAround(3).double()
    nn.init.zeros_(module.conv.weight)
    convert(module)
    nn.init.ones_(module.conv.weight)
    twin = WrapAround(3).double()
    nn.init.ones_(twin.conv.weight)
    x = image()
    torch.testing.assert_close(module(x), twin(x))


def test_a_root_and_modules_without_memory() -> None:
    with torch.device("meta"):
        model = nn.Sequential(nn.Conv2d(3, 8, 1), eca_layer(8))
    assert convert(model).converted == {"1": "eca_layer"}
    assert model(torch.empty(1, 3, 4, 4, device="meta")).is_meta


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_dtype_and_memory_format_stay(dtype: torch.dtype) -> None:
    model = nn.Sequential(eca_layer(8)).to(dtype)
    convert(model)
    x = torch.randn(2, 8, 6, 5, dtype=dtype).to(memory_format=torch.channels_last)
    y = model(x)
    assert y.dtype == model[0].conv.weight.dtype == dtype
    assert y.is_contiguous(memory_format=torch.channels_last)


def test_options() -> None:
    model = nn.Sequential(eca_layer(8), ECALayer(8, fused=False))
    convert(model, backend="reference", inplace=True)
    assert [(m.backend, m.overwrites) for m in model] == [("reference", True)] * 2  # type: ignore[union-attr]
    x = torch.randn(2, 8, 6, 5)
    with torch.no_grad():
        assert model(x) is x
    with pytest.raises(ValueError, match="expected backend as one of"):
        convert(model, backend="cudnn")
    with pytest.raises(TypeError, match=r"expected model as a torch\.nn\.Module, got str"):
        convert("resnet50")  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"expected model as a torch\.nn\.Module, got list"):
        revert([model])  # type: ignore[arg-type]


# ---- what stays the same ----


def test_the_same_objects_before_and_after() -> None:
    model = C2f(8)
    model.eca.conv.weight.requires_grad_(False)
    model.m[0].eval()
    modules, parameters = list(model.modules()), dict(model.named_parameters())
    modes = [m.training for m in modules]
    state, inner = model.state_dict(), [dict(vars(m)) for m in modules]
    convert(model)
    assert list(model.modules()) == modules
    assert all(p is parameters[n] for n, p in model.named_parameters())
    assert [m.training for m in modules] == modes
    assert not model.eca.conv.weight.requires_grad
    assert list(model.state_dict()) == list(state)
    model.load_state_dict(state)
    assert revert(model) == 3
    assert [dict(vars(m)) for m in modules] == inner
    assert revert(model) == 0


def test_an_optimizer_goes_on() -> None:
    plain, x = C2f(8).double(), image()
    model = copy.deepcopy(plain)
    ours = torch.optim.Adam(model.parameters(), lr=0.1)
    theirs = torch.optim.Adam(plain.parameters(), lr=0.1)
    for step in range(3):
        if step == 1:
            convert(model)
        for network, optimizer in ((model, ours), (plain, theirs)):
            optimizer.zero_grad()
            network(x).square().mean().backward()
            optimizer.step()
    for a, b in zip(model.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(a, b)
        assert ours.state[a]["step"] == 3


def test_hooks_of_every_kind_stay() -> None:
    module, seen = eca_layer(8), []
    parent = nn.Sequential(module)
    handles = [
        module.register_forward_pre_hook(
            lambda m, a, k: seen.append("before"), with_kwargs=True, prepend=True
        ),
        module.register_forward_hook(lambda m, a, k, y: seen.append("after"), with_kwargs=True),
        module.register_forward_hook(lambda m, a, y: seen.append("always"), always_call=True),
        module.register_full_backward_pre_hook(lambda m, g: seen.append("gradient before")),
        module.register_full_backward_hook(lambda m, g, h: seen.append("gradient after")),
        module.register_state_dict_pre_hook(lambda m, p, k: seen.append("saving")),
        module._register_state_dict_hook(lambda m, s, p, i: seen.append("saved")),
        module.register_load_state_dict_pre_hook(lambda m, *a: seen.append("loading")),
        module.register_load_state_dict_post_hook(lambda m, k: seen.append("loaded")),
    ]

    def run() -> list[str]:
        seen.clear()
        parent(image().float()).sum().backward()
        parent.load_state_dict(parent.state_dict())
        with pytest.raises(Exception, match=r"int|unpack|shape|tensor"):
            module(5)
        return list(seen)

    want = run()
    assert len(set(want)) == len(handles)
    convert(parent)
    assert run() == want
    module.register_forward_hook(lambda m, a, y: seen.append("new"))
    assert "new" in run()
    revert(parent)
    assert "new" in run()
    for handle in handles:
        handle.remove()
    assert set(run()) == {"new"}


def test_hooks_do_not_see_the_trial() -> None:
    module, calls, state = eca_layer(8), [], torch.get_rng_state()
    module.register_forward_hook(lambda m, a, y: calls.append(y))
    module.eval()
    with torch.inference_mode():
        assert convert(module).converted
    assert calls == []
    assert not module.sigmoid.training
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize(
    "mode",
    [torch.no_grad(), torch.device("meta"), torch.autocast("cpu"), FakeTensorMode()],
    ids=lambda mode: type(mode).__name__,
)
def test_under_modes(mode: Any) -> None:
    model = nn.Sequential(eca_layer(8), WrapAround(3))
    with mode:
        report = convert(model)
    assert list(report.converted) == ["0", "1"]
    assert [m.padding_mode for m in model] == ["zeros", "circular"]  # type: ignore[union-attr]


def test_a_module_in_several_places() -> None:
    shared = eca_layer(8)
    model = nn.ModuleDict({"a": shared, "b": nn.Sequential(shared, nn.ReLU())})
    assert convert(model) == eca_fused.Conversion({"a": "eca_layer"}, {})
    assert model["a"] is model["b"][0] is shared  # type: ignore[index]
    assert len(list(model.parameters())) == 1


def test_nothing_outside_of_the_model_changes() -> None:
    other, classes = eca_layer(8), (eca_layer, nn.Module, nn.Conv1d, nn.Sigmoid, ECALayer)
    before = [dict(vars(cls)) for cls in classes]
    convert(nn.Sequential(eca_layer(8), WrapAround(3)))
    assert [dict(vars(cls)) for cls in classes] == before
    assert type(other) is type(eca_layer(8)) is eca_layer
    assert type(other).forward is eca_layer.forward


def saved_and_loaded(model: nn.Module) -> Any:
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@pytest.mark.parametrize(
    "copied", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m)), saved_and_loaded]
)
def test_copies_compute_and_revert(copied: Any) -> None:
    model, x = C2f(8).double(), image()
    want = results(model, x)
    convert(model)
    twin = copied(model)
    assert type(twin.eca) is ECALayer
    assert_same(results(twin, x), want)
    with torch.no_grad():
        twin.eca.conv.weight += 1
    assert revert(twin) == 3
    assert type(twin.eca) is eca_layer
    assert type(model.eca) is ECALayer
    with torch.no_grad():
        twin.eca.conv.weight -= 1
    assert_same(results(twin, x), want)


def test_twice() -> None:
    model = nn.Sequential(
        eca_layer(8), ECALayer(8), ECALayer(8, fused=False, backend="native", inplace=True)
    )
    first = convert(model, backend="reference")
    assert first.already_fused == ("1",)
    second = convert(model)
    assert (second.converted, second.left) == ({}, {})
    assert second.already_fused == ("0", "1", "2")
    assert model[2].overwrites
    assert [m.backend for m in model] == ["reference", "auto", "reference"]  # type: ignore[union-attr]
    assert revert(model) == 2
    assert [type(m) for m in model] == [eca_layer, ECALayer, ECALayer]
    assert [m.fused for m in model[1:]] == [True, False]  # type: ignore[union-attr]
    assert [m.backend for m in model[1:]] == ["auto", "native"]  # type: ignore[union-attr]


def test_parametrized_taps_stay() -> None:
    module, x = eca_layer(8, 5).double(), image()
    parametrizations.weight_norm(module.conv)
    want, names = results(module, x), [n for n, _ in module.named_parameters()]
    assert convert(module).converted
    assert [n for n, _ in module.named_parameters()] == names
    assert_same(results(module, x), want)
    revert(module)
    assert parametrize.is_parametrized(module.conv)
    assert_same(results(module, x), want)


# ---- wrappers and compilers ----


@needs_extension
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_compiled_afterwards(layout: torch.memory_format) -> None:
    model, x = C2f(8).double(), image().contiguous(memory_format=layout)
    want = results(model, x)
    convert(model)
    assert_same(results(torch.compile(model, fullgraph=True, backend="aot_eager"), x), want)


def test_of_a_compiled_model_the_inner_modules() -> None:
    model, x = C2f(8).double(), image()
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    want = results(compiled, x)
    assert len(convert(compiled).converted) == 3  # type: ignore[arg-type]
    assert type(model.eca) is ECALayer
    assert_same(results(compiled, x), want)


@pytest.fixture
def process_group() -> Iterator[None]:
    if not torch.distributed.is_available():
        pytest.skip("needs a torch with torch.distributed")
    store = torch.distributed.HashStore()
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


@pytest.mark.usefixtures("process_group")
def test_in_distributed_data_parallel() -> None:
    model, x = C2f(8).double(), image()
    want = results(model, x)[2:]
    wrapped = nn.parallel.DistributedDataParallel(model)
    report = convert(wrapped)
    assert "module.eca" in report.converted
    y = wrapped(x)
    y.backward(torch.randn(y.shape, generator=torch.Generator().manual_seed(1), dtype=y.dtype))
    assert_same(tuple(p.grad for p in model.parameters()), want)  # type: ignore[arg-type]


def test_scripted_afterwards() -> None:
    model, x = C2f(8).double(), image()
    want = results(model, x)
    convert(model)
    assert_same(results(torch.jit.script(model), x), want)


def test_traced_by_fx_afterwards() -> None:
    model, x = Decoder().double(), image(2, 3, 8, 12)
    want = results(model, x)
    convert(model)
    assert_same(results(torch.fx.symbolic_trace(model), x), want)
