"""Times whole networks: without attention, with plain attention, with fused attention and tails.

    python benchmarks/networks.py                        # ResNet-50 and MobileNetV2, eager
    python benchmarks/networks.py --network seresnet50 eca_nfnet_l0
    python benchmarks/networks.py --mode eager compiled --output networks.json --plot networks.png

Times inference, and a training step without the optimiser, in both memory layouts. Compiled, fused
ECA and tails are what backend="auto" chooses; native ECA and native tails always run the kernels.
All weights are the same. "tails" is convert(tails=True): batch norm, attention, addition and
activation as one operation. The outputs of all fused networks are checked against the plain one's
before anything is timed; layers.py and tails.py check gradients. Convolutions run as PyTorch sets
them, on a GPU in TF32. --precision bfloat16 is autocast. Memory is the most that a step allocates
at a time, beside the weights and the images.
"""

import argparse
import copy
import importlib
import sys
from collections.abc import Callable
from functools import partial
from itertools import product
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile

import report
from eca_fused import ECALayer, convert
from eca_fused.attention import ChannelAttention
from eca_fused.cli.common.measure import interleaved, reason
from eca_fused.models import MobileNetV2, ResNet, mobilenetv2, resnet, set_fused
from eca_fused.ops import native
from eca_fused.torch_state import forget_compiled
from lib.cases import LAYOUTS
from lib.devices import Device, device_named
from lib.machine import machine
from lib.script import (
    INTERRUPTED,
    add_options,
    chosen_options,
    positive,
    prepare,
    progress,
    until_interrupted,
    write,
)
from lib.timing import statistics_of

PASSES = ("inference", "training step")
MODES = ("eager", "compiled")
Step = Callable[[], object]


def without_attention(network: nn.Module) -> nn.Module:
    """A copy of a timm network whose blocks have no attention."""
    found = copy.deepcopy(network)
    for module in found.modules():
        if getattr(module, "attn_last", None) is not None:
            module.attn_last = None
    return found


def of_ours(make: Callable[..., nn.Module], attention: str) -> dict[str, nn.Module]:
    return {"none": make("none"), "plain": make(attention, fused=False)}


def of_timm(name: str) -> dict[str, nn.Module]:
    network = importlib.import_module("timm").create_model(name)
    for key, parameter in network.named_parameters():
        if key.endswith("gain") and not parameter.any():  # would hide what the branch does
            parameter.data.fill_(0.5)
    return {"none": without_attention(network), "plain": network}


# What makes a network without attention and with plain attention, and the name of the attention.
NETWORKS: dict[str, tuple[Callable[[], dict[str, nn.Module]], str]] = {
    "resnet50": (partial(of_ours, partial(resnet, 50), "eca"), "ECA"),
    "mobilenetv2": (partial(of_ours, mobilenetv2, "eca"), "ECA"),
    "seresnet50": (partial(of_ours, partial(resnet, 50), "se"), "SE"),
    "eca_nfnet_l0": (partial(of_timm, "eca_nfnet_l0"), "ECA"),
}
USUAL = ("resnet50", "mobilenetv2")


def fused(network: nn.Module) -> nn.Module:
    found = copy.deepcopy(network)
    if isinstance(network, ResNet | MobileNetV2):
        set_fused(found, True)
    else:
        convert(found)
    return found


def by_kernels(network: nn.Module) -> nn.Module:
    """A copy whose attention and tails always run the native kernels."""
    found = copy.deepcopy(network)
    for module in found.modules():
        if isinstance(module, ECALayer | ChannelAttention):
            module.backend = "native"
    return found


def built(name: str, device: Device, layout: str, mode: str) -> dict[str, nn.Module]:
    """The network in its kinds; those with attention have the same weights."""
    make, attention = NETWORKS[name]
    kinds = make()
    found = {"none": kinds["none"], f"plain {attention}": kinds["plain"]}
    unknown = found["none"].load_state_dict(kinds["plain"].state_dict(), strict=False)
    if unknown.missing_keys:
        raise RuntimeError(f"without attention, {name} has other weights: {unknown.missing_keys}")
    ours = {f"fused {attention}": fused(kinds["plain"]), "tails": fused(kinds["plain"])}
    convert(ours["tails"], tails=True)
    found |= ours
    if mode == "compiled" and native.unsupported(torch.device(device.tensors)) is None:
        # In a compiled network "auto" may leave layers and tails to the compiler.
        for kind, network in ours.items():
            found[f"native {kind.removeprefix('fused ')}"] = by_kernels(network)
    memory_format = torch.channels_last if layout == "channels_last" else torch.contiguous_format
    for network in found.values():
        network.to(device.tensors).to(memory_format=memory_format)  # type: ignore[call-overload]
    return found


def precision_of(name: str, device: Device) -> Any:
    """Autocast, or nothing for float32."""
    enabled = name == "bfloat16"
    return torch.autocast(torch.device(device.tensors).type, torch.bfloat16, enabled=enabled)


def infer(network: nn.Module, images: Tensor, precision: str, device: Device) -> None:
    with torch.no_grad(), precision_of(precision, device):
        network(images)


