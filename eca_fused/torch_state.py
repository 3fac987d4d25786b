"""What PyTorch is doing around a call, and every private name of PyTorch that this package uses.

tests/repository/test_versions.py finds private names elsewhere. Each was tried on every version of
torch in tools/versions.txt. Where a version lacks a name, its replacement is here too.
"""

import warnings
from collections.abc import Callable
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
    "batched",
    "batched_by_autograd",
    "child",
    "does_more",
    "exporting_to_onnx",
    "folded",
    "forget_compiled",
    "functionalized",
    "has_hooks_of_its_own",
    "has_tangent",
    "is_compiled",
    "is_exporting",
    "is_fake",
    "is_scripting",
    "is_tracing",
    "keep_saved_tensors",
    "overrides_torch",
    "own_parameters",
    "primal",
    "quietly",
    "replace_submodules",
    "submodules",
    "tracing_to_onnx",
    "transformed",
    "with_tangents",
    "without_modes",
]


# torch.jit does not list it among its names.
is_scripting = torch.jit.is_scripting  # type: ignore[attr-defined]

# Of every module. torch fills and empties these dictionaries, and never replaces them.
_HOOKS, _PRE_HOOKS = modules._global_forward_hooks, modules._global_forward_pre_hooks
_BACKWARD_HOOKS = modules._global_backward_hooks
_BACKWARD_PRE_HOOKS = modules._global_backward_pre_hooks


def has_hooks_of_its_own(module: nn.Module) -> bool:
    """Whether a call of the module runs hooks that were given to it."""
    return bool(
        module._forward_hooks
        or module._forward_pre_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
    )


def does_more(module: nn.Module) -> bool:
    """Whether a call of the module is more than its class's forward.

    It may run hooks, its own or those of every module, or the instance may have a method of its own
    in the place of its class's, as accelerate's offloading gives it.
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


def child(module: nn.Module, name: str) -> Any:
    """module.<name>, a submodule; nn.Module's own way takes 0.3 us longer."""
    return module._modules[name]


def submodules(module: nn.Module) -> dict[str, Any]:
    """The direct ones by their names; None for those that are not there."""
    return module._modules


def replace_submodules(module: nn.Module, by: dict[str, nn.Module]) -> None:
    """Give it another dictionary of them: that of a shallow copy is shared with its original."""
    module.__dict__["_modules"] = by


def is_compiled(module: nn.Module) -> bool:
    """By its own compile(), which replaces what a call runs."""
    return getattr(module, "_compiled_call_impl", None) is not None


def folded(function: F) -> F:
    """A function that torch.compile calls as it traces, as it cannot trace it."""
    function._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return function


# What has a __torch_function__ of one of these is computed with as any tensor.
_PLAIN = (Tensor.__torch_function__.__func__, nn.Parameter.__torch_function__)  # type: ignore[attr-defined]


def overrides_torch(t: Tensor) -> bool:
    """Whether the class of a tensor says what functions do with it."""
    kind = type(t)
    if kind is nn.Parameter or kind is Tensor:
        return False
    of_kind: Any = kind.__torch_function__
    return getattr(of_kind, "__func__", of_kind) not in _PLAIN


def own_parameters(module: nn.Module) -> dict[str, Any]:
    """By their names; None for those that are not there, as a bias."""
    return module._parameters


@folded  # or the graph breaks at it, without a word
def is_tracing() -> bool:
    """By torch.jit.trace; torch.jit.is_tracing() takes longer."""
    return torch._C._is_tracing()


def quietly(function: Callable[..., T], *args: Any) -> T:
    """Call it without a trace's warnings that it has the numbers of channels and taps for fixed."""
    if not is_tracing():
        return function(*args)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", TracerWarning)
        return function(*args)


def is_exporting() -> bool:
    """By torch.export, and by nothing else.

    torch.compiler.is_exporting() is true in every torch.compile on torch 2.11: it is folded there.
    """
    return bool(torch.compiler._is_exporting_flag)


def exporting_to_onnx() -> bool:
    """ONNX knows standard operators only; any other export keeps ours."""
    return is_exporting() and torch.onnx.is_in_onnx_export()


def tracing_to_onnx() -> bool:
    """While is_tracing(): for torch.onnx.export(dynamo=False), which knows no operators of ours."""
    return torch.onnx.is_in_onnx_export()


def transformed() -> bool:
    """Inside torch.func's transforms or forward-mode AD, which have rules of their own."""
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
    """A context with forward-mode AD on, which torch switches off within a rule for it."""
    return forward_ad._set_fwd_grad_enabled(True)


def has_tangent(t: Tensor) -> bool:
    """In forward-mode AD, of any level."""
    return forward_ad._current_level >= 0 and torch._VF._unpack_dual(t, level=0)[1] is not None


def primal(t: Tensor) -> Tensor:
    """t without its tangent of the innermost level."""
    return torch._VF._unpack_dual(t, level=0)[0]


def keep_saved_tensors() -> None:
    """Let compiled backward passes run again: torch.compile gives away what they have saved."""
    import torch._functorch.config

    torch._functorch.config.donated_buffer = False


def forget_compiled() -> None:
    """Forget every compiled form, as torch.compile does not compile beyond a number of them."""
    dynamo: Any = torch._dynamo
    dynamo.reset()
