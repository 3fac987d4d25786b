"""convert(tails=True): norm, activation and attention in the middle of a block."""

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from eca_fused import convert, revert
from eca_fused.attention import norm_act, residual_tail
from eca_fused.conversion import tailed
from helpers.cases import needs_extension
from helpers.optional import needs_timm, timm_layers
from helpers.residual_blocks import (
    Middle,
    as_before,
    assert_the_same,
    converted,
    everywhere_something,
    image,
    steps,
)

pytestmark = pytest.mark.every_torch


def middles(block: nn.Module) -> list[str]:
    """What is one operation in the middle of a block."""
    return [str(middle) for middle in vars(block)[tailed.PROGRAM].middles()]


@needs_extension
@needs_timm
def test_both_forms_in_one_block_are_computed_by_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    import timm

    model = timm.create_model("mobilenetv3_small_050", num_classes=10)
    found = list(convert(model, tails=True).tails.values())
    calls: list[str] = []
    for module in (norm_act, residual_tail):
        name, compute = module.__name__.rpartition(".")[2], module._compute
        monkeypatch.setattr(
            module, "_compute", lambda *a, n=name, f=compute: calls.append(n) or f(*a)
        )
    model(torch.randn(2, 3, 40, 40))
    assert calls.count("norm_act") == sum("attention" in parts for parts in found) == 9
    assert calls.count("residual_tail") == sum("tail" in parts for parts in found) == 7


# ---- forms ----


class Wider(Middle):
    """With other parts beside them."""

    def __init__(self) -> None:
        super().__init__()
        self.gelu = nn.GELU()


def norm(m: Any, x: Tensor) -> Tensor:
    return m.bn1(m.conv1(x))  # type: ignore[no-any-return]


FORMS: dict[str, Callable[[Any, Tensor], Tensor]] = {
    "the end of the block": lambda m, x: m.middle(x),
    "no tail": lambda m, x: m.conv2(m.middle(x)),
    "a function": lambda m, x: m.conv2(m.eca(F.relu(norm(m, x)))),
    "in place": lambda m, x: m.conv2(m.eca(norm(m, x).relu_())),
    "hard swish": lambda m, x: m.conv2(m.eca(F.hardswish(norm(m, x)))),
    "silu": lambda m, x: m.conv2(m.eca(F.silu(norm(m, x), inplace=True))),
    "gelu": lambda m, x: m.conv2(m.eca(m.gelu(norm(m, x)))),
    "an identity before the activation": lambda m, x: m.conv2(m.eca(m.act1(m.idle(norm(m, x))))),
    "more uses of the result": lambda m, x: (lambda z: m.conv2(z) + z)(m.middle(x)),
}


@pytest.mark.parametrize("name", FORMS)
def test_forms(name: str) -> None:
    block = converted(type("Mine", (Wider,), {"forward": FORMS[name]})())
    assert len(middles(block)) == 1
    plain = as_before(block)
    assert_the_same(steps(block, image()), steps(plain, image()))


OTHERS: dict[str, Callable[[Any, Tensor], Tensor]] = {
    "the activation is used again": lambda m, x: (lambda z: m.conv2(m.eca(z)) + z)(
        m.act1(norm(m, x))
    ),
    "the norm is used again": lambda m, x: (lambda u: m.conv2(m.eca(F.relu(u))) + u)(norm(m, x)),
    "another activation": lambda m, x: m.conv2(m.eca(F.leaky_relu(norm(m, x)))),
    "approximate gelu": lambda m, x: m.conv2(m.eca(F.gelu(norm(m, x), approximate="tanh"))),
    "no activation": lambda m, x: m.conv2(m.eca(norm(m, x))),
    "no norm": lambda m, x: m.conv2(m.eca(F.relu(m.conv1(x)))),
    "two activations": lambda m, x: m.conv2(m.eca(F.relu(F.silu(norm(m, x))))),
}


@pytest.mark.parametrize("name", OTHERS)
def test_other_forms_keep_their_forward(name: str) -> None:
    block = everywhere_something(type("Mine", (Wider,), {"forward": OTHERS[name]})())
    plain = copy.deepcopy(block)
    convert(block, tails=True)
    assert tailed.PROGRAM not in vars(block) or not middles(block)
    assert_the_same(steps(block, image()), steps(plain, image()))


@needs_timm
def test_a_norm_with_the_activation_inside_and_one_after_it() -> None:
    block = Middle()
    block.bn1 = timm_layers.BatchNormAct2d(8)
    block.act1 = nn.SiLU()
    plain = copy.deepcopy(everywhere_something(block))
    convert(block, tails=True)
    assert not middles(block)
    block.act1 = nn.Identity()
    revert(block)
    convert(block, tails=True)
    assert middles(block) == ["bn1, eca"]
    plain.act1 = nn.Identity()
    assert_the_same(steps(block, image()), steps(plain, image()))


def test_an_attention_that_is_not_known_is_called() -> None:
    block = everywhere_something(Middle(nn.Sequential(nn.Conv2d(8, 8, 1))))
    convert(block, tails=True)
    assert not middles(block)


def test_the_tail_may_stay_as_it_is() -> None:
    """The sum of two maps has another use, so it is no tail."""

    def forward(self: Any, x: Tensor) -> Tensor:
        total = self.bn2(self.conv2(self.middle(x))) + x
        return F.relu(total) + total  # type: ignore[no-any-return]

    block = converted(type("Mine", (Middle,), {"forward": forward})())
    assert vars(block)[tailed.PROGRAM].tail is None
    plain = as_before(block)
    assert_the_same(steps(block, image()), steps(plain, image()))


# ---- after the conversion ----


def test_reports_and_repr() -> None:
    block = Middle()
    assert str(convert(block, tails=True)).splitlines() == [
        "converted 1, blocks 1, left 0",
        "  eca_layer: eca",
        "  in Middle: attention bn1, act1, eca; tail bn2, + shortcut, relu: the model itself",
    ]
    assert "in one operation: attention bn1, act1, eca; tail bn2, + shortcut, relu" in repr(block)
    block.bn1.register_forward_hook(lambda *arguments: None)
    reason = "of bn1, act1, eca, bn: BatchNorm2d has hooks, or a forward of its own"
    assert f"by calling its modules ({reason}): attention bn1" in repr(block)


def test_copies_and_pickles() -> None:
    block = converted(Middle())
    assert vars(pickle.loads(pickle.dumps(block)))[tailed.PROGRAM] == vars(block)[tailed.PROGRAM]
    plain = as_before(block)
    assert_the_same(steps(copy.deepcopy(block), image()), steps(plain, image()))


@pytest.mark.parametrize("part", ["bn1", "act1", "eca", "eca.conv"])
def test_a_hook_added_later_is_called(part: str) -> None:
    block = converted(Middle())
    plain = as_before(block)
    for model in (block, plain):
        model.get_submodule(part).register_forward_hook(lambda m, a, out: out * 2)
    assert_the_same(steps(block, image()), steps(plain, image()))


def test_a_replaced_identity_is_called() -> None:
    block = converted(Middle())
    plain = as_before(block)
    for model in (block, plain):
        model.idle = nn.Softplus()
    assert_the_same(steps(block, image()), steps(plain, image()))


@needs_extension
def test_compiled_afterwards() -> None:
    block = converted(Middle())
    plain = as_before(block)
    compiled = torch.compile(block, fullgraph=True, backend="aot_eager")
    assert_the_same(steps(compiled, image()), steps(plain, image()))  # type: ignore[arg-type]
