"""Makes tables, pictures and the figures of texts from result files, and compares results.

    python benchmarks/report.py benchmarks/results/cpu.json       # Markdown
    python benchmarks/report.py r.json --plot r.png
    python benchmarks/report.py r.json --pack benchmarks/results/r.json   # to commit it
    python benchmarks/report.py --compare before.json after.json rerun.json
    python benchmarks/report.py --readme                          # renew the texts' figures

A comparison lists the rows whose time changed by more than the spread, p20 to p80, of both results.
Two processes of the same code differ too. A third result, a rerun of the new code, removes changes
that it does not show again. lib/changes.py has the rule. The exit status is 0 if nothing became
slower or is missing, else 1. It is 2 if no row is in both, or a file or an option does not fit.
"""

import argparse
import json
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, TypeVar

from lib import changes, packing, plots, steps, tables

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"
BEGIN, END = "<!-- figures: made by benchmarks/report.py -->", "<!-- end of figures -->"
GPU_RESULTS = ("bench", "rivals", "networks", "sizes", "calls")
CPU_RESULTS = ("cpu-layers*", "cpu-tails", "cpu-networks*", "cpu-sizes", "cpu-calls")
SHORT_BATCH = 32  # of the tables in short
SHORT_LAYERS = (
    "cpu-layers",
    "bench",
    "rivals",
)  # results with the whole grid; the others are beside it

BY_OURS = "Layers: the time of each contender divided by ours. Above 1, ours is faster."
BY_NONE = (
    "Networks: the time divided by that of the network without attention. 1.00 means that "
    "attention is free."
)
BY_OUR_TAIL = (
    "Tails of residual blocks: the time of each contender divided by ours. A norm tail has batch "
    "norm in training. Ours and eager have ECA; no attention is eager without it."
)
MICROSECONDS = "Small calls, in microseconds. ours / eager below 1: ours is faster."

Result = dict[str, Any]
T = TypeVar("T")


class RefusedError(Exception):
    """What cannot be done, in one line."""


class NoResultError(RefusedError):
    """A file is no result of these scripts."""

    def __init__(self, path: Path, reason: object):
        super().__init__(f"{path} is no result of these scripts: {reason}")


def load(path: Path) -> Result:
    """A result file.

    Raises:
        NoResultError: it is not there, or is no result of these scripts.
    """
    try:
        result: Result = json.loads(path.read_text())
        if not isinstance(result, dict) or not {"script", "machine", "rows"} <= result.keys():
            raise ValueError("it does not say its script, machine and rows")
        if not isinstance(result["rows"], list) or "device" not in result["machine"]:
            raise ValueError("its rows are no list, or its machine has no device")
        if result["script"] not in SCRIPTS:
            raise ValueError(f"there is no script {result['script']!r}")
        result = packing.unpack(result)
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as reason:
        raise NoResultError(path, reason) from reason
    return result


def whole(path: Path, make: Callable[[Result], T]) -> T:
    """What is made of a result file.

    Raises:
        NoResultError: it is no result, or lacks something that is needed for this.
    """
    result = load(path)
    try:
        return make(result)
    except KeyError as field:
        raise NoResultError(path, f"it lacks {field}") from field
    except (TypeError, AttributeError, ArithmeticError) as reason:
        raise NoResultError(path, reason) from reason


TABLES = {"networks": tables.networks, "calls": tables.calls, "tails": tables.tails}
IN_SHORT = {"networks": tables.networks_in_short, "tails": tables.tails_in_short}
PLOTS = {"layers": plots.layers, "sizes": plots.sizes, "networks": plots.networks}
SCRIPTS = ("layers", "sizes", *TABLES)


def markdown(result: Result, rows: bool = True) -> str:
    """Everything about a result, with or without a line for each row."""
    if result["script"] == "layers":
        groups = tables.GROUPS if rows else ("network", "dtype", "direction")
        parts = [tables.goals(result), tables.summary(result, groups)]
        parts += [tables.layers(result), tables.profiler(result)] if rows else []
        parts.append(where_another_is_faster(result))
        parts += [bullets(tables.remarks(result))] if rows else []
    elif result["script"] == "sizes":
        parts = [tables.sizes(result), steps.markdown(result)] if rows else []
        parts.append(bullets(result["remarks"]))
    else:
        make = (TABLES if rows else IN_SHORT).get(result["script"], TABLES[result["script"]])
        parts = [make(result), bullets(result.get("remarks", []))]
    parts.append(f"Measured on {tables.where(result['machine'])}.")
    return "\n\n".join(part for part in parts if part)


