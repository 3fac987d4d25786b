"""Parameters and FLOPs of a network, FLOPs as thop counts them."""

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd

from eca_fused.attention import ECANS, ChannelAttention, ECALayer, ECAVariant, GSoP

__all__ = ["count_flops", "count_parameters"]


def count_parameters(model: nn.Module) -> int:
    """The number of elements of all parameters, shared ones once."""
    return sum(parameter.numel() for parameter in model.parameters())


def count_flops(model: nn.Module, shape: Sequence[int] = (1, 3, 224, 224)) -> int:
    """Multiply-adds of one call in evaluation mode, by the rules of thop 0.1.1.

    Convolutions and fully connected layers count one for each product, without biases; a batch norm
    four for each element, two without affine parameters; an average pool one for each element that
    it reads and each that it writes; activations, maximum pools and products of tensors nothing.
    Attention counts its average pool and its taps like that, whether or not a fused kernel computes
    them, and what else is made of modules as these.

    Args:
        model: any module of one tensor; on the meta device nothing is computed.
        shape: of its input.

    Raises:
        ValueError: the model has a layer with parameters that there is no rule for.
    """
    total = 0

    def add(rule: Callable[[Any, Tensor, Tensor], int]) -> Callable[..., None]:
        def hook(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
            nonlocal total
            total += rule(module, inputs[0], output)

        return hook

    rules = [(module, _rule(module)) for module in model.modules()]
    handles = [
        module.register_forward_hook(add(rule)) for module, rule in rules if rule is not None
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


def _rule(module: nn.Module) -> Callable[[Any, Tensor, Tensor], int] | None:
    for kinds, rule in RULES:
        if isinstance(module, kinds):
            return rule
    if any(True for _ in module.parameters(recurse=False)):
        raise ValueError(
            f"expected layers that thop has a rule for, got {type(module).__name__}; "
            "add its rule to eca_fused/counting.py"
        )
    return None


def _convolution(module: _ConvNd, x: Tensor, y: Tensor) -> int:
    return y.numel() * (module.in_channels // module.groups) * math.prod(module.kernel_size)


def _linear(module: nn.Linear, x: Tensor, y: Tensor) -> int:
    return y.numel() * module.in_features


def _norm(module: _BatchNorm, x: Tensor, y: Tensor) -> int:
    return (4 if module.affine else 2) * x.numel()


def _average(module: nn.Module, x: Tensor, y: Tensor) -> int:
    return x.numel() + y.numel()


def _pooled(module: nn.Module, x: Tensor, y: Tensor) -> int:
    return x.numel() + x.shape[0] * x.shape[1]


def _band(module: Any, x: Tensor, y: Tensor) -> int:
    k: int = module.conv.weight.shape[2]
    return _pooled(module, x, y) + x.shape[0] * x.shape[1] * k


def _nothing(module: nn.Module, x: Tensor, y: Tensor) -> int:
    return 0


# The first that fits holds. What a method of attention has in modules that it calls, such as the
# layers of SE, is counted there; the taps of a band are in a module that is never called.
RULES: list[tuple[Any, Callable[[Any, Tensor, Tensor], int]]] = [
    ((GSoP, nn.Identity), _nothing),
    ((ECALayer, ECANS), _band),
    (ECAVariant, lambda module, x, y: (_band if module.conv2 is None else _pooled)(module, x, y)),
    (ChannelAttention, _pooled),
    (_ConvNd, _convolution),
    (nn.Linear, _linear),
    (_BatchNorm, _norm),
    (nn.AdaptiveAvgPool2d, _average),
]
