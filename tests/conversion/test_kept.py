"""What a block keeps from call to call: no later change of its modules or of the call is lost."""

import copy
import gc
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call, jvp, vmap
from torch.nn.modules.module import register_module_forward_hook
from torch.nn.utils import parametrize

from eca_fused import ECALayer, NormActAttention, ResidualTail, use_backend
from eca_fused.attention import SE
from eca_fused.attention.kept import Kept
from eca_fused.attention.residual_tail import KeptTail
from helpers.cases import needs_extension
from helpers.eca_modules import eca_layer
from helpers.residual_blocks import Block, Middle, as_before, converted, image, with_downsample

pytestmark = pytest.mark.every_torch

BLOCKS: dict[str, Callable[[], Any]] = {
    "tail": Block,
    "tail with a downsample": with_downsample,
    "middle": Middle,
}


def block_of(kind: str) -> Any:
    """A converted block in evaluation. Its attention has neighbours, so that padding matters."""
    block = BLOCKS[kind]()
    block.eca = ECALayer(8, 3)
    return converted(block).eval()


class Twice(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return 2 * x


class Doubled(nn.BatchNorm2d):
    def forward(self, x: Tensor) -> Tensor:
        return 2 * super().forward(x)


def norm_of(block: Any) -> Any:
    """The norm before the attention."""
    return block.bn1 if isinstance(block, Middle) else block.bn2


def with_other_norm(block: Any) -> None:
    other = nn.BatchNorm2d(8, eps=0.5).double()
    setattr(block, "bn1" if isinstance(block, Middle) else "bn2", other)


def with_other_activation(block: Any) -> None:
    setattr(block, "act1" if isinstance(block, Middle) else "relu", nn.SiLU())


def without_statistics(block: Any) -> None:
    norm = norm_of(block)
    norm.track_running_stats, norm.running_mean, norm.running_var = False, None, None


@torch.no_grad()
def with_written_taps(block: Any) -> None:
    block.eca.conv.weight.mul_(2)


def loaded(block: Any) -> None:
    state = {name: 2 * tensor for name, tensor in block.state_dict().items()}
    block.load_state_dict(state, assign=True)


# Each returns what to remove after the test, or nothing.
CHANGES: dict[str, Callable[[Any], Any]] = {
    "a hook on the norm": lambda b: norm_of(b).register_forward_hook(lambda m, a, y: 2 * y),
    "a hook on the attention": lambda b: b.eca.register_forward_pre_hook(lambda m, a: (2 * a[0],)),
    "a hook on the taps": lambda b: b.eca.conv.register_forward_hook(lambda m, a, y: 2 * y),
    "a hook on all modules": lambda b: register_module_forward_hook(
        lambda m, a, y: 2 * y if isinstance(m, nn.BatchNorm2d) else None
    ),
    "another forward of the norm": lambda b: setattr(norm_of(b), "forward", lambda x: 2 * x),
    "another class of the norm": lambda b: setattr(norm_of(b), "__class__", Doubled),
    "another norm": with_other_norm,
    "another attention": lambda b: setattr(b, "eca", eca_layer(8).double()),
    "another activation": with_other_activation,
    "other taps": lambda b: setattr(
        b.eca.conv, "weight", nn.Parameter(2 * b.eca.conv.weight.detach())
    ),
    "written taps": with_written_taps,
    "taps written past autograd": lambda b: b.eca.conv.weight.data.mul_(2),
    "written statistics": lambda b: norm_of(b).running_mean.add_(1),
    "other statistics": lambda b: setattr(norm_of(b), "running_var", 2 * norm_of(b).running_var),
    "no statistics": without_statistics,
    "eps": lambda b: setattr(norm_of(b), "eps", 0.5),
    "circular padding": lambda b: setattr(b.eca, "padding_mode", "circular"),
    "not fused": lambda b: setattr(b.eca, "fused", False),
    "a parametrization": lambda b: parametrize.register_parametrization(
        norm_of(b), "weight", Twice()
    ),
    "training": lambda b: b.train(),
    "loaded": loaded,
}


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize("kind", BLOCKS)
def test_a_change_after_the_first_call_is_seen(kind: str, grad: bool, change: str) -> None:
    block, x = block_of(kind), image()
    with torch.set_grad_enabled(grad):
        before = block(x)
        assert torch.equal(block(x), before)
        removable = CHANGES[change](block)
        try:
            want = as_before(block)(x)
            assert not torch.allclose(want, before) or change == "not fused"
            torch.testing.assert_close(block(x), want)
        finally:
            if hasattr(removable, "remove"):
                removable.remove()


@needs_extension
@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize("kind", BLOCKS)
def test_a_plan_is_made_once(kind: str, grad: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[Any] = []
    make = Kept._make
    monkeypatch.setattr(Kept, "_make", lambda kept: made.append(kept) or make(kept))
    block, x = block_of(kind), image()
    made.clear()  # by the trial
    with torch.set_grad_enabled(grad):
        for _ in range(3):
            block(x)
    assert len(made) == (2 if kind == "middle" else 1)


# ---- the call ----


def tail() -> Any:
    torch.manual_seed(0)
    return ResidualTail(eca_layer(8), nn.BatchNorm2d(8)).double().eval()


def gated() -> Any:
    """A tail whose gates a network makes."""
    torch.manual_seed(0)
    return ResidualTail(SE(8, 2), nn.BatchNorm2d(8)).double().eval()


def gated_alone() -> Any:
    torch.manual_seed(0)
    return ResidualTail(SE(8, 2)).double().eval()


def middle() -> Any:
    torch.manual_seed(0)
    return NormActAttention(eca_layer(8), nn.BatchNorm2d(8)).double().eval()


def by_reference(module: Any, *maps: Any) -> Any:
    twin = copy.deepcopy(module)
    with use_backend("reference"):
        return twin(*maps)


CALLS: dict[str, Callable[[Any, Tensor], Any]] = {
    "another size": lambda m, x: m(x[:1, :, 1:]),
    "no samples": lambda m, x: m(x[:0]),
    "channels_last": lambda m, x: m(x.contiguous(memory_format=torch.channels_last)),
    "a subclass": lambda m, x: m(x.as_subclass(type("Own", (Tensor,), {}))).as_subclass(Tensor),
    "vmap": lambda m, x: vmap(m)(torch.stack([x, 2 * x])),
    "forward mode": lambda m, x: torch.stack(jvp(m, (x,), (x + 1,))),
    "a trace": lambda m, x: torch.jit.trace(m, (x,), check_trace=False)(x),
    "a backend": lambda m, x: by_reference(m, x),
}


@pytest.mark.filterwarnings(
    "ignore:.torch.jit:FutureWarning", "ignore:.torch.jit:DeprecationWarning"
)
@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("make", [tail, gated, middle])
def test_another_call_after_the_first_is_right(make: Callable[[], Any], call: str) -> None:
    module, x = make(), image()
    with torch.no_grad():
        module(x)
        got = CALLS[call](module, x)
        fresh = make()
        torch.testing.assert_close(got, CALLS[call](fresh, x), rtol=0, atol=0)
        torch.testing.assert_close(module(x), by_reference(module, x))


@pytest.mark.parametrize("make", [tail, gated])
def test_an_identity_comes_and_goes(make: Callable[[], Any]) -> None:
    module, x = make(), image()
    with torch.no_grad():
        for identity in (None, x, None, x[:1], 2 * x):
            torch.testing.assert_close(module(x, identity), by_reference(module, x, identity))


@pytest.mark.parametrize("make", [tail, gated, gated_alone])
def test_errors_are_those_of_the_first_call(make: Callable[[], Any]) -> None:
    module, x = make(), image()
    wrong: list[tuple[Any, ...]] = [
        (x[:, :4],),
        (x[:, :4], x[:, :4]),
        (x[0],),
        (x.float(), x),
        (x, x[:, :4]),
        (x.tolist(),),
    ]
    errors = []
    for called in (False, True):
        with torch.no_grad():
            if called:
                module(x, x)
            for maps in wrong:
                with pytest.raises((RuntimeError, ValueError, TypeError, AttributeError)) as error:
                    module(*maps)
                errors.append((error.type, str(error.value)))
    assert errors[: len(wrong)] == errors[len(wrong) :]


@needs_extension
def test_a_call_with_a_gate_network_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    module, x = gated(), image()
    with torch.no_grad():
        want = module(x, x)
        monkeypatch.setattr(KeptTail, "compute", None)
        torch.testing.assert_close(module(x, x), want, rtol=0, atol=0)


@needs_extension
def test_a_gate_network_that_fails_runs_once(monkeypatch: pytest.MonkeyPatch) -> None:
    module, x, calls = gated(), image(), []

    def failing(mean: Tensor) -> Tensor:
        calls.append(mean)
        if len(calls) == 2:
            raise RuntimeError("of the network")
        return mean.sigmoid()

    monkeypatch.setattr(module.attention, "gate", failing)
    with torch.no_grad():
        module(x, x)
        with pytest.raises(RuntimeError, match="of the network"):
            module(x, x)
    assert len(calls) == 2


def with_hook_in_network(module: Any) -> Any:
    return layers_of(module)[0].register_forward_hook(lambda m, a, y: 2 * y)


def with_other_layer(module: Any) -> None:
    layers_of(module)[0].weight = nn.Parameter(-layers_of(module)[0].weight.detach())


@torch.no_grad()
def with_written_layer(module: Any) -> None:
    layers_of(module)[0].weight.neg_()


def layers_of(module: Any) -> list[Any]:
    return [m for m in module.attention.modules() if isinstance(m, nn.Linear | nn.Conv2d)]


@needs_extension
@pytest.mark.parametrize("change", [with_hook_in_network, with_other_layer, with_written_layer])
def test_a_change_of_a_gate_network_is_seen(change: Callable[[Any], Any]) -> None:
    module, x = gated(), image()
    with torch.no_grad():
        before = module(x, x)
        change(module)
        want = by_reference(module, x, x)
        assert not torch.allclose(want, before)
        torch.testing.assert_close(module(x, x), want)


# ---- memory ----


@pytest.mark.parametrize("kind", BLOCKS)
def test_nothing_outlives_the_block(kind: str) -> None:
    block = block_of(kind)
    with torch.no_grad():
        block(image())
    left = [weakref.ref(block), weakref.ref(block.eca), weakref.ref(norm_of(block).weight)]
    gc.collect()
    gc.disable()
    try:
        del block
        assert [ref() for ref in left] == [None] * 3
    finally:
        gc.enable()


@pytest.mark.parametrize("make", [tail, gated, middle])
def test_parameters_of_one_call_are_not_kept(make: Callable[[], Any]) -> None:
    module, x = make(), image()
    with torch.no_grad():
        module(x)
        own = module(x)
        given = {name: 2 * p.detach() for name, p in module.named_parameters()}
        twice = functional_call(module, given, (x,))
        assert not torch.allclose(twice, own)
        torch.testing.assert_close(module(x), own, rtol=0, atol=0)
    left = [weakref.ref(t) for t in given.values()]
    del given
    gc.collect()
    assert [ref() for ref in left] == [None] * len(left)


def test_copies_are_their_own() -> None:
    block, x = converted().eval(), image()
    with torch.no_grad():
        before = block(x)
        twin, shallow = copy.deepcopy(block), copy.copy(block)
        twin.bn2.weight.mul_(3)
        assert not torch.allclose(twin(x), before)
        shallow.bn2 = copy.deepcopy(twin.bn2)  # into the dictionary that both have
        torch.testing.assert_close(block(x), shallow(x), rtol=0, atol=0)
        torch.testing.assert_close(block(x), twin(x), rtol=0, atol=0)
