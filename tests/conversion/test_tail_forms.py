"""convert(tails=True): which forms of residual blocks it takes, and why it leaves others."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from eca_fused import ECALayer, convert, revert
from eca_fused.attention.residual_tail import KeptTail
from eca_fused.conversion import tailed
from helpers.residual_blocks import (
    Block,
    as_before,
    assert_the_same,
    converted,
    image,
    steps,
)

pytestmark = pytest.mark.every_torch


# ---- forms of tails ----


class Gained(Block):
    """With a factor that is trained, and another norm."""

    def __init__(self) -> None:
        super().__init__()
        self.gain = nn.Parameter(torch.tensor(0.7))
        self.bn3 = nn.BatchNorm2d(8)


def forwards_of_tails() -> dict[str, Callable[[Any, Tensor], Tensor]]:
    return {
        "functions": lambda m, x: F.relu(torch.add(m.branch(x), x)),
        "in place": lambda m, x: m.branch(x).add_(x).relu_(),
        "no activation": lambda m, x: m.branch(x) + x,
        "no addition": lambda m, x: m.relu(m.branch(x)),
        "silu": lambda m, x: F.silu(m.branch(x) + x, inplace=True),
        "gelu": lambda m, x: F.gelu(m.branch(x) + x),
        "shortcut first": lambda m, x: torch.relu(x + m.branch(x)),
        "an ended factor": lambda m, x: F.relu(m.branch(x) * 0.5 * m.gain + x),
        "a factor in place": lambda m, x: (lambda out: (out.mul_(m.gain), m.alpha * out)[1] + x)(
            m.branch(x)
        ),
        "a shared factor": lambda m, x: m.branch(x * m.gain) * m.gain + x,
        "slices": lambda m, x: m.branch(x) + torch.cat([x[:, 4:], x[:, :4]], 1),
        "two branches": lambda m, x: m.branch(x) + m.bn3(m.conv1(x)),
    }


@pytest.mark.parametrize("name", forwards_of_tails())
def test_forms(name: str) -> None:
    block = type("Mine", (Gained,), {"forward": forwards_of_tails()[name]})()
    block = converted(block)
    plain = as_before(block)
    assert "bn2" in convert_again(block).tails[""]
    assert_the_same(steps(block, image()), steps(plain, image()))


class Inverted(nn.Module):
    """A block of which most is in containers, as in MobileNetV2."""

    def __init__(self, between: nn.Module | None = None) -> None:
        super().__init__()
        self.act = nn.ReLU6()
        first = nn.Sequential(nn.Conv2d(8, 8, 1), nn.BatchNorm2d(8), between or nn.ReLU6())
        self.conv = nn.Sequential(first, nn.Conv2d(8, 8, 1), nn.BatchNorm2d(8), ECALayer(8))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.conv(x)  # type: ignore[no-any-return]


class CalledTwice(Inverted):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(self.conv[0][1](x))  # type: ignore[operator,no-any-return]


class WithShared(Inverted):
    def __init__(self) -> None:
        act = nn.ReLU6()
        super().__init__(nn.Sequential(act, nn.Conv2d(8, 8, 1), act))


class UsedOnTheWay(Inverted):
    def forward(self, x: Tensor) -> Tensor:
        first = self.conv[0][0](x)  # type: ignore[operator]
        middle = self.conv[0][2](self.conv[0][1](first))  # type: ignore[operator]
        return first + self.conv[3](self.conv[2](self.conv[1](middle)))  # type: ignore[operator]


@pytest.mark.parametrize(
    ("kind", "called"),
    [
        (Inverted, ["conv.0", "conv.1"]),
        (CalledTwice, ["conv.0.1", "conv.0.0", "conv.0.1", "conv.0.2", "conv.1"]),
        (
            WithShared,
            ["conv.0.0", "conv.0.1", "conv.0.2.0", "conv.0.2.1", "conv.0.2.0", "conv.1"],
        ),
        (UsedOnTheWay, ["conv.0.0", "conv.0.1", "conv.0.2", "conv.1"]),
    ],
)
def test_containers_before_a_tail(kind: type[Inverted], called: list[str]) -> None:
    """One is called as a whole where a block's forward does nothing else with its parts."""
    block = converted(kind())
    plain = as_before(block)
    assert [step.target for step in vars(block)[tailed.PROGRAM].steps] == called
    assert_the_same(steps(block, image()), steps(plain, image()))


@pytest.mark.parametrize("name", ["conv", "conv.0", "conv.0.1", "conv.1"])
def test_hooks_on_containers_and_their_parts(name: str) -> None:
    block = converted(Inverted())
    block.get_submodule(name).register_forward_hook(lambda module, inputs, output: output * 2)
    plain = as_before(block)
    assert_the_same(steps(block, image()), steps(plain, image()))


def convert_again(block: nn.Module) -> Any:
    revert(block)
    return convert(block, tails=True)


def test_layers_that_overwrite() -> None:
    block = converted()
    plain = as_before(block)
    assert convert(as_before(block), inplace=True, tails=True).tails
    revert(block)
    convert(block, inplace=True, tails=True)
    with torch.no_grad():
        torch.testing.assert_close(block(image()), plain(image()))


# ---- blocks that are left ----


class Unknown(nn.Module):
    """An attention whose gates nothing knows."""

    def forward(self, x: Tensor) -> Tensor:
        return x * x.mean((2, 3), keepdim=True).tanh()


