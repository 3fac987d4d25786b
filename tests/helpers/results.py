"""Made-up rows and results of the benchmarks, and wrong contenders."""

import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lib import contenders


def times(**ratios: float) -> dict[str, Any]:
    """Contenders with these times relative to ours, and a spread of five percent."""

    def spread(value):
        return {"median": value, "p20": 0.95 * value, "p80": 1.05 * value}

    return {
        name.replace("_", " "): {
            "us": spread(10 * value),
            "gbps": 1.0,
            "of_copy": spread(ratios.get("copy", 1.0) / value),
            "times_ours": spread(value),
        }
        for name, value in ratios.items()
    }


def row(
    shape: tuple[int, ...] = (32, 256, 56, 56),
    k: int = 3,
    direction: str = "forward",
    ideal: int = 10**6,
    **ratios: float,
) -> dict[str, Any]:
    """A row of layers.py, with these times relative to ours."""
    return {
        "shape": list(shape), "k": k, "dtype": "bfloat16", "layout": "contiguous",
        "direction": direction, "ideal_bytes": ideal, "failed": [],
        "contenders": times(native=1.0, **ratios),
    }  # fmt: skip


def result(*rows: dict[str, Any], device: str = "cpu") -> dict[str, Any]:
    """A result of layers.py."""
    place = {"device": device, "dry_run": True}
    return {"script": "layers", "machine": place, "rows": list(rows), "left_out": []}


def written(folder: Path, **results: Any) -> list[str]:
    """Result files, and their paths."""
    for name, what in results.items():
        (folder / f"{name}.json").write_text(json.dumps(what))
    return [str(folder / f"{name}.json") for name in results]


def wrong_contenders(taps: Tensor) -> dict[str, contenders.Contender]:
    """Contenders that are wrong in all ways: forward, backward, or by an exception."""

    def broken(x, w):
        raise RuntimeError("nothing works")

    class Half(torch.autograd.Function):
        @staticmethod
        def forward(ctx, y):
            return y.clone()

        @staticmethod
        def backward(ctx, dy):
            return dy / 2

    found = {
        "native": contenders.plain,
        "eager": lambda x, w: contenders.plain(x, w) * 1.1,
        "timm": broken,
        "compile": lambda x, w: Half.apply(contenders.plain(x, w)),
    }
    return {name: contenders.with_taps(layer, taps) for name, layer in found.items()}
