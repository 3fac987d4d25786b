"""examples/train.py, killed with SIGKILL at a chosen place, once: `killed_train.py PLACE ARGS`.

PLACE is RANK:WHERE:STEP. WHERE is "step", before the step after STEP begins, or "write", with the
checkpoint of STEP written but not yet in place. A process that torchrun starts again is not killed.
"""

import os
import signal
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[2] / "examples"))

import train
from training import checkpoint, loop, processes


def kill() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def arm(where: str, at: int) -> None:
    """Have this process killed at that place."""
    one_step, sync_folder = loop.Run.one_step, checkpoint.sync_folder

    def step(run: loop.Run) -> Any:
        if run.step == at:
            kill()
        return one_step(run)

    def write(folder: Path) -> None:
        if folder.name == f"{checkpoint.UNDER_WAY}step-{at:08}":
            kill()
        sync_folder(folder)

    if where == "step":
        loop.Run.one_step = step  # type: ignore[method-assign]
    else:
        checkpoint.sync_folder = write


if __name__ == "__main__":
    rank, where, at = sys.argv[1].split(":")
    again = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") != "0"
    if rank == os.environ.get("RANK", "0") and not again:
        arm(where, int(at))
    processes.leave(train.main(sys.argv[2:]))
