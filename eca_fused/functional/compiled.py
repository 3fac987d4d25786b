"""What backend="auto" takes on the CPU under torch.compile: a backend like native.py.

Plain operations, so that the compiler fuses the rescaling with the addition and the ReLU that
follow; but with gradients and the channels innermost, the kernels. Compiled as a whole, ResNet-50
and MobileNetV2 took, in units of their time without attention, for inference 0.98 to 1.05 so and
1.05 to 1.11 with the kernels, for a training step on contiguous maps 1.03 to 1.05 so and 1.07 to
1.09 with the kernels, and on channels_last ones 1.00 to 1.02 so and 1.06 with plain ECA (batch 4,
float32; benchmarks/results/cpu-networks.json). A layer that is compiled alone has nothing to fuse
with, and is faster with backend="native".
"""

from torch import Tensor

from eca_fused.ops import graph as decomposed
from eca_fused.ops.checks import check
from eca_fused.ops.native import backward, forward
from eca_fused.ops.results import output_strides

__all__ = ["backward", "forward", "inference", "inference_", "trains_in_kernels"]


def trains_in_kernels(x: Tensor) -> bool:
    """Whether forward() and backward() are for x, or inference() with its own gradient."""
    return x.dim() > 1 and x.stride(1) == 1


def inference(x: Tensor, weight: Tensor, circular: bool = False) -> Tensor:
    """y in the memory format that the kernels give it."""
    check(x, weight, "circular" if circular else "zeros")  # plain operations would broadcast
    y = decomposed.eca(x, weight, circular)
    strides = output_strides(x)
    return y if y.stride() == strides else x.new_empty_strided(x.shape, strides).copy_(y)


def inference_(x: Tensor, weight: Tensor, circular: bool = False) -> None:
    """y written over x."""
    x.copy_(decomposed.eca(x, weight, circular))
