"""The library of the kernels: where it is, how it is loaded, and the namespace of its operators.

Only this file has the namespace. Another build can have another one: tools/hub_layout.py puts
tools/hub/torch-ext/eca_fused/ops/library.py in the place of this file.
"""

from pathlib import Path
from typing import Any

import torch

__all__ = ["LIBRARY", "NAMESPACE", "load", "operators", "qualified"]

LIBRARY = Path(__file__).parents[1] / "_kernels.so"
NAMESPACE = "eca_fused"
operators: Any = getattr(torch.ops, NAMESPACE)  # empty until load(), but for those of Triton


def load() -> None:
    """Load the library, which registers its operators.

    Raises:
        OSError: it is missing or does not load.
    """
    torch.ops.load_library(LIBRARY)  # type: ignore[no-untyped-call]


def qualified(name: str) -> str:
    """An operator's name with its namespace, as torch.library takes it."""
    return f"{NAMESPACE}::{name}"
