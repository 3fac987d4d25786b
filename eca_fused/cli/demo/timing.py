"""Times the ECA layer of each stage on its own maps, and the whole network."""

import copy
from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from eca_fused.cli.common.measure import Contender, interleave
from eca_fused.cli.common.timing import (
    BOTH,
    FORWARD,
    LEFT_OUT,
    Case,
    Effort,
    attempt,
    layer_case,
)
from eca_fused.cli.demo.network import last_eca_layers, layer_inputs
from eca_fused.models import ResNet
from eca_fused.torch_state import forget_compiled

__all__ = ["Case", "Effort", "layer_cases", "network_cases"]

INFERENCE, TRAINING = "inference", "training step"
CASES = 10  # four layers in two directions, and the network in two

TOO_LONG = "left out, because compiling it takes longer than everything else"
NETWORK_SHARE = 3  # the network's time for rounds, as a multiple of a layer's

Step = Callable[[str], None]  # told what comes next


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
