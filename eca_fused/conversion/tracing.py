"""The forward of a block as steps: what it calls and computes, without looking into its modules."""

import math
import os
import traceback
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.utils.checkpoint
from torch import fx, nn

from eca_fused.attention.norms import full_name
from eca_fused.conversion.recognise import apart, contents
from eca_fused.conversion.tailed import FUNCTIONS, METHODS, Slice, Step, Value
from eca_fused.torch_state import (
    dictionaries_of_parts,
    does_more,
    is_compiled,
    parts_apart,
    submodules,
    wrap_in,
)

__all__ = [
    "PLAIN",
    "NoTail",
    "Steps",
    "is_container",
    "is_in_place",
    "near_modules",
    "steps_of",
    "values_in",
    "whole_containers",
]

# Modules whose forward calls their children in order, by name; beside nn.Sequential.
CONTAINERS = ("timm.layers.conv_bn_act.ConvNormAct",)
NAMES = {function: name for name, function in FUNCTIONS.items()}
IN_PLACE = ("operator.iadd", "operator.imul")
# Attributes of these types are compared at each call, so what a trace made of them may change.
PLAIN = (bool, int, float, str, type(None))
# Of torch and of this package, where a traced forward fails for a reason that its own code gives.
OTHER_CODE = tuple(f"{Path(file).parent}{os.sep}" for file in (torch.__file__, __file__))


class NoTail(Exception):
    """A block that keeps its forward. The message says why.

    Args:
        reason: the message.
        is_residual: whether the block is known to end in the addition of a residual.
    """

    def __init__(self, reason: str, is_residual: bool = False) -> None:
        super().__init__(reason)
        self.is_residual = is_residual


def near_modules(block: nn.Module) -> Iterator[nn.Module]:
    """The modules that a block's forward or its containers call."""
    for module in block.children():
        yield module
        if is_container(module):
            yield from near_modules(module)


def is_container(module: nn.Module) -> bool:
    """Whether a module does nothing but call its children in their order."""
    ordered = isinstance(module, nn.Sequential) and type(module).forward is nn.Sequential.forward
    return (
        (ordered or full_name(module) in CONTAINERS)
        and type(module).__call__ is nn.Module.__call__
        and not does_more(module)
        and not is_compiled(module)
    )


# ---- the graph of a forward ----


class _Proxy(fx.Proxy):
    """Records x += y as what it is; fx.Proxy records x + y."""

    def __iadd__(self, other: Any) -> Any:
        return self.tracer.create_proxy(
            "call_function", FUNCTIONS["operator.iadd"], (self, other), {}
        )

    def __imul__(self, other: Any) -> Any:
        return self.tracer.create_proxy(
            "call_function", FUNCTIONS["operator.imul"], (self, other), {}
        )


def _modes() -> tuple[bool, ...]:
    """What a forward may switch for a part of itself, which no graph shows."""
    return (
        torch.is_grad_enabled(),
        torch.is_inference_mode_enabled(),
        torch.is_autocast_enabled("cpu"),
        torch.is_autocast_enabled("cuda"),
    )


class _Tracer(fx.Tracer):
    """Traces a block's own forward: what its modules do is not looked at, except containers."""

    def __init__(self) -> None:
        # These functions become nodes; a checkpoint would be traced through, and lost. Torch 2.11
        # cannot wrap everything in its file under Python 3.12.
        files = torch.utils.checkpoint
        super().__init__(
            autowrap_modules=(math,),
            autowrap_functions=(files.checkpoint, files.checkpoint_sequential),
        )
        wrap_in(self, files)
        self.modes = _modes()

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return not is_container(m)

    def proxy(self, node: fx.Node) -> fx.Proxy:
        return _Proxy(node, self)

    def create_node(self, *args: Any, **kwargs: Any) -> fx.Node:
        if _modes() != self.modes:
            raise NoTail("its forward switches autocast or gradients")
        return super().create_node(*args, **kwargs)


def _traced(block: nn.Module, training: bool) -> list[fx.Node]:
    """The nodes of a block's forward. Neither the block nor its attributes change.

    Raises:
        NoTail: the forward cannot be traced, or does more than a graph shows.
    """
    twin = parts_apart(block)
    parts = dictionaries_of_parts(twin)
    attributes = vars(twin)
    attributes.update({n: apart(n, value) for n, value in attributes.items() if n not in parts})
    attributes["training"] = training
    before = {name: contents(value) for name, value in attributes.items()}
    # Autocast is on in one of the traces, so that a forward that switches it on or off is noticed.
    was = torch.is_autocast_enabled("cpu"), torch.is_autocast_enabled("cuda")
    try:
        for device in ("cpu", "cuda"):
            torch.set_autocast_enabled(device, training)
        nodes = list(_Tracer().trace(twin).nodes)
    except NoTail:
        raise
    except Exception as error:
        raise NoTail(
            f"its forward cannot be traced: {_first_line(error)}{_place(error)}"
        ) from error
    finally:
        for device, enabled in zip(("cpu", "cuda"), was, strict=True):
            torch.set_autocast_enabled(device, enabled)
    after = {name: contents(value) for name, value in attributes.items()}
    stored = [name for name in after if after[name] != before.get(name)]
    if stored:
        raise NoTail(f"its forward stores {', '.join(stored)}")
    return nodes


def _first_line(error: Exception) -> str:
    lines = str(error).splitlines()
    return lines[0] if lines else type(error).__name__


