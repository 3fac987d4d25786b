"""Progress and tables, for a terminal and for a pipe."""

import importlib
import math
import os
import sys
import time
from collections.abc import Sequence
from typing import Any, TextIO

__all__ = ["Progress", "bold", "finite", "table"]


class Progress:
    """Steps on standard error: a bar on a terminal, a line for each step otherwise.

    Args:
        steps: how many there will be.
    """

    def __init__(self, steps: int) -> None:
        self.steps = steps
        self.done = 0
        self.began = time.perf_counter()
        self.bar: Any = None
        if sys.stderr.isatty():
            tqdm = importlib.import_module("tqdm").tqdm
            self.bar = tqdm(total=steps, leave=False, bar_format="{bar:24} {n}/{total}{desc}")

    def step(self, what: str) -> None:
        """Show the next step; the previous one is done."""
        if self.bar is not None:
            self.bar.n = self.done
            self.bar.set_description_str(f" {what}")
        else:
            elapsed = time.perf_counter() - self.began
            line = f"[{self.done + 1:2}/{self.steps}] {elapsed:6.1f} s  {what}"
            print(line, file=sys.stderr, flush=True)
        self.done += 1

    def hide(self) -> None:
        """Make room for text; the next step shows the bar again."""
        if self.bar is not None:
            self.bar.clear()

    def close(self) -> None:
        """Remove the bar."""
        if self.bar is not None:
            self.bar.close()
            self.bar = None


def styled(stream: TextIO) -> bool:
    """Whether a stream can show bold type and lines."""
    return stream.isatty() and "NO_COLOR" not in os.environ and os.environ.get("TERM") != "dumb"


def bold(text: str, stream: TextIO) -> str:
    """The text, in bold type if the stream can show it."""
    return f"\x1b[1m{text}\x1b[0m" if styled(stream) else text


def table(head: Sequence[str], rows: Sequence[Sequence[str]], stream: TextIO) -> str:
    """Rows in columns under a head, the first column aligned left, the others right.

    A pipe gets plain spaces and dashes; a terminal gets lines and a bold head.
    """
    widths = [max(map(len, column)) for column in zip(head, *rows, strict=True)]

    def line(cells: Sequence[str]) -> str:
        first, *others = (
            cell.rjust(width) if i else cell.ljust(width)
            for i, (cell, width) in enumerate(zip(cells, widths, strict=True))
        )
        return "  ".join([first, *others]).rstrip()

    rule = ("─" if styled(stream) else "-") * (sum(widths) + 2 * (len(widths) - 1))
    return "\n".join([bold(line(head), stream), rule, *map(line, rows)])


def finite(value: Any) -> Any:
    """The document with NaN and infinity as strings, because JSON lacks them."""
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    if isinstance(value, dict):
        return {key: finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [finite(item) for item in value]
    return value
