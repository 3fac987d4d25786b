"""Times the tail of a residual block: ours, plain PyTorch, torch.compile, and a copy.

    python benchmarks/tails.py                                  # ResNet-50's tails, about 4 minutes
    python benchmarks/tails.py --tail norm --layout channels_last --output tails.json

A norm tail has batch norm in training: relu(eca(bn(x)) + identity). A block tail has it in
evaluation, where it is an affine function. GB/s counts the ideal bytes: forward, x and the identity
read and y written, and with statistics x once more; backward, dy and x read and dx and the
identity's gradient written, with statistics dy and x once more; and ReLU's mask of one bit an
element. The copy moves as many. "no attention" is plain PyTorch without ECA, which does less.

Every contender's outputs and gradients are checked against float64 before it is timed. Forward runs
without autograd, as in inference, but with the norm as the tail has it.
"""

import argparse
import copy
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from itertools import product
from typing import Any

import torch
from torch import Tensor, nn

import report
from eca_fused import ECALayer, ResidualTail
from eca_fused.cli.common.measure import reason
from eca_fused.torch_state import forget_compiled
from lib.cases import DTYPES, LAYOUTS, NETWORKS, TailCase
from lib.devices import Device, Recording, device_named
from lib.gpu_timing import no_collection
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
from lib.timing import call_times, summarise

TAILS = ("norm", "block")
DIRECTIONS = ("forward", "forward and backward")
CONTENDERS = ("native", "eager", "no attention", "compile")
Results = tuple[Tensor, ...]  # y, and the gradients of x, the identity and the weights
MAPS = 3  # of the results


class Modules(nn.Module):
    """A tail whose modules are called one after the other."""

    def __init__(self, bn: nn.Module, attention: nn.Module) -> None:
        super().__init__()
        self.bn, self.attention = bn, attention

    def before_relu(self, x: Tensor, identity: Tensor) -> Tensor:
        y: Tensor = self.attention(self.bn(x))
        return y.add_(identity)

    def forward(self, x: Tensor, identity: Tensor) -> Tensor:
        return torch.relu_(self.before_relu(x, identity))


@dataclass
class Inputs:
    """Distinct maps that the calls rotate among, all (N, C, H, W)."""

    xs: list[Tensor]
    identities: list[Tensor]
    dys: list[Tensor]


def make_inputs(case: TailCase, device: Device) -> Inputs:
    count = device.distinct(3 * case.map_bytes)
    maps = [[case.random_map(device.tensors) for _ in range(count)] for _ in range(3)]
    return Inputs(*maps)


def modules(case: TailCase, device: Device) -> tuple[nn.BatchNorm2d, ECALayer]:
    """A batch norm and an ECA layer with weights of their own."""
    channels = case.shape[1]
    bn, attention = nn.BatchNorm2d(channels), ECALayer(kernel_size=case.k, fused=False)
    with torch.no_grad():
        for parameter in (*bn.parameters(), *attention.parameters()):
            parameter.copy_(torch.rand(parameter.shape) + 0.5)
    bn.train(case.tail == "norm")
    return bn.to(device.tensors), attention.to(device.tensors)


def contenders(case: TailCase, device: Device) -> dict[str, nn.Module]:
    """All that need no compilation, with the same weights."""
    bn, attention = modules(case, device)
    fused = copy.deepcopy(attention)
    fused.fused = True
    return {
        "native": ResidualTail(fused, copy.deepcopy(bn)),
        "eager": Modules(copy.deepcopy(bn), attention),
        "no attention": Modules(copy.deepcopy(bn), nn.Identity()),
    }


# ---- what is recorded and checked ----


def forward(tail: Callable[..., Tensor], x: Tensor, identity: Tensor) -> Results:
    return (tail(x, identity),)


def both(
    tail: Callable[..., Tensor], weights: list[Tensor], x: Tensor, identity: Tensor, dy: Tensor
) -> Results:
    y = tail(x, identity)
    return y.detach(), *torch.autograd.grad(y, (x, identity, *weights), dy)


