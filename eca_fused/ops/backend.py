"""Names of the backends, which of them work here, and which one a call gets."""

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
    """Whether a backend can be used here. It is truthy if so.

    Attributes:
        usable: It can be used on at least one type of device.
        detail: What it runs on, or why it cannot be used.
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
    """Every backend by name. Each has `usable` and a `detail`, which gives the reason if not."""
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
    """Return name, or raise ValueError if it is not the name of a backend."""
    if name not in NAMES:
        raise ValueError(f"expected {what} as one of {', '.join(NAMES)}, got {name!r}")
    return name


@functools.cache
def _triton_missing() -> str | None:
    """Why Triton cannot run here, or None. The first call imports Triton."""
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
        return f"Triton finds no GPU driver ({type(error).__name__}: {error})"
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
            reason += "; for tests, set TRITON_INTERPRET=1, which runs them in Triton's interpreter"
    return reason


# Process-wide, like the flags of torch.backends. Read at import: if the first call set it,
# torch.compile would compile again. Checked when used, because an import must not fail.
_default = os.environ.get("ECA_FUSED_BACKEND") or "auto"  # an empty variable counts as not set


def named(backend: str) -> str:
    """The name itself; for "auto", the backend that use_backend() chose."""
    return _default if backend == "auto" else backend


@contextmanager
def use_backend(name: str) -> Iterator[None]:
    """Make `name` what backend="auto" means inside a with block, in all threads.

    A graph from torch.jit.trace() or torch.export() keeps what "auto" meant during the trace.
    torch.jit.script() does not see this setting.

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


_OURS = __name__.partition(".")[0]
_warned: set[str] = set()


@folded  # torch.compile cannot trace a warning
def warn_once(message: str) -> None:
    """Warn once per process and message, at the line that called eca_fused."""
    if message in _warned:
        return
    _warned.add(message)
    level, frame = 1, sys._getframe()
    while frame.f_back and frame.f_globals.get("__name__", "").split(".")[0] in (_OURS, "torch"):
        level, frame = level + 1, frame.f_back
    warnings.warn(message, RuntimeWarning, stacklevel=level)


def kind_of(x: Tensor) -> str:
    """x.device.type, which takes three times as long."""
    return "cpu" if x.is_cpu else x.device.type


def select(x: Tensor, backend: str) -> Kernels | None:
    """The kernels for x, or None for plain PyTorch.

    "auto" takes the best backend that works, and warns once if that is not the native one. It
    never takes Triton on the CPU, where only Triton's interpreter runs.

    Raises:
        ValueError: unknown backend.
        RuntimeError: the backend was asked for by name and cannot run for x; says why.
    """
    asked = _default if backend == "auto" else backend
    kind = kind_of(x)
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
        "use 'auto', which takes the best backend that works"
    )


def _triton() -> Kernels:
    from eca_fused.ops import triton

    return triton