def failures(result: Result) -> list[str]:
    """What was wrong or did not run, a line each."""
    lines = tables.remarks(result) if result["script"] == "layers" else result["remarks"]
    return [line for line in lines if line.startswith("FAILED")]


def show(result: Result, picture: Path | None) -> int:
    """Print a result at the end of its script. The exit status: 1 if something failed."""
    if result["script"] == "layers":
        print(tables.for_terminal(result))
    else:
        print(markdown(result))
    if picture:
        PLOTS[result["script"]](result, picture)
    return int(bool(failures(result)))


def listed(names: Iterable[str]) -> str:
    """Each name once: "a, b and c"."""
    *head, last = dict.fromkeys(names)
    return f"{', '.join(head)} and {last}" if head else last


def bullets(lines: list[str]) -> str:
    return "\n".join(f"- {line}" for line in lines)


def where_another_is_faster(result: Result) -> str:
    """The rows on which a rival wins, and those on which a rerun did not show it."""
    rows = [row for row in result["rows"] if tables.rivals(row)]
    if not rows:
        return ""
    slower, unconfirmed = tables.losses(result), tables.unconfirmed(result)
    rule = "A rival counts as faster if it wins four of five rounds"
    rule += ", and again in a rerun." if unconfirmed else "."
    text = f"No rival was faster on any of {len(rows)} rows. {rule}"
    if slower:
        text = f"Where a rival was faster. {rule}\n\n" + bullets(slower)
    if unconfirmed:
        text += "\n\nFaster at first, but not in a rerun:\n\n" + bullets(unconfirmed)
    return text


# ---- the figures of docs/, and of the results' README ----


def committed() -> list[Path]:
    """The result files in the repository; a GPU has a folder."""
    paths = [path for name in GPU_RESULTS for path in RESULTS.glob(f"*/{name}.json")]
    paths += [path for name in CPU_RESULTS for path in sorted(RESULTS.glob(f"{name}.json"))]
    return sorted(paths, key=lambda path: path.parent)  # stable: in each folder, the order above


def layer_figures(result: Result) -> list[str]:
    """The short tables of a result of layers.py."""
    both = [
        row
        for row in result["rows"]
        if {"resnet50", "mobilenetv2"} & {*tables.network_of(row)}
        and row["direction"] in ("forward", "backward")
    ]
    usual = [
        row
        for row in both
        if row["shape"][0] == SHORT_BATCH and "resnet50" in tables.network_of(row)
    ]
    rivals = any(map(tables.rivals, both))
    parts = [BY_OURS if rivals else "Layers: our time beside a copy. No other contender was timed."]
    if usual:
        parts += [
            f"ResNet-50, batch {SHORT_BATCH}:",
            tables.summary({**result, "rows": usual}, tables.GROUPS[2:]),
        ]
    parts += [
        f"{listed(row['dtype'] for row in both)}, in both layouts:",
        tables.summary({**result, "rows": both}, ("network", "batch", "direction")),
        "Rows of the whole result file that reach the goals, which were set before tuning:",
        tables.goals(result),
        where_another_is_faster(result),
    ]
    return [part for part in parts if part]


def figures() -> str:
    """The tables of docs/performance.md, from the committed results."""
    parts = []
    for path in committed():
        result = load(path)
        script, machine = result["script"], result["machine"]
        if script == "layers" and path.stem in SHORT_LAYERS:
            found = layer_figures(result)
        elif script == "calls":
            note = "Microseconds of a call. ours / eager: below 1, ours is faster."
            found = [note, tables.calls(result)]
        elif script == "tails":
            found = [BY_OUR_TAIL, tables.tails_in_short(result)]
        elif script == "networks":
            found = [BY_NONE, tables.networks_in_short(result)]
        else:
            continue
        what = {
            "layers": "Layers",
            "tails": "Tails",
            "calls": "Small calls",
            "networks": "Networks",
        }[script]
        place = machine.get("gpu") or f"a CPU, {machine['cpu']}"
        parts += [f"## {what} on {place}: `{path.relative_to(RESULTS)}`", *found]
        parts.append(f"Measured on {tables.where(machine)}.")
    return "\n\n".join(parts)


