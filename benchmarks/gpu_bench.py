"""Times ECA layers on a GPU: ours in CUDA and in Triton, eager, timm, torch.compile, a copy.

    python benchmarks/gpu_bench.py --output bench.json       # under 4 minutes
    python benchmarks/gpu_bench.py --quick                   # three layers, half a minute
    python benchmarks/gpu_bench.py --full --seconds 3600     # every layer in every dtype

Then `python benchmarks/report.py bench.json --plot bench.png`. gpu_timing.py says how a time is
taken. Every contender's outputs, filled with NaN before, are checked against float64; a wrong one
is reported, not timed, and makes the exit status 1. GB/s counts the ideal bytes: x and y forward,
dy, x and dx backward, both for the two together, whatever a contender really moves; the copy moves
as many. Forward is without autograd, as in inference. Layers are measured in the order of what
matters most, until the time is up; what was left out is in the result.
"""

import argparse
import importlib
import json
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import gpu_timing
import torch
import torch._dynamo
import torch._functorch.config
from forms import plain, results, shifted
from gpu_timing import interleaved_replays, no_collection, rotation, summarise_calls
from harness import gpu, machine, statistics_of
from torch import Tensor

import eca_fused

# A graph of backward passes replays them again and again, on what the forward passes saved.
torch._functorch.config.donated_buffer = False

DEVICE = "cuda"
DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
LAYOUTS = ("contiguous", "channels_last")
DIRECTIONS = ("forward", "backward", "forward and backward")

# Channels, height, width, taps. ResNet-50: behind each stage, the taps of the authors' checkpoint.
RESNET50 = [(256, 56, 56, 3), (512, 28, 28, 5), (1024, 14, 14, 5), (2048, 7, 7, 7)]
RESNET18 = [(64, 56, 56, 3), (128, 28, 28, 5), (256, 14, 14, 5), (512, 7, 7, 5)]
MOBILENET_V2 = [(24, 56, 56, 1), (32, 28, 28, 1), (96, 14, 14, 3), (320, 7, 7, 3)]
LARGE = [(64, 224, 224, 3), (256, 200, 334, 5)]
ONE_PIXEL = [(2048, 1, 1, 7)]
CHUNK = 1 << 25  # elements that are checked in float64 at a time


@dataclass(frozen=True)
class Case:
    """One layer."""

    shape: tuple[int, int, int, int]
    k: int
    dtype: str
    layout: str

    @property
    def map_bytes(self) -> int:
        n, c, h, w = self.shape
        return n * c * h * w * DTYPES[self.dtype].itemsize

    def ideal_bytes(self, direction: str) -> int:
        return {"forward": 2, "backward": 3, "forward and backward": 5}[direction] * self.map_bytes

    def __str__(self) -> str:
        return f"{self.dtype} {self.layout} {'x'.join(map(str, self.shape))} k={self.k}"


def cases(
    layers: Sequence[tuple[int, int, int, int]],
    batches: Sequence[int],
    dtypes: Sequence[str] = ("bfloat16",),
) -> list[Case]:
    return [
        Case((n, c, h, w), k, dtype, layout)
        for dtype, n, layout, (c, h, w, k) in product(dtypes, batches, LAYOUTS, layers)
    ]


def quick_cases() -> list[Case]:
    big, small = cases(RESNET50[:1], [32]), cases(RESNET50[2:3], [1])
    return [*big, small[0]]


def usual_cases() -> list[Case]:
    return [
        *cases(RESNET50, [256, 32, 1]),
        *cases(LARGE, [32]),
        *cases(RESNET50, [32], ["float32", "float16"]),
        *cases(RESNET18, [32, 1]),
        *cases(ONE_PIXEL, [32, 256]),
        *cases(MOBILENET_V2, [32]),
        *cases(LARGE, [1]),
        *cases(RESNET18, [256]),
        *cases(MOBILENET_V2, [256, 1]),
    ]


def all_cases() -> list[Case]:
    layers = [*RESNET50, *RESNET18, *MOBILENET_V2, *LARGE, *ONE_PIXEL]
    rest = cases(layers, [1, 32, 256], list(DTYPES))
    return list(dict.fromkeys([*usual_cases(), *rest]))


