"""What two processes check of fused layers under DDP and FSDP2; test_train.py starts them.

`CUDA_VISIBLE_DEVICES= torchrun --nproc-per-node 2 distributed_checks.py` prints the name of each
check that passed.
"""

import copy
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch._dynamo
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from eca_fused import ECALayer
from eca_fused.models import BasicBlock

sys.path.insert(0, str(Path(__file__).parents[2] / "examples"))

from training import processes

BATCH = 8  # of both processes together


class Unused(nn.Module):
    """An ECA layer behind a convolution, and a layer that no output depends on."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 16, 3)
        self.eca = ECALayer(16)
        self.unused = ECALayer(16)

    def forward(self, x: Tensor) -> Tensor:
        return self.eca(self.conv(x)).mean((2, 3))  # type: ignore[no-any-return]


def network() -> nn.Module:
    """Two blocks in evaluation mode: in training, half a batch has other statistics."""
    down = nn.Sequential(nn.Conv2d(16, 32, 1, 2, bias=False), nn.BatchNorm2d(32))
    return nn.Sequential(
        nn.Conv2d(3, 16, 3, padding=1),
        BasicBlock(16, 16, 1, ECALayer(16)),
        BasicBlock(16, 32, 2, ECALayer(32), down),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(32, 10),
    ).eval()


def check(
    make: Callable[[], nn.Module],
    spread: Callable[[nn.Module], nn.Module],
    layout: torch.memory_format = torch.contiguous_format,
) -> None:
    """A network's gradients over two processes are those of one process with the whole batch."""
    torch.manual_seed(0)
    alone = make().double()
    together = spread(copy.deepcopy(alone))
    rank, world = dist.get_rank(), dist.get_world_size()
    for _ in range(3):  # DDP goes other ways in the first steps of a static graph
        x = torch.randn(BATCH, 3, 16, 16, dtype=torch.float64)
        alone.zero_grad()
        together.zero_grad()
        alone(x).square().mean().backward()
        together(x[rank::world].contiguous(memory_format=layout)).square().mean().backward()
        for a, b in zip(alone.parameters(), together.parameters(), strict=True):
            if a.grad is None:
                assert b.grad is None or not b.grad.any()
                continue
            assert b.grad is not None
            whole: Any = b.grad.full_tensor() if hasattr(b.grad, "full_tensor") else b.grad
            torch.testing.assert_close(whole, a.grad)


def ddp(**options: Any) -> Callable[[nn.Module], nn.Module]:
    return lambda model: DistributedDataParallel(model, **options)


def fsdp(model: nn.Module) -> nn.Module:
    """Shard each block, and each ECA layer by itself: one row of taps for two processes."""
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    for module in model.modules():
        if isinstance(module, ECALayer):
            fully_shard(module, mesh=mesh)
    for module in model.modules():
        if isinstance(module, BasicBlock):
            fully_shard(module, mesh=mesh)
    fully_shard(model, mesh=mesh)
    return model


def compiled(spread: Callable[[nn.Module], nn.Module]) -> Callable[[nn.Module], nn.Module]:
    """Compile before spreading, as examples/train.py does."""

    def both(model: nn.Module) -> nn.Module:
        model.compile(backend="aot_eager", dynamic=False)
        return spread(model)

    return both


CHECKS: dict[str, tuple[Any, ...]] = {
    "ddp": (network, ddp()),
    "static_graph": (network, ddp(static_graph=True)),
    "gradient_as_bucket_view": (network, ddp(gradient_as_bucket_view=True)),
    "find_unused_parameters": (Unused, ddp(find_unused_parameters=True)),
    "fsdp": (network, fsdp),
    "ddp, compiled, channels_last": (network, compiled(ddp()), torch.channels_last),
    "fsdp, compiled, channels_last": (network, compiled(fsdp), torch.channels_last),
}

if __name__ == "__main__":
    processes.start()
    for name, arguments in CHECKS.items():
        check(*arguments)
        graphs = torch._dynamo.utils.counters["stats"]["unique_graphs"]
        assert bool(graphs) == ("compiled" in name), graphs
        if dist.get_rank() == 0:
            print("passed", name, flush=True)
    processes.stop()
    processes.leave(0)
