"""ResidualTail: the end of a residual block, from its last batch norm to its activation."""

from typing import Any, NamedTuple

from torch import Tensor, nn
from torch.compiler import is_compiling

from eca_fused.attention.activations import activation_name
from eca_fused.attention.base import ChannelAttention
from eca_fused.attention.gates import Gate, gate_of
from eca_fused.attention.kept import Kept, cannot_be_scripted, kept_for
from eca_fused.attention.norms import ABSENT, as_norm, fits, full_name, named_reason
from eca_fused.functional.choice import choose
from eca_fused.functional.tails import InferenceCall
from eca_fused.functional.ways import Way
from eca_fused.ops.checks import ACTIVATIONS, DTYPES, alike, check_activation, check_map
from eca_fused.ops.results import sums_dtype
from eca_fused.ops.tail import TailOptions, TailTensors, activate
from eca_fused.torch_state import child, does_more, is_tracing

__all__ = ["DROP_PATHS", "KeptTail", "ResidualTail", "TailParts", "compute", "why_called"]

DROP_PATHS = (
    "timm.layers.drop.DropPath",
    "torchvision.ops.stochastic_depth.StochasticDepth",
)


class TailParts(NamedTuple):
    """The modules of a block's tail, in the order in which they are called; None for absent ones.

    activation is a module or one of ACTIVATIONS. scale is a factor of the branch, a number or a
    tensor of one element.
    """

    bn: nn.Module | None
    attention: nn.Module | None
    drop_path: nn.Module | None
    identity_bn: nn.Module | None
    activation: nn.Module | str
    scale: Tensor | float = 1.0


# ---- which tails are one operation ----


def why_called(parts: TailParts) -> str | None:
    """Why the modules of a tail are called one after the other; None if it is one operation."""
    found = _plan_of(parts)
    return found if isinstance(found, str) else None


class _Plan(NamedTuple):
    activation: str
    gate: Gate


def _plan_of(parts: TailParts) -> _Plan | str:
    """How a tail is one operation, or why its modules are called."""
    reason = named_reason("bn", parts.bn) or named_reason("identity_bn", parts.identity_bn)
    if reason is not None:
        return reason
    gate = gate_of(parts.attention)
    if isinstance(gate, str):
        return f"attention: {gate}"
    activation = activation_name(parts.activation)
    if activation not in ACTIVATIONS:
        return f"activation: {type(parts.activation).__name__} is not one that the kernels have"
    drop = parts.drop_path
    if drop is None or type(drop) is nn.Identity:
        return _Plan(activation, gate)
    if full_name(drop) not in DROP_PATHS or does_more(drop):
        return f"drop_path: {type(drop).__name__} does more than drop samples"
    return _Plan(activation, gate)


# ---- computing them ----


def _drop_factor(drop: Any, x: Tensor) -> Tensor | None:
    """The factor of each sample, (N,), with the random numbers that the module would draw."""
    if drop is None or type(drop) is nn.Identity or not drop.training:
        return None
    if full_name(drop) == DROP_PATHS[0]:
        rate, rows, rescaled = drop.drop_prob, True, drop.scale_by_keep
    else:
        rate, rows, rescaled = drop.p, drop.mode == "row", True
    if not rate:
        return None
    keep = 1 - rate
    size = (x.shape[0] if rows else 1, *(1,) * (x.dim() - 1))
    noise = x.new_empty(size).bernoulli_(keep)
    if keep > 0.0 and rescaled:
        noise.div_(keep)
    return noise.flatten().expand(x.shape[0])


def _scale(parts: TailParts, x: Tensor) -> Tensor | None:
    """The factor of each sample (N,), in the dtype of sums; None for 1."""
    drop = _drop_factor(parts.drop_path, x)
    own = parts.scale
    if isinstance(own, Tensor):
        own = own.reshape(()).to(x.device, sums_dtype(x)).expand(x.shape[0])
    elif own == 1.0:
        return None if drop is None else drop.to(sums_dtype(x))
    else:
        own = x.new_full(x.shape[:1], own, dtype=sums_dtype(x))
    return own if drop is None else own * drop


def compute(
    parts: TailParts, x: Tensor, identity: Tensor | None, block: nn.Module | None = None
) -> Tensor:
    """y of a tail, as one operation if its modules and the call allow it.

    Args:
        parts: the modules.
        x: (N, C, *spatial).
        identity: of the shape of x; None for nothing.
        block: what has these parts; its next call is faster.
    """
    if block is None or is_compiling():
        return _by_plan(parts, _plan_of(parts), x, identity)[0]
    return kept_for(block, parts, KeptTail)(x, identity)


class KeptTail(Kept[TailParts]):
    """compute() with the same TailParts."""

    def plan(self) -> _Plan | str:
        return _plan_of(self.parts)

    def compute(self, plan: _Plan | str, *maps: Any) -> tuple[Tensor, InferenceCall | None]:
        return _by_plan(self.parts, plan, *maps)


def _by_plan(
    parts: TailParts, plan: _Plan | str, x: Tensor, identity: Tensor | None
) -> tuple[Tensor, InferenceCall | None]:
    """y, and the call that gives it for other maps with these parts; None if it may differ."""
    if isinstance(plan, str) or not _fit(x, identity):
        return by_calling(parts, x, identity), None
    way = choose(x, plan.gate.backend)
    if not way.has_tails(x, plan.gate.network is not None) or x.numel() == 0:
        return by_calling(parts, x, identity), None
    # Before the first norm updates its running statistics.
    if not fits(parts.bn, x) or not fits(parts.identity_bn, identity):
        return by_calling(parts, x, identity), None
    if isinstance(parts.attention, ChannelAttention):
        check_map(x, parts.attention.width())
    return _compute(parts, plan, way, x, identity)


