"""Compiles the kernels that an operator would launch, for a GPU that need not be there."""

import re
import subprocess
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from eca_fused.ops.triton import (
    block_tail_launch,
    coefficient_launch,
    gating_launch,
    launch,
    tail_launch,
)

POINTERS = {
    torch.float32: "*fp32",
    torch.float64: "*fp64",
    torch.float16: "*fp16",
    torch.bfloat16: "*bf16",
    torch.uint8: "*u8",
}
CUOBJDUMP = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"


@dataclass
class Launch:
    """A kernel with the arguments that it was called with."""

    kernel: Any
    grid: tuple[int, ...]
    arguments: dict[str, Any]
    options: dict[str, int]


def recorded(function: Callable[[], object], monkeypatch: Any) -> list[Launch]:
    """What the function would launch, on tensors of any device, the meta device too."""
    launches: list[Launch] = []

    class Recorder:
        def __init__(self, kernel: Any) -> None:
            self.kernel = kernel

        def __getitem__(self, grid: Any) -> Callable[..., None]:
            def call(*args: Any, **kwargs: Any) -> None:
                names = self.kernel.arg_names
                options = {k: kwargs.pop(k) for k in ("num_warps",) if k in kwargs}
                arguments = {**dict(zip(names, args, strict=False)), **kwargs}
                size = grid(arguments) if callable(grid) else grid
                launches.append(Launch(self.kernel, size, arguments, options))

            return call

    for module in (block_tail_launch, coefficient_launch, gating_launch, launch, tail_launch):
        monkeypatch.setattr(module, "wrap_triton", Recorder)
    function()
    return launches


def compiled(launched: Launch, architecture: int) -> Any:
    """The kernel as Triton would compile it at this launch, for sm_<architecture>."""
    signature, constants, attributes = {}, {}, {}
    for position, (name, parameter) in enumerate(
        zip(launched.kernel.arg_names, launched.kernel.params, strict=True)
    ):
        value = launched.arguments[name]
        # Triton specializes on constants, None, 1, and multiples of 16.
        if parameter.is_constexpr or value is None or (type(value) is int and value == 1):
            signature[name], constants[name] = "constexpr", value
            continue
        if isinstance(value, torch.Tensor):
            signature[name] = POINTERS[value.dtype]
            divisible = True  # allocations are aligned
        else:
            signature[name] = "i32" if -(2**31) <= value < 2**31 else "i64"
            divisible = value % 16 == 0
        if divisible:
            attributes[(position,)] = [["tt.divisibility", 16]]
    source = ASTSource(launched.kernel, signature, constants, attributes)
    return triton.compile(
        source, target=GPUTarget("cuda", architecture, 32), options=launched.options
    )


@dataclass
class Usage:
    """What a compiled kernel takes: registers of a thread; bytes of stack and of shared memory."""

    registers: int
    stack: int
    shared: int


def usage(kernel: Any, folder: Path) -> Usage:
    text = dump(kernel, folder, "--dump-resource-usage")
    found = {k: int(v) for k, v in re.findall(r"(REG|STACK|LOCAL):(\d+)", text)}
    return Usage(found["REG"], found["STACK"] + found["LOCAL"], kernel.metadata.shared)


def machine_code(kernel: Any, folder: Path) -> str:
    """What cuobjdump prints of a kernel's instructions."""
    return dump(kernel, folder, "-sass")


def dump(kernel: Any, folder: Path, option: str) -> str:
    file = folder / "kernel.cubin"
    file.write_bytes(kernel.asm["cubin"])
    command = [CUOBJDUMP, option, file]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout
