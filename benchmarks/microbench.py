"""Times ECA layers, forward and backward, on the CPU: ours, plain PyTorch, torch.compile, a copy.

gpu_bench.py is the same on a GPU.

    python benchmarks/microbench.py                       # ResNet-50's layers, float32, 2 minutes
    python benchmarks/microbench.py --dtype bfloat16 --layout channels_last
    python benchmarks/microbench.py --output result.json  # then: benchmarks/report.py result.json

Every contender is checked against the plain form before it is timed; a wrong one is reported and
makes the exit status 1. GB/s counts the ideal bytes: x read and y written once forward, dy and x
read and dx written once backward, whatever a contender really moves. Outputs are fresh, but for
ours in place. "eager" is eca_fused.reference.eca() for the layers and timm's EcaModule for the
small call; torch.compile is in its default mode.
"""

import argparse
import json
import sys
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch._dynamo
from forms import Layer, plain, results, shifted, worst
from harness import interleaved, machine, restart_with_malloc, summarise
from timm.layers.eca import EcaModule

import eca_fused

# The ECA layers of ResNet-50 behind each stage: channels, size, taps of the authors' checkpoint.
RESNET50 = [(256, 56, 3), (512, 28, 5), (1024, 14, 5), (2048, 7, 7)]
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def contenders() -> dict[str, Layer]:
    return {
        "native": eca_fused.eca,
        "eager": plain,
        "compile conv": torch.compile(plain, dynamic=False, fullgraph=True),
        "compile shifted": torch.compile(shifted, dynamic=False, fullgraph=True),
    }


def measure(
    shape: tuple[int, ...], k: int, dtype: torch.dtype, layout: str, rounds: int
) -> dict[str, Any]:
    """Check, then time, all contenders on one layer."""
    torch._dynamo.reset()
    memory_format = torch.channels_last if layout == "channels_last" else torch.contiguous_format
    x = torch.randn(shape).to(dtype).contiguous(memory_format=memory_format)  # (N, C, H, W)
    dy = torch.randn_like(x)
    weight = torch.randn(1, 1, k).to(dtype)
    x_grad, weight_grad = x.clone().requires_grad_(), weight.clone().requires_grad_()
    exact = results(plain, x.double(), weight.double(), dy.double())
    usual = [worst(*pair) for pair in zip(results(plain, x, weight, dy), exact, strict=True)]
    # As good as plain PyTorch in this dtype, but for the order of its sums.
    limits = [4 * (error + torch.finfo(dtype).eps) for error in usual]
    failed = []
    forward: dict[str, Any] = {"copy": (lambda: None, lambda _: x.clone())}
    backward: dict[str, Any] = {}
    for name, layer in contenders().items():
        try:
            got = results(layer, x, weight, dy)
        except Exception as reason:  # a contender that does not run is a result, not an end
            failed.append(f"{name}: {type(reason).__name__}: {reason}"[:300])
            continue
        errors = [worst(*pair) for pair in zip(got, exact, strict=True)]
        wrong = [
            f"{what} has relative error {error:.2g}, allowed {limit:.2g}"
            for what, error, limit in zip(("y", "dx", "dweight"), errors, limits, strict=True)
            if not error <= limit
        ]
        if wrong:
            failed.append(f"{name}: {', '.join(wrong)}")
            continue
        forward[name] = (lambda: None, lambda _, layer=layer: layer(x, weight))
        backward[name] = (
            partial(layer, x_grad, weight_grad),
            lambda y: torch.autograd.grad(y, (x_grad, weight_grad), dy),
        )
    own = x.clone(memory_format=torch.preserve_format)
    forward["native in place"] = (lambda: own.copy_(x), lambda _: eca_fused.eca_(own, weight))
    with torch.no_grad():
        forward_times = summarise(interleaved(forward, rounds))
    backward["copy"] = forward["copy"]
    backward_times = summarise(interleaved(backward, rounds))
    map_bytes = x.numel() * x.element_size()
    return {
        "shape": list(shape),
        "k": k,
        "dtype": str(dtype).removeprefix("torch."),
        "layout": layout,
        "failed": failed,
        "forward": {"ideal_bytes": 2 * map_bytes, "contenders": forward_times},
        "backward": {"ideal_bytes": 3 * map_bytes, "contenders": backward_times},
    }


def measure_host(rounds: int) -> dict[str, Any]:
    """Host time of a call so small that the arithmetic does not matter: one sample of 64x7x7."""
    x = torch.randn(1, 64, 7, 7)
    dy = torch.randn_like(x)
    x_grad = x.clone().requires_grad_()
    layers = {"native": eca_fused.ECALayer(64), "eager": EcaModule(64)}
    layers["compile"] = torch.compile(EcaModule(64), dynamic=False, fullgraph=True)
    nothing = lambda: None  # noqa: E731

    def training_step(layer: torch.nn.Module) -> None:
        layer(x_grad).backward(dy)

    with torch.no_grad():
        inference = {name: (nothing, lambda _, m=m: m(x)) for name, m in layers.items()}
        forward = summarise(interleaved(inference, rounds, repeat=500))
    training = {name: (nothing, lambda _, m=m: training_step(m)) for name, m in layers.items()}
    training["sigmoid"] = (nothing, lambda _: torch.sigmoid(x_grad).backward(dy))
    both = summarise(interleaved(training, rounds, repeat=200))
    return {"shape": [1, 64, 7, 7], "forward": forward, "forward and backward": both}


def parse(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--batch", type=int, default=32, help="samples (default 32)")
    parser.add_argument("--dtype", choices=DTYPES, nargs="+", default=["float32"])
    layouts = ["contiguous", "channels_last"]
    parser.add_argument("--layout", choices=layouts, nargs="+", default=layouts[:1])
    parser.add_argument("--rounds", type=int, default=25, help="samples of each time (default 25)")
    parser.add_argument("--malloc", choices=["recycled", "default"], default="recycled")
    parser.add_argument("--output", type=Path, help="JSON file to write")
    return parser.parse_args(argv)


def main(argv: list[str]) -> int:
    args = parse(argv)
    restart_with_malloc(args.malloc)
    torch.manual_seed(0)
    result: dict[str, Any] = {"machine": machine(), "layers": []}
    status = 0
    for dtype in args.dtype:
        for layout in args.layout:
            for channels, size, k in RESNET50:
                shape = (args.batch, channels, size, size)
                row = measure(shape, k, DTYPES[dtype], layout, args.rounds)
                result["layers"].append(row)
                for reason in row["failed"]:
                    print(f"FAILED {shape} {dtype} {layout} {reason}", file=sys.stderr)
                    status = 1
                for direction in ("forward", "backward"):
                    times = row[direction]["contenders"]
                    text = "  ".join(f"{n} {t['ms']['median']:.2f}" for n, t in times.items())
                    print(f"{dtype} {layout} {shape} {direction} ms: {text}", flush=True)
    torch._dynamo.reset()
    result["host"] = measure_host(args.rounds)
    for direction in ("forward", "forward and backward"):
        times = result["host"][direction]
        text = "  ".join(f"{n} {1e3 * t['ms']['median']:.1f}" for n, t in times.items())
        print(f"1x64x7x7 {direction}, us: {text}")
    if args.output:
        args.output.write_text(json.dumps(result, indent=1) + "\n")
    return status


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
