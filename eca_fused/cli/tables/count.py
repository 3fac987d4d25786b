"""Parameters and FLOPs of a network. FLOPs are counted by the rules of thop or of MMDetection."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from eca_fused.attention import ECANS, ChannelAttention, ECALayer, ECAVariant, GSoP
from eca_fused.torch_state import BatchNorm, Convolution

__all__ = ["MMDETECTION", "THOP", "Rules", "count_flops", "count_parameters"]

Rule = Callable[[Any, Tensor, Tensor], int]  # of a module, its first input and its output


@dataclass(frozen=True)
class Rules:
    """The rules of a counter of FLOPs.

    Args:
        name: of the counter.
        rules: classes of modules with their rule; the first match applies.
    """

    name: str
    rules: Sequence[tuple[Any, Rule]]

    def of(self, module: nn.Module) -> Rule | None:
        """The rule for a module; None if it counts nothing.

        Raises:
            ValueError: the module has parameters but no rule.
        """
        for kinds, rule in self.rules:
            if isinstance(module, kinds):
                return rule
        if any(True for _ in module.parameters(recurse=False)):
            raise ValueError(
                f"expected layers that {self.name} has a rule for, got {type(module).__name__}; "
                "add its rule to eca_fused/cli/tables/count.py"
            )
        return None


def count_parameters(model: nn.Module, trainable: bool = False) -> int:
    """The number of elements of all or of the trainable parameters; shared ones count once."""
    return sum(p.numel() for p in model.parameters() if p.requires_grad or not trainable)


def _convolution(module: Convolution, x: Tensor, y: Tensor) -> int:
    return y.numel() * (module.in_channels // module.groups) * math.prod(module.kernel_size)


def _linear(module: nn.Linear, x: Tensor, y: Tensor) -> int:
    return y.numel() * module.in_features


def _norm(module: BatchNorm, x: Tensor, y: Tensor) -> int:
    return (4 if module.affine else 2) * x.numel()


def _average(module: nn.Module, x: Tensor, y: Tensor) -> int:
    return x.numel() + y.numel()


def _pooled(module: nn.Module, x: Tensor, y: Tensor) -> int:
    return x.numel() + x.shape[0] * x.shape[1]


def _taps(module: Any, x: Tensor) -> int:
    k: int = getattr(module, getattr(module, "taps_name", "conv")).weight.shape[2]
    return x.shape[0] * x.shape[1] * k


def _has_taps(module: nn.Module) -> bool:
    if isinstance(module, ECAVariant):
        return module.conv2 is None
    return isinstance(module, ECALayer | ECANS)


def _band(module: Any, x: Tensor, y: Tensor) -> int:
    return _pooled(module, x, y) + _taps(module, x)


def _read(module: nn.Module, x: Tensor, y: Tensor) -> int:
    return x.numel()


def _nothing(module: nn.Module, x: Tensor, y: Tensor) -> int:
    return 0


def _with_bias(module: Convolution, x: Tensor, y: Tensor) -> int:
    return _convolution(module, x, y) + (0 if module.bias is None else y.numel())


# Modules that an attention method calls, such as the layers of SE, are counted by their own rules.
# The taps of a band are in a module that is not called, so the method's rule counts them.
THOP = Rules(
    "thop",
    (
        ((GSoP, nn.Identity), _nothing),
        ((ECALayer, ECANS), _band),
        (ECAVariant, lambda m, x, y: (_band if m.conv2 is None else _pooled)(m, x, y)),
        (ChannelAttention, _pooled),
        (Convolution, _convolution),
        (nn.Linear, _linear),
        (BatchNorm, _norm),
        (nn.AdaptiveAvgPool2d, _average),
    ),
)
MMDETECTION = Rules(
    "MMDetection",
    (
        ((GSoP, nn.Identity), _nothing),
        ((ECALayer, ECANS), lambda m, x, y: _read(m, x, y) + _taps(m, x)),
        (ECAVariant, lambda m, x, y: _read(m, x, y) + (_taps(m, x) if m.conv2 is None else 0)),
        (ChannelAttention, _read),
        (Convolution, _with_bias),
        (nn.Linear, _linear),
        (BatchNorm, lambda m, x, y: (2 if m.affine else 1) * x.numel()),
        ((nn.AdaptiveAvgPool2d, nn.MaxPool2d, nn.ReLU), _read),
    ),
)


def count_flops(
    model: nn.Module, shape: Sequence[int] = (1, 3, 224, 224), rules: Rules = THOP
) -> int:
    """Multiply-adds of one call in evaluation mode.

    THOP has the rules of thop 0.1.1. Convolutions and fully connected layers count one for each
    product, without biases. A batch norm counts four for each element, two without affine
    parameters. An average pool counts one for each element that it reads and each that it writes.
    Activations, maximum pools and products of tensors count nothing.

    MMDETECTION has the rules of MMDetection 1 (mmdet/utils/flops_counter.py). They differ so: a
    convolution also counts one for each addition of a bias. A batch norm counts two for each
    element, one without affine parameters. Pools of both kinds, and ReLU modules, count one for
    each element that they read. Both count a transposed convolution on the map that it writes.

    Attention counts its average pool and its taps by these rules, even if a fused kernel computes
    them. Its other modules count like any modules.

    Args:
        model: any module of one tensor; on the meta device nothing is computed.
        shape: of its input.
        rules: THOP or MMDETECTION.

    Raises:
        ValueError: the model has a layer with parameters but without a rule.
    """
    total = 0

    def add(rule: Rule) -> Callable[..., None]:
        def hook(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
            nonlocal total
            total += rule(module, inputs[0], output)

        return hook

    # A layer's own rule counts its taps, even if their convolution is called.
    inner = {id(part) for m in model.modules() if _has_taps(m) for part in m.children()}
    found = [(module, rules.of(module)) for module in model.modules() if id(module) not in inner]
    handles = [
        module.register_forward_hook(add(rule)) for module, rule in found if rule is not None
    ]
    training = [module for module in model.modules() if module.training]
    try:
        like = next(model.parameters(), torch.empty(()))
        with torch.no_grad():
            model.eval()(torch.zeros(*shape, device=like.device, dtype=like.dtype))
    finally:
        for handle in handles:
            handle.remove()
        for module in training:
            module.training = True
    return total