# torch.compile takes many seconds for each: only these, as far as the time for it goes.
COMPILED = [
    Case((256, 256, 56, 56), 3, "bfloat16", "contiguous"),
    Case((256, 256, 56, 56), 3, "bfloat16", "channels_last"),
    Case((32, 1024, 14, 14), 5, "bfloat16", "contiguous"),
    Case((32, 1024, 14, 14), 5, "bfloat16", "channels_last"),
]
COMPILE_FORMS = [("shifted", "default"), ("conv", "default")]
COMPILE_FORMS += [(form, "max-autotune-no-cudagraphs") for form in ("shifted", "conv")]
COMPILE_SECONDS = 20  # what one form took at most, both directions, on a server with 16 cores


# ---- contenders ----


@dataclass
class Contender:
    """An ECA layer with its taps, which its gradient is for."""

    call: Callable[[Tensor], Tensor]  # (N, C, H, W) to the same
    weight: Tensor  # (1, 1, k)


def with_taps(layer: Callable[[Tensor, Tensor], Tensor], taps: Tensor) -> Contender:
    weight = taps.detach().clone().requires_grad_()
    return Contender(lambda x: layer(x, weight), weight)


def fused(backend: str) -> Callable[[Tensor, Tensor], Tensor]:
    return lambda x, weight: eca_fused.eca(x, weight, backend=backend)


def timm_module(taps: Tensor) -> Contender | None:
    try:
        eca = importlib.import_module("timm.layers.eca")
    except Exception:  # not there, or a torchvision that does not fit torch
        return None
    # Told the channels, it would choose the kernel size itself.
    module = eca.EcaModule(kernel_size=taps.shape[-1]).to(taps.device, taps.dtype)
    with torch.no_grad():
        module.conv.weight.copy_(taps)
    return Contender(module, module.conv.weight)


def contenders(taps: Tensor) -> dict[str, Contender]:
    found = {"native": with_taps(fused("native"), taps)}
    if eca_fused.backends()["triton"]:
        found["triton"] = with_taps(fused("triton"), taps)
    found["eager"] = with_taps(plain, taps)
    module = timm_module(taps)
    if module is not None:
        found["timm"] = module
    return found


def compiled(form: str, mode: str, taps: Tensor) -> Contender:
    layer = {"conv": plain, "shifted": shifted}[form]
    made: Any = torch.compile(layer, dynamic=False, fullgraph=True, mode=mode)
    return with_taps(made, taps)


# ---- calls to capture ----


@dataclass
class Inputs:
    """Distinct maps that the calls of a graph rotate among, all (N, C, H, W)."""

    xs: list[Tensor]
    dys: list[Tensor]
    taps: Tensor  # (1, 1, k)


def random_map(case: Case) -> Tensor:
    memory_format = (
        torch.channels_last if case.layout == "channels_last" else torch.contiguous_format
    )
    x = torch.randn(case.shape, device=DEVICE, dtype=DTYPES[case.dtype])
    return x.contiguous(memory_format=memory_format)


def make_inputs(case: Case, l2: int) -> Inputs:
    count = rotation(2 * case.map_bytes, l2)
    taps = torch.randn(1, 1, case.k, device=DEVICE, dtype=DTYPES[case.dtype])
    return Inputs(
        [random_map(case) for _ in range(count)], [random_map(case) for _ in range(count)], taps
    )


def record_forward(one: Contender, inputs: Inputs, stream: Any) -> gpu_timing.Recording:
    def call(x: Tensor) -> tuple[Tensor]:
        return (one.call(x),)

    with torch.no_grad():
        return gpu_timing.Recording([partial(call, x) for x in inputs.xs], stream)


