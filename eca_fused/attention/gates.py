"""The gates of attention modules: their taps, or their networks as functions of the means.

A module's forward pools, makes gates and rescales. The fused parts of a block pool and rescale
themselves, and call what lies in between, so hooks on that go on working.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

from torch import Tensor, nn

from eca_fused.attention.base import BandAttention, ChannelAttention
from eca_fused.attention.norms import full_name
from eca_fused.functional import under_autocast
from eca_fused.functional.convolution import plain_taps
from eca_fused.functional.tails import GateOf
from eca_fused.layer import ECALayer
from eca_fused.ops.checks import check, is_circular
from eca_fused.ops.graph import padded
from eca_fused.torch_state import child, does_more

__all__ = ["NETWORKS", "Gate", "gate_of"]


def _timm_se(module: Any, mean: Tensor) -> Tensor:
    return module.gate(module.fc2(module.act(module.bn(module.fc1(mean)))))  # type: ignore[no-any-return]


def _timm_effective_se(module: Any, mean: Tensor) -> Tensor:
    return module.gate(module.fc(mean))  # type: ignore[no-any-return]


def _timm_efficientnet_se(module: Any, mean: Tensor) -> Tensor:
    inner = module.act1(module.conv_reduce(mean))
    return module.gate(module.conv_expand(inner))  # type: ignore[no-any-return]


def _timm_eca(module: Any, mean: Tensor) -> Tensor:
    rows = mean.flatten(2).transpose(1, 2)
    if module.conv2 is not None:
        rows = module.act(module.conv(rows))
    last = module.conv if module.conv2 is None else module.conv2
    return module.gate(last(rows)).view_as(mean)  # type: ignore[no-any-return]


def _timm_circular_eca(module: Any, mean: Tensor) -> Tensor:
    around = padded(mean.flatten(1), module.padding, circular=True)
    return module.gate(module.conv(around.unsqueeze(1))).view_as(mean)  # type: ignore[no-any-return]


def _torchvision_se(module: Any, mean: Tensor) -> Tensor:
    inner = module.activation(module.fc1(mean))
    return module.scale_activation(module.fc2(inner))  # type: ignore[no-any-return]


# By class, so that neither project need be installed. Each takes means (N, C, 1, 1). Those of ECA
# are for what no ECALayer computes: a hard sigmoid, or an MLP before the convolution.
NETWORKS: dict[str, Callable[[Any, Tensor], Tensor]] = {
    "timm.layers.eca.EcaModule": _timm_eca,
    "timm.layers.eca.CecaModule": _timm_circular_eca,
    "timm.layers.squeeze_excite.SEModule": _timm_se,
    "timm.layers.squeeze_excite.EffectiveSEModule": _timm_effective_se,
    "timm.models._efficientnet_blocks.SqueezeExcite": _timm_efficientnet_se,
    "torchvision.ops.misc.SqueezeExcitation": _torchvision_se,
}


def _gate_network(module: nn.Module) -> GateOf | str:
    """The gates (N, C) of a module as a function of the means (N, C); or why there is none."""
    network = NETWORKS.get(full_name(module))
    if network is None:
        return f"{type(module).__name__} is not a module whose gates are known"
    if getattr(module, "add_maxpool", False):
        return f"{type(module).__name__} pools the maximum too"
    pool = getattr(module, "avgpool", None)
    if isinstance(pool, nn.Module) and (type(pool) is not nn.AdaptiveAvgPool2d or does_more(pool)):
        return f"the pooling of {type(module).__name__} does more than average"
    found = network  # not None, also in the function below

    def gates(mean: Tensor) -> Tensor:
        return found(module, mean[:, :, None, None]).flatten(1)

    return gates


class Gate(NamedTuple):
    """Where the gates of a block come from: taps, or a network; neither for a gate of 1."""

    taps: Callable[[], Tensor] | None = None
    circular: bool = False
    network: GateOf | None = None
    backend: str = "auto"

    def taps_for(self, x: Tensor) -> Tensor | None:
        """The taps for a map, in its dtype under autocast; None without taps.

        Call it before a norm updates its running statistics.

        Raises:
            TypeError: the taps have a dtype that x cannot be computed with.
        """
        if self.taps is None:
            return None
        taps = self.taps()
        if taps.dtype != x.dtype:
            taps = under_autocast(x, taps)
            check(x, taps, self.circular)
        return taps


def gate_of(attention: nn.Module | None) -> Gate | str:
    """The gate of an attention module, or why the module must be called."""
    if attention is None or (type(attention) is nn.Identity and not does_more(attention)):
        return Gate()
    name = type(attention).__name__
    if does_more(attention):
        return f"{name} has hooks, or a forward of its own"
    ours = isinstance(attention, ECALayer | ChannelAttention)
    if ours and (not attention.fused or attention.backend == "reference"):
        return f"{name} is not fused"
    if type(attention) is ECALayer:
        taps = plain_taps(child(attention, attention.taps_name), False, True)
        if taps is None:
            return "the convolution of ECALayer does more than apply its taps"
        return Gate(lambda: taps, is_circular(attention.padding_mode), None, attention.backend)
    if isinstance(attention, BandAttention) and type(attention).forward is BandAttention.forward:
        if attention.has_taps():
            circular = is_circular(attention.padding_mode)
            return Gate(attention.taps, circular, None, attention.backend)
    elif not (
        isinstance(attention, ChannelAttention)
        and type(attention).forward is ChannelAttention.forward
    ):
        network = _gate_network(attention)
        if isinstance(network, str):
            return network
        return Gate(network=network)
    return Gate(network=attention.gate, backend=attention.backend)
