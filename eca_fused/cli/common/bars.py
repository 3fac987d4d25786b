"""Bars of the times of contenders. Needs matplotlib."""

from collections.abc import Sequence
from typing import Any

from matplotlib.axes import Axes

from eca_fused.cli.common.measure import ratio
from eca_fused.cli.common.style import BLUE, GREEN, GREY, ORANGE, SKY
from eca_fused.cli.common.timing import Case

__all__ = ["draw_bars", "handles"]

CONTENDERS = {  # the name in a Case, with its colour and its name in the legend
    "copy": (GREY, "copy of as many bytes"),
    "plain": (ORANGE, "plain PyTorch"),
    "compiled": (GREEN, "torch.compile of plain"),
    "fused": (BLUE, "fused"),
    "fused, compiled": (SKY, "torch.compile of fused"),
}


def handles(cases: Sequence[Case]) -> list[Any]:
    """The legend, with the contenders that were timed."""
    from matplotlib.patches import Patch

    timed = {n for case in cases for n, c in case.contenders.items() if c.seconds}
    return [Patch(color=c, label=label) for n, (c, label) in CONTENDERS.items() if n in timed]


def draw_bars(axes: Axes, title: str, cases: Sequence[Case]) -> None:
    axes.set_title(title)
    axes.set_ylabel("time of one call, ms")
    axes.grid(axis="y")
    for i, case in enumerate(cases):
        shown = [name for name in CONTENDERS if name in case.contenders]
        shown = [name for name in shown if case.contenders[name].seconds]
        width = 0.88 / max(len(shown), 3)
        for j, name in enumerate(shown):
            contender = case.contenders[name]
            spread = contender.spread
            assert spread is not None
            low, middle, high = (1e3 * t for t in (spread.p20, spread.median, spread.p80))
            place = i + (j - (len(shown) - 1) / 2) * width
            axes.bar(
                place,
                middle,
                0.92 * width,
                color=CONTENDERS[name][0],
                yerr=[[max(middle - low, 0)], [max(high - middle, 0)]],
                error_kw={"linewidth": 1, "capsize": 2},
            )
            times = ratio(case.contenders["plain"], contender)
            if name != "plain" and times is not None:
                axes.annotate(
                    f"{times.median:.2f}",
                    (place, high),
                    (0, 3),
                    textcoords="offset points",
                    ha="center",
                    fontsize=9,
                    fontweight="bold" if name == "fused" else "normal",
                )
    labels = [
        f"{case.place if case.ideal_bytes else case.pass_}\n{'x'.join(map(str, case.shape))}"
        for case in cases
    ]
    axes.set_xticks(range(len(cases)), labels, fontsize=9)
    axes.margins(y=0.12)
