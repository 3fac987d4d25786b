"""Recognises other projects' ECA modules by what they compute, not by their names."""

import collections
import copy
import inspect
import itertools
import types
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from eca_fused import reference
from eca_fused.layer import ECALayer
from eca_fused.ops.checks import PADDING_MODES
from eca_fused.torch_state import (
    has_hooks_of_its_own,
    is_compiled,
    replace_submodules,
    submodules,
    without_modes,
)

__all__ = [
    "NotPlainECA",
    "apart",
    "arguments_of",
    "check_class",
    "contents",
    "looks_like_eca",
    "padding_mode",
    "taps_name",
]

# timm's current and former module for ECA; timm need not be installed.
TIMM = ("timm.layers.eca", "timm.models.layers.eca")
NAMES = ("EcaModule", "CecaModule", "eca_layer")
POOLS: dict[type[nn.Module], int] = {  # with the spatial dimensions of their maps
    nn.AdaptiveAvgPool1d: 1,
    nn.AdaptiveAvgPool2d: 2,
    nn.AdaptiveAvgPool3d: 3,
}
SPATIAL = (4, 3, 2)  # sizes of the trial's maps, as many as the module pools
MOST_CHANNELS = 130  # of the trial's maps
MOST_TAPS = 4095
# Types of attributes that the trial passes to the forward unchanged.
CONSTANTS = (
    *(bool, int, float, complex, str, bytes, slice),
    *(torch.dtype, torch.device, torch.memory_format, torch.Size),
)
# Their modules have no user code, which the fused layer would not run.
LIBRARIES = ("torch", "timm")
# Names that a class may define without doing more than its forward.
HARMLESS = {"__init__", "forward", "extra_repr", "__repr__", "__annotate__", "__annotate_func__"}


class NotPlainECA(Exception):
    """A module that looks like ECA but that ECALayer cannot replace. The message says why."""


def looks_like_eca(module: nn.Module) -> bool:
    """Whether a module is ECA by its class (timm's or the authors') or by its parts.

    The parts are a Conv1d of one channel and a global average pooling, both direct children. If the
    pooling is a function, the convolution alone is enough, with no other parameters. Three kinds of
    modules count too, but are only reported, because they cannot be converted: the convolution is
    in a Sequential, is a Conv2d over rows, or is a function that gets the module's own taps.
    """
    if isinstance(module, torch.jit.ScriptModule):
        return getattr(module, "original_name", None) in NAMES
    if _known(type(module)) is not None:
        return True
    if isinstance(module, nn.Sequential):
        return False
    children = list(module.children())
    for child in children:
        inner = list(child) if isinstance(child, nn.Sequential) else [child]
        if any(map(_convolves_channels, inner)):
            others = [m for m in children if m is not child]
            others += [m for m in inner if not _convolves_channels(m)]
            return _pooled(module) is not None or not any(map(_has_parameters, others))
    own = module.parameters(recurse=False)
    return _pooled(module) is not None and any(p.dim() == 3 and p.shape[:2] == (1, 1) for p in own)


def _convolves_channels(module: nn.Module) -> bool:
    """Whether a module is a convolution of one channel along one dimension."""
    if isinstance(module, nn.Conv2d):
        return module.in_channels == module.out_channels == 1 and 1 in module.kernel_size
    return isinstance(module, nn.Conv1d) and _one_channel(module)


def _has_parameters(module: nn.Module) -> bool:
    return next(module.parameters(), None) is not None


def padding_mode(module: nn.Module) -> str:
    """The padding mode, "zeros" or "circular", of a module that looks like ECA.

    The forward of its class runs on small maps in float64, with random taps and without hooks, and
    must give the output and the gradients of ECA. The module's own taps are not used, because zeros
    would hide the padding. Neither the module nor torch's random state changes.

    Raises:
        NotPlainECA: it computes anything else, or has more than ECALayer would keep.
    """
    check_class(module)
    _check_parts(module)
    # Modes such as FakeTensorMode are left, because their results have no values.
    with (
        without_modes(),
        torch.inference_mode(False),
        torch.enable_grad(),
        torch.random.fork_rng(devices=[]),
    ):
        pooled = _pooled(module)
        failures: list[NotPlainECA] = []
        ranks = (2, 1, 3) if pooled is None else (pooled,)
        for dims in ranks:
            try:
                trials = [_results(module, dims, training) for training in (False, True)]
            except NotPlainECA as failure:
                failures.append(failure)
                continue
            for mode in PADDING_MODES:
                expected = _expected(module, dims, mode)
                if all(_agree(got, expected) for got in trials):
                    return mode
        if len(failures) == len(ranks):
            raise failures[0]
    gates = [type(m).__name__ for m in module.children() if _could_be_a_gate(m)]
    other = f" (its gate is {gates[0]})" if gates and gates[0] != "Sigmoid" else ""
    raise NotPlainECA(f"computes something other than sigmoid(conv1d(mean(x))) * x{other}")


