"""Autograd behaviour of the operators that write into a tensor, for direct calls of them.

Autograd treats an unknown operator as one without a gradient. It would let a leaf that requires
grad be overwritten, keep a stale tangent, and leave the version counter alone, so that a backward
pass would use overwritten values unnoticed. eca_() and eca(out=) handle all of this themselves, in
less time.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from eca_fused.ops import fakes
from eca_fused.ops.checks import check_tensor, check_writable
from eca_fused.ops.library import NAMESPACE, qualified
from eca_fused.torch_state import has_tangent

__all__ = ["define", "register"]

Operator = Callable[..., None]
_libraries: list[torch.library.Library] = []  # a registration lasts as long as its library


def _check(name: str, target: Tensor, tensors: dict[str, Tensor]) -> None:
    for argument, t in tensors.items():
        check_tensor(argument, t)
    if target.is_neg():
        raise RuntimeError(
            f"expected {name} to be writable, got a negated view, which no operator can write; "
            f"pass {name}.resolve_neg()"
        )
    check_writable(name, target)
    if any(map(has_tangent, tensors.values())):
        raise RuntimeError(
            "this operator has no forward-mode derivative; call eca_fused.eca(), which has one"
        )
    if torch.is_grad_enabled() and any(t.requires_grad for t in tensors.values()):
        raise RuntimeError(
            "this operator has no gradient, and one is needed for x, the taps or the output; "
            "call it in torch.no_grad(), or call eca_fused.eca()"
        )


def _written(target: Tensor) -> None:
    if not target.is_inference():
        torch.autograd.graph.increment_version(target)


def register(prefix: str, over: Operator, into: Operator) -> None:
    """Make the operators <prefix>inference_ and <prefix>inference_into behave like ATen's.

    Args:
        prefix: of the operators, which must exist.
        over, into: the operators they call; these do not check or count writes.
    """

    def inference_(x: Tensor, weight: Tensor, circular: bool = False) -> None:
        _check("x", x, {"x": x, "weight": weight})
        over(x, weight, circular)
        _written(x)

    def inference_into(x: Tensor, weight: Tensor, out: Tensor, circular: bool = False) -> None:
        _check("out", out, {"x": x, "weight": weight, "out": out})
        into(x, weight, out, circular)
        _written(out)

    library: Any = torch.library.Library(NAMESPACE, "FRAGMENT")  # type: ignore[no-untyped-call]
    # Inference mode and inference tensors skip the Autograd key.
    for key in ("Autograd", "ADInplaceOrView", "Negative"):
        library.impl(prefix + "inference_", inference_, key)
        library.impl(prefix + "inference_into", inference_into, key)
    _libraries.append(library)


def define(prefix: str, over: Operator, into: Operator) -> None:
    """Define the operators, then register() them. Args as for register()."""
    library: Any = torch.library.Library(NAMESPACE, "FRAGMENT")  # type: ignore[no-untyped-call]
    library.define(f"{prefix}inference_(Tensor(a!) x, Tensor weight, bool circular=False) -> ()")
    into_schema = "(Tensor x, Tensor weight, Tensor(a!) out, bool circular=False) -> ()"
    library.define(f"{prefix}inference_into{into_schema}")
    library.impl(prefix + "inference_", over, "CompositeExplicitAutograd")
    library.impl(prefix + "inference_into", into, "CompositeExplicitAutograd")
    _libraries.append(library)
    for name, fake in (("inference_", fakes.inference_), ("inference_into", fakes.inference_into)):
        torch.library.register_fake(qualified(prefix + name))(fake)
    register(prefix, over, into)
