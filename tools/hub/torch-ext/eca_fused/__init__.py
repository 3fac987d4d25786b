"""Efficient Channel Attention (ECA) as one fused operation, forward and backward.

>>> from kernels import get_local_kernel
>>> eca_fused = get_local_kernel(Path("eca-fused"))
>>> eca_fused.eca(torch.randn(8, 256, 56, 56), torch.randn(1, 1, 5)).shape
torch.Size([8, 256, 56, 56])
"""

from . import layers, reference
from ._version import __version__
from .attention.norm_act import NormActAttention
from .attention.residual_tail import ResidualTail
from .functional import ECAFunction, eca, eca_, pool, rescale, residual_tail
from .layer import ECALayer
from .ops.backend import Backend, backends, use_backend
from .ops.taps import adaptive_kernel_size

__all__ = [
    "Backend",
    "ECAFunction",
    "ECALayer",
    "NormActAttention",
    "ResidualTail",
    "__version__",
    "adaptive_kernel_size",
    "backends",
    "eca",
    "eca_",
    "layers",
    "pool",
    "reference",
    "rescale",
    "residual_tail",
    "use_backend",
]
