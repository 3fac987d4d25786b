"""TailedBlock: a block some parts of which are one operation. convert(tails=True) makes it.

The parts are the tail of a residual block, and batch norm, activation and attention in its middle.
The block keeps its submodules under their names. A program in plain data says how it computes: the
steps before the tail, and the names of the tail's parts.
"""

import operator
import types
from collections.abc import Callable
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.compiler import is_compiling
from torch.nn import functional as F

from eca_fused.attention import norm_act
from eca_fused.attention.norm_act import KeptNormAct, NormActParts
from eca_fused.attention.residual_tail import KeptTail, TailParts, compute, why_called
from eca_fused.torch_state import Snapshot, child, does_more, submodules

__all__ = [
    "FUNCTIONS",
    "METHODS",
    "PROGRAM",
    "Container",
    "NormAct",
    "Program",
    "Slice",
    "Step",
    "Tail",
    "TailedBlock",
    "Value",
    "former",
    "module_at",
    "names_of_children",
    "norm_act_parts",
    "tailed",
    "tensor_at",
]

# The key of the program in a block's __dict__, so that copies and pickles have it too.
PROGRAM = "_eca_fused_tail"

# What the steps of a program can be besides calls of modules. Names, so that a program is data.
FUNCTIONS: dict[str, Callable[..., Any]] = {
    "operator.add": operator.add,
    "operator.iadd": operator.iadd,
    "operator.sub": operator.sub,
    "operator.mul": operator.mul,
    "operator.imul": operator.imul,
    "operator.truediv": operator.truediv,
    "operator.neg": operator.neg,
    "operator.getitem": operator.getitem,
    "torch.add": torch.add,
    "torch.mul": torch.mul,
    "torch.cat": torch.cat,
    "torch.split": torch.split,
    "torch.chunk": torch.chunk,
    "torch.relu": torch.relu,
    "torch.relu_": torch.relu_,
    "torch.sigmoid": torch.sigmoid,
    "torch.tanh": torch.tanh,
    "F.relu": F.relu,
    "F.relu6": F.relu6,
    "F.silu": F.silu,
    "F.gelu": F.gelu,
    "F.leaky_relu": F.leaky_relu,
    "F.hardswish": F.hardswish,
    "F.hardsigmoid": F.hardsigmoid,
    "F.pad": F.pad,
    "F.avg_pool2d": F.avg_pool2d,
    "F.max_pool2d": F.max_pool2d,
    "F.adaptive_avg_pool2d": F.adaptive_avg_pool2d,
    "F.interpolate": F.interpolate,
}
METHODS = frozenset(
    {
        *("add", "add_", "sub", "mul", "mul_", "div", "relu", "relu_", "sigmoid", "tanh"),
        *("contiguous", "clone", "chunk", "split"),
    }
)


class Value(NamedTuple):
    """A value of a program: 0 is the block's input, n the result of its nth step, from 1 up."""

    number: int


class Slice(NamedTuple):
    start: Any
    stop: Any
    step: Any


class NormAct(NamedTuple):
    """Batch norm, activation and attention by their names in the block.

    Args:
        bn, attention: the names of modules.
        activation: the name of a module, or one of ops.gating.ACTIVATIONS; "none" also where bn has
            it inside.
        calls_activation: whether activation is the name of a module.
        idle: the names of nn.Identity modules in between.
    """

    bn: str
    activation: str
    calls_activation: bool
    attention: str
    idle: tuple[str, ...]

    def __str__(self) -> str:
        between = [] if self.activation == "none" else [self.activation]
        return ", ".join([self.bn, *between, self.attention])


class Step(NamedTuple):
    """A call, or a parameter or buffer that is read.

    Args:
        kind: "module", "attribute", "function", "method" or "norm_act".
        target: the name of a module or tensor in the block, of FUNCTIONS or of METHODS; or a
            NormAct.
        args, kwargs: Values, Slices, constants and tuples of them.
        free: the numbers of the values that nothing needs after this step.
    """

    kind: str
    target: Any
    args: tuple[Any, ...]
    kwargs: tuple[tuple[str, Any], ...]
    free: tuple[int, ...] = ()

    @property
    def takes_one_value(self) -> bool:
        return len(self.args) == 1 and not self.kwargs and type(self.args[0]) is Value


class Tail(NamedTuple):
    """The tail by the names of its parts in the block; None for absent ones.

    Args:
        branch: what the tail begins with.
        shortcut: what is added; None if nothing is.
        activation: the name of a module, or one of ACTIVATIONS.
        calls_activation: whether activation is the name of a module.
        factors: numbers, and names of tensors without dimensions.
        idle: the names of nn.Identity modules in between.
    """

    branch: Value
    shortcut: Value | None
    bn: str | None
    attention: str | None
    drop_path: str | None
    identity_bn: str | None
    activation: str
    calls_activation: bool
    factors: tuple[float | str, ...]
    idle: tuple[str, ...]

    @property
    def has_tensors(self) -> bool:
        return not all(isinstance(factor, float) for factor in self.factors)

    def __str__(self) -> str:
        names = [name for name in (self.bn, self.attention, self.drop_path) if name is not None]
        if self.shortcut is not None:
            names.append(f"+ {self.identity_bn or 'shortcut'}")
        if self.activation != "none":
            names.append(self.activation)
        return ", ".join(names)