def _place(error: Exception) -> str:
    """The line of a block's own code where an error was raised, as " at `code`"; "" if unknown."""
    frames = traceback.extract_tb(error.__traceback__)
    theirs = [f for f in frames if not f.filename.startswith(OTHER_CODE)]
    return f" at `{theirs[-1].line}`" if theirs and theirs[-1].line else ""


# ---- the graph as steps ----


class Steps(NamedTuple):
    steps: list[Step]
    output: Any  # a Value, if the forward returns one map
    uses: list[int]  # of each value

    def of(self, value: Value) -> Step | None:
        """The step that makes a value; None for the input."""
        return self.steps[value.number - 1] if value.number else None


def steps_of(block: nn.Module, training: bool) -> Steps:
    """The steps of a block's forward. The block does not change.

    Raises:
        NoTail: the forward cannot be traced, or has a step that a program cannot express.
    """
    nodes = _traced(block, training)
    numbers: dict[fx.Node, int] = {}
    steps: list[Step] = []
    output: Any = None

    def argument(given: Any) -> Any:
        if isinstance(given, fx.Node):
            return Value(numbers[given])
        if isinstance(given, tuple | list):
            return tuple(argument(part) for part in given)
        if isinstance(given, slice):
            return Slice(argument(given.start), argument(given.stop), argument(given.step))
        if isinstance(given, (*PLAIN, type(...))):
            return given
        raise NoTail(f"its forward has a {type(given).__name__} as an argument")

    for node in nodes:
        if node.op == "placeholder":
            numbers[node] = 0
            continue
        args = tuple(argument(a) for a in node.args)
        if node.op == "output":
            output = args[0]
            continue
        kwargs = tuple((name, argument(a)) for name, a in node.kwargs.items())
        if node.op == "call_module" and any(
            isinstance(a, list) for a in (*node.args, *node.kwargs.values())
        ):
            raise NoTail(f"its forward passes a list to {node.target}, which may change it")
        steps.append(Step(*_kind(node), args, kwargs))
        numbers[node] = len(steps)
        if is_in_place(steps[-1]) and isinstance(node.args[0], fx.Node):
            # The same tensor: what comes later uses it after the operation.
            old = numbers[node.args[0]]
            numbers.update({n: len(steps) for n, number in numbers.items() if number == old})
    uses = [0] * (len(steps) + 1)
    for value in values_in([s[2:4] for s in steps]) + values_in(output):
        uses[value.number] += 1
    return Steps(steps, output, uses)


def _kind(node: fx.Node) -> tuple[str, str]:
    """A step's kind and target."""
    target: Any = node.target
    if node.op == "call_module":
        return "module", target
    if node.op == "get_attr":
        return "attribute", target
    if node.op == "call_method":
        if target in METHODS:
            return "method", target
        raise NoTail(f"its forward calls the method {target}()")
    if target in NAMES:
        return "function", NAMES[target]
    raise NoTail(f"its forward calls the function {getattr(target, '__name__', target)}()")


def is_in_place(step: Step) -> bool:
    if step.kind == "function":
        inplace = dict(step.kwargs).get("inplace") is True or step.args[1:2] == (True,)
        relu = step.target in ("F.relu", "F.relu6", "F.silu", "F.hardswish")
        return step.target in IN_PLACE or step.target == "torch.relu_" or (relu and inplace)
    return step.kind == "method" and step.target.endswith("_")


def values_in(argument: Any) -> list[Value]:
    """The values in an argument."""
    if isinstance(argument, Value):
        return [argument]
    if isinstance(argument, tuple | list):
        return [value for part in argument for value in values_in(part)]
    return []


# ---- containers that are called as a whole ----


def _parts_of(container: nn.Module, name: str) -> Iterator[str]:
    """The names of the modules that a container calls, in their order."""
    for part, module in submodules(container).items():
        if module is None:
            continue
        if is_container(module):
            yield from _parts_of(module, f"{name}.{part}")
        else:
            yield f"{name}.{part}"


def whole_containers(
    block: nn.Module, traced: Steps, replaced: Collection[int]
) -> Iterator[tuple[str, range]]:
    """The containers of which every step stays a step, and the numbers of these steps.

    One call of the container computes the same, in less time, and with its hooks.

    Args:
        block: the module whose steps these are.
        traced: its steps.
        replaced: the numbers of steps that an operation takes the place of.
    """
    numbers: dict[str, list[int]] = {}
    for number, step in enumerate(traced.steps, 1):
        if step.kind == "module":
            numbers.setdefault(step.target, []).append(number)

    def steps_of_whole(container: nn.Module, name: str) -> range | None:
        parts = [numbers.get(part, []) for part in _parts_of(container, name)]
        if not parts or any(len(of) != 1 for of in parts):
            return None  # one of them is called from elsewhere too, or not at all
        found = range(parts[0][0], parts[0][0] + len(parts))
        if [of[0] for of in parts] != list(found) or any(number in replaced for number in found):
            return None
        for number in found:
            step = traced.steps[number - 1]
            if len(step.args) != 1 or step.kwargs:
                return None
            if number > found[0] and step.args != (Value(number - 1),):
                return None
        return found if all(traced.uses[number] == 1 for number in found[:-1]) else None

    def within(module: nn.Module, prefix: str) -> Iterator[tuple[str, range]]:
        for part, container in submodules(module).items():
            if container is None or not is_container(container):
                continue
            found = steps_of_whole(container, prefix + part)
            if found is None:
                yield from within(container, f"{prefix}{part}.")
            else:
                yield prefix + part, found

    yield from within(block, "")
