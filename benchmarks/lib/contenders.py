"""Who competes: eca_fused in its forms, plain PyTorch, timm, torch.compile, and a copy."""

import importlib
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

import eca_fused
from eca_fused.torch_state import keep_saved_tensors
from lib.cases import Case
from lib.devices import Device, Recording

# A backward pass runs many times on what one forward pass saved.
keep_saved_tensors()

Layer = Callable[[Tensor, Tensor], Tensor]
CHOICES = ("native", "triton", "eager", "timm", "compile", "existing memory")
FORMS = ("shifted", "conv")
MODES = ("default", "max-autotune-no-cudagraphs")


def shifted(x: Tensor, weight: Tensor) -> Tensor:
    """ECA with the convolution as shifted additions, which torch.compile can fuse better."""
    mean = x.mean((2, 3))  # (N, C)
    k = weight.shape[-1]
    rows = torch.nn.functional.pad(mean, (k // 2, k // 2))
    z = weight[0, 0, 0] * rows[:, : x.shape[1]]
    for j in range(1, k):
        z = z + weight[0, 0, j] * rows[:, j : j + x.shape[1]]
    gate: Tensor = torch.sigmoid(z)[:, :, None, None].to(x.dtype)
    return x * gate


def plain(x: Tensor, weight: Tensor) -> Tensor:
    return eca_fused.reference.eca(x, weight)


def plain_given(x: Tensor, weight: Tensor, out: Tensor) -> Tensor:
    """Plain PyTorch into a preallocated output."""
    gate = eca_fused.reference.gate(x, weight)
    return torch.mul(x, gate[:, :, None, None], out=out)


@dataclass
class Contender:
    """An ECA layer, and the taps that get a gradient."""

    call: Callable[[Tensor], Tensor]  # (N, C, H, W) to the same
    weight: Tensor  # (1, 1, k)


def with_taps(layer: Layer, taps: Tensor) -> Contender:
    weight = taps.detach().clone().requires_grad_()
    return Contender(lambda x: layer(x, weight), weight)


def fused(backend: str) -> Layer:
    return lambda x, weight: eca_fused.eca(x, weight, backend=backend)


def timm_module(taps: Tensor) -> Any:
    """timm's EcaModule with these taps, or None."""
    try:
        eca = importlib.import_module("timm.layers.eca")
    except Exception:  # not there, or a torchvision that does not fit torch
        return None
    # Given the channels, it would choose the kernel size itself.
    module = eca.EcaModule(kernel_size=taps.shape[-1]).to(taps.device, taps.dtype)
    with torch.no_grad():
        module.conv.weight.copy_(taps)
    return module


def contenders(taps: Tensor) -> dict[str, Contender]:
    """All that need no compilation, by name."""
    found = {}
    native, triton = (eca_fused.backends()[name] for name in ("native", "triton"))
    if taps.device.type in (native.devices or ()):
        found["native"] = with_taps(fused("native"), taps)
    if triton and taps.device.type == "cuda":
        found["triton"] = with_taps(fused("triton"), taps)
    found["eager"] = with_taps(plain, taps)
    module = timm_module(taps)
    if module is not None:
        found["timm"] = Contender(module, module.conv.weight)
    return found


def missing(names: Iterable[str], device: str) -> list[str]:
    """Which of these contenders cannot run on a type of device, each with the reason."""
    found = [
        f"{name}: {status.detail if not status else f'has no kernels for {device}'}"
        for name, status in eca_fused.backends().items()
        if name in names and device not in (status.devices or ())
    ]
    if "timm" in names and timm_module(torch.ones(1, 1, 3)) is None:
        found.append("timm: timm.layers.eca cannot be imported; pip install timm")
    return found


def compiled(form: str, mode: str, taps: Tensor) -> Contender:
    """torch.compile of timm's module (plain PyTorch's if there is none), or with shifted sums."""
    options: dict[str, Any] = {"dynamic": False, "fullgraph": True, "mode": mode}
    module = timm_module(taps)
    if form == "shifted" or module is None:
        layer: Any = torch.compile(shifted if form == "shifted" else plain, **options)
        return with_taps(layer, taps)
    made: Any = torch.compile(module, **options)
    return Contender(made, module.conv.weight)


# ---- what is recorded of them ----


@dataclass
class Inputs:
    """Distinct maps that the calls rotate among, all (N, C, H, W)."""

    case: Case
    xs: list[Tensor]
    dys: list[Tensor]
    taps: Tensor  # (1, 1, k)


def make_inputs(case: Case, device: Device) -> Inputs:
    count = device.distinct(2 * case.map_bytes)
    xs, dys = ([case.random_map(device.tensors) for _ in range(count)] for _ in range(2))
    return Inputs(case, xs, dys, torch.randn(1, 1, case.k, device=device.tensors).to(xs[0]))


def record(direction: str, one: Contender, inputs: Inputs, device: Device) -> Recording:
    """The calls of a contender in one direction, one for each of the inputs."""
    if direction == "forward":
        with torch.no_grad():
            calls = [partial(forward, one, x) for x in inputs.xs]
            return device.record(calls, before=device.writer(inputs.xs[0]))
    xs = [x.detach().requires_grad_() for x in inputs.xs]
    if direction == "forward and backward":
        pairs = zip(xs, inputs.dys, strict=True)
        calls = [partial(both, one, x, dy) for x, dy in pairs]
        return device.record(calls, before=device.writer(xs[0]))
    # Autograd runs a backward pass on the stream of its forward pass.
    with device.streaming():
        ys = [one.call(x) for x in xs]
    calls = [partial(backward, one, *maps) for maps in zip(xs, ys, inputs.dys, strict=True)]
    first = xs[0], inputs.dys[0]
    return device.record(calls, lambda: both(one, *first), before=device.writer(inputs.dys[0]))


def forward(one: Contender, x: Tensor) -> tuple[Tensor, ...]:
    return (one.call(x),)


def backward(one: Contender, x: Tensor, y: Tensor, dy: Tensor) -> tuple[Tensor, ...]:
    return torch.autograd.grad(y, (x, one.weight), dy, retain_graph=True)


def both(one: Contender, x: Tensor, dy: Tensor) -> tuple[Tensor, ...]:
    y = one.call(x)
    return y.detach(), *torch.autograd.grad(y, (x, one.weight), dy)


def record_copy(direction: str, case: Case, device: Device) -> Recording:
    """A copy that moves the ideal bytes of the layer."""
    ideal = case.ideal_bytes(direction)
    dtype = case.random_map("meta").dtype
    size = ideal // 2 // dtype.itemsize
    sources = [
        torch.randn(size, device=device.tensors, dtype=dtype) for _ in range(device.distinct(ideal))
    ]
    calls = [lambda source=source: (source.clone(),) for source in sources]
    return device.record(calls, before=device.writer(sources[0]))


def record_existing_memory(inputs: Inputs, device: Device) -> dict[str, Recording]:
    """Forward passes in place, and into a preallocated output, by name."""
    x, taps = inputs.xs[0], inputs.taps
    with torch.no_grad():
        own, out = x.clone(), torch.empty_like(x)

        def again() -> None:
            own.copy_(x)

        anew = device.writer(x)
        return {
            "native in place": device.record([lambda: (eca_fused.eca_(own, taps),)], before=again),
            "native given": device.record(
                [lambda: (eca_fused.eca(x, taps, out=out),)], before=anew
            ),
            "eager given": device.record([lambda: (plain_given(x, taps, out),)], before=anew),
            "copy given": device.record([lambda: (out.copy_(x),)], before=anew),
        }
