"""The number of taps of ECA, by the authors' rule."""

import math

from eca_fused.ops.checks import check_channels

__all__ = ["adaptive_kernel_size"]


def adaptive_kernel_size(channels: int, gamma: float = 2, beta: float = 1) -> int:
    """Adaptive kernel size, k = |log2(C) / gamma + beta / gamma| to the nearest odd, at least 3.

    Wang et al., "ECA-Net" (CVPR 2020), equation 12, rounded as in the authors' code: the value is
    truncated, and an even value gets one added.

    Args:
        channels: number of channels C, from 1 up.
        gamma, beta: slope and offset of the rule.

    Returns:
        k, odd; 3 for 64 channels, 5 for 128 to 1024, 7 for 2048.

    Raises:
        TypeError: channels is not an int.
        ValueError: channels is less than 1, or gamma is zero.
    """
    check_channels(channels)
    if not (math.isfinite(gamma) and math.isfinite(beta)) or gamma == 0:
        raise ValueError(
            f"expected finite gamma and beta, gamma other than zero, got {gamma} and {beta}; "
            "the paper has 2 and 1"
        )
    t = int(abs(math.log2(channels) + beta) / gamma)
    return max(t if t % 2 else t + 1, 3)
