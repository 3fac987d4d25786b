"""What the scripts share: options, checked before anything is measured, and result files."""

import argparse
import json
import math
import os
import platform
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any, TypeVar

import torch

from lib.devices import DEVICES

T = TypeVar("T")

INTERRUPTED = 130  # exit status

# By default glibc gives each large output new pages, whose faults cost more than the arithmetic.
# With these settings it recycles its heap instead, as a training run with steady shapes would want.
RECYCLED_HEAP = {
    "MALLOC_MMAP_MAX_": "0",
    "MALLOC_TRIM_THRESHOLD_": str(1 << 40),
    "MALLOC_TOP_PAD_": str(1 << 30),
}


def restart_with_malloc(setting: str) -> None:
    """Run this script again with malloc "default" or "recycled", if it has another setting."""
    wanted = RECYCLED_HEAP if setting == "recycled" else {}
    if all(os.environ.get(name) == wanted.get(name) for name in RECYCLED_HEAP):
        return
    env = {k: v for k, v in os.environ.items() if k not in RECYCLED_HEAP} | wanted
    os.execve(sys.executable, [sys.executable, *sys.argv], env)


def recycles_heap() -> bool:
    settings = all(os.environ.get(name) == value for name, value in RECYCLED_HEAP.items())
    return settings and platform.libc_ver()[0] == "glibc"


def positive(text: str) -> int:
    """An option's argument, from 1 up."""
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"expected a number from 1 up, got {value}")
    return value


def amount(text: str) -> float:
    """An option's argument, from 0 up: of seconds or megabytes."""
    value = float(text)
    if not value >= 0:  # as "nan" is not
        raise argparse.ArgumentTypeError(f"expected a number from 0 up, got {text}")
    return value


def add_options(parser: argparse.ArgumentParser, rounds: int, *, plot: bool = True) -> None:
    """The options that all scripts have; with `plot`, also --plot."""
    parser.add_argument("--device", choices=DEVICES, help="default: the GPU, if there is one")
    parser.add_argument("--threads", type=positive, help="of the CPU (default: as PyTorch chooses)")
    parser.add_argument(
        "--malloc", choices=["recycled", "default"], default="recycled",
        help="heap of glibc, on a CPU; default takes new pages for every large output",
    )  # fmt: skip
    parser.add_argument(
        "--rounds", type=positive, default=rounds, help=f"samples (default {rounds})"
    )
    parser.add_argument("--output", type=Path, help="JSON file to write")
    if plot:
        parser.add_argument("--plot", type=Path, help="picture to write, such as result.png")


def check_files(output: Path | None, plot: Path | None) -> None:
    """Check before measuring that the output and the picture can be written.

    Raises:
        SystemExit: they cannot.
    """
    for name, path in (("--output", output), ("--plot", plot)):
        if path is None:
            continue
        if path.is_dir():
            raise SystemExit(f"{name}: expected a file to write, got the folder {path}")
        folder = path.absolute().parent
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as reason:
            raise SystemExit(f"{name}: cannot make the folder {folder}: {reason}") from None
        if not os.access(path if path.exists() else folder, os.W_OK):
            raise SystemExit(f"{name}: {path} cannot be written; choose another place")
    if plot is None:
        return
    if find_spec("matplotlib") is None:
        raise SystemExit("a picture needs matplotlib: pip install matplotlib")
    from matplotlib.backend_bases import FigureCanvasBase

    known = sorted(FigureCanvasBase.get_supported_filetypes())
    if plot.suffix.removeprefix(".") not in known:
        raise SystemExit(f"--plot: expected a name that ends in .{', .'.join(known)}, got {plot}")


def prepare(args: argparse.Namespace) -> None:
    """Set malloc and threads, before anything is measured; may start this process anew.

    Raises:
        SystemExit: the result or the picture that is wanted cannot be written.
    """
    check_files(args.output, getattr(args, "plot", None))
    if args.device == "cpu" or (args.device is None and not torch.cuda.is_available()):
        restart_with_malloc(args.malloc)
    if args.threads:
        torch.set_num_threads(args.threads)
    torch.manual_seed(0)


def chosen_options(args: argparse.Namespace) -> dict[str, Any]:
    """All options with their values here, for the result file; without the paths to write."""
    return {
        name: "unlimited" if value == math.inf else value
        for name, value in vars(args).items()
        if name not in ("output", "plot")
    }


# ---- while it runs ----


@contextmanager
def until_interrupted(result: dict[str, Any]) -> Iterator[None]:
    """Ctrl-C ends the block, and what was measured before it is shown."""
    try:
        yield
    except KeyboardInterrupt:
        result["interrupted"] = True
        result["remarks"].append("interrupted: what follows was not measured")


def progress(items: Iterable[T], total: int) -> Iterator[T]:
    """The items, with a progress bar on stderr where there is a terminal and tqdm."""
    try:
        from tqdm import tqdm
    except ImportError:
        yield from items
        return
    yield from tqdm(items, total=total, file=sys.stderr, disable=None, leave=False)


def write(path: Path | None, result: dict[str, Any]) -> None:
    """Write a result through another file, so that a reader always finds a whole one."""
    if path:
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_suffix(".partial")
        partial.write_text(json.dumps(result, indent=1) + "\n")
        partial.replace(path)