def record(
    direction: str, tail: Any, weights: list[Tensor], inputs: Inputs, device: Device
) -> Recording:
    """The calls of a contender in one direction, one for each of the inputs."""
    if direction == "forward":
        maps = zip(inputs.xs, inputs.identities, strict=True)
        with torch.no_grad():
            calls = [lambda m=m: forward(tail, *m) for m in maps]
            return device.record(calls, before=device.writer(inputs.xs[0]))
    xs = [x.detach().requires_grad_() for x in inputs.xs]
    identities = [i.detach().requires_grad_() for i in inputs.identities]
    triples = zip(xs, identities, inputs.dys, strict=True)
    calls = [lambda m=m: both(tail, weights, *m) for m in triples]
    return device.record(calls, before=device.writer(xs[0]))


def record_copy(direction: str, case: TailCase, device: Device) -> Recording:
    """A copy that moves the ideal bytes."""
    ideal = case.ideal_bytes(direction)
    dtype = DTYPES[case.dtype]
    sources = [
        torch.randn(ideal // 2 // dtype.itemsize, device=device.tensors).to(dtype)
        for _ in range(device.distinct(ideal))
    ]
    calls = [lambda source=source: (source.clone(),) for source in sources]
    return device.record(calls, before=device.writer(sources[0]))


class Judge:
    """Knows the results of the first inputs in float64, and the errors of plain PyTorch.

    A contender may be off by four times as much: another order of sums and roundings is allowed, a
    wrong formula is farther off. The gradients of weights are sums of M values of either sign, of
    which a plain sum one after the other rounds off about sqrt(M) units in the last place. ReLU
    decides by the sign of a number that each contender rounds in its own way, so dy is set to zero
    where rounding may decide.
    """

    def __init__(self, tails: dict[str, Any], inputs: Inputs) -> None:
        self.inputs, self.wanted, self.usual = inputs, {}, {}
        first = (inputs.xs[0], inputs.identities[0], inputs.dys[0])
        names = ("eager", "no attention")
        exact = {name: copy.deepcopy(tails[name]).double() for name in names}
        least = 8 * torch.finfo(first[0].dtype).eps
        for one in exact.values():
            with torch.no_grad():
                v = copy.deepcopy(one).before_relu(*(m.double() for m in first[:2])).abs()
            first[2][v < least * v.max()] = 0
        for name in names:
            self.wanted[name] = results(exact[name], *(m.double() for m in first))
            got = results(copy.deepcopy(tails[name]), *first)
            pairs = zip(got, self.wanted[name], strict=True)
            self.usual[name] = [mean_error(a, b) for a, b in pairs]

    def faults(self, name: str, recording: Recording) -> list[str]:
        """What the calls get wrong; their outputs are filled with NaN first."""
        like = name if name in self.wanted else "eager"
        recording.poison()
        recording.replay()
        wrong = []
        x = self.inputs.xs[0]
        eps, values = torch.finfo(x.dtype).eps, x.numel() / x.shape[1]
        for i, got in enumerate(recording.outputs[0]):
            off = mean_error(got, self.wanted[like][i])
            limit = 4 * self.usual[like][i] + eps * (1 if i < MAPS else values**0.5)
            if not off <= limit:
                wrong.append(f"output {i} has relative error {off:.2g}, allowed {limit:.2g}")
        recording.forget()
        return wrong


def weights_of(tail: nn.Module) -> list[Tensor]:
    """The parameters in an order that does not depend on the class."""
    return [parameter for _, parameter in sorted(tail.named_parameters())]


def results(tail: nn.Module, x: Tensor, identity: Tensor, dy: Tensor) -> Results:
    """y, and the gradients of the maps and the weights."""
    x, identity = x.detach().requires_grad_(), identity.detach().requires_grad_()
    return both(tail, weights_of(tail), x, identity, dy)


def mean_error(got: Tensor, want: Tensor) -> float:
    """Root mean square error, relative to the root mean square; NaN where there is one."""
    return float((got.double() - want).norm() / want.norm())


# ---- one tail ----


def compiled(tail: nn.Module, inputs: Inputs) -> Any:
    """torch.compile of a tail, for inference and training."""
    made: Any = torch.compile(tail, dynamic=False, fullgraph=True)
    x, identity, dy = (m[0] for m in (inputs.xs, inputs.identities, inputs.dys))
    with torch.no_grad():
        made(x, identity)
    x, identity = x.detach().requires_grad_(), identity.detach().requires_grad_()
    both(made, weights_of(tail), x, identity, dy)
    return made


def measure(case: TailCase, args: argparse.Namespace, device: Device) -> list[dict[str, Any]]:
    """A row for each direction."""
    torch.manual_seed(0)
    inputs = make_inputs(case, device)
    tails = contenders(case, device)
    judge, failed = Judge(tails, inputs), []
    running: dict[str, Any] = {name: one for name, one in tails.items() if name in args.contender}
    if "compile" in args.contender:
        forget_compiled()
        try:
            tails["compile"] = copy.deepcopy(tails["eager"])
            running["compile"] = compiled(tails["compile"], inputs)
        except Exception as error:  # a contender that does not run is a result, not an end
            failed.append(f"compile: {reason(error)}")
    rows = []
    with no_collection():
        for direction in args.direction:
            recordings: dict[str, Recording] = {"copy": record_copy(direction, case, device)}
            for name, one in running.items():
                try:
                    recording = record(direction, one, weights_of(tails[name]), inputs, device)
                    wrong = judge.faults(name, recording)
                except Exception as error:
                    wrong = [reason(error)]
                if wrong:
                    failed.append(f"{direction}, {name}: {', '.join(wrong)}")
                else:
                    recordings[name] = recording
            ideal = case.ideal_bytes(direction)
            row = {**asdict(case), "direction": direction, "ideal_bytes": ideal}
            row["contenders"] = summarise(call_times(device, recordings, args.rounds), ideal)
            rows.append(row | {"failed": failed})
            failed = []
            device.free()
    return rows


def selected(args: argparse.Namespace, device: Device) -> list[TailCase]:
    """The tails to measure, those that matter most first."""
    dtypes = args.dtype or ["bfloat16" if device.kind == "cuda" else "float32"]
    places = product(args.tail, dtypes, args.layout, args.batch, NETWORKS["resnet50"])
    return [
        TailCase((n, c, h, w), k, dtype, layout, tail)
        for tail, dtype, layout, n, (c, h, w, k) in places
    ]


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    add_options(parser, rounds=15, plot=False)
    parser.add_argument("--tail", choices=TAILS, nargs="+", default=list(TAILS))
    parser.add_argument("--batch", type=positive, nargs="+", default=[32], help="samples")
    parser.add_argument("--dtype", choices=DTYPES, nargs="+")
    parser.add_argument("--layout", choices=LAYOUTS, nargs="+", default=list(LAYOUTS))
    parser.add_argument("--direction", choices=DIRECTIONS, nargs="+", default=list(DIRECTIONS))
    parser.add_argument("--contender", choices=CONTENDERS, nargs="+", default=list(CONTENDERS))
    args = parser.parse_args(argv)
    prepare(args)
    device = device_named(args.device)
    device.full_precision()
    result: dict[str, Any] = {"script": "tails", "machine": machine(device)}
    result |= {"options": chosen_options(args), "rows": [], "remarks": []}
    cases = selected(args, device)
    began = time.monotonic()
    with until_interrupted(result):
        for case in progress(cases, len(cases)):
            try:
                rows = measure(case, args, device)
            except Exception as error:  # out of memory, say: the others can still be measured
                result["remarks"].append(f"FAILED {case.tail} tail, {case}: {reason(error)}")
                continue
            result["rows"] += rows
            result["remarks"] += [
                f"FAILED {case.tail} tail, {case}: {what}" for row in rows for what in row["failed"]
            ]
            write(args.output, result)
    result["machine"]["seconds"] = round(time.monotonic() - began)
    write(args.output, result)
    status = report.show(result, None)
    return INTERRUPTED if "interrupted" in result else status


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
