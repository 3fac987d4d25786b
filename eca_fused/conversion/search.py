"""Finds what can be one operation in the steps of a block's forward: its tail, and norm, activation
and attention in its middle."""

import itertools
from collections.abc import Iterator
from typing import Any, NamedTuple

from torch import nn

from eca_fused.attention import norm_act
from eca_fused.attention.activations import activation_name
from eca_fused.attention.base import ChannelAttention
from eca_fused.attention.gates import NETWORKS
from eca_fused.attention.norms import activation_of, full_name, not_plain
from eca_fused.attention.residual_tail import DROP_PATHS, TailParts, why_called
from eca_fused.conversion.recognise import arguments_of
from eca_fused.conversion.tailed import (
    Container,
    NormAct,
    Program,
    Slice,
    Step,
    Tail,
    Value,
    module_at,
    names_of_children,
    norm_act_parts,
    tensor_at,
)
from eca_fused.conversion.tracing import (
    PLAIN,
    NoTail,
    Steps,
    is_container,
    is_in_place,
    steps_of,
    values_in,
    whole_containers,
)
from eca_fused.layer import ECALayer
from eca_fused.torch_state import BatchNorm, does_more

__all__ = ["is_attention", "program_of"]

ADDITIONS = ("operator.add", "operator.iadd", "torch.add", "add", "add_")
PRODUCTS = ("operator.mul", "operator.imul", "torch.mul", "mul", "mul_")
ACTIVATIONS = {
    "F.relu": "relu",
    "torch.relu": "relu",
    "torch.relu_": "relu",
    "relu": "relu",
    "relu_": "relu",
    "F.silu": "silu",
    "F.gelu": "gelu",
}
MIDDLE_ACTIVATIONS = ACTIVATIONS | {"F.hardswish": "hardswish"}
OF_MODULES = frozenset(vars(nn.Module()))  # such as training, and what hooks change


def is_attention(module: nn.Module) -> bool:
    """Whether a module's gates may be known."""
    return isinstance(module, ECALayer | ChannelAttention) or full_name(module) in NETWORKS


class _Branch(NamedTuple):
    """What was found from an operand of the addition backwards."""

    start: Value  # what the tail begins with
    members: tuple[int, ...]  # the numbers of the values that the tail replaces
    names: dict[str, str]  # bn, attention and drop_path
    factors: tuple[float | str, ...]
    idle: tuple[str, ...]
    reason: str  # why it goes no further

    def rank(self) -> tuple[bool, ...]:
        return tuple(name in self.names for name in ("attention", "drop_path", "bn"))


class _Search:
    def __init__(self, block: nn.Module, steps: Steps) -> None:
        self.block = block
        self.steps = steps

    def _called(self, value: Value) -> tuple[str, nn.Module, Value] | None:
        """The name, the module and the argument of a module that makes a value from one map."""
        step = self.steps.of(value)
        if step is None or step.kind != "module" or len(step.args) != 1 or step.kwargs:
            return None
        argument = step.args[0]
        if not isinstance(argument, Value):
            return None
        return step.target, module_at(self.block, step.target), argument

    def _used_once(self, value: Value) -> bool:
        return self.steps.uses[value.number] == 1

    def _factor(self, value: Value) -> tuple[float | str, Value] | None:
        """The factor of a product, and the map."""
        step = self.steps.of(value)
        if step is None or step.target not in PRODUCTS or len(step.args) != 2 or step.kwargs:
            return None
        for factor, other in (step.args, step.args[::-1]):
            if not isinstance(other, Value):
                continue
            if isinstance(factor, float | int) and not isinstance(factor, bool):
                return float(factor), other
            made = self.steps.of(factor) if isinstance(factor, Value) else None
            if made is not None and made.kind == "attribute":
                tensor = tensor_at(self.block, made.target)
                if tensor.dim() == 0 and tensor.is_floating_point():
                    return made.target, other
        return None

    def _part(self, value: Value, names: dict[str, str]) -> tuple[str, str, Value]:
        """What a value's module is in a tail, its name and its argument.

        Args:
            value: the value.
            names: of the parts that come later in the tail.

        Raises:
            NoTail: it is in no tail.
        """
        called = self._called(value)
        if called is None:
            raise NoTail(f"its branch ends in {self._described(value)}")
        name, module, below = called
        reason = None
        if type(module) is nn.Identity and not does_more(module):
            kind = "idle"
        elif isinstance(module, BatchNorm):
            kind, reason = "bn", not_plain(module)
        elif full_name(module) in DROP_PATHS and not names:
            kind, reason = "drop_path", why_called(TailParts(None, None, module, None, "none"))
        elif is_attention(module) and "attention" not in names:
            kind, reason = "attention", why_called(TailParts(None, module, None, None, "none"))
        else:
            raise NoTail(f"its branch ends in {self._described(value)}")
        if reason is not None:
            raise NoTail(reason)
        return kind, name, below

    def branch(self, operand: Value) -> _Branch:
        """The norm, the attention, the drop path and the factors that end in an operand."""
        value, reason = operand, ""
        members: list[int] = []
        names: dict[str, str] = {}
        factors: list[float | str] = []
        idle: list[str] = []
        while "bn" not in names:
            if not self._used_once(value):
                reason = f"the result of {self._described(value)} has more than one use"
                break
            product = None if "attention" in names else self._factor(value)
            if product is not None:
                factor, below = product
                factors.append(factor)
            else:
                try:
                    kind, name, below = self._part(value, names)
                except NoTail as why:
                    reason = str(why)
                    break
                if kind == "idle":
                    idle.append(name)
                else:
                    names[kind] = name
            members.append(value.number)
            value = below
        return _Branch(value, tuple(members), names, tuple(factors), tuple(idle), reason)

    def shortcut(self, operand: Value) -> tuple[Value, str | None, tuple[int, ...]]:
        """The start of a shortcut, the norm that it ends in, and what the tail replaces of it."""
        called = self._called(operand)
        if called is not None and self._used_once(operand):
            name, module, below = called
            if isinstance(module, BatchNorm) and not_plain(module) is None:
                return below, name, (operand.number,)
        return operand, None, ()

    def _is_made(self, value: Value) -> bool:
        """Whether a value is surely not the block's input."""
        called = self._called(value)
        return called is not None and type(called[1]) is not nn.Identity

    def _described(self, value: Value) -> str:
        step = self.steps.of(value)
        if step is None:
            return "its input"
        if step.kind != "module":
            return str(step.target)
        return f"{step.target} ({type(module_at(self.block, step.target)).__name__})"

    # ---- norm, activation and attention in the middle ----

    def _without_idle(self, value: Value, passed: list[tuple[str, int]]) -> Value | None:
        """The value that nn.Identity modules pass on; None if anything else needs one of them.

        Their names and numbers are added to passed.
        """
        while self._used_once(value):
            called = self._called(value)
            if called is None or type(called[1]) is not nn.Identity or does_more(called[1]):
                return value
            passed.append((called[0], value.number))
            value = called[2]
        return None

    def _activation_at(self, value: Value) -> tuple[str, bool, Value]:
        """The activation that makes a value, whether it is a module, and what it is applied to."""
        step, called = self.steps.of(value), self._called(value)
        if called is not None and activation_name(called[1]) is not None:
            return called[0], True, called[2]
        if step is not None and step.kind in ("function", "method"):
            kind: str | None = MIDDLE_ACTIVATIONS.get(step.target)
            alone = kind != "gelu" or (len(step.args) == 1 and not step.kwargs)
            if kind is not None and alone and isinstance(step.args[0], Value):
                return kind, False, step.args[0]
        return "none", False, value

    def middle(self, end: Value) -> tuple[NormAct, Value, set[int]] | None:
        """Norm, activation and attention that make a value, what they begin with, and what they
        replace before the value; None for other values."""
        called = self._called(end)
        if called is None or not is_attention(called[1]):
            return None
        passed: list[tuple[str, int]] = []
        after = self._without_idle(called[2], passed)
        if after is None:
            return None
        activation, is_module, below = self._activation_at(after)
        normed = below if below == after else self._without_idle(below, passed)
        norm = None if normed is None else self._called(normed)
        if normed is None or norm is None or not isinstance(norm[1], BatchNorm):
            return None
        if (below == after) == (activation_of(norm[1]) is None):  # none, or two activations
            return None
        idle = tuple(name for name, _ in passed)
        found = NormAct(norm[0], activation, is_module, called[0], idle)
        if norm_act.why_called(norm_act_parts(self.block, found)) is not None:
            return None
        return found, norm[2], {after.number, normed.number, *(number for _, number in passed)}

    # ---- the tail ----

    def activation(self) -> tuple[str, bool, Value, tuple[int, ...]]:
        """The activation after the addition, whether it is a module, and what it is applied to."""
        output: Value = self.steps.output
        step, called = self.steps.of(output), self._called(output)
        if called is not None and not any(True for _ in called[1].parameters()):
            return called[0], True, called[2], (output.number,)
        kind = ACTIVATIONS.get(step.target) if step is not None and step.kind != "module" else None
        if step is None or kind is None or not isinstance(step.args[0], Value):
            return "none", False, output, ()
        if kind == "gelu" and (len(step.args) > 1 or step.kwargs):  # approximate
            return "none", False, output, ()
        return kind, False, step.args[0], (output.number,)

    def addition(self, value: Value) -> tuple[Value, Value, bool] | None:
        """The operands of an addition, and whether it is written over the first."""
        step = self.steps.of(value)
        if step is None or step.target not in ADDITIONS or step.kwargs or len(step.args) != 2:
            return None
        a, b = step.args
        if not isinstance(a, Value) or not isinstance(b, Value) or a == b:
            return None
        return a, b, is_in_place(step)

    def tail(self) -> tuple[Tail, set[int]] | None:
        """The tail, and the numbers of the values that it replaces; None for other forwards.

        Without an addition there is a tail only if a norm and an attention end the forward.

        Raises:
            NoTail: there is an addition, but the tail is not one operation.
        """
        if not isinstance(self.steps.output, Value):
            return None
        activation, is_module, total, after = self.activation()
        operands = self.addition(total)
        module = module_at(self.block, activation) if is_module else activation
        reason = why_called(TailParts(None, None, None, None, module))
        if operands is None:
            branch = self.branch(total)
            if reason is not None or not {"bn", "attention"} <= branch.names.keys():
                return None
            replaced = {*after, *branch.members}
            return _tail(branch, None, None, activation, is_module), replaced
        if reason is not None:
            raise NoTail(reason, is_residual=True)
        if after and not self._used_once(total):
            raise NoTail("the sum has more than one use", is_residual=True)
        first, second = self.branch(operands[0]), self.branch(operands[1])
        swap = second.rank() > first.rank()
        branch, other = (second, operands[0]) if swap else (first, operands[1])
        if not {"bn", "attention"} & branch.names.keys():
            computed = [found for found in (first, second) if found.start.number] or [first]
            raise NoTail(computed[0].reason, is_residual=True)
        if swap and operands[2] and not self._is_made(other):
            raise NoTail("the addition is written over the block's input", is_residual=True)
        shortcut, identity_bn, of_shortcut = self.shortcut(other)
        replaced = {*after, total.number, *branch.members, *of_shortcut}
        return _tail(branch, shortcut, identity_bn, activation, is_module), replaced


