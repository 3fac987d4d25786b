"""Tables from results: Markdown for the README, plain text for the terminal."""

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from lib.cases import NETWORKS

Result = dict[str, Any]
Row = dict[str, Any]
MB = 10**6
FEW = 8  # layers that a remark names

# In the order of the columns. "compile" is the fastest of torch.compile's forms.
KINDS = (
    "copy",
    "eager",
    "timm",
    "compile",
    "triton",
    "native in place",
    "native given",
    "eager given",
    "copy given",
)
USUAL = ("eager", "compile", "triton", "native in place")
RIVALS = ("eager", "timm", "compile")


def markdown(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [f"| {' | '.join(head)} |", "|---" * len(head) + "|"]
    return "\n".join([*lines, *(f"| {' | '.join(row)} |" for row in rows)])


def aligned(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [list(head), *map(list, rows)]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    texts = [
        "  ".join(
            cell.ljust(width) if i == 0 else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(line, widths, strict=True))
        ).rstrip()
        for line in lines
    ]
    return "\n".join([texts[0], "-" * max(map(len, texts)), *texts[1:]])


def where(machine: dict[str, Any]) -> str:
    """Device and versions in one line."""
    if machine["dry_run"]:
        return "a dry run, with times that are made up"
    if machine["device"] == "cuda":
        place = (
            f"{machine['gpu']}, driver {machine.get('driver', 'unknown')}, "
            f"CUDA {machine['cuda']}, Triton {machine.get('triton')}"
        )
    else:  # what the build has for GPUs was not timed
        kernels = machine["kernels"].removesuffix(" and CUDA")
        place = (
            f"{machine['cpu']}, {machine['cores']} cores, {machine['threads']} threads, "
            f"{kernels}, malloc {machine['malloc']}"
        )
    return f"{place}, torch {machine['torch']}, commit {machine['commit']}, {machine['date']}"


def median(row: Row, name: str, what: str = "us") -> float:
    return float(row["contenders"][name][what]["median"])


def named(row: Row, kind: str) -> str | None:
    """The contender of a kind; of torch.compile's forms the fastest."""
    times = row["contenders"]
    if kind != "compile":
        return kind if kind in times else None
    forms = [name for name in times if name.startswith("compile")]
    return min(forms, key=lambda name: median(row, name)) if forms else None


def ours(row: Row) -> str | None:
    """Our contender: the native kernels, or Triton's where there are none."""
    return next((name for name in ("native", "triton") if name in row["contenders"]), None)


def ratio(row: Row, kind: str) -> float | None:
    """Time of a contender, divided by ours."""
    name = named(row, kind)
    if name is None or ours(row) is None:
        return None
    return median(row, name, "times_ours")


def text(value: float | None, form: str = "{:.2f}x") -> str:
    return "-" if value is None else form.format(value)


def layer_of(row: Row) -> str:
    return f"{'x'.join(map(str, row['shape']))} k={row['k']}"


def network_of(row: Row) -> list[str]:
    """The networks that have this layer."""
    layer = (*row["shape"][1:], row["k"])
    return [name for name, layers in NETWORKS.items() if layer in layers]


LETTERS = {
    "R": "rows", "F": "runs", "P": "columns", "K": "kept", "S": "stream", "A": "tile",
    "B": "split_tile", "D": "split_pixels", "C": "two_pass",
}  # fmt: skip


def plan_text(plan: Any) -> str:
    if not isinstance(plan, dict):
        return "-"
    # Older results have letters: the strategies had no names.
    strategy = LETTERS.get(plan["strategy"], plan["strategy"])
    if strategy == "two_pass":
        return f"two_pass, chunk {plan['chunk']}, parts {plan['parts']}"
    return (
        f"{strategy}, tile {plan['tile']}, {plan['threads']} threads, {plan['occupancy']} resident"
    )


# ---- layers ----


def cells(row: Row) -> list[str]:
    """Time, speed, share of the copy, and the ratios: what a table says of a row."""
    name = ours(row)
    failed = any(what.startswith("native:") for what in row["failed"])
    found = ["failed" if failed else "-", "-", "-", "-", "-"]
    if name and not failed:
        own = row["contenders"][name]
        us = own["us"]
        found = [f"{us[name]:.1f}" for name in ("median", "p20", "p80")]
        found += [f"{own['gbps']:.1f}", f"{own['of_copy']['median']:.2f}"]
    return found + [text(ratio(row, kind)) for kind in KINDS[1:]]


HEAD = ["layer", "dtype", "layout", "direction", "us", "p20", "p80", "GB/s", "of copy"]
HEAD += [f"{kind} / ours" for kind in KINDS[1:]]


def layers(result: Result) -> str:
    """Markdown: a row for each layer and direction, medians, ratios of times in the same round."""
    plans = any("plan" in row for row in result["rows"])
    rows = [
        [layer_of(row), row["dtype"], row["layout"], row["direction"], *cells(row)]
        + ([plan_text(row.get("plan"))] if plans else [])
        for row in result["rows"]
    ]
    return markdown(HEAD + ["plan"] * plans, rows)


def for_terminal(result: Result) -> str:
    """Plain text: the table of the layers, what was left out, what failed, and where."""
    rows = [
        [f"{layer_of(row)} {row['dtype']} {row['layout']} {row['direction']}", *cells(row)]
        for row in result["rows"]
    ]
    head = ["layer", *(name.removesuffix(" / ours") for name in HEAD[4:])]
    parts = ["", aligned(head, rows)] if rows else []
    parts.append("us, p20, p80 and GB/s of ideal bytes are ours; ratios are theirs / ours")
    if result["rows"] and not any(map(ours, result["rows"])):
        parts = ["", without_ours(result["rows"])]
    parts += remarks(result)
    return "\n".join([*parts, f"Measured on {where(result['machine'])}."])


def without_ours(rows: list[Row]) -> str:
    """Plain text: the times of all contenders, a line each, where none is ours."""
    lines = [
        [f"{layer_of(row)} {row['dtype']} {row['layout']} {row['direction']}, {name}"]
        + [f"{times['us'][which]:.1f}" for which in ("median", "p20", "p80")]
        + [f"{times['gbps']:.1f}", f"{times['of_copy']['median']:.2f}"]
        for row in rows
        for name, times in row["contenders"].items()
    ]
    return aligned(["layer", *HEAD[4:9]], lines)


def remarks(result: Result) -> list[str]:
    """What failed and what was left out, a line each."""
    lines = [
        f"FAILED {layer_of(row)} {row['dtype']} {row['layout']} {row['direction']}: {what}"
        for row in result["rows"]
        for what in row["failed"]
    ]
    absent: dict[str, list[str]] = {}
    for row in result["rows"]:
        for what in row.get("left_out", []):
            absent.setdefault(what, []).append(f"{layer_of(row)} {row['dtype']} {row['layout']}")
    lines += [f"left out of {some(names)}: {what}" for what, names in absent.items()]
    lines += [
        f"{layer_of(row)} {row['dtype']} {row['layout']} {row['direction']}: the maps of all calls "
        "fit the L2 cache"
        for row in result["rows"]
        if result["machine"]["device"] == "cuda" and not row.get("cold", True)
    ]
    lines += [
        f"{layer_of(row)} {row['dtype']} {row['layout']} {row['direction']}, {name}: "
        f"{t['us']['median']:.1f} us by events, {t['profiler_us']:.1f} us in the profiler"
        for row in result["rows"]
        for name, t in row["contenders"].items()
        if t.get("profiler_us") and abs(t["profiler_us"] / t["us"]["median"] - 1) > 0.15
    ]
    reasons: dict[str, list[str]] = {}
    for what in result["left_out"]:
        layer, _, reason = what.partition(": ")
        reasons.setdefault(reason, []).append(layer)
    for reason, names in reasons.items():
        which = some(names)
        lines.append(f"left out, {reason}: {which}" if reason else f"left out: {which}")
    return lines


def some(layers: list[str]) -> str:
    return ", ".join(layers) if len(layers) <= FEW else f"{len(layers)} layers"


def span(values: Iterable[float | None]) -> str:
    found = [value for value in values if value is not None]
    return f"{min(found):.2f} to {max(found):.2f}x" if found else "-"


# What the rows of a summary have in common.
GROUPS = ("network", "batch", "dtype", "layout", "direction")


def summary(result: Result, groups: Sequence[str] = GROUPS, kinds: Sequence[str] = USUAL) -> str:
    """Markdown: ranges over the layers that have `groups` in common."""
    found: dict[tuple[str, ...], list[Row]] = {}
    for network in NETWORKS:
        for row in result["rows"]:
            if network in network_of(row) and row["direction"] != "warm forward":
                named = {**row, "network": network, "batch": row["shape"][0]}
                found.setdefault(tuple(str(named[name]) for name in groups), []).append(row)
    timed = [k for k in kinds if any(ratio(row, k) for rows in found.values() for row in rows)]
    return markdown(
        [*groups, "layers", "share of copy", *(f"{kind} / ours" for kind in timed)],
        (
            [*key, str(len({layer_of(row) for row in rows}))]
            + [span(ratio(row, "copy") for row in rows).removesuffix("x")]
            + [span(ratio(row, kind) for row in rows) for kind in timed]
            for key, rows in found.items()
        ),
    )


def rivals(row: Row) -> list[str]:
    """The rivals that ours was measured beside."""
    return [name for kind in RIVALS if ours(row) and (name := named(row, kind))]


def faster_rivals(row: Row) -> list[str]:
    """Those that were faster than ours in four of five rounds."""
    return [name for name in rivals(row) if row["contenders"][name]["times_ours"]["p80"] < 1]


def losses(result: Result) -> list[str]:
    """Where a rival was faster, and in a rerun too if there was one."""
    return [text for text, lost in verdicts(result) if lost]


def unconfirmed(result: Result) -> list[str]:
    """Where a rival was faster, but not in the rerun."""
    return [text for text, lost in verdicts(result) if not lost]


def verdicts(result: Result) -> Iterator[tuple[str, bool]]:
    """Each row with a rival that was faster, and whether it was so in a rerun."""
    for row in result["rows"]:
        for name in faster_rivals(row):
            text = (
                f"{layer_of(row)} {row['dtype']} {row['layout']} {row['direction']}: "
                f"{name} takes {median(row, name, 'times_ours'):.2f}x our time"
            )
            again = row.get("again", {}).get(name)
            if again:
                text += f", again {again['median']:.2f}x ({again['p20']:.2f} to {again['p80']:.2f})"
            yield text, not again or again["p80"] < 1


# ---- what the kernels were written to reach ----

# Direction, contender, its time divided by ours; on a CPU with the heap recycled.
CPU_GOALS = [
    ("forward", "copy", 1 / 1.15),
    ("backward", "copy", 1 / 1.15),
    ("forward", "eager", 1.5),
    ("forward", "compile", 1.6),
    ("backward", "eager", 3.7),
    ("backward", "compile", 1.6),
]
# Least and most ideal bytes, direction, contender, its time divided by ours; on an H200, bfloat16.
GPU_GOALS: list[tuple[int, float, str, str, float]] = [
    (256 * MB, float("inf"), "forward", "copy", 0.97),
    (256 * MB, float("inf"), "backward", "copy", 0.95),
    (16 * MB, 256 * MB, "forward", "copy", 0.87),
    (16 * MB, 256 * MB, "backward", "copy", 0.84),
    (256 * MB, float("inf"), "forward", "compile", 1.45),
    (256 * MB, float("inf"), "backward", "compile", 1.3),
    (256 * MB, float("inf"), "forward", "eager", 1.45),
    (256 * MB, float("inf"), "backward", "eager", 3.2),
]
ONE_SAMPLE_GOALS = {"forward": 4.0, "backward": 6.0}  # us of ResNet-50's layers in bfloat16


def goals(result: Result) -> str:
    """Markdown: on how many rows each goal was reached."""
    goals_of = gpu_goals if result["machine"]["device"] == "cuda" else cpu_goals
    lines = []
    for what, values, goal, at_most in goals_of(result):
        if not values:  # not measured
            continue
        reached = sum(v <= goal if at_most else v >= goal for v in values)
        span = [f"{min(values):.2f}", f"{max(values):.2f}"]
        lines.append([what, f"{reached} of {len(values)}", *span])
    return markdown(["goal", "reached on", "least", "most"], lines)


Goal = tuple[str, list[float], float, bool]


def ratios_of(rows: Iterable[Row], kind: str) -> list[float]:
    return [value for row in rows if (value := ratio(row, kind)) is not None]


def cpu_goals(result: Result) -> Iterator[Goal]:
    for direction, kind, goal in CPU_GOALS:
        rows = [row for row in result["rows"] if row["direction"] == direction]
        what = f"{direction}: {kind} / ours at least {goal:.2f}"
        yield what, ratios_of(rows, kind), goal, False


def gpu_goals(result: Result) -> Iterator[Goal]:
    rows = [row for row in result["rows"] if row["dtype"] == "bfloat16"]
    for least, most, direction, kind, goal in GPU_GOALS:
        size = f"{least // MB} MB and more"
        if most < float("inf"):
            size = f"{least // MB} to {most // MB} MB"
        inside = [
            row
            for row in rows
            if row["direction"] == direction and least <= row["ideal_bytes"] < most
        ]
        what = f"{direction}, {size}: {kind} / ours at least {goal:.2f}"
        yield what, ratios_of(inside, kind), goal, False
    for direction, goal in ONE_SAMPLE_GOALS.items():
        single = [
            median(row, name)
            for row in rows
            if row["direction"] == direction
            and row["shape"][0] == 1
            and "resnet50" in network_of(row)
            and (name := ours(row))
        ]
        yield f"{direction}, ResNet-50, batch 1: at most {goal:.0f} us", single, goal, True


def profiler(result: Result) -> str:
    """Markdown: times by events over graph replays beside the profiler's."""
    head = ["layer", "direction", "contender", "graph", "profiler"]
    lines = []
    for row in result["rows"]:
        layer = f"{row['dtype']} {row['layout']} {layer_of(row)}"
        for name, t in row["contenders"].items():
            if t.get("profiler_us"):
                times = [f"{us:.1f} us" for us in (t["us"]["median"], t["profiler_us"])]
                lines.append([layer, row["direction"], name, *times])
    return markdown(head, lines) if lines else ""


# ---- tails, small calls, networks, sizes ----


def tails(result: Result) -> str:
    """Markdown: tails of residual blocks, our time and those of the others divided by it."""
    kinds = list(dict.fromkeys(n for row in result["rows"] for n in row["contenders"]))
    kinds = [kind for kind in kinds if kind not in ("copy", "native")]
    lines = []
    for row in result["rows"]:
        own = row["contenders"].get("native")
        place = [row["tail"], layer_of(row), row["dtype"], row["layout"], row["direction"]]
        us, share = ("-", "-")
        if own:
            us, share = f"{own['us']['median']:.0f}", f"{own['of_copy']['median']:.2f}"
        lines.append([*place, us, share, *(text(ratio(row, kind)) for kind in kinds)])
    head = ["tail", "layer", "dtype", "layout", "direction", "us", "of copy"]
    return markdown([*head, *(f"{kind} / ours" for kind in kinds)], lines)


def tails_in_short(result: Result) -> str:
    """Markdown: ranges over the layers."""
    groups = ("tail", "dtype", "layout", "direction")
    kinds = ("eager", "no attention", "compile")
    found: dict[tuple[str, ...], list[Row]] = {}
    for row in result["rows"]:
        found.setdefault(tuple(row[name] for name in groups), []).append(row)
    return markdown(
        [*groups, "layers", "share of copy", *(f"{kind} / ours" for kind in kinds)],
        (
            [*key, str(len(rows)), span(ratio(row, "copy") for row in rows).removesuffix("x")]
            + [span(ratio(row, kind) for row in rows) for kind in kinds]
            for key, rows in found.items()
        ),
    )


def calls(result: Result) -> str:
    """Markdown: host time of small calls, and its ratio to eager's."""
    head = ["small call", "direction"]
    names = list(dict.fromkeys(n for row in result["rows"] for n in row["contenders"]))
    lines = []
    for row in result["rows"]:
        times = row["contenders"]
        share = 1 / ratio_to(times, "eager") if "eager" in times and ours(row) else None
        shape = f"{'x'.join(map(str, row['shape']))}, {row['dtype']}"
        cells = [f"{times[n]['us']['median']:.1f} us" if n in times else "-" for n in names]
        lines.append([shape, row["direction"], *cells, text(share, "{:.2f}")])
    return markdown([*head, *names, "ours / eager"], lines)


def ratio_to(times: dict[str, Any], name: str) -> float:
    return float(times[name]["times_ours"]["median"])


def networks(result: Result) -> str:
    """Markdown: speed of whole networks, and what a step allocates at most beside the weights."""
    head = ["network", "images", "precision", "layout", "mode", "pass", "attention"]
    head += ["images/s", "time / without"]
    lines = []
    for row in result["rows"]:
        for name, t in row["contenders"].items():
            memory = f"{t['peak_bytes'] / MB:.0f} MB" if t.get("peak_bytes") else "-"
            times = [f"{t['images_per_s']:.1f}", text(t.get("times_none", {}).get("median"))]
            images = f"{row['batch']}x3x{row['size']}x{row['size']}"
            place = [row["network"], images, row["precision"], row["layout"], row["mode"]]
            place.append(row["pass"])
            lines.append([*place, name, *times, memory])
    return markdown([*head, "peak memory"], lines)


def kind_of(name: str) -> str:
    """A contender of networks.py without its attention: "fused" for "fused ECA"."""
    return name.removesuffix(" ECA").removesuffix(" SE")


def networks_in_short(result: Result) -> str:
    """Markdown: the time of networks with attention, divided by the time without."""
    head = ["network", "images", "precision", "layout", "mode", "pass"]
    kinds: dict[str, list[str]] = {}  # "plain": "plain ECA", "plain SE"
    for name in dict.fromkeys(n for row in result["rows"] for n in row["contenders"]):
        kinds.setdefault(kind_of(name), []).append(name)
    kinds.pop("none", None)
    lines = []
    for row in result["rows"]:
        images = f"{row['batch']}x3x{row['size']}x{row['size']}"
        place = [row["network"], images, row["precision"], row["layout"], row["mode"], row["pass"]]
        for names in kinds.values():
            found = (row["contenders"][name] for name in names if name in row["contenders"])
            place.append(text(next(found, {}).get("times_none", {}).get("median")))
        lines.append(place)
    columns = [names[0] if len(names) == 1 else kind for kind, names in kinds.items()]
    return markdown([*head, *(f"{column} / without" for column in columns)], lines)


def sizes(result: Result) -> str:
    """Markdown: picoseconds per element at every size."""
    names = list(dict.fromkeys(n for row in result["rows"] for n in row["contenders"]))
    lines = []
    for row in result["rows"]:
        place = [row["axis"], layer_of(row), row["layout"], row["direction"]]
        times = (row["contenders"].get(name, {}).get("ps_per_element") for name in names)
        cells = [text(value, "{:.1f}") for value in times]
        lines.append([*place, f"{row['map_bytes'] / MB:.2f}", *cells])
    return markdown(["axis", "layer", "layout", "direction", "MB", *names], lines)
