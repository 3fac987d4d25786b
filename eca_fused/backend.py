"""Which kernels run: the backends, their choice, and a warning where it is not the expected one."""

import os
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import ModuleType

from torch import Tensor

from eca_fused import native

__all__ = ["Backend", "backends", "use_backend"]

NAMES = ("auto", "native", "triton", "reference")

_TRITON_MISSING = "this version of eca_fused has no Triton kernels"


@dataclass(frozen=True)
class Backend:
    """Whether a backend can be used here; true in a condition if so.

    Attributes:
        usable: It can be used, at least on one kind of device.
        detail: What it runs on, or the reason why it cannot be used.
    """

    usable: bool
    detail: str

    def __bool__(self) -> bool:
        return self.usable

    def __str__(self) -> str:
        return ("usable: " if self.usable else "not usable: ") + self.detail


def backends() -> dict[str, Backend]:
    """The backends by name, each with its `usable` and a `detail` that gives the reason if not."""
    return {
        "native": Backend(native.missing is None, native.missing or native.description),
        "triton": Backend(False, _TRITON_MISSING),
        "reference": Backend(True, "plain PyTorch, any device"),
    }


def check_backend(name: str, what: str = "backend") -> str:
    """Return name, or raise ValueError where it names no backend."""
    if name not in NAMES:
        raise ValueError(f"expected {what} as one of {', '.join(NAMES)}, got {name!r}")
    return name


# Process-wide, like torch.backends' flags; None until the environment is read at the first call.
_default: str | None = None


@contextmanager
def use_backend(name: str) -> Iterator[None]:
    """Make `name` what backend="auto" means inside a with block, in all threads.

    Args:
        name: "auto", "native", "triton" or "reference".

    Raises:
        ValueError: unknown name.
    """
    global _default
    before, _default = _default, check_backend(name)
    try:
        yield
    finally:
        _default = before


_warned: set[str] = set()


def warn_once(message: str) -> None:
    """Warn, the first time this process has this message, of the line that called eca_fused."""
    if message in _warned:
        return
    _warned.add(message)
    level, frame = 1, sys._getframe()
    while frame.f_back and frame.f_globals.get("__name__", "").split(".")[0] in (
        "eca_fused",
        "torch",
    ):
        level, frame = level + 1, frame.f_back
    warnings.warn(message, RuntimeWarning, stacklevel=level)


# torch.compile cannot trace a warning: with this mark it calls the function while it traces.
warn_once._dynamo_marked_constant = True  # type: ignore[attr-defined]


def select(x: Tensor, backend: str) -> ModuleType | None:
    """The module with the kernels for x, or None for plain PyTorch.

    "auto" takes the best that works, and warns once where that is plain PyTorch.

    Raises:
        ValueError: unknown backend.
        RuntimeError: the backend was asked for by name and cannot run for x; says why.
    """
    global _default
    source = "the argument"
    if backend == "auto":
        source = "use_backend() or ECA_FUSED_BACKEND"
        if _default is None:
            name = os.environ.get("ECA_FUSED_BACKEND", "auto")
            _default = check_backend(name, "ECA_FUSED_BACKEND")
        backend = _default
    kind = x.device.type
    if kind in native.devices and backend in ("auto", "native"):
        return native
    if backend == "reference":
        return None
    if kind == "meta" and native.missing is None and backend != "triton":
        return native
    if check_backend(backend) == "triton":
        reason = _TRITON_MISSING
    else:
        reason = native.missing or f"the extension was compiled without kernels for {kind}"
    if backend == "auto":
        warn_once(f"eca_fused runs in plain PyTorch on {kind}, which is slower: {reason}")
        return None
    raise RuntimeError(
        f"backend {backend!r}, which {source} asked for, cannot be used: {reason}; "
        "let it be 'auto', which takes the best that works"
    )