def _tail(
    branch: _Branch,
    shortcut: Value | None,
    identity_bn: str | None,
    activation: str,
    calls_activation: bool,
) -> Tail:
    return Tail(
        branch.start,
        shortcut,
        branch.names.get("bn"),
        branch.names.get("attention"),
        branch.names.get("drop_path"),
        identity_bn,
        activation,
        calls_activation,
        branch.factors,
        branch.idle,
    )


# ---- the program ----


def program_of(block: nn.Module) -> Program | None:
    """The program of a block; None if nothing in its forward can be one operation.

    Raises:
        NoTail: it keeps its forward.
    """
    if len(arguments_of(type(block).forward)) != 1:
        raise NoTail("its forward takes more than one map")
    trained, evaluated = (steps_of(block, training) for training in (True, False))
    search = _Search(block, trained)
    middles = {}
    for number in range(1, len(trained.steps) + 1):
        middle = search.middle(Value(number))
        if middle is not None:
            middles[number] = middle
    try:
        found = search.tail()
    except NoTail:
        if not middles:
            raise
        found = None
    tail, replaced = (None, set()) if found is None else found
    middles = {number: middle for number, middle in middles.items() if number not in replaced}
    if tail is None and (not middles or not isinstance(trained.output, Value)):
        return None
    if trained != evaluated:
        raise NoTail("its forward depends on whether it trains", is_residual=True)
    steps = list(trained.steps)
    for number, (names, start, members) in middles.items():
        steps[number - 1] = Step("norm_act", names, (start,), ())
        replaced = replaced | members
    whole = dict(whole_containers(block, trained, {*replaced, *middles}))
    for name, numbers in whole.items():
        steps[numbers[-1] - 1] = Step("module", name, steps[numbers[0] - 1].args, ())
        replaced = replaced | {*numbers[:-1]}
    kept, tail, output = _without(steps, replaced, tail, trained.output)
    plain = {n: v for n, v in vars(block).items() if isinstance(v, PLAIN) and n not in OF_MODULES}
    constants = tuple(plain.items())
    containers = tuple(_containers(block, "", whole))
    between = [step.target.idle for step in kept if step.kind == "norm_act"]
    idle = tuple(itertools.chain(() if tail is None else tail.idle, *between))
    return Program(kept, tail, output, containers, names_of_children(block), constants, idle)