class Container(NamedTuple):
    """A module whose forward calls its children in their order, so that the program calls them."""

    name: str
    cls: type[nn.Module]
    children: tuple[str, ...]


class Program(NamedTuple):
    """What a block computes, and what must stay as it was for the program to hold.

    Args:
        steps: before the tail.
        tail: the tail; None without one.
        output: what the block returns without a tail.
        containers: the modules that are not called, because the program calls their children.
        children: the names of the block's submodules.
        constants: the block's attributes of plain types.
        idle: the names of the nn.Identity modules that are not called.
    """

    steps: tuple[Step, ...]
    tail: Tail | None
    output: Value
    containers: tuple[Container, ...]
    children: tuple[str, ...]
    constants: tuple[tuple[str, Any], ...]
    idle: tuple[str, ...]

    def middles(self) -> list[NormAct]:
        return [step.target for step in self.steps if step.kind == "norm_act"]

    def __str__(self) -> str:
        parts = [f"attention {middle}" for middle in self.middles()]
        return "; ".join(parts if self.tail is None else [*parts, f"tail {self.tail}"])


def module_at(block: nn.Module, name: str) -> Any:
    """A submodule by its dotted name."""
    if "." not in name:
        return child(block, name)
    found: Any = block
    for part in name.split("."):
        found = child(found, part)
    return found


def names_of_children(module: nn.Module) -> tuple[str, ...]:
    return tuple([name for name, m in submodules(module).items() if m is not None])


def tensor_at(block: nn.Module, name: str) -> Tensor:
    """A parameter or buffer by its dotted name; parametrized ones too, which are properties."""
    prefix, _, last = name.rpartition(".")
    return getattr(module_at(block, prefix) if prefix else block, last)  # type: ignore[no-any-return]


def _holds(block: nn.Module, program: Program) -> bool:
    """Whether a block is still what its program was made from; hooks on parts do not matter."""
    if names_of_children(block) != program.children:
        return False
    own = vars(block)
    for name, value in program.constants:
        if name not in own or own[name] != value:
            return False
    for name, cls, children in program.containers:
        module = module_at(block, name)
        if type(module) is not cls or does_more(module) or names_of_children(module) != children:
            return False
    for name in program.idle:
        module = module_at(block, name)
        if type(module) is not nn.Identity or does_more(module):
            return False
    if program.tail is not None:
        for factor in program.tail.factors:
            if not isinstance(factor, float) and tensor_at(block, factor).dim() != 0:
                return False
    return True


def _filled(argument: Any, values: list[Any]) -> Any:
    """An argument of a step, with values in the place of their numbers."""
    if isinstance(argument, Value):
        return values[argument.number]
    if isinstance(argument, Slice):
        return slice(*[_filled(part, values) for part in argument])
    if isinstance(argument, tuple):
        return tuple([_filled(part, values) for part in argument])
    return argument


def _result_of(block: nn.Module, step: Step, values: list[Any]) -> Any:
    if step.kind == "attribute":
        return tensor_at(block, step.target)
    args = [_filled(argument, values) for argument in step.args]
    kwargs = {name: _filled(argument, values) for name, argument in step.kwargs}
    if step.kind == "module":
        return module_at(block, step.target)(*args, **kwargs)
    if step.kind == "norm_act":
        return norm_act.compute(norm_act_parts(block, step.target), args[0])
    if step.kind == "function":
        return FUNCTIONS[step.target](*args, **kwargs)
    return getattr(args[0], step.target)(*args[1:], **kwargs)


def norm_act_parts(block: nn.Module, names: NormAct) -> NormActParts:
    activation = names.activation
    return NormActParts(
        module_at(block, names.bn),
        module_at(block, activation) if names.calls_activation else activation,
        module_at(block, names.attention),
    )


def _parts(block: nn.Module, tail: Tail) -> TailParts:
    def part(name: str | None) -> nn.Module | None:
        return None if name is None else module_at(block, name)

    scale: Any = 1.0
    for factor in tail.factors:
        scale = (factor if isinstance(factor, float) else tensor_at(block, factor)) * scale
    return TailParts(
        part(tail.bn),
        part(tail.attention),
        part(tail.drop_path),
        part(tail.identity_bn),
        module_at(block, tail.activation) if tail.calls_activation else tail.activation,
        scale,
    )


# Steps, and for those that call something with one value, as most do, that and the value's number.
Calls = list[tuple[Callable[[Any], Any] | None, int, Step]]


