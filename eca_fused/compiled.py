"""What backend="auto" takes on the CPU under torch.compile: a backend like native.py.

Plain operations, so that the compiler fuses the rescaling with the addition and the ReLU that
follow; but with gradients and the channels innermost, the kernels. A training step of ResNet-50 and
MobileNetV2, compiled as a whole, batch 4, takes in plain operations 0.93 to 0.97 times as long on
contiguous maps, and 0.99 to 1.08 times on channels_last ones (medians of interleaved rounds,
float32, and ResNet-50 under bfloat16 autocast; 2 cores of an EPYC server with AVX-512, PyTorch
2.15). A layer that is compiled alone has nothing to fuse with, and is faster with backend="native".
"""

from torch import Tensor

from eca_fused import decomposed
from eca_fused.checks import check
from eca_fused.layout import output_strides
from eca_fused.native import backward, forward

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
