"""PyTorch's state around a call, and every private name of PyTorch that this package uses.

tests/repository/test_versions.py finds private names elsewhere. Each was tried on every version of
torch in tools/versions.txt. Where a version lacks a name, its replacement is here too.
"""

import copy
import warnings
from collections.abc import Callable, Iterable
from itertools import chain
from operator import is_
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch._C import _functorch as functorch
from torch._subclasses.fake_tensor import is_fake
from torch.autograd import forward_ad
from torch.jit._trace import TracerWarning
from torch.nn.modules import module as modules
from torch.nn.modules.batchnorm import _BatchNorm as BatchNorm
from torch.nn.modules.conv import _ConvNd as Convolution
from torch.utils._python_dispatch import _disable_current_modes as without_modes

T = TypeVar("T")
F = TypeVar("F", bound=Callable[..., Any])

__all__ = [
    "BatchNorm",  # of any number of dimensions, and SyncBatchNorm
    "Convolution",
    "Snapshot",
    "add_over_processes",
    "batched",
    "batched_by_autograd",
    "child",
    "dictionaries_of_parts",
    "does_more",
    "exporting_to_onnx",
    "folded",
    "forget_compiled",
    "functionalized",
    "gather_over_processes",
    "has_hooks_of_its_own",
    "has_tangent",
    "hooks_of",
    "is_compiled",
    "is_exporting",
    "is_fake",
    "is_scripting",
    "is_tracing",
    "keep_saved_tensors",
    "overrides_torch",
    "own_buffers",
    "own_parameters",
    "parts_apart",
    "primal",
    "processes_of",
    "quietly",
    "replace_submodules",
    "submodules",
    "tracing_to_onnx",
    "transformed",
    "with_tangents",
    "without_modes",
    "wrap_in",
]


# torch.jit does not export this name to type checkers.
is_scripting = torch.jit.is_scripting  # type: ignore[attr-defined]

# The hooks of all modules. torch fills and empties these dictionaries, but never replaces them.
_HOOKS, _PRE_HOOKS = modules._global_forward_hooks, modules._global_forward_pre_hooks
_BACKWARD_HOOKS = modules._global_backward_hooks
_BACKWARD_PRE_HOOKS = modules._global_backward_pre_hooks


_PARTS = ("_parameters", "_buffers", "_modules")
_HOOKS_OF_CALLS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


def has_hooks_of_its_own(module: nn.Module) -> bool:
    """Whether a call of the module runs hooks that were registered on it."""
    return bool(
        module._forward_hooks
        or module._forward_pre_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
    )


def does_more(module: nn.Module) -> bool:
    """Whether a call of the module does more than its class's forward.

    It may run hooks, its own or global ones. Or a method on the instance may replace that of the
    class, as accelerate's offloading does.
    """
    own = module.__dict__
    return bool(
        "forward" in own
        or "_conv_forward" in own
        or "_call_impl" in own
        or module._forward_hooks
        or module._forward_pre_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
        or _HOOKS
        or _PRE_HOOKS
        or _BACKWARD_HOOKS
        or _BACKWARD_PRE_HOOKS
    )


class Snapshot:
    """What modules have at one time: attributes, parameters, buffers, submodules and classes.

    As long as it holds, what was decided from these holds too. To look at each of them again takes
    many times as long, because after a convolution little of Python's memory is in the caches.

    Args:
        modules: without hooks.
        owner: another module, which may have hooks; the snapshot has no reference to it.
    """

    def __init__(self, modules: Iterable[nn.Module], owner: nn.Module | None = None) -> None:
        self.modules = list(dict.fromkeys(modules))
        self.classes = list(map(type, self.modules))
        every = [vars(m) for m in (self.modules if owner is None else [owner, *self.modules])]
        every += [own[name] for own in every for name in _PARTS if isinstance(own.get(name), dict)]
        self.held: list[dict[str, Any]] = every
        self.sizes = list(map(len, every))
        self.values = list(self._now())
        hooks = [_HOOKS, _PRE_HOOKS, _BACKWARD_HOOKS, _BACKWARD_PRE_HOOKS]
        self.hooks = hooks + [getattr(m, name) for m in self.modules for name in _HOOKS_OF_CALLS]

    def holds(self) -> bool:
        """Whether all of that is the same objects still, and no hook is on the modules."""
        if any(self.hooks):
            return False
        return (
            list(map(len, self.held)) == self.sizes
            and all(map(is_, self._now(), self.values))
            and list(map(type, self.modules)) == self.classes
        )

    def _now(self) -> Iterable[Any]:
        return chain.from_iterable(map(dict.values, self.held))


def child(module: nn.Module, name: str) -> Any:
    """module.<name>, a submodule; getattr() takes 0.3 us longer."""
    return module._modules[name]


def submodules(module: nn.Module) -> dict[str, Any]:
    """The direct submodules by name; None for those that are not set."""
    return module._modules


def replace_submodules(module: nn.Module, by: dict[str, nn.Module]) -> None:
    """Give a module a new dictionary of submodules; a shallow copy shares its original's."""
    module.__dict__["_modules"] = by


def parts_apart(module: nn.Module) -> nn.Module:
    """A shallow copy of a module, with dictionaries of its own for the tensors and submodules."""
    twin = copy.copy(module)
    for name in _PARTS:
        vars(twin)[name] = dict(vars(module)[name])
    return twin


def dictionaries_of_parts(module: nn.Module) -> set[str]:
    """The names of the attributes that hold a module's tensors, submodules and hooks."""
    return {name for name in vars(module) if name in _PARTS or ("hooks" in name and name[0] == "_")}


