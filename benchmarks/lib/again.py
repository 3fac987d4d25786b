"""Rows on which a rival was faster, measured again in processes of their own.

More rounds in one process cannot show what differs between processes, such as where their pages
lie. Rows that are won by a narrow margin are not measured again.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import tables
from cases import DIRECTIONS
from harness import progress, reason_of, statistics_of
from tables import Result, Row

FEWEST = 5  # processes, for four of five to be a number of them

__all__ = ["FEWEST", "command", "measure_again", "run_microbench"]

SCRIPT = Path(__file__).parent / "microbench.py"


def command(row: Row, rivals: list[str], args: argparse.Namespace) -> list[str]:
    """Arguments of microbench.py for one row, with ours and these contenders alone."""
    kinds = sorted({tables.ours(row), *(name.split()[0] for name in rivals)})
    arguments = ["--shape", *map(str, row["shape"]), "--taps", str(row["k"])]
    arguments += ["--dtype", row["dtype"], "--layout", row["layout"]]
    arguments += ["--direction", row["direction"], "--contender", *kinds]
    arguments += ["--compile-mode", *args.compile_mode, "--rounds", str(args.rounds)]
    arguments += ["--malloc", args.malloc]
    for option in ("device", "threads"):
        if getattr(args, option):
            arguments += [f"--{option}", str(getattr(args, option))]
    return arguments


def run_microbench(arguments: list[str]) -> Row:
    """The row that microbench.py measures in a process of its own.

    Raises:
        RuntimeError: it failed.
    """
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "row.json"
        whole = [sys.executable, str(SCRIPT), *arguments, "--output", str(path)]
        done = subprocess.run(whole, capture_output=True, text=True, check=False)
        if done.returncode:
            raise RuntimeError(f"exit status {done.returncode}: {done.stderr.strip()[-200:]}")
        row: Row = json.loads(path.read_text())["rows"][0]
        return row


def measure_again(
    result: Result, args: argparse.Namespace, run: Callable[[list[str]], Row] = run_microbench
) -> Iterator[Row]:
    """Add to each such row, as "again", each rival's time in units of ours in args.again processes.

    Its statistics are over the processes, each of which counts with the median of its rounds.

    Yields:
        Each row, when that is done.
    """
    rows = [row for row in result["rows"] if row["direction"] in DIRECTIONS]
    lost = [(row, rivals) for row in rows if (rivals := tables.faster_rivals(row))]
    for row, rivals in progress(lost, len(lost)):
        medians: dict[str, list[float]] = {name: [] for name in rivals}
        try:
            for _ in range(args.again):
                found = run(command(row, rivals, args))
                for name in rivals:
                    medians[name].append(tables.median(found, name, "times_ours"))
        except (RuntimeError, KeyError) as reason:
            row["failed"].append(f"again: {reason_of(reason)}")
        else:
            row["again"] = {
                name: {"medians": found, **statistics_of(found)} for name, found in medians.items()
            }
        yield row
