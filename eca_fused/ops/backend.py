"""The backends by name: which there are, which works here, and which one a call gets."""

import functools
import os
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from torch import Tensor

from eca_fused.ops import native
from eca_fused.ops.kernels import Kernels
from eca_fused.torch_state import folded

__all__ = ["Backend", "backends", "use_backend"]

NAMES = ("auto", "native", "triton", "reference")


@dataclass(frozen=True)
class Backend:
    """Whether a backend can be used here; true in a condition if so.

    Attributes:
        usable: It can be used, at least on one kind of device.
        detail: What it runs on, or the reason why it cannot be used.
        devices: The types of device it runs on; None for any.
    """

    usable: bool
    detail: str
    devices: frozenset[str] | None = None

    def __bool__(self) -> bool:
        return self.usable

    def __str__(self) -> str:
        return ("usable: " if self.usable else "not usable: ") + self.detail


def backends() -> dict[str, Backend]:
    """The backends by name, each with its `usable` and a `detail` that gives the reason if not."""
    found = {
        "native": Backend(
            native.missing is None, native.missing or native.description, native.devices
        )
    }
    if reason := _triton_missing():
        found["triton"] = Backend(False, reason, frozenset())
    else:
        triton = _triton()
        found["triton"] = Backend(True, triton.description, triton.devices)
    return found | {"reference": Backend(True, "plain PyTorch, any device")}


def check_backend(name: str, what: str = "backend") -> str:
    """Return name, or raise ValueError where it names no backend."""
    if name not in NAMES:
        raise ValueError(f"expected {what} as one of {', '.join(NAMES)}, got {name!r}")
    return name


@functools.cache
def _triton_missing() -> str | None:
    """Why there is no Triton that can run, or None. The first call imports it."""
    try:
        import triton
    except Exception as error:  # a broken installation may fail in any way
        return (
            f"Triton could not be imported ({type(error).__name__}: {error}); "
            "install it with `pip install triton`"
        )
    try:
        if not triton.knobs.runtime.interpret:
            triton.runtime.driver.active.get_current_target()
    except Exception as error:
        return f"Triton finds no driver of a GPU ({type(error).__name__}: {error})"
    try:
        _triton()
    except Exception as error:
        return (
            f"the kernels do not fit Triton {triton.__version__} "
            f"({type(error).__name__}: {error}); install the one that belongs to your torch"
        )
    return None


@folded  # torch.compile cannot trace imports that fail
def _triton_unsupported(kind: str) -> str | None:
    """Why the Triton kernels cannot run on this type of device, or None."""
    reason = _triton_missing()
    if reason is None and kind not in _triton().devices | {"meta"}:
        reason = f"the Triton kernels do not run on {kind}"
        if kind == "cpu":
            reason += ", but for tests in Triton's interpreter: set TRITON_INTERPRET=1"
    return reason


# Process-wide, like torch.backends' flags. Read here, as torch.compile would compile again after a
# first call that sets it; checked when it is used, as an import must not fail.
_default = os.environ.get("ECA_FUSED_BACKEND") or "auto"  # empty is as if it were not set


def named(backend: str) -> str:
    """The backend that a name stands for: what use_backend() chose, for "auto"."""
    return _default if backend == "auto" else backend


@contextmanager
def use_backend(name: str) -> Iterator[None]:
    """Make `name` what backend="auto" means inside a with block, in all threads.

    What torch.jit.trace() or torch.export() makes keeps what "auto" meant in the meantime; of this,
    torch.jit.script() sees nothing.

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


@folded  # torch.compile cannot trace a warning
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


def select(x: Tensor, backend: str) -> Kernels | None:
    """The kernels for x, or None for plain PyTorch.

    "auto" takes the best that works, and warns once where that is not the native one. It never
    takes Triton on the CPU, where only the interpreter runs it.

    Raises:
        ValueError: unknown backend.
        RuntimeError: the backend was asked for by name and cannot run for x; says why.
    """
    asked = _default if backend == "auto" else backend
    kind = "cpu" if x.is_cpu else x.device.type  # device.type takes three times as long
    if (
        kind in native.devices
        and asked in ("auto", "native")
        and (kind == "cpu" or native.unsupported(x.device) is None)
    ):
        return native
    source = "the argument" if backend != "auto" else "use_backend() or ECA_FUSED_BACKEND"
    backend = asked
    if backend == "reference":
        return None
    what = "backend" if source == "the argument" else "ECA_FUSED_BACKEND"
    by_triton = check_backend(backend, what) == "triton"
    if kind == "meta" and native.missing is None and not by_triton:
        return native
    reason = _triton_unsupported(kind) if by_triton else native.unsupported(x.device)
    if by_triton and reason is None:
        return _triton()
    if backend == "auto":
        if kind == "cpu":
            instead = None
        elif (instead := _triton_unsupported(kind)) is None:
            warn_once(f"eca_fused runs its Triton kernels on {kind}: {reason}")
            return _triton()
        why = reason if instead is None else f"{reason}; {instead}"
        warn_once(f"eca_fused runs in plain PyTorch on {kind}, which is slower: {why}")
        return None
    raise RuntimeError(
        f"backend {backend!r}, which {source} asked for, cannot be used: {reason}; "
        "let it be 'auto', which takes the best that works"
    )


def _triton() -> Kernels:
    from eca_fused.ops import triton

    return triton
