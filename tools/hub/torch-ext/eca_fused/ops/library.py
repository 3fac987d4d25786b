"""The library of the kernels on the Hub: importing _ops loads it, in a namespace of this build.

kernel-builder writes _ops.py. The names here are those of eca_fused/ops/library.py, whose place
this file takes.
"""

from pathlib import Path

from .._ops import add_op_namespace_prefix as qualified, ops as operators

__all__ = ["LIBRARY", "NAMESPACE", "load", "operators", "qualified"]

LIBRARY = Path(__file__).parents[1] / "_ops.py"
NAMESPACE = qualified("").removesuffix("::")


def load() -> None:
    """Nothing: the library is loaded."""
