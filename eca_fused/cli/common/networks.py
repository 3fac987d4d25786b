"""What commands do to a network: statistics of batch norms, hooks."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["adapt", "hooked"]


def adapt(network: nn.Module, images: Tensor) -> None:
    """Give the batch norms the statistics of images (P, 3, H, W); sets evaluation mode."""
    norms = [module for module in network.modules() if isinstance(module, nn.BatchNorm2d)]
    momenta = [norm.momentum for norm in norms]
    for norm in norms:
        norm.momentum = 1.0  # the statistics of this batch alone
    with torch.no_grad():
        network.train()(images)
    for norm, momentum in zip(norms, momenta, strict=True):
        norm.momentum = momentum
    network.eval()


@contextmanager
def hooked(modules: list[Any], hook: Any) -> Iterator[None]:
    """Run hook(index, module, inputs, output) after each of the modules, inside a with block."""
    handles = [
        module.register_forward_hook(
            lambda module, inputs, output, index=index: hook(index, module, inputs, output)
        )
        for index, module in enumerate(modules)
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
