"""Checkpoints that exist completely or not at all, whenever the run is killed.

A checkpoint is a folder step-N. All processes write the weights and the optimiser's state into it
through torch.distributed.checkpoint; state.json has everything else. The folder is written under
another name and renamed last. The same checkpoint fits DDP, FSDP and a single process.
"""

import json
import os
import shutil
import warnings
from pathlib import Path
from typing import Any

import torch.distributed as dist
from torch import nn
from torch.distributed.checkpoint import state_dict_loader, state_dict_saver
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.optim import Optimizer

from .options import UsageError
from .processes import Processes

__all__ = ["check_options", "load_tensors", "newest", "read_state", "save"]

UNDER_WAY, OUTDATED = ".writing-", ".removing-"


def newest(folder: Path) -> Path | None:
    """The checkpoint of the latest step, or None without checkpoints."""
    found = [path for path in folder.glob("step-*") if path.is_dir()]
    return max(found, key=lambda path: path.name, default=None)


def save(
    folder: Path, model: nn.Module, optimizer: Optimizer, state: dict[str, Any], at: Processes
) -> None:
    """Write a checkpoint, then remove the earlier ones.

    Args:
        folder: of the checkpoints; all processes must see it.
        model, optimizer: in all processes.
        state: everything else, for JSON; state["step"] names the checkpoint.
        at: this process among the others.
    """
    name = f"step-{state['step']:08}"
    if at.first:
        folder.mkdir(parents=True, exist_ok=True)
        # A killed run may have left these.
        for pattern in (UNDER_WAY, OUTDATED):
            for path in folder.glob(f"{pattern}*"):
                shutil.rmtree(path)
    at.wait()
    writing = folder / f"{UNDER_WAY}{name}"
    model_state, optimizer_state = get_state_dict(model, optimizer)
    tensors: dict[str, Any] = {"model": model_state, "optimizer": optimizer_state}
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "torch.distributed is disabled")  # on purpose
        state_dict_saver.save(tensors, checkpoint_id=writing, no_dist=not dist.is_initialized())
    if at.first:
        earlier = [path for path in folder.glob("step-*") if path.name != name]
        with open(writing / "state.json", "w") as file:
            json.dump(state, file)
            file.flush()
            os.fsync(file.fileno())
        sync_folder(writing)
        os.rename(writing, folder / name)
        sync_folder(folder)
        for path in earlier:
            # A partly removed folder must not look like a checkpoint either.
            outdated = folder / f"{OUTDATED}{path.name}"
            os.rename(path, outdated)
            shutil.rmtree(outdated)
    at.wait()


def sync_folder(folder: Path) -> None:
    """Write the names in a folder to disk, so that they also survive a power cut."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def read_state(checkpoint: Path) -> dict[str, Any]:
    """The state that was passed to save().

    Raises:
        UsageError: there is no state, or it is not JSON.
    """
    try:
        found: dict[str, Any] = json.loads((checkpoint / "state.json").read_text())
    except (OSError, ValueError) as error:
        raise UsageError(
            f"{checkpoint} is not a checkpoint of this script ({error}); remove it, or choose "
            "another folder with --checkpoint"
        ) from error
    return found


def check_options(checkpoint: Path, theirs: dict[str, Any], ours: dict[str, Any]) -> None:
    """Raise UsageError unless a checkpoint was made with the options of this run."""
    differing = [name for name in ours if theirs.get(name) != ours[name]]
    if differing:
        raise UsageError(
            f"{checkpoint} was made with {shown(theirs, differing)}, this run has "
            f"{shown(ours, differing)}; give the same options, or choose another --output"
        )


def shown(options: dict[str, Any], names: list[str]) -> str:
    """Options as on the command line."""
    texts = []
    for name in names:
        option, value = f"--{name.replace('_', '-')}", options.get(name)
        if isinstance(value, list):
            texts.append(" ".join([option, *map(str, value)]))
        elif value is None or value is False:
            texts.append(f"no {option}")
        else:
            texts.append(option if value is True else f"{option} {value}")
    return ", ".join(texts)


def load_tensors(checkpoint: Path, model: nn.Module, optimizer: Optimizer) -> None:
    """Load the weights and the optimiser's state from a checkpoint."""
    model_state, optimizer_state = get_state_dict(model, optimizer)
    tensors: dict[str, Any] = {"model": model_state, "optimizer": optimizer_state}
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "torch.distributed is disabled")
        state_dict_loader.load(tensors, checkpoint_id=checkpoint, no_dist=not dist.is_initialized())
    set_state_dict(
        model,
        optimizer,
        model_state_dict=tensors["model"],
        optim_state_dict=tensors["optimizer"],
    )
