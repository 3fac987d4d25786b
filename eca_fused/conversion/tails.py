"""Which blocks of a model get their tail as one operation: found by structure, tried on a copy."""

import copy
import itertools
import re
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from eca_fused.attention.residual_tail import ResidualTail
from eca_fused.conversion.search import is_attention, program_of
from eca_fused.conversion.tailed import PROGRAM, Program, module_at, tailed
from eca_fused.conversion.tracing import NoTail, near_modules
from eca_fused.layer import ECALayer
from eca_fused.torch_state import BatchNorm, Convolution, hooks_of, is_compiled, without_modes

__all__ = ["Examined", "examine"]

SAMPLES, SIZE = 3, (6, 4, 2)  # of the trial's maps; even, because some blocks halve them
NUMBER = re.compile(r"\d+(\.\d*)?(e-?\d+)?")


class Examined(NamedTuple):
    """What examine() found, by the names of the blocks.

    Args:
        programs: for the blocks whose tail can be one operation.
        left: why the others that look like residual blocks cannot.
        tailed: the names of the blocks whose tail is one operation already.
    """

    programs: dict[str, Program]
    left: dict[str, str]
    tailed: list[str]


def examine(model: nn.Module) -> Examined:
    """Find the blocks whose tail can be one operation. Nothing in the model changes."""
    found = Examined({}, {}, [])
    tried: dict[Any, str | None] = {}  # why a trial failed
    for name, block in model.named_modules():
        if PROGRAM in vars(block):  # its class may be derived from ours, as FSDP2 derives one
            found.tailed.append(name)
            continue
        if not _may_be_a_block(block):
            continue
        try:
            program = _program(block)
            if program is None:
                continue
            kind = _kind(block, program)
            if kind not in tried:
                tried[kind] = _difference(block, program)
            reason = tried[kind]
            if reason is not None:
                raise NoTail(reason, is_residual=True)
        except NoTail as reason:
            if reason.is_residual or _has_norm_and_attention(block):
                found.left[name] = f"{type(block).__name__}: {reason}"
        else:
            found.programs[name] = program
    return found


def _may_be_a_block(module: nn.Module) -> bool:
    if isinstance(module, nn.Sequential | torch.jit.ScriptModule | ResidualTail):
        return False
    return not is_attention(module) and any(
        isinstance(part, BatchNorm) or is_attention(part) for part in near_modules(module)
    )


def _has_norm_and_attention(block: nn.Module) -> bool:
    near = list(near_modules(block))
    return any(isinstance(m, BatchNorm) for m in near) and any(map(is_attention, near))


def _program(block: nn.Module) -> Program | None:
    """The program of a block; None if its forward does not end like that of a residual block.

    Raises:
        NoTail: the block keeps its forward.
    """
    cls = type(block)
    if "forward" in vars(block):
        raise NoTail("has a forward of its own on the instance, as some wrappers give it")
    if is_compiled(block):
        raise NoTail("was compiled by its compile(); convert the model before that")
    if cls.__call__ is not nn.Module.__call__:
        raise NoTail("its class defines what a call does")
    program = program_of(block)
    if program is None:
        return None
    if cls.__reduce_ex__ is not object.__reduce_ex__ or cls.__reduce__ is not object.__reduce__:
        raise NoTail("its class defines how it is pickled", is_residual=True)
    if hasattr(cls.__init_subclass__, "__func__"):
        raise NoTail("its class keeps a record of classes derived from it", is_residual=True)
    try:
        object.__new__(cls).__class__ = tailed(cls)
    except TypeError as error:  # for example a class with __slots__
        raise NoTail(f"its class cannot be exchanged: {error}", is_residual=True) from error
    return program


def _kind(block: nn.Module, program: Program) -> Any:
    """Equal for blocks of which one trial is enough.

    A trial looks for faults of the program. That depends on the classes of modules and on their
    options, but not on their sizes, which are read at each call. A number counts as zero or not.
    """

    def without_sizes(text: str) -> str:
        return NUMBER.sub(lambda found: "n" if float(found[0]) else "0", text)

    modules = [(n, type(m), without_sizes(m.extra_repr())) for n, m in block.named_modules()]
    same = program._replace(constants=())
    return type(block), same, tuple(modules[1:])


# ---- the trial ----