def _fit(x: Any, identity: Any) -> bool:
    """Whether kernels can take the maps; if not, the modules say what is wrong with them."""
    if not isinstance(x, Tensor) or is_tracing() or not 2 <= x.dim() <= 5 or x.dtype not in DTYPES:
        return False
    return identity is None or (isinstance(identity, Tensor) and alike(identity, x))


def _compute(
    parts: TailParts, plan: _Plan, way: Way, x: Tensor, identity: Tensor | None
) -> tuple[Tensor, InferenceCall | None]:
    """As _by_plan(), as one operation."""
    gate, scale = plan.gate, _scale(parts, x)
    taps = gate.taps_for(x)
    other = ABSENT
    # First, as by_calling() has it: processes exchange their statistics in this order.
    if parts.identity_bn is not None and identity is not None:
        other = as_norm(parts.identity_bn, identity, way)
    own = ABSENT if parts.bn is None else as_norm(parts.bn, x, way)
    t = TailTensors(
        x,
        identity,
        taps,
        None,
        scale,
        own.weight,
        own.bias,
        other.weight,
        other.bias,
        own.mean,
        own.variance,
        other.mean,
        other.variance,
        own.planes,
    )
    o = TailOptions(
        plan.activation,
        gate.circular,
        own.eps,
        other.eps,
        own.values,
        other.values,
        own.group,
        other.group,
    )
    y = way.tail(t, o) if gate.network is None else way.gated_tail(t, o, gate.network)
    return y, way.inference_call(t, o, gate.backend, gate.network)


def by_calling(parts: TailParts, x: Tensor, identity: Tensor | None) -> Tensor:
    """y of a tail whose modules are called one after the other."""
    if identity is not None and parts.identity_bn is not None:
        identity = parts.identity_bn(identity)
    for module in (parts.bn, parts.attention, parts.drop_path):
        if module is not None:
            x = module(x)
    if isinstance(parts.scale, Tensor) or parts.scale != 1.0:
        x = x * parts.scale
    if identity is not None:
        x = x + identity
    if isinstance(parts.activation, str):
        return activate(parts.activation, x)
    return parts.activation(x)  # type: ignore[no-any-return]


# ---- the module ----


class ResidualTail(nn.Module):
    """The end of a residual block in one operation.

        y = activation(drop_path(attention(bn(x))) + identity_bn(identity))

    It computes what calling the modules computes, with their parameters, and changes their running
    statistics as they do. In training with batch norm it reads or writes maps 4 times forward and 6
    times backward, where plain PyTorch with ECA does so 11 and 18 times, and keeps for the backward
    pass x, numbers for each plane and one bit for each element; the identity too, if its norm needs
    it, and with SiLU and GELU. Without statistics of the batch and with ECA it does so 3 and 4
    times.

    The modules are called one after the other, which is slower, where one of them does more than
    its class (hooks, wrappers, quantisation, other classes), and where the maps or the device do
    not fit. print() of the module says which way its modules allow.

    Args:
        attention: an ECALayer, another layer of eca_fused.attention, a squeeze and excitation
            module of timm or torchvision, or any module from map to map; None for none.
        bn: the batch norm before the attention; None for none.
        identity_bn: the batch norm of the shortcut, where the block downsamples; None for none.
        activation: "relu", "silu", "gelu", "none", or a module.
        drop_path: timm's DropPath, torchvision's StochasticDepth or another module; None for none.
        scale: a factor of the branch, as NFNet has one.

    Shape:
        x and identity (N, C, *spatial); the same shape and dtype out.

    Raises:
        TypeError: one of the modules is not a module.
        ValueError: an unknown activation.
    """

    def __init__(
        self,
        attention: nn.Module | None,
        bn: nn.Module | None = None,
        identity_bn: nn.Module | None = None,
        activation: str | nn.Module = "relu",
        drop_path: nn.Module | None = None,
        *,
        scale: float = 1.0,
    ) -> None:
        super().__init__()
        given = {
            "attention": attention,
            "bn": bn,
            "identity_bn": identity_bn,
            "drop_path": drop_path,
        }
        for name, module in given.items():
            if module is not None and not isinstance(module, nn.Module):
                raise TypeError(
                    f"expected {name} as a torch.nn.Module or None, got {type(module).__name__}"
                )
            self.register_module(name, module)
        if isinstance(activation, str):
            check_activation(activation)
        elif not isinstance(activation, nn.Module):
            raise TypeError(
                f"expected activation as a torch.nn.Module or one of {', '.join(ACTIVATIONS)}, "
                f"got {type(activation).__name__}"
            )
        self.activation = activation
        self.scale = float(scale)

    def parts(self) -> TailParts:
        return TailParts(
            child(self, "bn"),
            child(self, "attention"),
            child(self, "drop_path"),
            child(self, "identity_bn"),
            self.activation,
            self.scale,
        )

    def forward(self, x: Tensor, identity: Tensor | None = None) -> Tensor:
        return compute(self.parts(), x, identity, self)

    def __prepare_scriptable__(self) -> None:
        cannot_be_scripted(self)

    def extra_repr(self) -> str:
        reason = why_called(self.parts())
        way = "one operation" if reason is None else f"calls its modules ({reason})"
        shown = [way] if self.scale == 1.0 else [f"scale={self.scale}", way]
        if isinstance(self.activation, str):
            shown.insert(0, f"activation={self.activation!r}")
        return ", ".join(shown)
