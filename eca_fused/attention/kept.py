"""Operations on a block's modules, whose plan is kept from call to call.

To look at modules, their tensors and their hooks takes longer than a pass over a small map, because
convolutions in between drive Python's objects out of the caches.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Generic, TypeVar
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from eca_fused.functional.tails import InferenceCall
from eca_fused.torch_state import Snapshot

__all__ = ["Kept", "cannot_be_scripted", "kept_for"]

Parts = TypeVar("Parts", bound=tuple[Any, ...])


@dataclass
class _Made:
    """A plan, and what it was made from."""

    plan: Any
    seen: Snapshot | None = None  # None if the plan is not kept
    call: InferenceCall | None = None  # that follows from the last call


class Kept(Generic[Parts]):
    """An operation on modules, from maps to a map. Its plan holds as long as they are as they were.

    Args:
        parts: the modules, and other values.
    """

    def __init__(self, parts: Parts) -> None:
        self.parts = parts
        self.made = _Made("not yet made")

    def plan(self) -> Any:
        """How the parts are one operation; a str that says why they are not."""
        raise NotImplementedError

    def compute(self, plan: Any, *maps: Any) -> tuple[Tensor, InferenceCall | None]:
        """y, and the call that gives it for other maps; None if that may differ."""
        raise NotImplementedError

    def __call__(self, *maps: Any) -> Tensor:
        made = self.made  # another thread may exchange it
        if made.seen is None or not made.seen.holds():
            made = self.made = self._make()
        call = made.call
        if call is not None and not torch.is_grad_enabled():
            y = call(*maps)
            if y is not None:
                return y
        y, made.call = self.compute(made.plan, *maps)
        return y

    def _make(self) -> _Made:
        plan = self.plan()
        if isinstance(plan, str):
            return _Made(plan)
        parts = [part for part in self.parts if isinstance(part, nn.Module)]
        return _Made(plan, Snapshot(module for part in parts for module in part.modules()))


_kept: WeakKeyDictionary[nn.Module, Kept[Any]] = WeakKeyDictionary()


def kept_for(block: nn.Module, parts: Parts, make: Callable[[Parts], Kept[Parts]]) -> Kept[Parts]:
    """The operation on a block's parts, which is forgotten with the block."""
    kept = _kept.get(block)
    if kept is None or kept.parts != parts:
        kept = _kept[block] = make(parts)
    return kept


def cannot_be_scripted(module: nn.Module) -> None:
    """What torch.jit.script gets of a module whose plan is no TorchScript.

    Raises:
        RuntimeError: always.
    """
    raise RuntimeError(
        f"expected a model without {type(module).__name__}; call its modules one after the other, "
        "or call torch.jit.trace instead"
    )
