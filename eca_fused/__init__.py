"""Efficient Channel Attention (ECA) as one fused operation, forward and backward.

>>> import torch, eca_fused
>>> layer = eca_fused.ECALayer(channels=256)
>>> layer(torch.randn(8, 256, 56, 56)).shape
torch.Size([8, 256, 56, 56])
"""

from eca_fused import reference
from eca_fused._version import __version__
from eca_fused.backend import Backend, backends, use_backend
from eca_fused.checkpoints import CheckpointError, load_checkpoint
from eca_fused.conversion import Conversion, convert, revert
from eca_fused.functional import ECAFunction, eca, eca_
from eca_fused.layers import ECALayer, kernel_size
from eca_fused.planning import Plan, plan
from eca_fused.pool_rescale import pool, rescale

__all__ = [
    "Backend",
    "CheckpointError",
    "Conversion",
    "ECAFunction",
    "ECALayer",
    "Plan",
    "__version__",
    "backends",
    "convert",
    "eca",
    "eca_",
    "kernel_size",
    "load_checkpoint",
    "plan",
    "pool",
    "reference",
    "rescale",
    "revert",
    "use_backend",
]
