"""Attention after an activation: what it computes besides the passes over maps.

    y = gate * z,  z = act(norm(x)),  the gate from the means of z

RegNet, MobileNetV3 and EfficientNet have this in the middle of their blocks. Tensors and options
are those of a tail without an identity, see ops/tail.py. This file has the whole in plain
operations.
"""

from torch import Tensor

from eca_fused.ops import checks, graph, tail
from eca_fused.ops.tail import TailOptions, TailTensors

__all__ = ["ACTIVATIONS", "activation_number", "plain", "plain_mean"]

ACTIVATIONS = (*checks.ACTIVATIONS, "hardswish")  # their order is that of csrc/eca.h


def activation_number(o: TailOptions) -> int:
    return ACTIVATIONS.index(o.activation)


def _activated(t: TailTensors, o: TailOptions, with_batch: bool) -> Tensor:
    """z, not in half precision."""
    wide = t._replace(x=graph.widened(t.x), weight=None, gate=None)
    return tail.plain(wide, o, with_batch)


def plain(t: TailTensors, o: TailOptions, with_batch: bool = True) -> Tensor:
    """y in differentiable operations that round once, like x. Args as for tail.plain()."""
    z = _activated(t, o, with_batch)
    if t.weight is not None:
        gate = graph.gate(graph.mean(z), t.weight, o.circular)
    else:
        assert t.gate is not None, "taps or gates"
        gate = t.gate.to(z.dtype)
    return (z * graph.spread(gate, z)).to(t.x.dtype)


def plain_mean(t: TailTensors, o: TailOptions, with_batch: bool = True) -> Tensor:
    """The mean of z over each plane, (N, C) like x, in differentiable operations."""
    return graph.mean(_activated(t, o, with_batch)).to(t.x.dtype)