def under_autocast(m: Any, x: Tensor) -> Tensor:
    with torch.autocast("cpu", enabled=False):
        out = m.branch(x)
    return F.relu(out + x)


def without_gradients(m: Any, x: Tensor) -> Tensor:
    with torch.no_grad():
        out = m.conv1(x)
    return F.relu(m.eca(m.bn2(out)) + x)


def twice(m: Any, x: Tensor) -> Tensor:
    out = m.branch(x)
    return F.relu(out + x * out)


def storing(m: Any, x: Tensor) -> Tensor:
    m.last = m.branch(x)
    return F.relu(m.last + x)


def counting(m: Any, x: Tensor) -> Tensor:
    m.calls.append(1)
    return F.relu(m.branch(x) + x)


def while_training(m: Any, x: Tensor) -> Tensor:
    return F.relu(m.branch(x) + (F.relu(x) if m.training else x))


def with_dropout(m: Any, x: Tensor) -> Tensor:
    return F.relu(F.dropout(m.branch(x), 0.1, m.training) + x)


def with_a_list(m: Any, x: Tensor) -> Tensor:
    """As timm's VoVNet passes one."""
    found = [x]
    m.conv1(x, found)
    return F.relu(m.bn2(found[-1]) + x)


def late_change(m: Any, x: Tensor) -> Tensor:
    """Changes what the norm has read, which the tail would read afterwards."""
    out = m.conv1(x)
    normed = m.bn2(out)
    return F.relu(normed + out.mul_(2))


REFUSED: dict[str, tuple[Callable[..., Any] | None, dict[str, Any], str | None]] = {
    "GroupNorm": (
        None,
        {"attention": nn.Identity(), "norm": lambda c: nn.GroupNorm(2, c)},
        r"its branch ends in bn2 \(GroupNorm\)",
    ),
    "an unknown attention": (
        None,
        {"attention": Unknown()},
        r"its branch ends in eca \(Unknown\)",
    ),
    "used twice": (twice, {}, r"the result of eca \(ECALayer\) has more than one use"),
    "data": (
        lambda m, x: F.relu(m.branch(x) + x) if x.sum() > 0 else x,
        {},
        "its forward cannot be traced",
    ),
    "stores": (storing, {}, "its forward stores last"),
    "a user's object": (counting, {}, None),
    "training": (while_training, {}, "its forward depends on whether it trains"),
    "dropout": (with_dropout, {}, r"its forward calls the function dropout\(\)"),
    "checkpoint": (
        lambda m, x: F.relu(checkpoint(m.branch, x, use_reentrant=False) + x),
        {},
        "its forward cannot be traced: argument of type.* at `lambda m, x: F.relu",
    ),
    "a list": (with_a_list, {}, "its forward passes a list to conv1, which may change it"),
    "autocast": (under_autocast, {}, "its forward switches autocast or gradients"),
    "no gradients": (without_gradients, {}, "its forward switches autocast or gradients"),
    "over the input": (
        lambda m, x: F.relu(x.add_(m.branch(x))),
        {},
        "the addition is written over the block's input",
    ),
    "LeakyReLU": (
        lambda m, x: m.act(m.branch(x) + x),
        {},
        "activation: LeakyReLU is not one that the kernels have",
    ),
    "a change between": (late_change, {}, "differs in a trial|has more than one use|fails"),
    "two maps": (lambda m, x, y=None: F.relu(m.branch(x) + x), {}, "takes more than one map"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_blocks_that_are_left(name: str) -> None:
    forward, options, reason = REFUSED[name]
    cls = Block if forward is None else type("Mine", (Block,), {"forward": forward})
    block = cls(**options).double()
    block.calls, block.act = [], nn.LeakyReLU()
    report = convert(nn.Sequential(block), tails=True)
    assert report.tails == {}
    assert type(block) is cls
    assert block.calls == []
    assert "last" not in vars(block)
    if reason is not None:
        with pytest.raises(AssertionError, match=reason):
            raise AssertionError(report.left["0"])


@pytest.mark.parametrize(
    ("wrong", "reason"),
    [
        (lambda y: 1.001 * y, "the output differs in a trial"),
        (lambda y: y + 0.001 * (y - y.detach()), "the gradient of the input differs in a trial"),
        (lambda y: y.chunk(0), "a trial on small maps fails: chunk expects"),
    ],
)
def test_a_block_that_computes_something_else_is_left(
    wrong: Callable[[Tensor], Tensor], reason: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    compute = KeptTail.__call__
    monkeypatch.setattr(KeptTail, "__call__", lambda *arguments: wrong(compute(*arguments)))
    report = convert(nn.Sequential(Block()), tails=True)
    assert report.tails == {}
    assert reason in report.left["0"]


def test_networks_without_residual_blocks() -> None:
    layer = nn.TransformerEncoderLayer(8, 2, 16)
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), ECALayer(8), layer)
    report = convert(model, tails=True)
    assert (report.tails, report.left) == ({}, {})
    plain = type("Plain", (Block,), {"forward": lambda m, x: m.relu(m.bn1(m.conv1(x)))})()
    report = convert(plain, tails=True)
    assert (report.tails, report.left) == ({}, {})


def test_a_hook_before_the_conversion_is_left_out_of_the_tail() -> None:
    block, seen = Block(), []
    block.bn2.register_forward_hook(lambda m, a, y: seen.append("bn2"))
    report = convert(block, tails=True)
    assert report.tails == {"": "Block: tail eca, + shortcut, relu"}
    block(image().float())
    assert seen == ["bn2"]
