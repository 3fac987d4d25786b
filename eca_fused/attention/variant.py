"""timm's variants of ECA. Pooling and rescaling are fused; the gates are plain PyTorch."""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from eca_fused.attention.base import ChannelAttention
from eca_fused.ops.checks import check_kernel_size, is_circular
from eca_fused.ops.graph import padded
from eca_fused.ops.taps import adaptive_kernel_size

__all__ = ["ECAVariant"]

GATES: dict[str, type[nn.Module]] = {"sigmoid": nn.Sigmoid, "hard_sigmoid": nn.Hardsigmoid}


class ECAVariant(ChannelAttention):
    """ECA with another gate, or with an MLP before its convolution, for comparison.

    Weights of timm's EcaModule with the same options load with strict=True. For the sigmoid alone
    use ECALayer, which is one fused operation.

    Args:
        channels: C, from 1 up.
        kernel_size: k, odd, from 1 up; None for adaptive_kernel_size().
        gate_layer: "sigmoid", "hard_sigmoid", or a callable that makes a module with values from 0
            to 1.
        use_mlp: put a convolution to rd_channels and an activation before the convolution over
            channels; both convolutions have biases.
        act_layer: makes that activation; used only with use_mlp.
        rd_channels: of the MLP; None for C / 8 to the nearest multiple of 8, as in timm.
        padding_mode: "zeros", or "circular" (cECA); only "zeros" with use_mlp.
        fused, backend: see ChannelAttention.
        device, dtype: of the parameters.

    Shape, raises: as for ChannelAttention; also ValueError for an unknown gate_layer,
        rd_channels < 1, or use_mlp with circular padding.
    """

    def __init__(
        self,
        channels: int,
        kernel_size: int | None = None,
        *,
        gate_layer: str | Callable[[], nn.Module] = "sigmoid",
        use_mlp: bool = False,
        act_layer: Callable[[], nn.Module] = nn.ReLU,
        rd_channels: int | None = None,
        padding_mode: str = "zeros",
        fused: bool = True,
        backend: str = "auto",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(channels, fused=fused, backend=backend)
        k = adaptive_kernel_size(channels) if kernel_size is None else kernel_size
        check_kernel_size(k)
        circular = is_circular(padding_mode)
        if isinstance(gate_layer, str) and gate_layer not in GATES:
            raise ValueError(
                f"expected gate_layer as one of {', '.join(GATES)} or a module's class, "
                f"got {gate_layer!r}"
            )
        if use_mlp and circular:
            raise ValueError("expected padding_mode 'zeros' with use_mlp, got 'circular'")
        self.padding_mode = padding_mode
        self.act: nn.Module | None = None
        self.conv2: nn.Conv1d | None = None
        if use_mlp:
            hidden = _near_eighth(channels) if rd_channels is None else rd_channels
            if hidden < 1:
                raise ValueError(f"expected rd_channels from 1 up, got {hidden}")
            self.conv = nn.Conv1d(1, hidden, 1, device=device, dtype=dtype)
            self.act = act_layer()
            self.conv2 = nn.Conv1d(hidden, 1, k, padding=k // 2, device=device, dtype=dtype)
        else:
            self.conv = nn.Conv1d(1, 1, k, bias=False, device=device, dtype=dtype)
        self.nonlinearity = GATES[gate_layer]() if isinstance(gate_layer, str) else gate_layer()

    def gate(self, mean: Tensor) -> Tensor:
        if self.conv2 is None or self.act is None:
            r = self.conv.kernel_size[0] // 2
            around = padded(mean, r, is_circular(self.padding_mode))
            rows = self.conv(around.unsqueeze(1)).squeeze(1)
        else:
            rows = self.conv2(self.act(self.conv(mean.unsqueeze(1)))).squeeze(1)
        return self.nonlinearity(rows)  # type: ignore[no-any-return]


def _near_eighth(channels: int) -> int:
    """channels / 8 to the nearest multiple of 8, never below nine tenths of it: timm's rule."""
    value = channels / 8
    rounded = max(8, int(value + 4) // 8 * 8)
    return rounded + 8 if rounded < 0.9 * value else rounded
