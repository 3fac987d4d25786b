"""The processes of a run, one or many under torchrun, and spreading the network over them."""

import inspect
import os
import sys
from dataclasses import dataclass
from typing import Any, NoReturn

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from eca_fused.models import BasicBlock

from .options import UsageError

__all__ = ["Processes", "average_statistics", "launched", "leave", "spread", "start", "stop"]


@dataclass(frozen=True)
class Processes:
    """This process among those of the run.

    Attributes:
        rank, world: its number, and the number of processes.
        device: of the network and its input.
    """

    rank: int
    world: int
    device: torch.device

    @property
    def first(self) -> bool:
        """Whether this is the process that prints and writes files."""
        return self.rank == 0

    def sum(self, values: Tensor) -> Tensor:
        """Sum values over all processes, in place."""
        if self.world > 1:
            dist.all_reduce(values)
        return values

    def agree(self, value: Any) -> Any:
        """The first process's value, in all processes."""
        values = [value]
        if self.world > 1:
            dist.broadcast_object_list(values)
        return values[0]

    def wait(self) -> None:
        """Wait until all processes are here."""
        if self.world > 1:
            dist.barrier()


def launched() -> bool:
    """Whether torchrun, or a launcher that sets the same variables, started this process."""
    return "WORLD_SIZE" in os.environ


def start() -> Processes:
    """Join the other processes, by NCCL if each has a GPU, by gloo on CPUs.

    Raises:
        UsageError: there are GPUs, but fewer than processes on this machine.
    """
    cuda = torch.cuda.is_available()
    if not launched():
        return Processes(0, 1, torch.device("cuda" if cuda else "cpu"))
    local = int(os.environ.get("LOCAL_RANK", "0"))
    if cuda and int(os.environ.get("LOCAL_WORLD_SIZE", "1")) > torch.cuda.device_count():
        raise UsageError(
            f"expected at most one process for each of {torch.cuda.device_count()} GPUs, got "
            f"{os.environ['LOCAL_WORLD_SIZE']}; lower --nproc-per-node, or hide the GPUs with "
            "CUDA_VISIBLE_DEVICES="
        )
    device = torch.device("cuda", local) if cuda else torch.device("cpu")
    if cuda:
        torch.cuda.set_device(device)
        dist.init_process_group("cpu:gloo,cuda:nccl", device_id=device)
    else:
        dist.init_process_group("gloo")
    return Processes(dist.get_rank(), dist.get_world_size(), device)


def stop() -> None:
    """Leave the other processes."""
    if dist.is_initialized():
        dist.destroy_process_group()


def leave(status: int) -> NoReturn:
    """End this process, with this exit status."""
    if launched():
        # Under FSDP2 gloo's threads outlive the process group. A thread that releases the tensor of
        # a last collective needs the interpreter, and aborts the process if that has ended.
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)
    sys.exit(status)


def spread(model: nn.Module, kind: str, processes: Processes) -> nn.Module:
    """The network spread over all processes; unchanged if there is only one process.

    Args:
        model: with the same weights in every process, on its device.
        kind: "ddp" or "fsdp".
        processes: this process among the others.
    """
    if not dist.is_initialized():
        return model
    if kind == "ddp":
        # average_statistics() averages the batch norms' statistics when they are used. torch 2.15
        # renamed the argument and warns about the old name.
        names = inspect.signature(DistributedDataParallel).parameters
        new, old = "forward_sync_buffers", "broadcast_buffers"
        off: dict[str, Any] = {new if new in names else old: False}
        return DistributedDataParallel(model, gradient_as_bucket_view=True, **off)
    mesh = init_device_mesh(processes.device.type, (processes.world,))
    # A block is gathered while it runs, together with its taps, which are far too small for a
    # collective of their own.
    for module in model.modules():
        if isinstance(module, BasicBlock):
            fully_shard(module, mesh=mesh)
    fully_shard(model, mesh=mesh)
    return model


def average_statistics(model: nn.Module, processes: Processes) -> None:
    """Give the batch norms of all processes the mean of their running statistics.

    Each process sees its own part of the batch. Running statistics are linear in the batches'
    statistics, so averaging when they are used or saved gives the same as after every step.
    """
    if processes.world == 1:
        return
    running = [b for b in model.buffers() if b.is_floating_point()]
    flat = torch.cat([b.reshape(-1) for b in running])
    flat = processes.sum(flat) / processes.world
    means = torch.split(flat, [b.numel() for b in running])
    for buffer, mean in zip(running, means, strict=True):
        buffer.copy_(mean.view_as(buffer))
