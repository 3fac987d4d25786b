"""Batch norms as the fused parts of a block compute them: without calling the module."""

from typing import Any

import torch
from torch import Tensor, nn

from eca_fused.functional.tails import Tails
from eca_fused.ops.results import sums_dtype
from eca_fused.ops.tail import Moments, Norm, Running
from eca_fused.torch_state import (
    does_more,
    gather_over_processes,
    overrides_torch,
    own_buffers,
    own_parameters,
    processes_of,
    submodules,
)

__all__ = ["ABSENT", "activation_of", "as_norm", "fits", "full_name", "named_reason", "not_plain"]

# With the numbers of dimensions of their maps.
KINDS: dict[type[nn.Module], tuple[int, ...]] = {
    nn.BatchNorm1d: (2, 3),
    nn.BatchNorm2d: (4,),
    nn.BatchNorm3d: (5,),
    nn.SyncBatchNorm: (2, 3, 4, 5),
}
# Batch norms that go on with two modules, by name, so that timm need not be installed.
WITH_MORE: dict[str, tuple[int, ...]] = {"timm.layers.norm_act.BatchNormAct2d": (4,)}
MORE = ("drop", "act")


# What as_norm() would return without a norm.
ABSENT = Norm(None, None, None, None, 0.0)


def full_name(module: object) -> str:
    return f"{type(module).__module__}.{type(module).__qualname__}"


def _dimensions(bn: nn.Module) -> tuple[int, ...]:
    """The numbers of dimensions of a batch norm's maps; none for other modules."""
    return KINDS.get(type(bn)) or WITH_MORE.get(full_name(bn), ())


def activation_of(bn: nn.Module | None) -> nn.Module | None:
    """The activation that a batch norm goes on with; None for none."""
    if bn is None or full_name(bn) not in WITH_MORE:
        return None
    found = submodules(bn).get("act")
    return None if type(found) is nn.Identity else found


def not_plain(bn: nn.Module, activated: bool = False) -> str | None:
    """Why a batch norm must be called; None if its parameters and buffers say what it does.

    Args:
        bn: the norm.
        activated: it may go on with an activation, which activation_of() tells.
    """
    name = type(bn).__name__
    if not _dimensions(bn):
        return f"{name} is not one of PyTorch's batch norms"
    if does_more(bn):
        return f"{name} has hooks, or a forward of its own"
    if type(bn) not in KINDS:
        for part in MORE:
            more = submodules(bn).get(part)
            if part == "act" and activated and activation_of(bn) is not None:
                continue
            if type(more) is not nn.Identity or does_more(more):
                return f"{name} goes on with {type(more).__name__}"
    parameters, buffers = own_parameters(bn), own_buffers(bn)
    if not (
        "weight" in parameters
        and "bias" in parameters
        and "running_mean" in buffers
        and "running_var" in buffers
    ):
        return f"{name} has tensors that are not registered, as in a replica of nn.DataParallel"
    for parameter in parameters.values():
        if (
            parameter is not None
            and type(parameter) is not nn.Parameter
            and (hasattr(parameter, "__tensor_flatten__") or overrides_torch(parameter))
        ):
            return f"{name} has parameters of the class {type(parameter).__name__}"
    return None


def named_reason(name: str, bn: nn.Module | None, activated: bool = False) -> str | None:
    """not_plain() of a part with this name; None without the part."""
    reason = None if bn is None else not_plain(bn, activated)
    return None if reason is None else f"{name}: {reason}"


def fits(bn: Any, x: Tensor | None) -> bool:
    """Whether a batch norm takes x, so that its module need not be called. True without either."""
    if bn is None or x is None:
        return True
    if x.dim() not in _dimensions(bn) or x.shape[1] != bn.num_features:
        return False
    device, dtype = x.device, x.dtype
    other = torch.float32 if x.element_size() == 2 else dtype
    for t in (*own_parameters(bn).values(), *_running(bn)):
        if t is not None and (t.device != device or (t.dtype != dtype and t.dtype != other)):
            return False
    return True


