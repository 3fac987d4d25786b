"""Makes tables and pictures from result files, the README's figures, and compares two results.

    python benchmarks/report.py benchmarks/results/cpu.json       # Markdown
    python benchmarks/report.py r.json --plot r.png
    python benchmarks/report.py --compare before.json after.json  # exit status 1 if slower
    python benchmarks/report.py --readme                          # renew the READMEs' figures

A comparison is of times in units of the copy's in the same run: two runs of the same code on a
machine that others share differ more. A change counts where it is larger than the spread, p20 to
p80, of both results.
"""

import argparse
import json
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import plots
import tables

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"
BEGIN, END = "<!-- figures: made by benchmarks/report.py -->", "<!-- end of figures -->"
GPU_RESULTS = ("bench", "networks", "sizes", "calls")
README_BATCH = 32  # of the README's table

Result = dict[str, Any]


def load(path: Path) -> Result:
    """A result file.

    Raises:
        SystemExit: it is not there, or is no result of these scripts.
    """
    try:
        result: Result = json.loads(path.read_text())
        if not isinstance(result, dict) or not {"script", "machine", "rows"} <= result.keys():
            raise ValueError("it does not say its script, machine and rows")
        if not isinstance(result["rows"], list) or "device" not in result["machine"]:
            raise ValueError("its rows are no list, or its machine has no device")
    except (OSError, ValueError, TypeError) as reason:
        raise SystemExit(f"{path} is no result of these scripts: {reason}") from reason
    return result


TABLES = {"scaling": tables.scaling, "network": tables.networks, "overhead": tables.overhead}
PLOTS = {"microbench": plots.layers, "scaling": plots.scaling, "network": plots.networks}


def markdown(result: Result) -> str:
    """All that is to be said of a result."""
    if result["script"] == "microbench":
        parts = [tables.goals(result), tables.summary(result), tables.layers(result)]
        parts.append(tables.profiler(result))
        parts.append(where_another_is_faster(result))
        parts.append(bullets(tables.remarks(result)))
    else:
        parts = [TABLES[result["script"]](result), bullets(result.get("remarks", []))]
    parts.append(f"Measured on {tables.where(result['machine'])}.")
    return "\n\n".join(part for part in parts if part)


def failures(result: Result) -> list[str]:
    """What was wrong or did not run, a line each."""
    lines = tables.remarks(result) if result["script"] == "microbench" else result["remarks"]
    return [line for line in lines if line.startswith("FAILED")]


def show(result: Result, picture: Path | None) -> int:
    """What a script says at its end. The exit status: 1 if something failed."""
    if result["script"] == "microbench":
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
    """The rows on which a rival wins, and those on which it did so in one process alone."""
    rows = [row for row in result["rows"] if tables.rivals(row)]
    if not rows:
        return ""
    slower, unconfirmed = tables.losses(result), tables.unconfirmed(result)
    text = f"On none of {len(rows)} rows another is faster in four of five rounds"
    text += " and, measured again, in four of five other processes." if unconfirmed else "."
    if slower:
        text = "Where another is faster in four of five rounds:\n\n" + bullets(slower)
    if unconfirmed:
        text += "\n\nIn one process, but not in four of five others:\n\n" + bullets(unconfirmed)
    return text


# ---- comparison ----

Key = tuple[str, ...]


def relative_times(result: Result) -> dict[Key, dict[str, float]]:
    """Of our contenders on every row: time in units of the copy's, or of eager's without a copy."""
    found = {}
    for row in result["rows"]:
        for name in ("native", "triton"):
            times = row["contenders"]
            if name not in times:
                continue
            if "of_copy" in times[name]:
                share = times[name]["of_copy"]
            elif "eager" in times and name == "native":
                share = times["eager"]["times_ours"]
            else:
                continue
            head = (row.get("axis", ""), "x".join(map(str, row["shape"])), str(row.get("k", "")))
            head += (row["dtype"], row.get("layout", ""), row["direction"], name)
            found[tuple(filter(None, head))] = {
                "median": 1 / share["median"],
                "low": 1 / share["p80"],
                "high": 1 / share["p20"],
            }
    return found