def _difference(block: nn.Module, program: Program) -> str | None:
    """What a block with its tail as one operation does differently; None for nothing.

    Both forms run on copies, with random parameters, because zeros would hide differences.
    """
    with (
        without_modes(),
        torch.inference_mode(False),
        torch.enable_grad(),
        torch.random.fork_rng(devices=[]),
        torch.device("cpu"),
    ):
        try:
            theirs = _copy(block)
            shape = _shape(theirs, program)
            ours = copy.deepcopy(theirs)
            vars(ours)[PROGRAM] = program
            ours.__class__ = tailed(type(block))
            for training in (True, False):
                want, got = (_results(module, shape, training) for module in (theirs, ours))
                different = [name for name in want if not _same(got[name], want[name])]
                if different:
                    return f"{different[0]} differs in a trial with its tail as one operation"
        except Exception as error:
            lines = str(error).splitlines() or [type(error).__name__]
            return f"a trial on small maps fails: {lines[0]}"
    return None


def _copy(block: nn.Module) -> nn.Module:
    """A copy on the CPU in float64 with random parameters and buffers, without hooks."""
    generator = torch.Generator("cpu").manual_seed(0)
    memo: dict[int, Any] = {}
    tensors = itertools.chain(block.parameters(), block.buffers())
    for tensor in tensors:
        memo[id(tensor)] = _random(tensor, generator)
    for module in block.modules():
        memo.update({id(hooks): type(hooks)() for hooks in hooks_of(module)})
    twin = copy.deepcopy(block, memo)
    for module in twin.modules():
        if isinstance(module, ECALayer):  # which would overwrite what a gradient needs
            module.overwrites = False
    return twin


def _random(tensor: Tensor, generator: torch.Generator) -> Tensor:
    shape = tensor.shape
    if not tensor.is_floating_point():
        return torch.zeros(shape, dtype=tensor.dtype) if tensor.is_meta else tensor.cpu().clone()
    if tensor.dim() > 1:  # of the magnitude that keeps that of the map
        made = torch.randn(shape, generator=generator, dtype=torch.float64)
        made = made / max(tensor.numel() // max(shape[0], 1), 1) ** 0.5
    else:  # positive, as a variance must be
        made = torch.rand(shape, generator=generator, dtype=torch.float64) + 0.5
    return nn.Parameter(made) if isinstance(tensor, nn.Parameter) else made


def _shape(block: nn.Module, program: Program) -> tuple[int, ...]:
    """The shape of a map that a block takes.

    It has the channels of the first convolution or batch norm in the order of calls with which the
    block runs, as a block may split its map first.

    Raises:
        ValueError: there is none.
    """
    names = [step.target for step in program.steps if step.kind == "module"]
    names += [middle.bn for middle in program.middles()]
    if program.tail is not None:
        names += [n for n in (program.tail.bn, program.tail.identity_bn) if n is not None]
    shapes: dict[tuple[int, ...], None] = {}
    for module in (part for name in names for part in module_at(block, name).modules()):
        if isinstance(module, Convolution):
            shapes[(SAMPLES, module.in_channels, *SIZE[: len(module.kernel_size)])] = None
        elif isinstance(module, BatchNorm):
            dims = 1 if isinstance(module, nn.BatchNorm1d) else 2
            shapes[(SAMPLES, module.num_features, *SIZE[:dims])] = None
    failures = []
    for shape in shapes:
        try:
            with torch.no_grad():
                block(torch.zeros(shape, dtype=torch.float64))
        except Exception as error:  # noqa: PERF203
            failures.append(error)
        else:
            return shape
    raise failures[0] if failures else ValueError("no convolution says how many channels it takes")


def _results(block: nn.Module, shape: tuple[int, ...], training: bool) -> dict[str, Tensor | None]:
    """The output of a block, all gradients, and what it has changed."""
    torch.manual_seed(0)  # of drop paths
    block.train(training)
    leaf = torch.randn(shape, dtype=torch.float64, requires_grad=True)
    x = leaf.clone()  # which a forward may write over
    y = block(x)
    dy = torch.randn(y.shape, dtype=y.dtype)
    inputs: dict[str, Tensor] = {"the input": leaf, **dict(block.named_parameters())}
    given = torch.autograd.grad(y, list(inputs.values()), dy, allow_unused=True)
    results: dict[str, Tensor | None] = {"the output": y.detach(), "its input": x.detach()}
    results |= {f"the gradient of {n}": g for n, g in zip(inputs, given, strict=True)}
    return results | {n: buffer.clone() for n, buffer in block.named_buffers()}


def _same(got: Tensor | None, want: Tensor | None) -> bool:
    if got is None or want is None:
        return got is want
    # Both are in float64. A tail that is computed differently differs far more.
    return got.shape == want.shape and torch.allclose(got, want, rtol=1e-7, atol=1e-7)