def train(
    network: nn.Module, images: Tensor, labels: Tensor, precision: str, device: Device
) -> None:
    """Loss and gradients; images (N, 3, H, W), labels (N,)."""
    with precision_of(precision, device):
        loss = F.cross_entropy(network(images).float(), labels)
    torch.autograd.grad(loss, list(network.parameters()))


def difference(networks: dict[str, nn.Module], images: Tensor) -> float:
    """Largest difference of the logits of plain and fused networks, relative to the largest logit.

    In float32 without TF32, and in evaluation mode.
    """
    tf32 = torch.backends.cudnn.allow_tf32
    torch.backends.cudnn.allow_tf32 = False
    with torch.no_grad():
        plain, *others = (
            network.eval()(images) for kind, network in networks.items() if kind != "none"
        )
    torch.backends.cudnn.allow_tf32 = tf32
    found = torch.stack([(plain - other).abs().max() for other in others]).max()
    return float(found / plain.abs().max())


def seconds(step: Step, device: Device) -> float:
    """Seconds of one step, until the GPU is done."""
    device.synchronize()
    start = device.host_seconds()
    step()
    device.synchronize()
    return device.host_seconds() - start


def peak_bytes(step: Step, device: Device) -> int | None:
    """The most bytes a step allocates at a time, beside weights and images; None if unknown."""
    if device.kind == "cuda" and device.tensors == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        step()
        return int(torch.cuda.max_memory_allocated() - before)
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as trace:
        step()
    profiler: Any = trace.profiler
    events = [e for e in profiler.kineto_results.events() if e.name() == "[memory]"]
    peak = allocated = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        allocated += event.nbytes()
        peak = max(peak, allocated)
    return peak or None


def measure(
    name: str, layout: str, mode: str, pass_: str, args: argparse.Namespace, device: Device
) -> dict[str, Any]:
    """All kinds of a network in one pass."""
    forget_compiled()
    torch.manual_seed(0)
    memory_format = torch.channels_last if layout == "channels_last" else torch.contiguous_format
    images = torch.randn(args.batch, 3, args.size, args.size, device=device.tensors)
    images = images.contiguous(memory_format=memory_format)
    labels = torch.arange(args.batch, device=device.tensors) % 10
    row: dict[str, Any] = {"network": name, "layout": layout, "mode": mode, "pass": pass_}
    row |= {"batch": args.batch, "size": args.size, "precision": args.precision}
    row |= {"contenders": {}, "failed": []}
    networks = built(name, device, layout, mode)
    row["difference"] = difference(networks, images)
    # Rounding errors grow over fifty layers; a wrong layer gives differences near one.
    if not row["difference"] < 1e-3:
        row["failed"].append(f"a fused network differs from plain by {row['difference']:.2g}")
    steps: dict[str, Step] = {}
    for kind, network in networks.items():
        network.train(pass_ == "training step")
        runs: Any = torch.compile(network) if mode == "compiled" else network
        arguments = (args.precision, device)
        step = partial(train, runs, images, labels, *arguments)
        if pass_ == "inference":
            step = partial(infer, runs, images, *arguments)
        try:
            step()
            steps[kind] = step
        except Exception as error:  # a contender that does not run is a result, not an end
            row["failed"].append(f"{kind}: {reason(error)}")
    if not steps:
        return row
    samples = interleaved(lambda kind: seconds(steps[kind], device), list(steps), args.rounds)
    for kind, values in samples.items():
        entry = {
            "us": statistics_of([1e6 * s for s in values]),
            "images_per_s": args.batch / statistics_of(values)["median"],
            "peak_bytes": peak_bytes(steps[kind], device),
        }
        if "none" in samples:
            pairs = zip(values, samples["none"], strict=True)
            entry["times_none"] = statistics_of([s / none for s, none in pairs])
        row["contenders"][kind] = entry
    return row


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    add_options(parser, rounds=7)
    parser.add_argument("--network", choices=NETWORKS, nargs="+", default=list(USUAL))
    parser.add_argument("--mode", choices=MODES, nargs="+", default=["eager"])
    parser.add_argument("--pass", dest="passes", choices=PASSES, nargs="+", default=list(PASSES))
    parser.add_argument("--layout", choices=LAYOUTS, nargs="+", default=list(LAYOUTS))
    parser.add_argument("--precision", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument("--batch", type=positive, help="images (default: 128 on a GPU, 4 on a CPU)")
    parser.add_argument("--size", type=positive, default=224, help="pixels a side (default 224)")
    args = parser.parse_args(argv)
    prepare(args)
    device = device_named(args.device)
    args.batch = args.batch or (128 if device.tensors == "cuda" else 4)
    result: dict[str, Any] = {"script": "networks", "machine": machine(device)}
    result |= {"options": chosen_options(args), "rows": [], "remarks": []}
    cases = list(product(args.network, args.layout, args.mode, args.passes))
    with until_interrupted(result):
        for case in progress(cases, len(cases)):
            try:
                row = measure(*case, args, device)
                result["rows"].append(row)
                failed = row["failed"]
            except Exception as error:  # out of memory, say: the others can still be measured
                failed = [reason(error)]
            result["remarks"] += [f"FAILED {' '.join(case)}: {what}" for what in failed]
            write(args.output, result)
    write(args.output, result)
    status = report.show(result, args.plot)
    return INTERRUPTED if "interrupted" in result else status


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
