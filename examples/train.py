"""Trains an ECA-ResNet on handwritten digits, through PyTorch's own engine.

python examples/train.py                                              # one process
torchrun --nproc-per-node 2 examples/train.py                         # DistributedDataParallel
torchrun --nproc-per-node 2 examples/train.py --parallel fsdp         # FSDP2
torchrun --nproc-per-node 2 --max-restarts 3 examples/train.py --resume  # goes on if one is killed

A GPU for each process where there are any, and NCCL between them; else CPU processes and gloo.
README.md, beside this file, says what is saved, and what is the same after a restart.
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
    """Train as the arguments say; the exit status."""
    # Of all processes the first alone speaks.
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
        # torchrun ends all processes when one has failed: leave the first the time to say why.
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
    """Train, and write what came of it."""
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
    """What to call after each step, and at the end: a bar on a terminal, a line for each epoch.

    Only the first process shows them.
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
