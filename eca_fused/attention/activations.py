"""Which modules are activations that kernels have."""

from torch import nn

from eca_fused.torch_state import does_more

__all__ = ["activation_name"]

MODULES: dict[type[nn.Module], str] = {
    nn.Identity: "none",
    nn.ReLU: "relu",
    nn.SiLU: "silu",
    nn.GELU: "gelu",
    nn.Hardswish: "hardswish",
}


def activation_name(activation: nn.Module | str) -> str | None:
    """One of ops.gating.ACTIVATIONS; None if a call of the module does anything else."""
    if isinstance(activation, str):
        return activation
    name = MODULES.get(type(activation))
    approximate = getattr(activation, "approximate", "none") != "none"
    return None if name is None or does_more(activation) or approximate else name