def check_class(module: nn.Module) -> None:
    """Raise NotPlainECA if replacing the class of a module would drop something it does."""
    if isinstance(module, torch.jit.ScriptModule):
        raise NotPlainECA("is compiled by TorchScript; convert the model before torch.jit.script")
    if "forward" in vars(module):
        raise NotPlainECA("has a forward of its own on the instance, as some wrappers give it")
    if is_compiled(module):
        raise NotPlainECA("was compiled by its compile(); convert the model before that")
    arguments = arguments_of(type(module).forward)
    if len(arguments) != 1 or arguments[0].startswith("*"):
        raise NotPlainECA(f"its forward takes ({', '.join(arguments)}), not one map alone")
    own = _own_names(type(module))
    if own:
        more = " and more" if len(own) > 3 else ""
        raise NotPlainECA(
            f"its class has {', '.join(own[:3])}{more} of its own, which ECALayer lacks"
        )


def arguments_of(forward: Any) -> list[str]:
    """The names of a forward's arguments after self; "*" (any) if it is not a function."""
    code = getattr(inspect.unwrap(forward), "__code__", None)
    if code is None:
        return ["*"]
    # inspect.signature() would evaluate the annotations.
    args, varargs, varkw = inspect.getargs(code)
    return args[1:] + [f"*{varargs}"] * bool(varargs) + [f"**{varkw}"] * bool(varkw)


def _own_names(cls: type) -> list[str]:
    """Names that a class defines beyond the known class it derives from, or beyond a forward."""
    known = _known(cls)
    derived = cls.__mro__[: cls.__mro__.index(known)] if known is not None else ()
    own: list[str] = []
    for base in cls.__mro__:
        if base is nn.Module or (base is known and base.__name__ != "eca_layer"):
            break
        harmless = HARMLESS - {"forward"} if base in derived else HARMLESS
        for name, value in vars(base).items():
            if name not in harmless and (callable(value) or not name.startswith("__")):
                own.append(name)
    return own


def _known(cls: type) -> type | None:
    """The class of timm, the authors or this package that cls is or derives from, or None."""
    for base in cls.__mro__:
        timms = base.__module__ in TIMM and base.__name__ in NAMES
        if timms or base.__name__ == "eca_layer" or base is ECALayer:
            return base
    return None


def _pooled(module: nn.Module) -> int | None:
    """The number of spatial dimensions that a child pools to one pixel; None if no child does."""
    for child in module.children():
        dims = POOLS.get(type(child))
        if dims is not None and child.output_size in (1, (1,) * dims):
            return dims
    return None


def _one_channel(conv: nn.Conv1d) -> bool:
    return conv.in_channels == conv.out_channels == 1


def _could_be_a_gate(module: nn.Module) -> bool:
    return type(module) not in POOLS and not isinstance(module, nn.Conv1d)


def taps_name(module: nn.Module) -> str:
    """The name of the submodule with the taps: "conv" if it is a Conv1d, else the first match.

    Raises:
        NotPlainECA: there is none.
    """
    children = dict(module.named_children())
    names = [name for name, m in children.items() if isinstance(m, nn.Conv1d) and _one_channel(m)]
    if isinstance(children.get("conv"), nn.Conv1d):
        return "conv"
    if not names:
        raise NotPlainECA("has no Conv1d of one channel among its direct children, for the taps")
    return names[0]


