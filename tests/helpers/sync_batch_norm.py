"""torch.nn.SyncBatchNorm on the CPU, so that two processes without GPUs can compare with it.

PyTorch has its arithmetic for GPUs only. The exchanges between processes stay PyTorch's own.
"""

import torch
from torch import Tensor


def _over(t: Tensor) -> list[int]:
    return [0, *range(2, t.dim())]


def _as_map(values: Tensor, t: Tensor) -> Tensor:
    return values.view(-1, *[1] * (t.dim() - 2))


def _stats(x: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    variance, mean = torch.var_mean(x, _over(x), correction=0)
    return mean, torch.rsqrt(variance + eps)


def _merge(x, means, spreads, running_mean, running_var, momentum, eps, counts):
    counts = counts.view(-1, 1)
    n = counts.sum()
    mean = (counts * means).sum(0) / n
    variance = (counts * (spreads**-2 - eps + (means - mean) ** 2)).sum(0) / n
    if running_mean is not None:
        running_mean.lerp_(mean, momentum)
        running_var.lerp_(variance * n / (n - 1), momentum)
    return mean, torch.rsqrt(variance + eps)


def _normalise(x, weight, bias, mean, spread, eps):
    y = (x - _as_map(mean, x)) * _as_map(spread * weight, x)
    return y + _as_map(bias, x)


def _sums(dy, x, mean, spread, weight, *needed):
    sums = dy.sum(_over(dy))
    products = (dy * (x - _as_map(mean, x))).sum(_over(dy))
    return sums, products, products * spread, sums


def _gradient(dy, x, mean, spread, weight, sums, products, counts):
    n = counts.sum()
    by_x = _as_map(products * spread**2 / n, x) * (x - _as_map(mean, x))
    return (dy - _as_map(sums / n, x) - by_x) * _as_map(spread * weight, x)


def allow_on_cpu() -> None:
    """Let this process call torch.nn.SyncBatchNorm with maps on the CPU, from now on."""
    torch.batch_norm_stats = _stats
    torch.batch_norm_gather_stats_with_counts = _merge
    torch.batch_norm_elemt = _normalise
    torch.batch_norm_backward_reduce = _sums
    torch.batch_norm_backward_elemt = _gradient
    # The module takes maps of this kind of device too.
    torch._C._get_privateuse1_backend_name = lambda: "cpu"
