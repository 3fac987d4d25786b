"""Decides which way computes a call."""

from torch import Tensor
from torch.compiler import is_compiling, is_dynamo_compiling

from eca_fused.functional.ways import (
    ForTheCompiler,
    Graph,
    Plain,
    Scripted,
    TracedPlain,
    TracedToONNX,
    Way,
    Ways,
)
from eca_fused.ops import native
from eca_fused.ops.backend import named, select
from eca_fused.torch_state import (
    exporting_to_onnx,
    is_exporting,
    is_tracing,
    tracing_to_onnx,
    transformed,
)

__all__ = ["choose"]

PLAIN, TRACED_PLAIN = Plain(), TracedPlain()
TO_ONNX, TRACED_TO_ONNX = Graph(), TracedToONNX()
NATIVE = Ways(native)
FOR_THE_COMPILER = ForTheCompiler(native)


def choose(x: Tensor, backend: str) -> Way:
    """The way that computes a call for x.

    Raises:
        ValueError: unknown backend.
        RuntimeError: the backend was asked for by name and cannot run for x; says why.
    """
    kernels = select(x, backend)
    if kernels is None:
        return TRACED_PLAIN if is_tracing() else PLAIN
    ways = NATIVE if kernels is NATIVE.kernels else _on_triton()
    if transformed():
        return ways.transformed
    if is_tracing():  # by torch.jit.trace
        return TRACED_TO_ONNX if tracing_to_onnx() else Scripted(named(backend))
    if not is_compiling():
        return ways.fused
    if exporting_to_onnx():
        return TO_ONNX
    auto = named(backend) == "auto" and x.is_cpu
    if auto and is_dynamo_compiling() and not is_exporting():
        return FOR_THE_COMPILER
    return ways.compiling


def _on_triton() -> Ways:
    from eca_fused.functional.on_triton import TRITON

    return TRITON