def compare(before: Result, after: Result) -> tuple[str, int]:
    """Text and exit status: 0 if nothing became slower or is missing, 2 if nothing is in both."""
    old, new = relative_times(before), relative_times(after)
    lines = [
        f"{name}: {tables.where(result['machine'])}"
        for name, result in (("before", before), ("after", after))
    ]
    for what in ("device", "gpu", "cpu", "threads", "malloc"):
        a, b = before["machine"].get(what), after["machine"].get(what)
        if a != b:
            lines.append(f"measured with another {what}: {a} and {b}")
    slower, faster = [], []
    for key in sorted(old.keys() & new.keys()):
        a, b = old[key], new[key]
        change = f"{' '.join(key)}: {b['median'] / a['median']:.2f}x the time"
        if b["low"] > a["high"]:
            slower.append(f"SLOWER {change}")
        elif b["high"] < a["low"]:
            faster.append(f"faster {change}")
    missing = [f"MISSING {' '.join(key)}" for key in sorted(old.keys() - new.keys())]
    both = len(old.keys() & new.keys())
    lines.append(
        f"{both} in both, {len(slower)} slower, {len(faster)} faster, {len(missing)} missing"
    )
    status = 2 if not both else int(bool(slower or missing))
    return "\n".join([*lines, *slower, *missing, *faster]), status


# ---- the README, and that of the results ----


def committed() -> list[Path]:
    """The result files in the repository; gpu_check.sh makes a folder for a GPU."""
    of_gpus = [path for name in GPU_RESULTS for path in RESULTS.glob(f"*/{name}.json")]
    return sorted([*RESULTS.glob("*.json"), *of_gpus])


def layer_figures(result: Result) -> list[str]:
    """The README's tables of a result of microbench.py."""
    both = [
        row
        for row in result["rows"]
        if {"resnet50", "mobilenetv2"} & {*tables.network_of(row)}
        and row["direction"] in ("forward", "backward")
    ]
    usual = [
        row
        for row in both
        if row["shape"][0] == README_BATCH and "resnet50" in tables.network_of(row)
    ]
    return [
        f"ResNet-50, batch {README_BATCH}:",
        tables.summary({**result, "rows": usual}, tables.GROUPS[2:]),
        f"{listed(row['dtype'] for row in both)}, in both layouts:",
        tables.summary({**result, "rows": both}, ("network", "batch", "direction")),
        tables.goals(result),
        where_another_is_faster(result),
    ]


def readme_figures() -> str:
    """The README's tables, from the committed results."""
    parts = []
    for path in committed():
        result = load(path)
        script = result["script"]
        if script == "microbench" and result["machine"]["malloc"] == "recycled":
            parts += layer_figures(result)
        elif script == "overhead":
            parts.append(tables.overhead(result))
        elif script == "network":
            parts.append(tables.networks_in_short(result))
        else:
            continue
        parts.append(f"Measured on {tables.where(result['machine'])}.")
    return "\n\n".join(parts)


def all_figures() -> str:
    """Every committed result, whole, with its picture."""
    parts = []
    for path in committed():
        name = path.relative_to(RESULTS)
        parts.append(f"## {name}")
        if path.with_suffix(".png").exists():
            parts.append(f"![{name.stem}]({name.with_suffix('.png')})")
        parts.append(markdown(load(path)))
    return "\n\n".join(parts)


def renew(readme: str, figures: str) -> str:
    """A text with these figures between its marks."""
    head, _, rest = readme.partition(BEGIN)
    _, _, tail = rest.partition(END)
    return f"{head}{BEGIN}\n{figures}\n{END}{tail}"


FIGURES = {ROOT / "README.md": readme_figures, RESULTS / "README.md": all_figures}


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("results", type=Path, nargs="*", help="JSON files of the scripts here")
    parser.add_argument("--plot", type=Path, help="picture to write, of one result")
    parser.add_argument("--compare", action="store_true", help="two results: before and after")
    parser.add_argument("--readme", action="store_true", help="renew the figures in both READMEs")
    args = parser.parse_args(argv)
    if args.readme:
        for path, make in FIGURES.items():
            path.write_text(renew(path.read_text(), make()))
        return 0
    if not args.results or (args.compare and len(args.results) != 2):
        parser.error("expected result files, two of them for --compare")
    results = [load(path) for path in args.results]
    if args.compare:
        text, status = compare(*results)
        print(text)
        return status
    for result in results:
        print(markdown(result))
    if args.plot:
        script = results[0]["script"]
        if script not in PLOTS:
            parser.error(f"there is no picture of a result of {script}.py")
        PLOTS[script](results[0], args.plot)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
