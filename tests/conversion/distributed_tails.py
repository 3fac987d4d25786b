"""What two processes check of convert(tails=True) under DDP and FSDP2; test_tail_processes.py
starts them.

Each check trains two forms of a network side by side: converted and as it was, spread over the
processes in the same way. Each process has images of its own. The name of a check that passed is
printed.
"""

import copy
import datetime
import inspect
import os
import sys
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from eca_fused import attention, convert
from eca_fused.attention import norm_act, residual_tail
from helpers.residual_blocks import Block, Middle, distance, everywhere_something, with_downsample
from helpers.sync_batch_norm import allow_on_cpu

STEPS = 4
OPERATIONS = 5  # of the network in one forward: four tails and a middle
Spread = Callable[[nn.Module], nn.Module]


def network() -> Any:
    """Blocks with and without a shortcut's norm, with SE, and with attention in the middle."""
    return everywhere_something(
        nn.Sequential(
            nn.Conv2d(3, 8, 3, padding=1),
            Block(),
            with_downsample(),
            Block(attention.SE(8, 4)),
            Middle(),
            nn.AdaptiveAvgPool2d(1),
            nn.Flatten(),
            nn.Linear(8, 5),
        )
    )


# ---- ways to spread a network ----


def ddp(**options: Any) -> Spread:
    return lambda model: DistributedDataParallel(model, **options)


def own_statistics() -> dict[str, bool]:
    """The option of DDP with which each process keeps its running statistics."""
    names = inspect.signature(DistributedDataParallel).parameters
    new = "forward_sync_buffers"  # from torch 2.15 on, which warns about the old name
    return {new if new in names else "broadcast_buffers": False}


def blocks(model: Any) -> list[Any]:
    return [module for module in model if isinstance(module, Block | Middle)]


def fsdp(inner: Callable[[Any], list[Any]] = lambda model: [], **options: Any) -> Spread:
    """Shard some inner modules first, then each block, then the rest."""

    def spread(model: nn.Module) -> nn.Module:
        mesh = init_device_mesh("cpu", (dist.get_world_size(),))
        for module in (*inner(model), *blocks(model), model):
            fully_shard(module, mesh=mesh, **options)
        return model

    return spread


def fsdp_of_the_root(model: nn.Module) -> nn.Module:
    fully_shard(model, mesh=init_device_mesh("cpu", (dist.get_world_size(),)))
    return model


def ddp_synchronised(model: nn.Module) -> nn.Module:
    """DDP with SyncBatchNorm, which PyTorch has for GPUs only: here with sums on the CPU."""
    allow_on_cpu()
    unchecked: Any = DistributedDataParallel
    unchecked._passing_sync_batchnorm_handle = lambda *_: None
    return DistributedDataParallel(nn.SyncBatchNorm.convert_sync_batchnorm(model))


# ---- the comparison ----


class Check(NamedTuple):
    """How a network is spread.

    Args:
        spread: spreads it.
        operations: how many parts of blocks one forward computes by kernels, and not by calling
            their modules.
        late: convert the network after it was spread.
        own: whether each process keeps running statistics of its own images.
        compiled: compile the converted network, where operations are not counted.
    """

    spread: Spread
    operations: int = OPERATIONS
    late: bool = False
    own: bool = True
    compiled: bool = False


CHECKS: dict[str, Check] = {
    "DDP": Check(ddp(), own=False),
    "DDP, own statistics": Check(ddp(**own_statistics())),
    "DDP, static graph": Check(ddp(static_graph=True), own=False),
    "DDP, gradients in buckets": Check(ddp(gradient_as_bucket_view=True), own=False),
    "DDP, then converted": Check(ddp(**own_statistics()), late=True),
    "DDP, compiled": Check(ddp(), own=False, compiled=True),
    "FSDP2": Check(fsdp()),
    "FSDP2, gathered until the backward pass": Check(fsdp(reshard_after_forward=False)),
    "FSDP2 of the root": Check(fsdp_of_the_root),
    "FSDP2 of the root, then converted": Check(fsdp_of_the_root, 1, late=True),
    "FSDP2, then converted": Check(fsdp(), 0, late=True),
    "FSDP2, compiled": Check(fsdp(), compiled=True),
    # What a tail would not call must be called where it is sharded by itself.
    "FSDP2 of norms": Check(fsdp(lambda m: [m[1].bn2, m[4].bn1]), OPERATIONS - 2),
    "FSDP2 of a shortcut's norm": Check(fsdp(lambda m: [m[2].downsample[1]]), OPERATIONS - 1),
    "FSDP2 of a shortcut": Check(fsdp(lambda m: [m[2].downsample]), OPERATIONS - 1),
    "FSDP2 of two norms together": Check(fsdp(lambda m: [[m[1].bn1, m[1].bn2]]), OPERATIONS - 1),
    "FSDP2 of attention": Check(fsdp(lambda m: [m[1].eca, m[3].eca, m[4].eca]), OPERATIONS - 3),
    "FSDP2 of taps": Check(fsdp(lambda m: [m[1].eca.conv, m[4].eca.conv]), OPERATIONS - 2),
    # A tail calls the network that makes its gates.
    "FSDP2 of a gate's network": Check(fsdp(lambda m: [m[3].eca.fc])),
    "FSDP2 of an activation": Check(fsdp(lambda m: [m[1].relu]), OPERATIONS - 1),
    # Last, because they change what PyTorch does on the CPU.
    "DDP, SyncBatchNorm": Check(ddp_synchronised, own=False),
    "DDP, SyncBatchNorm, then converted": Check(ddp_synchronised, own=False, late=True),
}