def record_backward(one: Contender, inputs: Inputs, stream: Any) -> gpu_timing.Recording:
    def gradients(x: Tensor, y: Tensor, dy: Tensor, keep: bool = True) -> tuple[Tensor, ...]:
        return torch.autograd.grad(y, (x, one.weight), dy, retain_graph=keep)

    xs = [x.detach().requires_grad_() for x in inputs.xs]
    torch.cuda.synchronize()
    with torch.cuda.stream(stream):
        ys = [one.call(x) for x in xs]
    calls = [partial(gradients, x, y, dy) for x, y, dy in zip(xs, ys, inputs.dys, strict=True)]
    recording = gpu_timing.Recording(
        calls, stream, lambda: gradients(xs[0], one.call(xs[0]), inputs.dys[0], False)
    )
    recording.keep = ys  # a replay reads what these saved
    return recording


def record_both(one: Contender, inputs: Inputs, stream: Any) -> gpu_timing.Recording:
    def step(x: Tensor, dy: Tensor) -> tuple[Tensor, ...]:
        y = one.call(x)
        return y.detach(), *torch.autograd.grad(y, (x, one.weight), dy)

    xs = [x.detach().requires_grad_() for x in inputs.xs]
    calls = [partial(step, x, dy) for x, dy in zip(xs, inputs.dys, strict=True)]
    return gpu_timing.Recording(calls, stream)


RECORD = dict(zip(DIRECTIONS, (record_forward, record_backward, record_both), strict=True))
RETURNS = {
    "forward": ("y",),
    "backward": ("dx", "dweight"),
    "forward and backward": ("y", "dx", "dweight"),
}


