"""Times the ECA layer of each stage on its own maps, and the whole network."""

import copy
import itertools
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from eca_fused.cli.common.measure import Contender, interleave, reason, rotation
from eca_fused.cli.demo.network import last_eca_layers, layer_inputs
from eca_fused.models import ResNet
from eca_fused.torch_state import forget_compiled

__all__ = ["Case", "Effort", "layer_cases", "network_cases"]

FORWARD, BOTH = "forward", "forward + backward"
INFERENCE, TRAINING = "inference", "training step"
CASES = 10  # four layers in two directions, and the network in two

LEFT_OUT = "left out by --quick"
TOO_LONG = "left out, because compiling it takes longer than everything else"
NETWORK_SHARE = 3  # the network's time for rounds, as a multiple of a layer's

Step = Callable[[str], None]  # told what comes next


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


def layer_cases(
    plain: ResNet, fused: ResNet, x: Tensor, effort: Effort, say: Step
) -> Iterator[Case]:
    """The last ECA layer of each stage, first forward, then forward and backward.

    Args:
        plain, fused: the network with its ECA in either form.
        x: (N, 3, H, W); the layers are timed on the maps of this input.
        effort: how long to measure.
        say: told what comes next.
    """
    maps = layer_inputs(plain, x)
    pairs = zip(last_eca_layers(plain), last_eca_layers(fused), maps, strict=True)
    for stage, (plain_layer, fused_layer, map_) in enumerate(pairs, 1):
        for pass_ in (FORWARD, BOTH):
            say(f"stage {stage}, {pass_}")
            yield layer_case(f"stage {stage}", pass_, plain_layer, fused_layer, map_, effort)


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

    contenders = [Contender("plain", lambda: use(plain)), Contender("fused", lambda: use(fused))]
    if pass_ == FORWARD:
        contenders.append(Contender("copy", lambda: results.append(next(turn).clone())))
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
    ideal = (2 if pass_ == FORWARD else 5) * x.numel() * x.element_size()
    return Case(place, pass_, tuple(x.shape), ideal, {c.name: c for c in contenders}, others)


def network_cases(
    plain: ResNet, fused: ResNet, x: Tensor, effort: Effort, say: Step
) -> Iterator[Case]:
    """The whole network: inference, and a training step without the optimiser.

    Args as for layer_cases().
    """
    say("network, inference" + (", compiling twice" if effort.compile_network else ""))

    def infer(network: nn.Module) -> None:
        with torch.no_grad():
            network(x)

    contenders = [
        Contender("plain", lambda: infer(plain)),
        Contender("fused", lambda: infer(fused)),
    ]
    forget_compiled()
    for name, network in (("compiled", plain), ("fused, compiled", fused)):
        if effort.compile_network:
            contenders.append(attempt(name, network, infer))
        else:
            contenders.append(Contender(name, None, LEFT_OUT))
    yield network_case(INFERENCE, contenders, x, effort)

    say("network, training step")
    labels = torch.arange(x.shape[0], device=x.device) % 2

    def train(network: nn.Module) -> None:
        loss = F.cross_entropy(network(x).float(), labels)
        torch.autograd.grad(loss, list(network.parameters()))

    learner, fused_learner = copy.deepcopy(plain).train(), copy.deepcopy(fused).train()
    contenders = [
        Contender("plain", lambda: train(learner)),
        Contender("fused", lambda: train(fused_learner)),
        *(Contender(name, None, TOO_LONG) for name in ("compiled", "fused, compiled")),
    ]
    yield network_case(TRAINING, contenders, x, effort)


def network_case(pass_: str, contenders: list[Contender], x: Tensor, effort: Effort) -> Case:
    # A call of the network takes as long as hundreds of calls of a layer.
    budget_s = NETWORK_SHARE * effort.budget_s
    others = interleave(contenders, x.device, budget_s=budget_s, rounds=effort.rounds)
    return Case("network", pass_, tuple(x.shape), None, {c.name: c for c in contenders}, others)
