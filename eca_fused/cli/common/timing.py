"""Times an ECA layer: plain, fused, compiled, and a copy of as many bytes, interleaved."""

import copy
import itertools
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from eca_fused.cli.common.measure import Contender, interleave, reason, rotation
from eca_fused.torch_state import forget_compiled

__all__ = ["BOTH", "FORWARD", "LEFT_OUT", "RESNET50", "Case", "Effort", "attempt", "layer_case"]

# Channels, height, width and taps behind each stage, with the taps of the authors' checkpoint.
RESNET50 = [(256, 56, 56, 3), (512, 28, 28, 5), (1024, 14, 14, 5), (2048, 7, 7, 7)]
FORWARD, BOTH = "forward", "forward + backward"
LEFT_OUT = "left out by --quick"


@dataclass(frozen=True)
class Effort:
    """How much time a run spends.

    Attributes:
        budget_s: for the rounds of one case, in seconds.
        rounds: the least and the largest number of rounds.
        compile_training: also compile the layers' backward.
        compile_network: also compile the whole network.
    """

    budget_s: float
    rounds: tuple[int, int]
    compile_training: bool
    compile_network: bool


@dataclass(frozen=True)
class Case:
    """A timed case, with its contenders' times.

    Attributes:
        place: "stage 1" to "stage 4", or "network".
        pass_: forward, forward + backward, inference or training step.
        shape: of the input.
        ideal_bytes: the least that an ECA layer must move: x read and y written once, and for the
            backward pass dy and x read and dx written once. None for the network.
        contenders: by name.
        others: share of the processors that other programs took meanwhile, see interleave().
    """

    place: str
    pass_: str
    shape: tuple[int, ...]
    ideal_bytes: int | None
    contenders: dict[str, Contender]
    others: float | None


def attempt(name: str, module: nn.Module, use: Callable[[nn.Module], object]) -> Contender:
    """A contender with a compiled module. It runs once here, because compiling may fail."""
    try:
        fast: Any = torch.compile(copy.deepcopy(module), dynamic=False, fullgraph=True)
        use(fast)
    except Exception as error:  # of many kinds: no compiler, no support for the device or Python
        return Contender(name, None, reason(error))
    return Contender(name, lambda: use(fast))


def copies(x: Tensor) -> int:
    """How many copies of a map to use in turn; one on a CPU, as a network has just written it."""
    if x.device.type != "cuda":
        return 1
    cache = torch.cuda.get_device_properties(x.device).L2_cache_size
    return rotation(2 * x.numel() * x.element_size(), cache, most=64)


def layer_case(
    place: str, pass_: str, plain: nn.Module, fused: nn.Module, x: Tensor, effort: Effort
) -> Case:
    """One layer in one direction, for a map x (N, C, H, W)."""
    maps = [x.detach().clone() for _ in range(copies(x))]
    turn = itertools.cycle(maps)
    results: deque[object] = deque(maxlen=len(maps) - 1)  # outputs rotate as inputs do
    if pass_ == FORWARD:

        def use(layer: nn.Module) -> None:
            with torch.no_grad():
                results.append(layer(next(turn)))
    else:
        dy = torch.randn_like(x)
        for map_ in maps:
            map_.requires_grad_()

        def use(layer: nn.Module) -> None:
            leaf = next(turn)
            y = layer(leaf)
            results.append((y.detach(), torch.autograd.grad(y, (leaf, *layer.parameters()), dy)))

    moved = 2 if pass_ == FORWARD else 5  # x and y; backward dy, x and dx
    sources = itertools.cycle([x.new_ones(moved * x.numel() // 2) for _ in maps])
    contenders = [
        Contender("plain", lambda: use(plain)),
        Contender("fused", lambda: use(fused)),
        Contender("copy", lambda: results.append(next(sources).clone())),
    ]
    forget_compiled()
    if pass_ == FORWARD or effort.compile_training:
        contenders.append(attempt("compiled", plain, use))
    else:
        contenders.append(Contender("compiled", None, LEFT_OUT))
    others = interleave(
        contenders,
        x.device,
        budget_s=effort.budget_s,
        rounds=effort.rounds,
        multiple=len(maps),
    )
    ideal = moved * x.numel() * x.element_size()
    return Case(place, pass_, tuple(x.shape), ideal, {c.name: c for c in contenders}, others)
