"""Formulas for torch.utils.flop_counter: the floating point operations of the operators.

By the counter's convention only convolutions and matrix products count, 2 for each multiplication
with its addition. In ECA that is the convolution over channels: 2 N C k forward, and as many again
for each of the two gradients, of its input and of the taps. Plain PyTorch counts the same. Sums,
sigmoids and products with the gates (2 per element of x forward) do not count, so pool() and
rescale() have no formula.
"""

import gc
import importlib.util
import sys
from collections.abc import Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

from eca_fused.ops.library import operators

__all__ = ["register"]

MODULE = "torch.utils.flop_counter"

Shape = Sequence[int]


def _forward(x: Shape, weight: Shape, *_: Any, **__: Any) -> int:
    return 2 * x[0] * x[1] * weight[2]


def _backward(
    dy: Shape,
    x: Shape,
    weight: Shape,
    mean: Shape,
    gate: Shape,
    circular: bool = False,
    need_dx: bool = True,
    need_dweight: bool = True,
    **_: Any,
) -> int:
    return _forward(x, weight) * (need_dx + need_dweight)


FORMULAS = {
    "forward": _forward,
    "inference": _forward,
    "inference_": _forward,
    "inference_into": _forward,
    "backward": _backward,
}


def register(prefix: str) -> None:
    """Register the formulas of the operators <prefix>* as soon as the counter is imported.

    Importing the counter imports Triton. That takes 0.24 s, five times as long as importing
    eca_fused after torch, so this waits until other code imports the counter.
    """
    formulas = {prefix + name: formula for name, formula in FORMULAS.items()}
    # The operators that those in writing.py call.
    formulas |= {f"_{prefix}{name}": FORMULAS[name] for name in ("inference_", "inference_into")}
    by_operator = {getattr(operators, name): f for name, f in formulas.items()}
    if MODULE in sys.modules:
        _add(sys.modules[MODULE], by_operator)
    else:
        sys.meta_path.insert(0, _WhenImported(by_operator))


def _add(flop_counter: ModuleType, formulas: dict[Any, Any]) -> None:
    for operator, formula in formulas.items():
        flop_counter.register_flop_formula(operator)(formula)
    # A counter copies the formulas when it is created, so update those that already exist.
    for counter in gc.get_referrers(flop_counter.FlopCounterMode):
        if isinstance(counter, flop_counter.FlopCounterMode):
            counter.flop_registry.update({o: flop_counter.flop_registry[o] for o in formulas})


class _WhenImported(MetaPathFinder):
    """Adds formulas to the counter's module as soon as it is imported."""

    def __init__(self, formulas: dict[Any, Any]) -> None:
        self.formulas = formulas

    def find_spec(self, name: str, path: Any, target: Any = None) -> ModuleSpec | None:
        if name != MODULE:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)  # by the other finders
        if spec is None or spec.loader is None:
            return spec
        execute = spec.loader.exec_module

        def exec_module(module: ModuleType) -> None:
            execute(module)
            _add(module, self.formulas)

        spec.loader.exec_module = exec_module  # type: ignore[method-assign]
        return spec
