"""ECALayer, the drop-in module."""

import torch
from torch import Tensor, nn

from eca_fused.functional import eca, eca_, plain
from eca_fused.functional.convolution import by_calling, plain_taps
from eca_fused.ops.backend import check_backend
from eca_fused.ops.checks import check_kernel_size, is_circular
from eca_fused.ops.taps import adaptive_kernel_size
from eca_fused.torch_state import child, is_scripting

__all__ = ["ECALayer"]


class ECALayer(nn.Module):
    """Efficient channel attention: y = sigmoid(conv1d over channels of mean(x)) * x.

    Drop-in replacement for the authors' eca_layer and timm's EcaModule and CecaModule: their
    weights, under `conv.weight` of shape (1, 1, k), load with strict=True. The formula is that of
    Wang et al., "ECA-Net" (CVPR 2020).

    Args:
        channels: number of channels, from which adaptive_kernel_size() derives k.
        kernel_size: k, odd, from 1 up; takes precedence over channels. With neither, k = 3.
        gamma, beta: constants of the rule for k.
        padding_mode: "zeros", or "circular" to wrap around at the first and last channel (cECA).
        fused: False computes in plain PyTorch, with the same parameters.
        backend: "auto", "native", "triton" or "reference", see eca().
        inplace: write the result over x, for inference; an error if a gradient would need x.
        device, dtype: of the taps, which may stay in float32 for a half precision x.

    Shape:
        x (N, C, *spatial), 0 to 3 spatial dimensions; the same shape, dtype and memory format out.

    Raises:
        TypeError: channels or kernel_size is not an int.
        ValueError: channels < 1, an even or non-positive kernel_size, an unknown padding mode.
    """

    # With fused=False as a constant, TorchScript leaves out the compiled operators.
    __constants__ = ("fused", "overwrites")
    # The name of the submodule with the taps. convert() keeps the name that a module already has.
    taps_name = "conv"

    def __init__(
        self,
        channels: int | None = None,
        kernel_size: int | None = None,
        *,
        gamma: float = 2,
        beta: float = 1,
        padding_mode: str = "zeros",
        fused: bool = True,
        backend: str = "auto",
        inplace: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        adaptive = None if channels is None else adaptive_kernel_size(channels, gamma, beta)
        k = kernel_size if kernel_size is not None else adaptive or 3
        check_kernel_size(k)
        is_circular(padding_mode)  # raises for others
        check_backend(backend)
        self.padding_mode = padding_mode
        self.fused = fused
        self.backend = backend
        # Not called inplace: frameworks set that to True, for ReLUs, on every module that has it.
        self.overwrites = inplace
        # The kernels take its weight. It is called only if it does more, for example has hooks.
        self.conv = nn.Conv1d(1, 1, k, padding=k // 2, bias=False, device=device, dtype=dtype)

    def forward(self, x: Tensor) -> Tensor:
        # TorchScript compiles this and cannot choose a function first and call it later.
        if is_scripting():
            weight = self.conv.weight
        else:
            conv = child(self, self.taps_name)
            taps = plain_taps(conv, False, True)
            if taps is None:
                backend = self.backend if self.fused else "reference"
                return by_calling(x, conv, self.padding_mode, backend, self.overwrites)
            weight = taps
        if not self.fused:
            return plain(x, weight, self.padding_mode, self.overwrites)
        if self.overwrites:
            return eca_(x, weight, padding_mode=self.padding_mode, backend=self.backend)
        return eca(x, weight, padding_mode=self.padding_mode, backend=self.backend)

    def __prepare_scriptable__(self) -> nn.Module:
        """Called by torch.jit.script, which would use `conv.weight` alone and ignore the rest.

        It returns no other module to compile, because torch would put that into the model.
        """
        if self.taps_name != "conv" or plain_taps(self.conv, False, True) is None:
            raise RuntimeError(
                f"expected a convolution without hooks, bias or dilation, named conv, got "
                f"{self.taps_name}, {child(self, self.taps_name)}; call torch.jit.trace instead, "
                "or eca_fused.revert() before torch.jit.script"
            )
        return self

    def extra_repr(self) -> str:
        k = child(self, self.taps_name).kernel_size[0]
        return (
            f"kernel_size={k}, padding_mode={self.padding_mode!r}, "
            f"fused={self.fused}, backend={self.backend!r}, inplace={self.overwrites}"
        )