def _calls(block: nn.Module, program: Program, keep: bool) -> Calls:
    def of(step: Step) -> Callable[[Any], Any] | None:
        if not step.takes_one_value:
            return None
        if step.kind == "norm_act" and keep:
            return KeptNormAct(norm_act_parts(block, step.target))
        return module_at(block, step.target) if step.kind == "module" else None

    found = [(of(step), step) for step in program.steps]
    return [(call, 0 if call is None else step.args[0].number, step) for call, step in found]


def _run(block: nn.Module, program: Program, calls: Calls, kept: KeptTail | None, x: Any) -> Any:
    values = [x]
    for call, number, step in calls:
        values.append(_result_of(block, step, values) if call is None else call(values[number]))
        for freed in step.free:
            values[freed] = None
    tail = program.tail
    if tail is None:
        return values[program.output.number]
    shortcut = None if tail.shortcut is None else values[tail.shortcut.number]
    branch = values[tail.branch.number]
    if kept is not None:
        return kept(branch, shortcut)
    return compute(_parts(block, tail), branch, shortcut)


class _Kept:
    """A block's program with its modules, as long as the block has the same.

    It refers to no block, so that it goes with its block.
    """

    def __init__(self, block: nn.Module, program: Program) -> None:
        names = [*[container.name for container in program.containers], *program.idle]
        self.seen = Snapshot([module_at(block, name) for name in names], block)
        self.program, self.calls = program, _calls(block, program, keep=True)
        self.tail = None if program.tail is None else KeptTail(_parts(block, program.tail))


_kept: WeakKeyDictionary[nn.Module, _Kept] = WeakKeyDictionary()


def _why_called(block: nn.Module, program: Program) -> str | None:
    """Why a block's tail or middle is not one operation any more; None if both are."""
    if not _holds(block, program):
        return "its attributes or modules have changed"
    reasons = []
    for step in program.steps:
        if step.kind == "norm_act":
            reason = norm_act.why_called(norm_act_parts(block, step.target))
            reasons += [] if reason is None else [f"of {step.target}, {reason}"]
    reason = None if program.tail is None else why_called(_parts(block, program.tail))
    reasons += [] if reason is None else [reason]
    return "; ".join(reasons) or None


class TailedBlock(nn.Module):
    """A block that computes its tail, or a norm to its attention, or both as one operation each.

    convert() derives one class from this one and from each class of blocks. So a block keeps its
    methods and is an instance of its former class. Where its attributes or the order of its modules
    have changed since, it runs the forward of its former class. Modules are looked up at each call,
    so hooks and replaced modules work as before.
    """

    _eca_fused_former: type[nn.Module]

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        if kwargs or len(args) != 1:
            return super().forward(*args, **kwargs)
        kept = None if is_compiling() else _kept.get(self)
        if kept is None or not kept.seen.holds():
            program: Program = self.__dict__[PROGRAM]
            if not _holds(self, program):
                return super().forward(*args)
            if is_compiling() or (program.tail is not None and program.tail.has_tensors):
                return _run(self, program, _calls(self, program, keep=False), None, args[0])
            _kept[self] = kept = _Kept(self, program)
        return _run(self, kept.program, kept.calls, kept.tail, args[0])

    def __reduce_ex__(self, protocol: Any) -> Any:
        """Pickles and copies name the former class, because this one is made at run time."""
        getstate = getattr(self, "__getstate__", None)  # object has one from Python 3.11 on
        return _blank, (self._eca_fused_former,), vars(self) if getstate is None else getstate()

    def __prepare_scriptable__(self) -> nn.Module:
        """Called by torch.jit.script, which cannot compile a program."""
        raise RuntimeError(
            "expected a block without a tail that convert(tails=True) made; call "
            "eca_fused.revert() before torch.jit.script, or torch.jit.trace instead"
        )

    def extra_repr(self) -> str:
        own, program = super().extra_repr(), vars(self)[PROGRAM]
        reason = _why_called(self, program)
        way = "in one operation" if reason is None else f"by calling its modules ({reason})"
        return f"{own}, {way}: {program}" if own else f"{way}: {program}"


_made: dict[type, type[TailedBlock]] = {}


def tailed(cls: type[nn.Module]) -> type[TailedBlock]:
    """The class of blocks of the class cls whose tail is one operation; one for each cls."""
    if cls in _made:
        return _made[cls]
    names = {"_eca_fused_former": cls, "__module__": cls.__module__, "__doc__": TailedBlock.__doc__}
    made: Any = types.new_class(
        f"Tailed{cls.__name__}", (TailedBlock, cls), exec_body=lambda body: body.update(names)
    )
    return _made.setdefault(cls, made)


def former(block: nn.Module) -> type[nn.Module] | None:
    """The class of a block before tailed(); None if its class is not one that tailed() made."""
    cls = type(block)
    return cls.__bases__[1] if cls.__bases__[0] is TailedBlock else None


def _blank(former: type[nn.Module]) -> TailedBlock:
    """A block without state, for copy and pickle."""
    cls = tailed(former)
    return cls.__new__(cls)
