"""Tuning on request: ECA_FUSED_TRITON_AUTOTUNE=1 times a few configurations of a kernel.

Without it, the rule of plan.py decides, and no kernel is timed. Tuning is keyed by the rows of a
map, not by the number of samples, so a new batch size tunes nothing. Calls that write in place are
not tuned, because a kernel can run only once on them.
"""

import functools
import os
from collections.abc import Callable
from typing import Any

import triton

from eca_fused.ops.triton.plan import TILE, TILE_MOST, Pass, Shape, Tile, power_of_two

enabled = os.environ.get("ECA_FUSED_TRITON_AUTOTUNE", "") not in ("", "0")

KEY = ["channels", "pixels", "PLANES", "ALIGN"]

# Elements and warps of a resident tile, around those of the rule. Smaller tiles let more programs
# share a processor and hide each other's latency. Other numbers of warps change the loads in flight
# per thread. A larger tile has a relatively smaller halo, although it spills for some shapes.
RESIDENT = ((TILE // 2, 4), (TILE, 8), (TILE_MOST, 8), (TILE_MOST, 16), (2 * TILE_MOST, 16))

# Tiles and warps of a program of the second pass: many short programs or few long ones.
SCALE = ((1, 4), (1, 8), (4, 4), (8, 4))


def resident(
    kernel: Any, shape: Shape, tile: Tile, halo: Callable[[int], int], tuned: bool
) -> tuple[Any, dict[str, int]]:
    """The kernel to launch, and the constants that the launch must give: none if it is tuned.

    Args:
        kernel: one that keeps planes.
        shape: of the map.
        tile: from the rule.
        halo: halo places for a tile of a given number of channels.
        tuned: whether it may be tuned.
    """
    rule = {"BLOCK_C": tile.channels, "HALO": halo(tile.channels), "num_warps": tile.warps}
    if not (enabled and tuned):
        return kernel, rule
    configs = []
    for elements, warps in RESIDENT:
        channels = min(elements // tile.pixels, power_of_two(shape.channels))
        if channels >= 1 and (channels >= halo(channels) or channels >= shape.channels):
            configs.append((("BLOCK_C", channels), ("HALO", halo(channels)), ("num_warps", warps)))
    return (_tuned(kernel, tuple(dict.fromkeys(configs))), {}) if configs else (kernel, rule)


def scale(kernel: Any, pass_: Pass, tuned: bool) -> tuple[Any, dict[str, int]]:
    """As resident(), for the kernel that scales."""
    if not (enabled and tuned):
        return kernel, {"BLOCKS": pass_.blocks, "num_warps": pass_.tile.warps}
    configs = [(("BLOCKS", blocks), ("num_warps", warps)) for blocks, warps in SCALE]
    return _tuned(kernel, tuple(configs)), {}


@functools.cache
def _tuned(kernel: Any, configs: tuple[tuple[tuple[str, int], ...], ...]) -> Any:
    choices = []
    for config in configs:
        constants = dict(config)
        warps = constants.pop("num_warps")
        choices.append(triton.Config(constants, num_warps=warps))
    return triton.autotune(choices, KEY)(kernel)
