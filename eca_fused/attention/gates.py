"""Gate networks of other projects' squeeze and excitation modules, as functions of the means.

Their forward pools, makes gates and rescales. The tail of a block pools and rescales itself, and
calls the parts in between, so hooks on these parts go on working.
"""

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from eca_fused.attention.norms import full_name
from eca_fused.torch_state import does_more

__all__ = ["NETWORKS", "gate_network"]

GateOf = Callable[[Tensor], Tensor]


def _timm_se(module: Any, mean: Tensor) -> Tensor:
    return module.gate(module.fc2(module.act(module.bn(module.fc1(mean)))))  # type: ignore[no-any-return]


def _timm_effective_se(module: Any, mean: Tensor) -> Tensor:
    return module.gate(module.fc(mean))  # type: ignore[no-any-return]


def _timm_efficientnet_se(module: Any, mean: Tensor) -> Tensor:
    inner = module.act1(module.conv_reduce(mean))
    return module.gate(module.conv_expand(inner))  # type: ignore[no-any-return]


def _torchvision_se(module: Any, mean: Tensor) -> Tensor:
    inner = module.activation(module.fc1(mean))
    return module.scale_activation(module.fc2(inner))  # type: ignore[no-any-return]


# By class, so that neither project need be installed. Each takes means (N, C, 1, 1).
NETWORKS: dict[str, Callable[[Any, Tensor], Tensor]] = {
    "timm.layers.squeeze_excite.SEModule": _timm_se,
    "timm.layers.squeeze_excite.EffectiveSEModule": _timm_effective_se,
    "timm.models._efficientnet_blocks.SqueezeExcite": _timm_efficientnet_se,
    "torchvision.ops.misc.SqueezeExcitation": _torchvision_se,
}


def gate_network(module: nn.Module) -> GateOf | str:
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
