"""convert(tails=True) over two processes, with DistributedDataParallel and FSDP2."""

from pathlib import Path

import pytest
import torch

from helpers.cases import needs_extension
from helpers.processes import two_processes

pytestmark = pytest.mark.every_torch

SCRIPT = Path(__file__).with_name("distributed_tails.py")
CHECKS = [
    "DDP",
    "DDP, own statistics",
    "DDP, static graph",
    "DDP, gradients in buckets",
    "DDP, then converted",
    "DDP, compiled",
    "FSDP2",
    "FSDP2, gathered until the backward pass",
    "FSDP2 of the root",
    "FSDP2 of the root, then converted",
    "FSDP2, then converted",
    "FSDP2, compiled",
    "FSDP2 of norms",
    "FSDP2 of a shortcut's norm",
    "FSDP2 of a shortcut",
    "FSDP2 of two norms together",
    "FSDP2 of attention",
    "FSDP2 of taps",
    "FSDP2 of a gate's network",
    "FSDP2 of an activation",
    "DDP, SyncBatchNorm",
    "DDP, SyncBatchNorm, then converted",
]


@needs_extension
@pytest.mark.skipif(not torch.distributed.is_available(), reason="needs torch.distributed")
def test_training_follows_the_network_as_it_was(tmp_path: Path) -> None:
    """Outputs, gradients, parameters and the running statistics of each process."""
    for done in two_processes(SCRIPT, tmp_path / "store"):
        assert done.returncode == 0, done.stderr[-3000:]
        assert done.stdout.splitlines() == [f"passed {name}" for name in CHECKS]
