"""Rows on which a rival was faster, measured again in a process of their own.

More rounds in one process cannot show what differs between processes, such as where their pages
lie.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

from eca_fused.cli.common.measure import reason
from lib import tables
from lib.cases import DIRECTIONS
from lib.script import progress
from lib.tables import Result, Row

SCRIPT = Path(__file__).parents[1] / "layers.py"


def command(row: Row, rivals: list[str], args: argparse.Namespace) -> list[str]:
    """Arguments of layers.py for one row, with ours and these contenders alone."""
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


def run_layers(arguments: list[str]) -> Row:
    """The row that layers.py measures in a process of its own.

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
    result: Result, args: argparse.Namespace, run: Callable[[list[str]], Row] = run_layers
) -> Iterator[Row]:
    """Measure each such row in a new process; add the rivals' times over ours to it as "again".

    Yields:
        Each row, when that is done.
    """
    rows = [row for row in result["rows"] if row["direction"] in DIRECTIONS]
    lost = [(row, rivals) for row in rows if (rivals := tables.faster_rivals(row))]
    for row, rivals in progress(lost, len(lost)):
        try:
            times = run(command(row, rivals, args))["contenders"]
            row["again"] = {name: times[name]["times_ours"] for name in rivals}
        except (RuntimeError, KeyError) as error:
            row["failed"].append(f"again: {reason(error)}")
        yield row
