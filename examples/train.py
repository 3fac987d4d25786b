"""Trains an ECA-ResNet on handwritten digits, through PyTorch's own engine.

python examples/train.py                                              # one process
torchrun --nproc-per-node 2 examples/train.py                         # DistributedDataParallel
torchrun --nproc-per-node 2 examples/train.py --parallel fsdp         # FSDP2
torchrun --nproc-per-node 2 --max-restarts 3 examples/train.py --resume  # goes on if one is killed

With GPUs, each process uses one, with NCCL between them. Without GPUs, they use CPUs and gloo.
README.md in this folder says what is saved, and what stays the same after a restart.
"""

import importlib
import os
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

from eca_fused.cli.common.packages import PACKAGES_MISSING, missing_packages, need
from training import processes
from training.loop import History, Run
from training.options import Options, UsageError, parse
from training.processes import Processes

BAD_USE = 2


def main(argv: Sequence[str]) -> int:
    """Train as the arguments say; return the exit status."""
    # Only the first process prints.
    first = os.environ.get("RANK", "0") == "0"
    says = print if first else lambda *args, **kwargs: None
    if missing := missing_packages({"matplotlib", "sklearn", "tqdm"}):
        says(need(missing), file=sys.stderr)
        return PACKAGES_MISSING
    try:
        options = parse(argv)
        history = work(options)
    except UsageError as error:
        says(f"error: {error}", file=sys.stderr)
        # torchrun ends all processes when one fails. Waiting lets the first print the reason.
        time.sleep(0 if first else 5)
        return BAD_USE
    finally:
        processes.stop()
    says(
        f"Held-out accuracy {100 * history.accuracy():.1f} % "
        f"({history.correct[-1]} of {history.held_out}); {options.output}/curve.png"
    )
    return 0


def work(options: Options) -> History:
    """Train, and write the results."""
    from training.results import write_results

    at = processes.start()
    try:
        options.output.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UsageError(
            f"--output {options.output}: cannot make this folder: {error.strerror}"
        ) from error
    run = Run(options, at)
    report, close = progress(run, at)
    try:
        history = run.train(report)
    finally:
        close()
    write_results(run.model, history, options, at)
    return history


def progress(run: Run, at: Processes) -> tuple[Callable[[], None], Callable[[], None]]:
    """Functions to call after each step and at the end.

    In the first process, they show a bar on a terminal and a line for each epoch.
    """
    if not at.first:
        return lambda: None, lambda: None
    if run.step:
        print(f"Going on after step {run.step} of {run.steps}", file=sys.stderr, flush=True)
    tqdm: Any = importlib.import_module("tqdm").tqdm
    bar = tqdm(total=run.steps, initial=run.step, unit="step", disable=None, leave=False)

    def report() -> None:
        bar.update()
        history = run.history
        if run.step % run.steps_per_epoch:
            return
        losses = history.losses[-run.steps_per_epoch :]
        line = (
            f"epoch {len(history.correct)} of {run.options.epochs}: training loss "
            f"{sum(losses) / len(losses):.3f}, held-out accuracy {100 * history.accuracy():.1f} %"
        )
        tqdm.write(line, file=sys.stderr)
        sys.stderr.flush()

    return report, bar.close


if __name__ == "__main__":
    processes.leave(main(sys.argv[1:]))