def _running(bn: Any) -> tuple[Tensor | None, Tensor | None]:
    """The running statistics; a module's getattr() takes ten times as long as its dictionary."""
    found = own_buffers(bn)
    return found.get("running_mean"), found.get("running_var")


def as_norm(bn: Any, x: Tensor, way: Tails) -> Norm:
    """A batch norm for a call with x; updates its running statistics as the module's forward does.

    Args:
        bn: a batch norm for which not_plain() gives no reason, and which fits().
        x: (N, C, *spatial).
        way: computes the statistics.

    Raises:
        ValueError: there is one value for each channel, as the module's forward does.
    """
    parameters = own_parameters(bn)
    weight, bias = parameters.get("weight"), parameters.get("bias")
    mean, variance = _running(bn)
    if not (bn.training or (mean is None and variance is None)):
        assert mean is not None, "batch norm has both or neither"
        assert variance is not None, "likewise"
        if torch.is_grad_enabled():  # the backward pass must not see a later update
            mean, variance = mean.clone(), variance.clone()
        return Norm(weight, bias, mean, variance, bn.eps)
    group = processes_of(bn) if type(bn) is nn.SyncBatchNorm and bn.training else None
    if group is None and x.numel() == x.shape[1]:
        raise ValueError(
            f"Expected more than 1 value per channel when training, got input size {x.shape}"
        )
    running = None
    if bn.training and bn.track_running_stats and group is None and way.updates(x):
        running = _writable(mean, variance, bn)
    found = way.moments(x, running)
    if group is not None:
        found = _over_processes(found, group, x, bn.eps)
    if bn.training and bn.track_running_stats:
        _update(bn, found, running is not None)
    return Norm(weight, bias, found.mean, found.variance, bn.eps, found.values, group, found.planes)


def _over_processes(own: Moments, group: Any, x: Tensor, eps: float) -> Moments:
    """The statistics of all processes of a group, each with as many values as it has.

    They exchange what torch.nn.SyncBatchNorm does, because another process may call that: after an
    empty batch, or with a hook. Merged by the formula of Chan, Golub and LeVeque (1979).
    """
    wide = own.variance.dtype
    spread = torch.rsqrt(own.variance + eps)
    count = own.mean.new_tensor([float(own.values)])
    sent = torch.cat([own.mean, spread, count]).to(sums_dtype(x))
    rows = gather_over_processes(sent, group).to(wide)
    channels = own.mean.shape[0]
    means, spreads, counts = rows[:, :channels], rows[:, channels:-1], rows[:, -1:]
    total = counts.sum()
    weights = counts / total
    # A process without values sends zeros.
    variances = torch.where(counts > 0, spreads.square().reciprocal() - eps, 0.0)
    mean = (weights * means).sum(0)
    variance = (weights * (variances + (means - mean).square())).sum(0).clamp_min(0)
    return Moments(own.planes, mean, variance, total)


def _factor(bn: Any) -> float:
    """By how much the next batch changes the running statistics."""
    factor = bn.momentum
    if factor is None and bn.num_batches_tracked is not None:
        factor = 1.0 / (float(bn.num_batches_tracked) + 1.0)
    return 0.0 if factor is None else float(factor)


def _writable(mean: Tensor | None, variance: Tensor | None, bn: Any) -> Running | None:
    """The running statistics, if a kernel can write them."""
    for t in (mean, variance):
        if type(t) is not Tensor or not t.is_contiguous() or t.is_inference():
            return None
    return Running(mean, variance, _factor(bn))  # type: ignore[arg-type]


@torch.no_grad()
def _update(bn: Any, found: Moments, written: bool) -> None:
    """Update the running statistics as _BatchNorm.forward does.

    Args:
        bn: the norm.
        found: the statistics of the batch.
        written: a kernel has done so, but for the number of batches.
    """
    if not written:
        factor = _factor(bn)
        unbiased = found.variance * (found.values / (found.values - 1))
        for running, new in ((bn.running_mean, found.mean), (bn.running_var, unbiased)):
            if running is not None:
                running.mul_(1 - factor).add_(new.to(running.dtype), alpha=factor)
    if bn.num_batches_tracked is not None:
        bn.num_batches_tracked.add_(1)
