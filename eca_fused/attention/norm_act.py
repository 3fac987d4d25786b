"""NormActAttention: batch norm, activation and attention, in the middle of a block."""

from typing import Any, NamedTuple

from torch import Tensor, nn
from torch.compiler import is_compiling

from eca_fused.attention.activations import activation_name
from eca_fused.attention.base import ChannelAttention
from eca_fused.attention.gates import Gate, gate_of
from eca_fused.attention.kept import Kept, cannot_be_scripted, kept_for
from eca_fused.attention.norms import activation_of, as_norm, fits, named_reason
from eca_fused.functional.choice import choose
from eca_fused.functional.ways import Way
from eca_fused.ops.checks import DTYPES, check_map
from eca_fused.ops.gating import ACTIVATIONS
from eca_fused.ops.tail import TailOptions, TailTensors, activate
from eca_fused.torch_state import child, is_tracing

__all__ = ["KeptNormAct", "NormActAttention", "NormActParts", "compute", "why_called"]


class NormActParts(NamedTuple):
    """The modules in the order in which they are called; None for absent ones.

    activation is a module or one of ACTIVATIONS. timm's BatchNormAct2d has its own inside.
    """

    bn: nn.Module | None
    activation: nn.Module | str
    attention: nn.Module | None


class _Plan(NamedTuple):
    activation: str
    gate: Gate


def why_called(parts: NormActParts) -> str | None:
    """Why the modules are called one after the other; None if they are one operation."""
    found = _plan_of(parts)
    return found if isinstance(found, str) else None


def _plan_of(parts: NormActParts) -> _Plan | str:
    reason = named_reason("bn", parts.bn, activated=True)
    if reason is not None:
        return reason
    inner, outer = activation_of(parts.bn), parts.activation
    activation = activation_name(outer)
    if inner is not None:
        if activation != "none":
            return f"activation: {type(outer).__name__} comes after that of bn"
        outer, activation = inner, activation_name(inner)
    if activation not in ACTIVATIONS:
        return f"activation: {type(outer).__name__} is not one that the kernels have"
    gate = gate_of(parts.attention)
    if isinstance(gate, str):
        return f"attention: {gate}"
    if gate.taps is None and gate.network is None:
        return "attention: there is none"
    return _Plan(activation, gate)


def compute(parts: NormActParts, x: Tensor, block: nn.Module | None = None) -> Tensor:
    """attention(activation(bn(x))), as one operation if the modules and the call allow it.

    Args:
        parts: the modules.
        x: (N, C, *spatial).
        block: what has these parts; its next call is faster.
    """
    if block is None or is_compiling():
        return _by_plan(parts, _plan_of(parts), x)
    return kept_for(block, parts, KeptNormAct)(x)


class KeptNormAct(Kept[NormActParts]):
    """compute() with the same NormActParts."""

    def plan(self) -> _Plan | str:
        return _plan_of(self.parts)

    def compute(self, plan: _Plan | str, *maps: Any) -> tuple[Tensor, None]:
        return _by_plan(self.parts, plan, *maps), None


def _by_plan(parts: NormActParts, plan: _Plan | str, x: Tensor) -> Tensor:
    if isinstance(plan, str) or not isinstance(x, Tensor) or is_tracing():
        return by_calling(parts, x)
    if not 2 <= x.dim() <= 5 or x.numel() == 0 or x.dtype not in DTYPES:
        return by_calling(parts, x)
    way = choose(x, plan.gate.backend)
    if not way.has_gating(x, plan.gate.network is not None) or not fits(parts.bn, x):
        return by_calling(parts, x)
    if isinstance(parts.attention, ChannelAttention):
        check_map(x, parts.attention.width())
    return _compute(parts.bn, plan, way, x)


def _compute(bn: nn.Module | None, plan: _Plan, way: Way, x: Tensor) -> Tensor:
    taps = plan.gate.taps_for(x)
    t, o = TailTensors(x), TailOptions(plan.activation, plan.gate.circular)
    if bn is not None:
        own = as_norm(bn, x, way)
        t = t._replace(gamma=own.weight, beta=own.bias, mean=own.mean, variance=own.variance)
        o = o._replace(eps=own.eps, values=own.values, group=own.group)
    if plan.gate.network is not None:
        return way.gated_by(t, o, plan.gate.network)
    return way.gated(t._replace(weight=taps), o)


def by_calling(parts: NormActParts, x: Tensor) -> Tensor:
    """The same with the modules called one after the other."""
    if parts.bn is not None:
        x = parts.bn(x)
    of = parts.activation
    x = activate(of, x) if isinstance(of, str) else of(x)
    return x if parts.attention is None else parts.attention(x)


# ---- the module ----


class NormActAttention(nn.Module):
    """Batch norm, activation and channel attention in one operation.

        y = attention(activation(bn(x)))

    RegNet, MobileNetV3 and EfficientNet have this in the middle of their blocks. It computes what
    calling the modules computes, with their parameters, and changes their running statistics as
    they do. In training with batch norm it reads or writes maps 4 times forward and 5 times
    backward, where plain PyTorch does so 8 and 14 times; with ECA on the CPU 3 times forward. It
    keeps x and numbers for each plane for the backward pass, which computes the activation again.

    The modules are called one after the other, which is slower, where one of them does more than
    its class (hooks, wrappers, quantisation, other classes), and where the map or the device does
    not fit. print() of the module says which way it goes.

    Args:
        attention: an ECALayer, another layer of eca_fused.attention, a squeeze and excitation
            module of timm or torchvision, or any module from map to map.
        bn: the batch norm; None for none. timm's BatchNormAct2d may have the activation inside.
        activation: "relu", "silu", "gelu", "hardswish", "none", or a module.

    Shape:
        x (N, C, *spatial); the same shape and dtype out.

    Raises:
        TypeError: one of the modules is not a module.
        ValueError: an unknown activation.
    """

    def __init__(
        self,
        attention: nn.Module,
        bn: nn.Module | None = None,
        activation: str | nn.Module = "relu",
    ) -> None:
        super().__init__()
        if not isinstance(attention, nn.Module):
            raise TypeError(
                f"expected attention as a torch.nn.Module, got {type(attention).__name__}"
            )
        if bn is not None and not isinstance(bn, nn.Module):
            raise TypeError(f"expected bn as a torch.nn.Module or None, got {type(bn).__name__}")
        if isinstance(activation, str) and activation not in ACTIVATIONS:
            raise ValueError(
                f"expected activation as one of {', '.join(ACTIVATIONS)}, got {activation!r}"
            )
        if not isinstance(activation, str | nn.Module):
            raise TypeError(
                f"expected activation as a torch.nn.Module or one of {', '.join(ACTIVATIONS)}, "
                f"got {type(activation).__name__}"
            )
        self.register_module("bn", bn)
        self.activation = activation
        self.attention = attention

    def parts(self) -> NormActParts:
        return NormActParts(child(self, "bn"), self.activation, child(self, "attention"))

    def forward(self, x: Tensor) -> Tensor:
        return compute(self.parts(), x, self)

    def __prepare_scriptable__(self) -> None:
        cannot_be_scripted(self)

    def extra_repr(self) -> str:
        reason = why_called(self.parts())
        way = "one operation" if reason is None else f"calls its modules ({reason})"
        own: Any = [f"activation={self.activation!r}"] if isinstance(self.activation, str) else []
        return ", ".join([*own, way])
