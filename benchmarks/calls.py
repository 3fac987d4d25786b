"""Times the host's part of small calls, where the arithmetic does not matter.

    python benchmarks/calls.py
    python benchmarks/calls.py --output calls.json

Compares fused ECA, plain PyTorch, timm's EcaModule eager and compiled, and one sigmoid. On a GPU
it also replays a CUDA graph of each layer's forward pass, which costs the host the same whatever it
holds. Modules are called, as networks call them. On a GPU the time is what the host takes to submit
a call to an empty queue.
"""

import argparse
import sys
from collections.abc import Callable
from functools import partial
from itertools import product
from typing import Any

import torch
from torch import Tensor, nn

import eca_fused
import report
from eca_fused.cli.common.measure import interleaved, reason
from eca_fused.torch_state import forget_compiled
from lib.contenders import timm_module
from lib.devices import Device, DryRun, device_named
from lib.gpu_timing import no_collection
from lib.machine import machine
from lib.script import INTERRUPTED, add_options, chosen_options, prepare, until_interrupted, write
from lib.timing import summarise

SHAPES = [(1, 64, 7, 7), (1, 256, 14, 14)]
CALLS = {"cpu": 300, "cuda": 20}  # per sample; few enough for a GPU's queue
Step = Callable[[], object]


def modules(channels: int, taps: Tensor) -> dict[str, nn.Module]:
    """ECA layers with the same taps, by name."""

    def layer(**options: Any) -> nn.Module:
        made = eca_fused.ECALayer(channels, kernel_size=taps.shape[-1], **options).to(taps.device)
        with torch.no_grad():
            made.conv.weight.copy_(taps)
        return made

    found: dict[str, nn.Module] = {}
    for name in ("native", "triton"):
        if taps.device.type in (eca_fused.backends()[name].devices or ()):
            found[name] = layer(backend=name)
    found["eager"] = layer(fused=False)
    module = timm_module(taps)
    if module is not None:
        found["timm"] = module
    made: Any = torch.compile(module or found["eager"], dynamic=False, fullgraph=True)
    return found | {"compile": made, "sigmoid": nn.Sigmoid()}


def infer(module: nn.Module, x: Tensor) -> None:
    with torch.no_grad():
        module(x)


def train(module: nn.Module, x: Tensor, dy: Tensor) -> None:
    """Forward and backward, into fresh gradients."""
    x.grad = None
    module.zero_grad()
    module(x).backward(dy)


def seconds(step: Step, calls: int, device: Device) -> float:
    """The host's seconds for a call."""
    device.synchronize()
    start = device.host_seconds()
    for _ in range(calls):
        step()
    elapsed = device.host_seconds() - start
    device.synchronize()
    return elapsed / calls


def graphed(step: Step, device: Device) -> Step:
    """The replay of a CUDA graph of this call."""

    def once() -> tuple[()]:
        step()
        return ()

    with no_collection():
        recording: Any = device.record([once])
    return recording.replay  # type: ignore[no-any-return]


def able(steps: dict[str, Step], failed: list[str]) -> dict[str, Step]:
    """The steps that run; each runs a few times to see."""
    found = {}
    for name, step in steps.items():
        try:
            for _ in range(5):
                step()
            found[name] = step
        except Exception as error:  # a contender that does not run is a result, not an end
            failed.append(f"{name}: {reason(error)}")
    return found


def measure(shape: tuple[int, ...], direction: str, device: Device, rounds: int) -> dict[str, Any]:
    """One shape in one direction."""
    forget_compiled()
    x, dy = (torch.randn(shape, device=device.tensors) for _ in range(2))
    layers = modules(shape[1], torch.randn(1, 1, 3, device=device.tensors))
    failed: list[str] = []
    if direction == "forward":
        steps: dict[str, Step] = {n: partial(infer, m, x) for n, m in layers.items()}
    else:
        leaf = x.requires_grad_()
        steps = {n: partial(train, m, leaf, dy) for n, m in layers.items()}
    steps = able(steps, failed)
    if device.kind == "cuda" and direction == "forward":
        made = {f"{n}, graph": partial(graphed, steps[n], device) for n in steps if n != "sigmoid"}
        for name, make in made.items():
            try:
                steps[name] = make()
            except Exception as error:
                failed.append(f"{name}: {reason(error)}")
    calls = 2 if isinstance(device, DryRun) else CALLS[device.kind]
    samples = interleaved(
        lambda name: 1e6 * seconds(steps[name], calls, device), list(steps), rounds
    )
    row: dict[str, Any] = {"shape": list(shape), "dtype": "float32", "direction": direction}
    return {**row, "contenders": summarise(samples), "failed": failed}


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    add_options(parser, rounds=25, plot=False)
    args = parser.parse_args(argv)
    prepare(args)
    device = device_named(args.device)
    result: dict[str, Any] = {"script": "calls", "machine": machine(device)}
    result |= {"options": chosen_options(args), "rows": [], "remarks": []}
    with until_interrupted(result):
        for shape, direction in product(SHAPES, ("forward", "forward and backward")):
            row = measure(shape, direction, device, args.rounds)
            result["rows"].append(row)
            result["remarks"] += [f"FAILED {shape} {direction}: {what}" for what in row["failed"]]
            write(args.output, result)
    write(args.output, result)
    failed = report.show(result, None)
    return INTERRUPTED if "interrupted" in result else failed


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