def _check_parts(module: nn.Module) -> None:
    taps = taps_name(module)
    conv: Any = getattr(module, taps)
    inside = f"{taps}."
    hooked = [
        name
        for name, part in module.named_modules()
        if name and name != taps and not name.startswith(inside) and _has_hooks(part)
    ]
    if hooked:
        raise NotPlainECA(f"has hooks on {', '.join(hooked)}, which the fused layer would not call")
    own = [
        f"{name} ({type(part).__name__})"
        for name, part in module.named_modules()
        if name and name != taps and not name.startswith(inside)
        if type(part).__module__.partition(".")[0] not in LIBRARIES
    ]
    if own:
        raise NotPlainECA(f"has {', '.join(own)}, which the fused layer would not call")
    tensors = itertools.chain(module.named_parameters(), module.named_buffers())
    # Tensors that a hook or a parametrization makes the weight from are taps too.
    others = [name for name, _ in tensors if not name.startswith(f"{inside}weight")]
    others = [name for name in others if not name.startswith(f"{inside}parametrizations.weight.")]
    if others:
        raise NotPlainECA(f"has {', '.join(others)} besides its taps")
    if type(conv) is not nn.Conv1d and not parametrize.is_parametrized(conv):
        raise NotPlainECA(f"its convolution is a {type(conv).__name__}, not a Conv1d")
    if not _one_channel(conv) or conv.kernel_size[0] % 2 == 0:
        raise NotPlainECA(f"its convolution is not of one channel and an odd kernel size: {conv}")
    if conv.kernel_size[0] > MOST_TAPS:  # the trial's time grows with the taps
        raise NotPlainECA(f"has {conv.kernel_size[0]} taps; a trial takes at most {MOST_TAPS}")


def _has_hooks(part: nn.Module) -> bool:
    return "forward" in vars(part) or has_hooks_of_its_own(part)


def _arguments(module: Any, dims: int) -> tuple[Tensor, Tensor, Tensor]:
    """Random x (2, C, *spatial), taps (1, 1, k) and dy (2, C, *spatial) for the trial."""
    k = getattr(module, taps_name(module)).kernel_size[0]
    g = torch.Generator("cpu").manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=g, dtype=torch.float64, device="cpu")

    # Enough channels that every tap reaches some, up to a limit: the trial takes time in proportion
    # to channels times taps. No network has more taps than the limit allows for.
    shape = (2, min(2 * k + 2, MOST_CHANNELS), *SPATIAL[:dims])
    channels = normal(*shape[:2]).reshape(shape[:2] + (1,) * (len(shape) - 2))
    return normal(*shape) + channels, normal(1, 1, k), normal(*shape)


def _results(module: Any, dims: int, training: bool) -> tuple[Tensor, ...]:
    """y, dx and dw of a module's own forward on the trial's arguments."""
    x, taps, dy = _arguments(module, dims)
    place = taps_name(module)
    theirs = getattr(module, place)
    conv = nn.Conv1d(
        1,
        1,
        theirs.kernel_size,
        stride=theirs.stride,
        padding=theirs.padding,
        dilation=theirs.dilation,
        bias=False,
        padding_mode=theirs.padding_mode,
        device="meta",  # draws no random numbers
    )
    conv.weight = nn.Parameter(taps)
    try:
        parts = {n: copy.deepcopy(m) for n, m in submodules(module).items() if n != place}
        twin = copy.copy(module)
        replace_submodules(twin, {})
        vars(twin).update({name: apart(name, value) for name, value in vars(twin).items()})
        replace_submodules(twin, {**parts, place: conv})
        twin.train(training)
        before = {name: contents(value) for name, value in vars(twin).items()}
        y = type(module).forward(twin, x.requires_grad_())
        gradients = torch.autograd.grad(y, (x, conv.weight), dy)
        conv.weight = nn.Parameter(taps.float())
        single = type(module).forward(twin, x.detach().float())
        half = _half(module, twin, conv, x)
    except NotPlainECA:
        raise
    except Exception as error:
        maps = f"maps of shape {tuple(x.shape)} in float64 and float32, the dtype of its taps"
        raise NotPlainECA(f"its forward fails on {maps}: {error}") from error
    after = {name: contents(value) for name, value in vars(twin).items()}
    stored = [name for name, found in after.items() if found != before.get(name)]
    if stored:
        raise NotPlainECA(f"its forward stores {', '.join(stored)}, which ECALayer does not")
    results = {torch.float64: y, torch.float32: single, torch.bfloat16: half}
    for dtype, result in results.items():
        if result is not None and result.dtype != dtype:
            raise NotPlainECA(f"its forward returns {result.dtype} for a map of {dtype}")
    return y.detach(), *gradients


def _half(module: nn.Module, twin: Any, conv: nn.Module, x: Tensor) -> Tensor | None:
    """A module's result for a map in bfloat16; None if it fails, as plain ECA may."""
    conv.to(torch.bfloat16)
    try:
        return type(module).forward(twin, x.detach().bfloat16())  # type: ignore[no-any-return]
    except NotPlainECA:
        raise
    except Exception:
        return None


class _Foreign:
    """Replaces a user's object in the trial, which must not touch it: any use raises NotPlainECA.

    Args:
        name: of the attribute that holds the object.
        kind: the object's class.
    """

    def __init__(self, name: str, kind: str) -> None:
        object.__setattr__(self, "described", f"{name} ({kind})")

    def _used(self, *_: Any, **__: Any) -> Any:
        what = object.__getattribute__(self, "described")
        raise NotPlainECA(f"its forward uses {what}, which its fused form would not")

    def __getattribute__(self, name: str) -> Any:
        # isinstance() asks for the class, which does not count as a use.
        return _Foreign if name == "__class__" else _Foreign._used(self)

    __setattr__ = __call__ = __bool__ = __len__ = _used
    __iter__ = __getitem__ = __setitem__ = __contains__ = __enter__ = __eq__ = __hash__ = _used
    __add__ = __radd__ = __iadd__ = __sub__ = __rsub__ = __mul__ = __rmul__ = __imul__ = _used
    __truediv__ = __rtruediv__ = __lt__ = __le__ = __gt__ = __ge__ = __int__ = __float__ = _used


def apart(name: str, value: Any) -> Any:
    """An attribute's value for the trial: containers are copied, objects get a stand-in."""
    if isinstance(value, dict | list | collections.deque):
        twin: Any = copy.copy(value)
        if isinstance(value, dict):
            twin.update({key: apart(name, part) for key, part in value.items()})
        else:
            twin.clear()
            twin.extend(apart(name, part) for part in value)
        return twin
    if type(value) in (set, tuple, frozenset):
        return type(value)(apart(name, part) for part in value)
    if value is None or isinstance(value, CONSTANTS) or _keeps_nothing(value):
        return value
    return _Foreign(name, type(value).__name__)


def _keeps_nothing(value: Any) -> bool:
    """Whether a value is a class or function that cannot store anything."""
    if isinstance(value, type):
        return value.__module__.partition(".")[0] in ("torch", "builtins")
    if isinstance(value, types.FunctionType):
        of_torch = value.__module__.partition(".")[0] == "torch"
        return of_torch or (value.__closure__ is None and not value.__defaults__)
    return isinstance(value, types.BuiltinFunctionType) and (
        isinstance(value.__self__, type | types.ModuleType | None)
    )


def contents(value: Any) -> list[int]:
    """The ids of a value and, in a container, of its contents; different if either changed."""
    if isinstance(value, dict):
        parts: Any = itertools.chain.from_iterable(value.items())
    elif isinstance(value, list | collections.deque | set | tuple):
        parts = value
    else:
        return [id(value)]
    return [id(value), *itertools.chain.from_iterable(map(contents, parts))]


def _expected(module: nn.Module, dims: int, mode: str) -> tuple[Tensor, ...]:
    x, taps, dy = _arguments(module, dims)
    x.requires_grad_()
    taps.requires_grad_()
    y = reference.eca(x, taps, padding_mode=mode)
    return y.detach(), *torch.autograd.grad(y, (x, taps), dy)


def _agree(got: tuple[Tensor, ...], expected: tuple[Tensor, ...]) -> bool:
    # A forward that rounds to float32 in between is ECA too. Anything else differs far more.
    return all(
        a.shape == b.shape and torch.allclose(a, b, rtol=1e-5, atol=1e-6)
        for a, b in zip(got, expected, strict=True)
    )