def record_copy(case: Case, direction: str, l2: int, stream: Any) -> gpu_timing.Recording:
    ideal = case.ideal_bytes(direction)
    dtype = DTYPES[case.dtype]
    sources = [
        torch.randn(ideal // 2 // dtype.itemsize, device=DEVICE, dtype=dtype)
        for _ in range(rotation(ideal, l2))
    ]

    def copy(source: Tensor) -> tuple[Tensor]:
        return (source.clone(),)

    recording = gpu_timing.Recording([partial(copy, source) for source in sources], stream)
    recording.keep = sources
    return recording


# ---- checks ----


def errors(got: dict[str, Tensor], x: Tensor, taps: Tensor, dy: Tensor) -> dict[str, float]:
    """Largest error of each result, relative to its largest value, against float64."""
    zero = torch.zeros((), device=x.device, dtype=torch.float64)
    off, largest = dict.fromkeys(got, zero), dict.fromkeys(got, zero)

    def compare(name: str, result: Tensor, want: Tensor) -> None:
        off[name] = torch.maximum(off[name], (result.double() - want).abs().max())
        largest[name] = torch.maximum(largest[name], want.abs().max())

    dweight = torch.zeros(taps.shape, device=x.device, dtype=torch.float64)
    step = max(1, CHUNK // x[0].numel())
    for begin in range(0, x.shape[0], step):
        part = slice(begin, begin + step)
        y, dx, dw = results(plain, x[part].double(), taps.double(), dy[part].double())
        dweight += dw
        for name, want in (("y", y), ("dx", dx)):
            if name in got:
                compare(name, got[name][part], want)
    if "dweight" in got:
        compare("dweight", got["dweight"], dweight)
    return {name: float(off[name] / largest[name]) for name in got}


def limits(case: Case, inputs: Inputs) -> dict[str, float]:
    """As good as plain PyTorch in this dtype, but for the order of its sums."""
    x, dy = inputs.xs[0], inputs.dys[0]
    usual = dict(zip(("y", "dx", "dweight"), results(plain, x, inputs.taps, dy), strict=True))
    eps = torch.finfo(DTYPES[case.dtype]).eps
    return {n: 4 * (e + eps) for n, e in errors(usual, x, inputs.taps, dy).items()}


def faults(
    recording: gpu_timing.Recording, direction: str, inputs: Inputs, allowed: dict[str, float]
) -> list[str]:
    """What a replay of the graph gets wrong, of its first and of its last input."""
    recording.poison()
    recording.replay()
    torch.cuda.synchronize()
    wrong = []
    for i in dict.fromkeys((0, len(inputs.xs) - 1)):
        got = dict(zip(RETURNS[direction], recording.outputs[i], strict=True))
        found = errors(got, inputs.xs[i], inputs.taps, inputs.dys[i])
        wrong += [
            f"{name} of input {i} has relative error {error:.2g}, allowed {allowed[name]:.2g}"
            for name, error in found.items()
            if not error <= allowed[name]
        ]
    return wrong


# ---- measurements ----


class Clock:
    """Seconds left, of all and of those for torch.compile."""

    def __init__(self, seconds: float, compile_seconds: float) -> None:
        self.end, self.compile_left = time.monotonic() + seconds, compile_seconds

    def left(self) -> float:
        return self.end - time.monotonic()

    @property
    def may_compile(self) -> bool:
        return min(self.compile_left, self.left()) > COMPILE_SECONDS


def native_module() -> Any:
    return importlib.import_module("eca_fused._C")


def gpu_limits() -> Any:
    return native_module().gpu_of_device(torch.cuda.current_device())


def plan_of(case: Case, backward: bool, wish: Any = None) -> dict[str, Any] | str:
    """The planner's choice, or the plan with the sizes of a wish; or why there is none."""
    try:
        module = native_module()
        n, c, h, w = case.shape
        made: dict[str, Any] = module.plan(
            backward=backward, dtype=case.dtype, channels_last=case.layout == "channels_last",
            samples=n, channels=c, pixels=h * w, kernel_size=case.k, own_taps=False,
            circular=False, aligned=True, in_place=False, gpu=gpu_limits(), wish=wish,
        )  # fmt: skip
    except Exception as reason:
        return f"{type(reason).__name__}: {reason}"
    return made


def reason_of(error: BaseException) -> str:
    return f"{type(error).__name__}: {error}"[:300]


def new_stream() -> Any:
    stream: Any = torch.cuda.Stream
    return stream()


def measure_direction(
    case: Case,
    direction: str,
    inputs: Inputs,
    running: dict[str, Contender],
    allowed: dict[str, float],
    *,
    l2: int,
    rounds: int,
    profile: bool,
) -> dict[str, Any]:
    """Record, check and time all contenders on one direction of a layer."""
    stream = new_stream()
    failed: list[str] = []
    recordings = {"copy": record_copy(case, direction, l2, stream)}
    for name, one in running.items():
        try:
            recording = RECORD[direction](one, inputs, stream)
            wrong = faults(recording, direction, inputs, allowed)
        except Exception as reason:  # a contender that does not run is a result, not an end
            wrong = [reason_of(reason)]
        if wrong:
            failed.append(f"{name}: {', '.join(wrong)}")
        else:
            recordings[name] = recording
    ideal = case.ideal_bytes(direction)
    found = summarise_calls(interleaved_replays(recordings, rounds), ideal)
    if profile:
        for name, recording in recordings.items():
            found[name]["profiler_us"] = gpu_timing.profiled_us(recording)
    row: dict[str, Any] = {
        "ideal_bytes": ideal,
        "calls": {name: r.calls for name, r in recordings.items()},
        "contenders": found,
        "failed": failed,
    }
    if direction != "forward and backward":
        row["plan"] = plan_of(case, direction == "backward")
    return row


def measure_warm(case: Case, inputs: Inputs, running: dict[str, Contender], rounds: int) -> Any:
    """The forward pass of one input again and again, into the same memory."""
    stream = new_stream()
    x = inputs.xs[0]

    def calls(function: Callable[[Tensor], Tensor]) -> list[gpu_timing.Call]:
        def call() -> tuple[Tensor, ...]:
            function(x)
            return ()

        return [call] * 50

    with torch.no_grad():
        recordings = {"copy": gpu_timing.Recording(calls(torch.clone), stream)}
        for name, one in running.items():
            recordings[name] = gpu_timing.Recording(calls(one.call), stream)
        return summarise_calls(interleaved_replays(recordings, rounds), 2 * case.map_bytes)


def measure(
    case: Case, clock: Clock, *, l2: int, rounds: int, compile_: bool, profile: bool
) -> dict[str, Any]:
    """One layer in all directions."""
    inputs = make_inputs(case, l2)
    running = contenders(inputs.taps)
    left_out = []
    began = time.monotonic()
    if compile_:
        torch._dynamo.reset()
        for form, mode in COMPILE_FORMS:
            name = f"compile {form}, {mode}"
            if not clock.may_compile:
                left_out.append(f"{name}: no time left for it")
                continue
            start = time.monotonic()
            one = compiled(form, mode, inputs.taps)
            try:
                compile_now(one, inputs)
                running[name] = one
            except Exception as reason:
                left_out.append(f"{name}: {reason_of(reason)}")
            clock.compile_left -= time.monotonic() - start
    allowed = limits(case, inputs)
    row: dict[str, Any] = {**asdict(case), "map_bytes": case.map_bytes, "left_out": left_out}
    with no_collection():
        for direction in DIRECTIONS:
            row[direction] = measure_direction(
                case, direction, inputs, running, allowed, l2=l2, rounds=rounds, profile=profile
            )
            torch.cuda.empty_cache()
        if 4 * case.map_bytes < l2:
            sound = {n: c for n, c in running.items() if n in row["forward"]["contenders"]}
            row["warm forward"] = {
                "ideal_bytes": 2 * case.map_bytes,
                "contenders": measure_warm(case, inputs, sound, rounds),
            }
    row["seconds"] = round(time.monotonic() - began, 1)
    return row


def compile_now(one: Contender, inputs: Inputs) -> None:
    """Compile for inference and for training."""
    with torch.no_grad():
        one.call(inputs.xs[0])
    x = inputs.xs[0].detach().requires_grad_()
    torch.autograd.grad(one.call(x), (x, one.weight), inputs.dys[0])
    torch.cuda.synchronize()


def host_us(step: Callable[[], object], calls: int) -> float:
    """Microseconds that the host takes to submit a call, the GPU's queue being empty before."""
    torch.cuda.synchronize()
    start = time.perf_counter()
    for _ in range(calls):
        step()
    elapsed = time.perf_counter() - start
    torch.cuda.synchronize()
    return 1e6 * elapsed / calls


def reason_to_fail(step: Callable[[], object]) -> str | None:
    try:
        for _ in range(5):
            step()
        torch.cuda.synchronize()
    except Exception as reason:
        return reason_of(reason)
    return None


def measure_host(rounds: int, compile_: bool) -> dict[str, Any]:
    """Host time of a call so small that the kernels do not matter: one sample of 64x7x7."""
    case = Case((1, 64, 7, 7), 3, "float32", "contiguous")
    taps = torch.randn(1, 1, 3, device=DEVICE)
    running = contenders(taps)
    if compile_:
        torch._dynamo.reset()
        running["compile"] = compiled("conv", "default", taps)
    x = random_map(case)
    dy = random_map(case)
    x_grad = x.clone().requires_grad_()

    def training(one: Contender) -> object:
        return torch.autograd.grad(one.call(x_grad), (x_grad, one.weight), dy)

    steps: dict[str, Callable[[Contender], object]] = {
        "forward": lambda one: one.call(x),
        "forward and backward": training,
    }
    samples: dict[str, dict[str, list[float]]] = {}
    failed = []
    for direction, step in steps.items():
        with torch.set_grad_enabled(direction != "forward"):
            able = {}
            for name, one in running.items():
                wrong = reason_to_fail(partial(step, one))
                if wrong:
                    failed.append(f"{name} {direction}: {wrong}")
                else:
                    able[name] = one
            # So few calls that their kernels fit into the queue, where the host would wait.
            times: dict[str, list[float]] = {name: [] for name in able}
            for _ in range(rounds):
                for name, one in able.items():
                    times[name].append(host_us(partial(step, one), 20))
            samples[direction] = times
    found: dict[str, Any] = {"shape": list(case.shape), "failed": failed}
    for direction, by_name in samples.items():
        found[direction] = {
            name: {
                "us": statistics_of(values),
                "times_ours": statistics_of(
                    [v / o for v, o in zip(values, by_name["native"], strict=True)]
                )
                if "native" in by_name
                else None,
            }
            for name, values in by_name.items()
        }
    return found


# ---- the script ----


def describe(case: Case, direction: str, row: dict[str, Any]) -> str:
    entries = []
    for name, t in row["contenders"].items():
        text = f"{name} {t['us']['median']:.1f}us"
        if name == "native":
            text += f" ({t['gbps']:.0f} GB/s, {t['of_copy']['median']:.2f} of copy)"
        entries.append(text)
    return f"{case} {direction}: {', '.join(entries)}"


def parse(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    which = parser.add_mutually_exclusive_group()
    which.add_argument("--quick", action="store_true", help="three layers")
    which.add_argument("--full", action="store_true", help="every layer in every dtype")
    parser.add_argument("--dtype", choices=DTYPES, nargs="+", help="these only")
    parser.add_argument("--layout", choices=LAYOUTS, nargs="+", help="these only")
    parser.add_argument("--batch", type=int, nargs="+", help="these only")
    parser.add_argument("--rounds", type=int, default=25, help="samples of each time (default 25)")
    parser.add_argument(
        "--seconds", type=float, default=230, help="no layer is started after (default 230)"
    )
    parser.add_argument(
        "--compile-seconds", type=float, default=90,
        help="no form is compiled after; 0 for none (default 90; 0 with --quick)",
    )  # fmt: skip
    parser.add_argument("--output", type=Path, help="JSON file to write, after every layer")
    args = parser.parse_args(argv)
    if args.quick and "--compile-seconds" not in " ".join(argv):
        args.compile_seconds = 0
    return args


def selected(args: argparse.Namespace) -> list[Case]:
    chosen = quick_cases() if args.quick else all_cases() if args.full else usual_cases()
    return [
        case
        for case in chosen
        if (not args.dtype or case.dtype in args.dtype)
        and (not args.layout or case.layout in args.layout)
        and (not args.batch or case.shape[0] in args.batch)
    ]


def main(argv: list[str]) -> int:
    args = parse(argv)
    if not torch.cuda.is_available():
        print("gpu_bench.py: there is no GPU that torch can use", file=sys.stderr)
        return 2
    torch.manual_seed(0)
    # The tiny convolution in TF32 would be a worse measure of what is right.
    torch.backends.cudnn.allow_tf32 = False
    gpu_timing.spin_up()
    described = {**machine(), **gpu(), "tf32": False}
    result: dict[str, Any] = {"machine": described, "cases": [], "left_out": []}
    clock = Clock(args.seconds, args.compile_seconds)
    status = run(args, clock, described["l2_bytes"], result)
    try:
        result["host"] = measure_host(args.rounds, args.compile_seconds > 0)
    except Exception as reason:
        result["left_out"].append(f"host time: {reason_of(reason)}")
        status = 1
    described["after"] = gpu()
    write(args, result)
    for what in result["left_out"]:
        print(f"left out: {what}")
    return status


def write(args: argparse.Namespace, result: dict[str, Any]) -> None:
    if args.output:
        args.output.parent.mkdir(parents=True, exist_ok=True)
        args.output.write_text(json.dumps(result, indent=1) + "\n")


def run(args: argparse.Namespace, clock: Clock, l2: int, result: dict[str, Any]) -> int:
    status = 0
    for i, case in enumerate(selected(args)):
        if clock.left() <= 0:
            result["left_out"].append(f"{case}: no time left")
            continue
        compile_ = args.compile_seconds > 0 and (case in COMPILED or args.quick)
        # The profiler costs a second each time: a few layers are enough to compare with.
        profile = i in (0, 5, 17)
        try:
            row = measure(
                case, clock, l2=l2, rounds=args.rounds, compile_=compile_, profile=profile
            )
        except Exception as reason:  # out of memory, say: the others can still be measured
            result["left_out"].append(f"{case}: {reason_of(reason)}")
            print(f"FAILED {case}: {reason_of(reason)}", file=sys.stderr, flush=True)
            status = 1
            if reason_to_fail(torch.cuda.empty_cache):
                # After an illegal access, say, no call of this process will work.
                result["left_out"].append("all that follows: the GPU does not answer any more")
                break
            continue
        result["cases"].append(row)
        for direction in DIRECTIONS:
            for fault in row[direction]["failed"]:
                print(f"FAILED {case} {direction}: {fault}", file=sys.stderr, flush=True)
                status = 1
            print(describe(case, direction, row[direction]), flush=True)
        write(args, result)
    return status


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
