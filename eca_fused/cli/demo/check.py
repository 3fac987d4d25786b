"""Checks that the fused network computes what the plain one does, and sets the tolerances.

Both are compared with float64, with the same weights and input. The allowed error is that of plain
PyTorch in the same dtype, plus a floor for rounding that no implementation can avoid. For single
layers, each fed the same map, the floor follows from the number formats. Through the whole network
rounding grows from block to block, so there the floor is measured: move every gate of the plain
network by one unit in the last place, up or down at random, and take twice the change, because
plain and fused may each be one unit off.
"""

import copy
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from eca_fused.cli.common.accuracy import error
from eca_fused.cli.common.comparison import Comparison, compare_layer
from eca_fused.cli.common.networks import hooked
from eca_fused.cli.demo.comparison import Check, TopFive
from eca_fused.cli.demo.network import eca_layers, moved_gates, outputs
from eca_fused.models import ResNet

__all__ = ["check", "check_layers", "check_network"]

SEED = 1


def check_layers(plain: ResNet, fused: ResNet, x: Tensor) -> list[Comparison]:
    """Every ECA layer, on its map in the plain network; returns the worst of each stage.

    Args:
        plain, fused: the network with its ECA in either form.
        x: (N, 3, H, W), of the dtype of the networks.
    """
    # Copies, because a layer called inside its own hook would run the hook again.
    twins = [
        (stage, copy.deepcopy(layer), fused_layer)
        for (stage, layer), (_, fused_layer) in zip(
            eca_layers(plain), eca_layers(fused), strict=True
        )
    ]
    worst: dict[tuple[str, str], Comparison] = {}

    def compare(index: int, module: nn.Module, inputs: tuple[Tensor], output: Tensor) -> None:
        stage, plain_layer, fused_layer = twins[index]
        for found in compare_layer(f"stage {stage}", plain_layer, fused_layer, inputs[0]):
            key = found.place, found.quantity
            if key not in worst or found.used > worst[key].used:
                worst[key] = found

    with hooked([layer for _, layer in eca_layers(plain)], compare), torch.no_grad():
        plain(x)
    return list(worst.values())


def check_network(
    plain: ResNet, fused: ResNet, x: Tensor, names: Sequence[str]
) -> tuple[list[Comparison], list[TopFive]]:
    """The output of every stage, the logits, and the five best classes of each photograph.

    Args:
        plain, fused: the network with its ECA in either form.
        x: (N, 3, H, W), of the dtype of the networks, in which the photographs alternate.
        names: of the photographs.
    """
    distinct = min(len(names), x.shape[0])
    repeat = torch.arange(x.shape[0], device=x.device) % distinct
    exact = outputs(copy.deepcopy(plain).double(), x[:distinct].double())
    usual, ours = outputs(plain, x), outputs(fused, x)
    with moved_gates(plain, SEED):
        moved = outputs(plain, x)
    stages = []
    for i, target in enumerate(exact):
        scale = float(target.abs().max()) or 1.0
        stages.append(
            Comparison(
                "logits" if i == len(exact) - 1 else f"stage {i + 1}",
                "output",
                scale,
                plain=error([usual[i]], target[repeat]) / scale,
                fused=error([ours[i]], target[repeat]) / scale,
                floor=2 * error([moved[i]], usual[i].double()) / scale,
            )
        )
    near = 2 * stages[-1].floor * stages[-1].scale
    top5 = [top_five(names[i], usual[-1][i], ours[-1][i], near) for i in range(distinct)]
    return stages, top5


def top_five(name: str, plain: Tensor, fused: Tensor, near: float) -> TopFive:
    """The best classes by two vectors of logits (classes,); logits within `near` are a near-tie."""
    usual, ours = (logits.double().topk(min(5, len(logits))).indices for logits in (plain, fused))
    gap = float((plain.double()[usual] - plain.double()[ours]).abs().max())
    return TopFive(name, usual.tolist(), ours.tolist(), gap, near)


def check(plain: ResNet, fused: ResNet, x: Tensor, names: Sequence[str]) -> Check:
    """check_layers() and check_network() together."""
    stages, top5 = check_network(plain, fused, x, names)
    return Check(check_layers(plain, fused, x), stages, top5)