def all_figures() -> str:
    """Every committed result in short, with its picture."""
    parts = []
    for path in committed():
        name = path.relative_to(RESULTS)
        parts.append(f"## {name}")
        if path.with_suffix(".png").exists():
            parts.append(f"![{name.stem}]({name.with_suffix('.png')})")
        parts.append(markdown(load(path), rows=False))
    return "\n\n".join(parts)


def renew(text: str, figures: str) -> str:
    """A text with these figures between its marks."""
    head, _, rest = text.partition(BEGIN)
    _, _, tail = rest.partition(END)
    return f"{head}{BEGIN}\n{figures}\n{END}{tail}"


FIGURES = {ROOT / "docs" / "performance.md": figures, RESULTS / "README.md": all_figures}
SPEED = ROOT / "docs" / "pictures" / "speed.png"


def draw_speed(path: Path) -> None:
    """The picture of the README: layers on a GPU, and networks there and on a CPU."""
    places = {"H200": RESULTS / "h200" / "networks.json", "CPU": RESULTS / "cpu-networks.json"}
    networks = {name: load(place) for name, place in places.items()}
    plots.speed(load(RESULTS / "h200" / "rivals.json"), networks, path)


def parse(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("results", type=Path, nargs="*", help="JSON files of the scripts here")
    parser.add_argument("--plot", type=Path, help="picture of one result to write")
    parser.add_argument(
        "--compare", action="store_true", help="results before, after, and of a rerun of after"
    )
    parser.add_argument("--pack", type=Path, help="file for one result in the form of results/")
    parser.add_argument(
        "--readme", action="store_true", help="renew the figures in docs/ and results/"
    )
    args = parser.parse_args(argv)
    if not args.readme and (not args.results or (args.compare and len(args.results) not in (2, 3))):
        parser.error("expected result files, two or three of them for --compare")
    if args.pack and (args.compare or args.readme or args.plot or len(args.results) != 1):
        parser.error(f"--pack: expected one result, got {len(args.results)}, and no other option")
    if args.plot and (args.compare or args.readme or len(args.results) > 1):
        parser.error(f"--plot: expected one result, got {len(args.results)}, and no other option")
    return args


def compared(result: Result) -> Result:
    """The same result, if it has what a comparison needs."""
    changes.relative_times(result)
    tables.where(result["machine"])
    return result


def compare_files(paths: list[Path]) -> int:
    """Print what changed from the first result to the second. The exit status.

    Args:
        paths: the old result, the new one, and optionally a rerun of the new code.

    Raises:
        RefusedError: they are no results, or of different scripts.
    """
    results = [whole(path, compared) for path in paths]
    scripts = dict.fromkeys(f"of {result['script']}.py" for result in results)
    if len(scripts) > 1:
        raise RefusedError(f"results {' and '.join(scripts)} cannot be compared")
    text, status = changes.compare(*results)
    print(text)
    return status


def draw(source: Path, picture: Path) -> None:
    """The picture of a result.

    Raises:
        RefusedError: it is no result, or one of which there is no picture.
    """
    script = load(source)["script"]
    if script not in PLOTS:
        raise RefusedError(f"there is no picture of a result of {script}.py")
    whole(source, lambda result: PLOTS[script](result, picture))


def run(args: argparse.Namespace) -> int:
    """What the options ask for. The exit status."""
    if args.readme:
        for path, make in FIGURES.items():
            path.write_text(renew(path.read_text(), make()))
        draw_speed(SPEED)
        return 0
    if args.pack:
        args.pack.write_text(whole(args.results[0], packing.pack))
        return 0
    if args.compare:
        return compare_files(args.results)
    texts = [whole(path, markdown) for path in args.results]
    if args.plot:
        draw(args.results[0], args.plot)
    print(*texts, sep="\n")
    return 0


def main(argv: list[str]) -> int:
    try:
        return run(parse(argv))
    except RefusedError as reason:
        print(reason, file=sys.stderr)
        raise SystemExit(2) from reason


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
