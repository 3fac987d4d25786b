"""The ways on Triton's kernels. A separate module, because importing it imports Triton."""

from eca_fused.functional.ways import Ways
from eca_fused.ops import triton

TRITON = Ways(triton)
