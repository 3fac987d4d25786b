"""Efficient Channel Attention (ECA) as one fused operation, forward and backward.

>>> import torch, eca_fused
>>> layer = eca_fused.ECALayer(channels=256)
>>> layer(torch.randn(8, 256, 56, 56)).shape
torch.Size([8, 256, 56, 56])
"""

import signal
import sys

if (
    (sys.argv[:1] == ["-m"] and "eca_fused" in sys.orig_argv)
    or (sys.argv and sys.argv[0].endswith("/eca-fused"))
) and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
    # Interrupting the program while it imports torch shows no traceback.
    signal.signal(signal.SIGINT, signal.SIG_DFL)

from eca_fused import reference
from eca_fused._version import __version__
from eca_fused.attention.norm_act import NormActAttention
from eca_fused.attention.residual_tail import ResidualTail
from eca_fused.conversion import CheckpointError, Conversion, convert, load_checkpoint, revert
from eca_fused.functional import ECAFunction, eca, eca_, pool, rescale, residual_tail
from eca_fused.layer import ECALayer
from eca_fused.ops.backend import Backend, backends, use_backend
from eca_fused.ops.cuda_plan import Plan, plan
from eca_fused.ops.taps import adaptive_kernel_size

kernel_size = adaptive_kernel_size  # its former name

__all__ = [
    "Backend",
    "CheckpointError",
    "Conversion",
    "ECAFunction",
    "ECALayer",
    "NormActAttention",
    "Plan",
    "ResidualTail",
    "__version__",
    "adaptive_kernel_size",
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
    "residual_tail",
    "revert",
    "use_backend",
]
