"""Packages that not every environment has."""

from typing import Any

import pytest

timm_eca: Any
try:
    from timm.layers import eca as timm_eca
except Exception:  # a torchvision that does not fit torch fails with a RuntimeError
    timm_eca = None
needs_timm = pytest.mark.skipif(
    timm_eca is None, reason="needs timm, and a torchvision that fits torch: make test"
)
