"""Exported programs: what they call, and what ONNX makes of them."""

from typing import Any

import pytest
import torch

try:
    import onnxruntime
    import onnxscript  # noqa: F401  # torch.onnx.export needs it
except ImportError:
    onnxruntime = None
needs_onnx = pytest.mark.skipif(
    onnxruntime is None, reason="needs onnx, onnxscript and onnxruntime: make test"
)


def called(graph_module: Any) -> set[Any]:
    """The operators that a graph and the graphs inside it call."""
    modules = [m for m in graph_module.modules() if isinstance(m, torch.fx.GraphModule)]
    return {n.target for m in modules for n in m.graph.nodes if n.op == "call_function"}


def own_operators(program: Any) -> set[str]:
    """The names of this package's operators in an exported program."""
    names = map(str, called(program.graph_module))
    return {name.split(".")[1] for name in names if name.startswith("eca_fused.")}


def onnx_session(program: Any) -> Any:
    """An inference session, once the graph is known to have standard operators alone."""
    model = program.model_proto
    assert {node.domain for node in model.graph.node} <= {"", "ai.onnx"}
    assert not model.functions
    assert [o.domain for o in model.opset_import if o.domain not in ("", "ai.onnx")] == []
    return onnxruntime.InferenceSession(model.SerializeToString())