def _containers(block: nn.Module, prefix: str, whole: dict[str, range]) -> Iterator[Container]:
    """The containers in a block that are not called as a whole, outer ones first."""
    for name, module in block.named_children():
        if is_container(module) and prefix + name not in whole:
            yield Container(prefix + name, type(module), names_of_children(module))
            yield from _containers(module, f"{prefix}{name}.", whole)


def _without(
    steps: list[Step], replaced: set[int], tail: Tail | None, output: Value
) -> tuple[tuple[Step, ...], Tail | None, Value]:
    """The steps before a tail or the output, numbered anew, with what each of them frees."""
    kept = [number for number in range(1, len(steps) + 1) if number not in replaced]
    of_tail = [output] if tail is None else values_in([tail.branch, tail.shortcut])
    read = values_in([steps[number - 1][2:4] for number in kept] + of_tail)
    numbers = {0: 0}
    for number in kept:
        if steps[number - 1].kind != "attribute" or Value(number) in read:
            numbers[number] = len(numbers)

    def renumbered(argument: Any) -> Any:
        if isinstance(argument, Value):
            return Value(numbers[argument.number])
        if isinstance(argument, tuple):
            parts = [renumbered(part) for part in argument]
            return type(argument)(*parts) if isinstance(argument, Slice) else tuple(parts)
        return argument

    needed = {value.number for value in renumbered(tuple(of_tail))}
    if tail is None:
        output = renumbered(output)
    else:
        tail = tail._replace(branch=renumbered(tail.branch), shortcut=renumbered(tail.shortcut))
        output = tail.branch
    made: list[Step] = []
    for number in reversed([n for n in numbers if n]):
        old = steps[number - 1]
        args, kwargs = renumbered(old.args), renumbered(old.kwargs)
        used = {value.number for value in values_in((args, kwargs))} | {numbers[number]}
        made.append(Step(old.kind, old.target, args, kwargs, tuple(sorted(used - needed))))
        needed |= used
    return tuple(reversed(made)), tail, output
