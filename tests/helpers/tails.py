"""What the tests of residual tails share: arguments, and comparisons with plain PyTorch."""

import copy
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import eca_fused
from eca_fused import reference
from eca_fused.attention.residual_tail import by_calling
from helpers.cases import BACKENDS, DEVICE, in_layout, normal

# The marks of files about ResidualTail.
MODULES_OF_TAILS = [
    pytest.mark.every_torch,
    pytest.mark.any_device,
    pytest.mark.skipif(
        BACKENDS == ["triton"],
        reason="minutes in Triton's interpreter; test_triton_tails.py has its tails",
    ),
]


@dataclass
class TailCase:
    """Arguments of residual_tail() and the gradient of its result; None for absent ones."""

    x: Tensor  # (N, C, *spatial)
    identity: Tensor | None  # (N, C, *spatial)
    weight: Tensor | None  # (1 or C, 1, k)
    gate: Tensor | None  # (N, C)
    scale: Tensor | None  # (N,)
    dy: Tensor  # (N, C, *spatial)
    activation: str = "relu"
    padding_mode: str = "zeros"

    def tensors(self) -> list[Tensor]:
        return [
            t for t in (self.x, self.identity, self.weight, self.gate, self.scale) if t is not None
        ]


def make_tail(
    shape: tuple[int, ...],
    dtype: torch.dtype = torch.float64,
    layout: str = "contiguous",
    gate: str = "taps",
    with_identity: bool = True,
    with_scale: bool = False,
    activation: str = "relu",
    padding_mode: str = "zeros",
    own_taps: bool = False,
    seed: int = 0,
) -> TailCase:
    g = torch.Generator().manual_seed(seed)

    def a_map() -> Tensor:
        means = normal(shape[:2] + (1,) * (len(shape) - 2), g)
        return in_layout((normal(shape, g) + means).to(dtype), layout).to(DEVICE)

    taps = normal((shape[1] if own_taps else 1, 1, 3), g).to(dtype).to(DEVICE)
    gates = normal(shape[:2], g).sigmoid().to(dtype).to(DEVICE)
    scales = normal(shape[:1], g).exp().to(dtype).to(DEVICE)
    return TailCase(
        a_map(),
        a_map() if with_identity else None,
        taps if gate == "taps" else None,
        gates if gate == "given" else None,
        scales if with_scale else None,
        a_map(),
        activation,
        padding_mode,
    )


def run_tail(function: Any, case: TailCase, dtype: torch.dtype | None = None) -> list[Tensor]:
    """y and the gradients of all tensors of a case, in another dtype if given."""
    given = {}
    for name in ("x", "identity", "weight", "gate", "scale"):
        t = getattr(case, name)
        given[name] = None if t is None else t.detach().to(dtype or t.dtype).requires_grad_()
    y = function(
        given["x"],
        given["identity"],
        given["weight"],
        gate=given["gate"],
        scale=given["scale"],
        activation=case.activation,
        padding_mode=case.padding_mode,
    )
    asked = [t for t in given.values() if t is not None]
    return [y.detach(), *torch.autograd.grad(y, asked, case.dy.to(y.dtype))]


def fused(backend: str = "auto") -> Any:
    return lambda *args, **options: eca_fused.residual_tail(*args, backend=backend, **options)


plain = reference.residual_tail


# ---- modules ----


def called(tail: eca_fused.ResidualTail, x: Tensor, identity: Tensor | None = None) -> Tensor:
    """What calling the modules of a tail gives."""
    return by_calling(tail.parts(), x, identity)


def batch_norm(channels: int, **options: Any) -> nn.Module:
    """A batch norm with parameters and running statistics that are not the initial ones."""
    kind = options.pop("kind", nn.BatchNorm2d)
    bn = kind(channels, **options)
    if bn.affine:
        nn.init.normal_(bn.weight)
        nn.init.normal_(bn.bias)
    if bn.track_running_stats:
        nn.init.normal_(bn.running_mean)
        nn.init.uniform_(bn.running_var, 0.5, 2)
    return bn


def unregistered(bn: Any) -> None:
    """Make a norm's weight a plain attribute, as replicas of nn.DataParallel have it."""
    weight = bn.weight.detach() * 2
    del bn.weight
    bn.weight = weight


def assert_same_state(module: nn.Module, twin: nn.Module, exported: bool = False) -> None:
    """All parameters and buffers are those of the twin.

    Args:
        module: any module.
        twin: another one with the same names.
        exported: the module is a program, which may lack what it does not use.
    """
    found, want = module.state_dict(), twin.state_dict()
    assert found.keys() <= want.keys() if exported else found.keys() == want.keys()
    for name, value in found.items():
        torch.testing.assert_close(value, want[name], msg=lambda m, n=name: f"{n}: {m}")


def assert_same_step(
    tail: nn.Module, *maps: Tensor, twin: nn.Module | None = None, by: Any = called
) -> None:
    """y, all gradients and all buffers are those of a copy whose modules are called, in float64.

    Args:
        tail: a ResidualTail, or another module that calls modules.
        maps: its arguments.
        twin: the copy, if it is not one of tail as it is.
        by: a function of the copy and the maps that calls the modules.
    """
    twin = copy.deepcopy(tail) if twin is None else twin
    results = []
    for function, module in ((tail, tail), (lambda *a: by(twin, *a), twin)):
        own = [m.detach().clone(memory_format=torch.preserve_format) for m in maps]
        given = [m.requires_grad_() for m in own]
        torch.manual_seed(1)
        y = function(*given)
        dy = torch.randn(y.shape, dtype=y.dtype, device=y.device)
        asked = [*given, *(p for p in module.parameters() if p.requires_grad)]
        found = torch.autograd.grad(y, asked, dy, allow_unused=True)
        names = [f"map {i}" for i in range(len(maps))]
        names += [name for name, p in module.named_parameters() if p.requires_grad]
        results.append(
            {"y": y.detach()}
            | dict(zip(names, found, strict=True))
            | {f"buffer {name}": b.clone() for name, b in module.named_buffers()}
        )
    ours, theirs = results
    assert ours.keys() == theirs.keys()
    for name, want in theirs.items():
        if want is None:
            assert ours[name] is None or not ours[name].any(), name
        else:
            torch.testing.assert_close(ours[name], want, msg=lambda m, n=name: f"{n}: {m}")