def whole(t: Any) -> Tensor:
    return t.full_tensor() if hasattr(t, "full_tensor") else t  # type: ignore[no-any-return]


class Training:
    """A network in training by SGD."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model.train()
        self.optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)

    def step(self, x: Tensor) -> dict[str, list[Tensor]]:
        """What a step gives, then y in evaluation."""
        self.optimizer.zero_grad()
        y = self.model.train()(x)
        y.square().mean().backward()
        gradients = [whole(p.grad).clone() for p in self.model.parameters()]
        self.optimizer.step()
        with torch.no_grad():
            evaluated = self.model.eval()(x)
        return {
            "outputs": [y.detach(), evaluated],
            "gradients": gradients,
            "parameters": [whole(p).detach().clone() for p in self.model.parameters()],
            "statistics": [b.clone() for b in self.model.buffers()],
        }


class Counted:
    """Counts the parts of blocks that are one operation."""

    def __init__(self) -> None:
        self.number = 0
        for module in (residual_tail, norm_act):
            module._compute = self.counting(module._compute)  # type: ignore[attr-defined]

    def counting(self, compute: Any) -> Any:
        def count(*arguments: Any) -> Tensor:
            self.number += 1
            return compute(*arguments)  # type: ignore[no-any-return]

        return count


def over_processes(tensors: list[Tensor]) -> Iterator[float]:
    """The largest difference of each tensor between the processes."""
    for t in tensors:
        rows = [torch.empty_like(t) for _ in range(dist.get_world_size())]
        dist.all_gather(rows, t.contiguous())
        yield float((rows[0] - rows[1]).abs().max())


def run(check: Check, counted: Counted) -> None:
    plain = network()
    model = copy.deepcopy(plain)
    if not check.late:
        assert len(convert(model, tails=True).tails) == len(blocks(model))
    if check.compiled:  # before it is spread, as examples/train.py does
        model.compile(backend="aot_eager", dynamic=False)
    model = check.spread(model)
    if check.late:
        convert(model, tails=True)
    ours, theirs = Training(model), Training(check.spread(plain))
    generator = torch.Generator().manual_seed(dist.get_rank())
    for _ in range(STEPS):
        x = torch.randn(3, 3, 8, 8, dtype=torch.float64, generator=generator) + dist.get_rank()
        before = counted.number
        found = ours.step(x)
        if not check.compiled:  # in training and in evaluation
            assert counted.number - before == 2 * check.operations, counted.number - before
        before = counted.number
        want = theirs.step(x)
        assert counted.number == before
        for name, tensors in want.items():
            assert distance(found[name], tensors) < 1e-9, name
    # The processes had different images, and shared what they share.
    assert max(over_processes(found["outputs"])) > 1e-2
    assert not any(over_processes(found["gradients"]))
    assert not any(over_processes(found["parameters"]))
    assert (max(over_processes(found["statistics"])) > 1e-2) is check.own


if __name__ == "__main__":
    rank, store = int(sys.argv[1]), sys.argv[2]
    limit = datetime.timedelta(seconds=60)
    dist.init_process_group(
        "gloo", init_method=f"file://{store}", rank=rank, world_size=2, timeout=limit
    )
    counted = Counted()
    for name, check in CHECKS.items():
        if len(sys.argv) == 3 or name in sys.argv[3:]:
            try:
                run(check, counted)
            except Exception as error:
                raise AssertionError(f"{name} failed") from error
            print("passed", name, flush=True)
    dist.barrier()
    # gloo's threads outlive the process group. One that releases the tensor of a last collective
    # needs the interpreter, and aborts the process if that has ended.
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)
