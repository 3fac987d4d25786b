"""Tails and norms of several processes, some of which call the modules one after the other."""

import pytest

from helpers.cases import needs_extension
from helpers.processes import two_processes

# Each process has a part of the batch. The first runs one operation, the second the modules.
PROCESSES = """
import copy, datetime, os, sys
import torch
import torch.distributed as dist
from torch import nn
from eca_fused import ECALayer, NormActAttention, ResidualTail, attention
from helpers.sync_batch_norm import allow_on_cpu

rank, path, why = int(sys.argv[1]), sys.argv[2], sys.argv[3]
limit = datetime.timedelta(seconds=100)
dist.init_process_group(
    "gloo", init_method=f"file://{path}", rank=rank, world_size=2, timeout=limit
)
torch.manual_seed(0)
allow_on_cpu()
maps = [torch.randn(5, 6, 4, 3, dtype=torch.float64) * 2 + 1 for _ in range(3)]
first = {"a hook": 2, "an empty batch": 5, "frozen maps": 2}[why]
own = [slice(0, first), slice(first, 5)][rank]
learns = why != "frozen maps"


def step(module, maps, dy):
    maps = [m.clone().requires_grad_(learns) for m in maps]
    y = module(*maps)
    asked = [*(maps if learns else ()), *module.parameters()]
    return y, torch.autograd.grad(y, asked, dy, allow_unused=True, materialize_grads=True)


def norm():
    made = nn.BatchNorm2d(6)
    with torch.no_grad():
        made.weight.uniform_(0.5, 2)
        made.bias.uniform_(-1, 1)
    return made


for gate in (ECALayer(6), attention.SE(6, 2), None):
    modules = [(ResidualTail(gate, norm(), norm(), "relu"), 2)]
    if gate is not None:
        modules.append((NormActAttention(gate, norm(), "silu"), 1))
    for plain, count in modules:
        plain = plain.double()
        shared = nn.SyncBatchNorm.convert_sync_batchnorm(copy.deepcopy(plain))
        if rank == 1 and why != "an empty batch":
            shared.bn.register_forward_hook(lambda *args: None)
            assert "calls its modules" in repr(shared)
        else:
            assert "one operation" in repr(shared)
        y, wanted = step(plain, maps[:count], maps[2])
        got, found = step(shared, [m[own] for m in maps[:count]], maps[2][own])
        torch.testing.assert_close(got, y[own])
        found, wanted = list(found), list(wanted)
        if learns:
            for name in ("x", "identity")[:count]:
                torch.testing.assert_close(found.pop(0), wanted.pop(0)[own], msg=name)
        for a, b in zip(found, wanted, strict=True):  # DistributedDataParallel adds them
            dist.all_reduce(a)
            torch.testing.assert_close(a, b)
        for (name, a), (_, b) in zip(shared.named_buffers(), plain.named_buffers(), strict=True):
            torch.testing.assert_close(a, b, msg=name)
dist.destroy_process_group()
# A thread of gloo that releases the last tensor needs the interpreter, and aborts the process if
# that has ended (torch 2.11).
sys.stdout.flush()
sys.stderr.flush()
os._exit(0)
"""


@needs_extension
@pytest.mark.every_torch
@pytest.mark.parametrize("why", ["a hook", "an empty batch", "frozen maps"])
def test_one_process_runs_the_operation_and_another_the_modules(tmp_path, why):
    script = tmp_path / "processes.py"
    script.write_text(PROCESSES)
    for process in two_processes(script, tmp_path / "s", why):
        assert process.returncode == 0, process.stderr[-3000:]
