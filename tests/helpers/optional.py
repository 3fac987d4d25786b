"""Packages that not every environment has."""

from typing import Any

import pytest

timm_eca: Any
timm_layers: Any
try:
    import timm.layers as timm_layers
    from timm.layers import eca as timm_eca
except Exception:  # a torchvision that does not fit torch fails with a RuntimeError
    timm_eca = timm_layers = None
needs_timm = pytest.mark.skipif(
    timm_eca is None, reason="needs timm, and a torchvision that fits torch: make test"
)

torchvision_ops: Any
try:
    from torchvision import ops as torchvision_ops
except Exception:
    torchvision_ops = None
needs_torchvision = pytest.mark.skipif(
    torchvision_ops is None, reason="needs a torchvision that fits torch: make test"
)
