"""The main job: the order of its steps, and its result."""

import contextlib
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, TextIO

import torch
from torch import Tensor

from eca_fused.cli.common import environment, photographs
from eca_fused.cli.common.console import Progress
from eca_fused.cli.common.photographs import Photograph
from eca_fused.cli.common.time_tables import how_timed, timing_document
from eca_fused.cli.common.timing import Case, Effort
from eca_fused.cli.demo import network, report
from eca_fused.cli.demo.check import check
from eca_fused.cli.demo.comparison import Check
from eca_fused.cli.demo.timing import CASES, layer_cases, network_cases
from eca_fused.models import ResNet

__all__ = ["Settings", "run"]

SEED = 0


@dataclass(frozen=True)
class Settings:
    """The settings of a run.

    Attributes:
        batch: images in the batch, in which the photographs alternate.
        dtype, device: of the network and its input.
        channels_last: the memory format of both; contiguous otherwise.
        output: folder for the pictures.
        effort: how long to measure; None leaves the times out.
        size: side of the images, in pixels.
    """

    batch: int
    dtype: torch.dtype
    device: torch.device
    channels_last: bool
    output: Path
    effort: Effort | None
    size: int = 224

    @property
    def input(self) -> str:
        """Shape, dtype and memory format of the input, for a title."""
        layout = "channels_last" if self.channels_last else "contiguous"
        dtype = str(self.dtype).removeprefix("torch.")
        return f"{self.batch}x3x{self.size}x{self.size}, {dtype}, {layout}"

    def place(self, thing: Any) -> Any:
        """A network or tensor (N, C, H, W) with the device, dtype and memory format of the run."""
        form = torch.channels_last if self.channels_last else torch.contiguous_format
        return thing.to(device=self.device, dtype=self.dtype, memory_format=form)


@dataclass(frozen=True)
class Scene:
    """The network in both forms, with the same weights, and its input.

    Attributes:
        samples: the photographs.
        images: (2, 3, H, W), each photograph once.
        plain, fused: the network with its ECA in either form.
        x: (N, 3, H, W), the batch in which they alternate.
    """

    samples: list[Photograph]
    images: Tensor
    plain: ResNet
    fused: ResNet
    x: Tensor


def prepare(settings: Settings) -> Scene:
    """The photographs, a network with batch norms adapted to them, and the batch."""
    samples = photographs.load_photographs()
    images = photographs.preprocess(samples, settings.size)
    plain = settings.place(network.build(images, SEED))
    x = settings.place(photographs.fill_batch(images, settings.batch))
    return Scene(samples, settings.place(images), plain, network.fused_copy(plain), x)


def run(settings: Settings, out: TextIO) -> dict[str, Any]:
    """Check, then time and draw if the check has passed; the report goes to `out`.

    Returns:
        All results, ready for JSON.
    """
    found = environment.describe(settings.device, settings.dtype)
    print(introduction(settings, found), file=out, flush=True)
    cases: list[Case] = []
    pictures: dict[str, str] = {}
    with contextlib.closing(Progress(3 + (CASES if settings.effort else 0))) as progress:
        progress.step("photographs, and the network's statistics on them")
        scene = prepare(settings)
        progress.step("check: plain, fused and float64")
        checked = check(scene.plain, scene.fused, scene.x, [s.name for s in scene.samples])
        progress.hide()
        print("\n" + report.check_text(checked, out), file=out, flush=True)
        if checked.passed:
            if settings.effort:
                for measure in (layer_cases, network_cases):
                    cases += measure(
                        scene.plain, scene.fused, scene.x, settings.effort, progress.step
                    )
            progress.step("pictures")
            pictures = draw(settings, scene, cases, environment.summary(found))
    if cases:
        print("\n" + report.timing_text(cases, how_timed(found), out), file=out)
    for path in pictures.values():
        print(f"{path}", file=out)
    return document(settings, found, scene, checked, cases, pictures)


def introduction(settings: Settings, found: dict[str, Any]) -> str:
    """The lines that say what runs, and where."""
    lines = [
        f"ECA-ResNet-50 (kernel sizes {network.KERNEL_SIZES}) with random weights, seed {SEED}",
        f"Input: two photographs, alternating, {settings.input}",
        f"On: {environment.summary(found)}",
        f"Fused ECA: {found['fused']}",
    ]
    if found["fused"].startswith("plain PyTorch"):
        lines.append("None of this package's kernels runs: below, fused is plain PyTorch too")
    if found["device"] == "cuda" and settings.dtype == torch.float32:
        used = "with" if found["tf32_convolutions"] else "without"
        lines.append(f"Convolutions {used} TF32, in the plain and in the fused network alike")
    return "\n".join(lines)


def draw(settings: Settings, scene: Scene, cases: list[Case], where: str) -> dict[str, str]:
    """Write the pictures; their paths by name."""
    from eca_fused.cli.demo.pictures import draw_gates, draw_times

    device = settings.device.type.upper()
    once = replace(settings, batch=len(scene.samples))
    paths = {"gates": settings.output / "gates.png"}
    draw_gates(
        paths["gates"],
        scene.samples,
        network.gates(scene.fused, scene.images),
        settings.size,
        f"ECA-ResNet-50: gates of the last fused ECA layer of each stage ({device}, {once.input})",
        f"Random weights (seed {SEED}), batch norms adapted to the photographs. {where}.",
    )
    if cases:
        paths["times"] = settings.output / "times.png"
        draw_times(
            paths["times"],
            cases,
            f"ECA-ResNet-50: times ({device}, {settings.input})",
            "Bars: medians of interleaved rounds, with p20 and p80. Numbers: how many times as "
            f"fast as plain PyTorch, median over rounds.\n{where}.",
        )
    return {name: str(path) for name, path in paths.items()}


def document(
    settings: Settings,
    found: dict[str, Any],
    scene: Scene,
    checked: Check,
    cases: list[Case],
    pictures: dict[str, str],
) -> dict[str, Any]:
    """The result for JSON."""
    return {
        "environment": found,
        "network": {
            "name": "ECA-ResNet-50",
            "kernel_sizes": network.KERNEL_SIZES,
            "weights": "random",
            "seed": SEED,
        },
        "input": {
            "photographs": [sample.name for sample in scene.samples],
            "shape": list(scene.x.shape),
            "dtype": str(settings.dtype).removeprefix("torch."),
            "channels_last": settings.channels_last,
        },
        "check": report.check_document(checked),
        "effort": asdict(settings.effort) if settings.effort else None,
        "times": timing_document(cases) if cases else None,
        "pictures": pictures,
    }
