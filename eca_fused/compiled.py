"""What backend="auto" takes on the CPU under torch.compile: a backend like native.py.

Inference is in plain operations, so that the compiler fuses the rescaling with the addition and the
ReLU that follow it; training is in the kernels. Compiled blocks (1x1 convolution, batch norm, ECA,
addition, ReLU) of ResNet-50's four stages, batch 4, both layouts, take in plain operations 0.84 to
0.96 times as long as with the kernels in inference, but 0.97 to 1.20 times with the backward pass
(medians of interleaved rounds, 2 busy cores of an EPYC server, PyTorch 2.15). A layer that is
compiled alone has nothing to fuse with, and is faster with backend="native".
"""

from torch import Tensor

from eca_fused import decomposed
from eca_fused.checks import check
from eca_fused.layout import output_strides
from eca_fused.native import backward, forward

__all__ = ["backward", "forward", "inference", "inference_"]


def inference(x: Tensor, weight: Tensor, circular: bool = False) -> Tensor:
    """y in the memory format that the kernels give it."""
    check(x, weight, "circular" if circular else "zeros")  # plain operations would broadcast
    y = decomposed.eca(x, weight, circular)
    strides = output_strides(x)
    return y if y.stride() == strides else x.new_empty_strided(x.shape, strides).copy_(y)


def inference_(x: Tensor, weight: Tensor, circular: bool = False) -> None:
    """y written over x."""
    x.copy_(decomposed.eca(x, weight, circular))
