"""Reads files of weights without running anything in them."""

import argparse
import importlib
import re
import threading
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.parameter import is_lazy

from eca_fused.ops.checks import DTYPES

__all__ = ["DTYPES", "CheckpointError", "check_memory", "listed", "read"]

MARKING = threading.Lock()  # torch's list of safe globals is shared by all threads
SHOWN = 6  # names of each kind in a message


class CheckpointError(ValueError):
    """A file or state dict that was not loaded, with the names that do not fit.

    Args:
        message: what was expected, what came and what to do.
        missing: names that the network has and the checkpoint lacks.
        unexpected: names that the checkpoint has and the network lacks.
        mismatched: names of tensors with other shapes, or without plain floating-point numbers.
    """

    def __init__(
        self,
        message: str,
        missing: tuple[str, ...] = (),
        unexpected: tuple[str, ...] = (),
        mismatched: tuple[str, ...] = (),
    ) -> None:
        super().__init__(message)
        self.missing = missing
        self.unexpected = unexpected
        self.mismatched = mismatched


def read(path: Path) -> Any:
    """The contents of a file, without running anything in it."""
    if path.is_dir():
        raise CheckpointError(f"expected {path} as a file of weights, got a folder")
    if path.suffix == ".safetensors":
        try:
            from safetensors import SafetensorError
            from safetensors.torch import load_file
        except ImportError as error:
            raise ImportError(f"{path} needs safetensors: pip install safetensors") from error
        try:
            return load_file(path)
        except SafetensorError as error:
            raise CheckpointError(f"{path} is not a safetensors file: {error}") from error
    _check_stored(path)
    try:
        # timm saves the arguments of its script, which are plain values too. Globals that the
        # caller has marked as safe are left out: leaving the context would unmark them.
        with MARKING:
            safe = [argparse.Namespace, *_numpys_numbers()]
            marked = torch.serialization.get_safe_globals()
            with torch.serialization.safe_globals([s for s in safe if s not in marked]):
                return torch.load(path, map_location="cpu", weights_only=True)
    except OSError:
        raise
    except Exception as error:  # torch.load() raises various errors for a file of another kind
        found = re.search(r"GLOBAL (\S+)|(TorchScript)", str(error))
        if not found:
            raise CheckpointError(
                f"{path} is not a complete file of torch.save(), or of another kind; download it "
                "again, and let the names of safetensors files end in .safetensors"
            ) from error
        raise CheckpointError(
            f"{path} is refused, and nothing of it was run: expected tensors and plain values, got "
            f"{found[1] or found[2]}, which loads by running code. If you trust the file, pass the "
            "state dict from torch.load(path, weights_only=False) or torch.jit.load(path)"
        ) from error


def _check_stored(path: Path) -> None:
    """Raise CheckpointError for a compressed archive, which could grow to any size in memory.

    torch.save() does not compress.
    """
    if not zipfile.is_zipfile(path):
        return
    try:
        with zipfile.ZipFile(path) as archive:
            packed = [
                i.filename
                for i in archive.infolist()
                if i.compress_type != zipfile.ZIP_STORED
                and ("/data/" in i.filename or i.filename.endswith("/data.pkl"))
            ]
    except (OSError, zipfile.BadZipFile):
        return  # torch.load() says what is wrong
    if packed:
        raise CheckpointError(
            f"{path}: expected a file as torch.save() writes it, got a compressed archive; "
            "torch.load() it, and torch.save() it again"
        )


def _numpys_numbers() -> list[Any]:
    """The globals that a numpy scalar in a file needs, such as the best accuracy so far."""
    try:
        numpy: Any = importlib.import_module("numpy")
    except ImportError:
        return []
    # Pickle stores numbers as scalar(dtype, bytes); numpy renamed the module of this function.
    scalar = numpy.float64(0).__reduce__()[0]
    modules = ("numpy.core.multiarray", "numpy._core.multiarray")
    names = ["int8", "int16", "int32", "int64", "uint8", "uint16", "uint32", "uint64"]
    names += ["bool", "float16", "float32", "float64", "complex64", "complex128", "str"]
    return [
        *((scalar, f"{module}.scalar") for module in modules),
        numpy.dtype,
        *{type(numpy.dtype(name)) for name in names},
    ]


def check_memory(
    name: str, tensors: Mapping[str, Tensor], size: int | None, *, built: bool
) -> None:
    """Raise CheckpointError unless every tensor has the memory that its shape needs.

    This runs before anything is allocated. A small file may hold tensors that repeat one number or
    share memory, and so describe a network of any size. A given network may share tensors, as one
    module under two names does.

    Args:
        name: for messages.
        tensors: of a state dict.
        size: of the file they are from, in bytes; None without a file.
        built: whether the network is built from the tensors.
    """
    wrong, asked = [], 0
    for key, t in tensors.items():
        if t.is_nested or is_lazy(t):
            wrong.append(f"{key} ({'nested' if t.is_nested else 'without a shape yet'})")
        elif t.layout == torch.strided and not t.is_meta:
            bytes_asked = t.numel() * t.element_size()
            asked += bytes_asked
            if bytes_asked > t.untyped_storage().nbytes():
                held = f"{t.untyped_storage().nbytes()} bytes"
                wrong.append(f"{key} {tuple(t.shape)}, which has {held}")
    if wrong:
        raise CheckpointError(
            f"{name}: expected tensors with the memory that their shapes ask for, got "
            f"{listed(wrong)}; save them as they are, or after contiguous()",
            mismatched=tuple(entry.split(" ")[0] for entry in wrong),
        )
    scaled = [f"{key} ({t.dtype})" for key, t in tensors.items() if _needs_scales(t)]
    if scaled:
        raise CheckpointError(
            f"{name}: expected numbers in {listed([str(d) for d in DTYPES])}, got "
            f"{listed(scaled)}, which need scales; load them by the library that wrote them",
            mismatched=tuple(entry.split(" ")[0] for entry in scaled),
        )
    if built and size is not None and asked > size:
        raise CheckpointError(
            f"{name}: expected tensors of no more than its {size} bytes, got {asked} bytes, as "
            "tensors share their memory; save each with clone()"
        )


def _needs_scales(t: Tensor) -> bool:
    return t.dtype.is_floating_point and t.dtype not in DTYPES


def listed(entries: list[str], separator: str = ", ") -> str:
    more = len(entries) - SHOWN
    return separator.join(entries[:SHOWN]) + (f" and {more} more" if more > 0 else "")