def hooks_of(module: nn.Module) -> list[Any]:
    """All dictionaries of a module's hooks."""
    return [vars(module)[name] for name in dictionaries_of_parts(module) - set(_PARTS)]


def is_compiled(module: nn.Module) -> bool:
    """Whether a module was compiled by its own compile(), which replaces what a call runs."""
    return getattr(module, "_compiled_call_impl", None) is not None


def folded(function: F) -> F:
    """Let torch.compile call a function while it traces, because it cannot trace the function."""
    function._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return function


# Tensors whose __torch_function__ is one of these are treated like any tensor.
_PLAIN = (Tensor.__torch_function__.__func__, nn.Parameter.__torch_function__)  # type: ignore[attr-defined]


def overrides_torch(t: Tensor) -> bool:
    """Whether the class of a tensor overrides what functions do with it."""
    kind = type(t)
    if kind is nn.Parameter or kind is Tensor:
        return False
    of_kind: Any = kind.__torch_function__
    return getattr(of_kind, "__func__", of_kind) not in _PLAIN


def own_parameters(module: nn.Module) -> dict[str, Any]:
    """The direct parameters by name; None for those that are not set, such as a bias."""
    return module._parameters


def own_buffers(module: nn.Module) -> dict[str, Any]:
    """The direct buffers by name; None for those that are not set."""
    return module._buffers


@folded  # without this, the graph breaks here silently
def is_tracing() -> bool:
    """Whether torch.jit.trace is tracing; torch.jit.is_tracing() takes longer."""
    return torch._C._is_tracing()


def quietly(function: Callable[..., T], *args: Any) -> T:
    """Call a function without the trace's warnings that numbers of channels and taps are fixed."""
    if not is_tracing():
        return function(*args)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", TracerWarning)
        return function(*args)


def is_exporting() -> bool:
    """Whether torch.export is exporting, and not torch.compile.

    In torch.compile, torch 2.11 folds torch.compiler.is_exporting() to True.
    """
    return bool(torch.compiler._is_exporting_flag)


def exporting_to_onnx() -> bool:
    """Whether torch.export exports to ONNX, which lacks our operators; other exports keep them."""
    return is_exporting() and torch.onnx.is_in_onnx_export()


def tracing_to_onnx() -> bool:
    """Whether the trace is by torch.onnx.export(dynamo=False), which lacks our operators."""
    return torch.onnx.is_in_onnx_export()


def transformed() -> bool:
    """Whether torch.func's transforms or forward-mode AD are active, which need separate rules."""
    return torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0


def batched_by_autograd(t: Tensor) -> bool:
    """Whether torch.autograd.grad(is_grads_batched=True) batches t, without torch.func."""
    return functorch.is_legacy_batchedtensor(t)


def batched(t: Tensor) -> bool:
    """Whether any vmap() around us batches t."""
    while functorch.is_functorch_wrapped_tensor(t):
        if functorch.is_batchedtensor(t):
            return True
        t = functorch.get_unwrapped(t)
    return False


def functionalized() -> bool:
    """Whether torch.func.functionalize() is among the transforms around us."""
    levels = functorch.get_interpreter_stack() or []
    return any(level.key() == functorch.TransformType.Functionalize for level in levels)


def with_tangents() -> Any:
    """A context with forward-mode AD on; torch switches it off inside a rule for it."""
    return forward_ad._set_fwd_grad_enabled(True)


def has_tangent(t: Tensor) -> bool:
    """Whether t has a tangent in forward-mode AD, at any level."""
    return forward_ad._current_level >= 0 and torch._VF._unpack_dual(t, level=0)[1] is not None


def primal(t: Tensor) -> Tensor:
    """t without its tangent of the innermost level."""
    return torch._VF._unpack_dual(t, level=0)[0]


def add_over_processes(t: Tensor, group: Any) -> Tensor:
    """The sum of t over the processes of a group."""
    import torch.distributed as dist

    t = t.contiguous()
    dist.all_reduce(t, group=group)
    return t


def gather_over_processes(t: Tensor, group: Any) -> Tensor:
    """The vectors t of all processes of a group, as rows.

    With the collectives that torch.nn.SyncBatchNorm uses, as other processes may call that.
    """
    import torch.distributed as dist

    t, size = t.contiguous(), dist.get_world_size(group)
    if group._get_backend_name() == "gloo":  # it lacks the other one
        rows = [torch.empty_like(t) for _ in range(size)]
        dist.all_gather(rows, t, group=group)
        return torch.stack(rows)
    gathered = t.new_empty(size * t.numel())
    # torch 2.11 has only the older name, of which newer ones warn.
    gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
    gather(gathered, t, group=group)
    return gathered.view(size, t.numel())


def processes_of(bn: Any) -> Any:
    """The group of a SyncBatchNorm if there are several processes in it, else None."""
    import torch.distributed as dist

    if not dist.is_available() or not dist.is_initialized():
        return None
    group = bn.process_group or dist.group.WORLD
    return group if dist.get_world_size(group) > 1 else None


def wrap_in(tracer: Any, module: Any) -> None:
    """Let a tracer of torch.fx replace the functions that it wraps in this module too."""
    tracer._autowrap_search.append(module)


def keep_saved_tensors() -> None:
    """Let a compiled backward pass run twice; otherwise torch.compile reuses its saved tensors."""
    import torch._functorch.config

    torch._functorch.config.donated_buffer = False


def forget_compiled() -> None:
    """Forget all compiled code, because torch.compile stops after a number of versions."""
    dynamo: Any = torch._dynamo
    dynamo.reset()


def same_storage(a: Tensor, b: Tensor) -> bool:
    """Whether a and b are views of one storage; also of fake tensors, which have no addresses."""
    return bool(a.untyped_storage()._cdata == b.untyped_storage()._cdata)
