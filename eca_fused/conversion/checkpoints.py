"""load_checkpoint(): a network from a file of weights, wholly or not at all."""

import argparse
import importlib
import os
import re
import threading
import zipfile
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from eca_fused.conversion import architectures
from eca_fused.conversion.modules import convert

__all__ = ["CheckpointError", "load_checkpoint"]

# Where training scripts put the state dict: the authors', timm's, and others'.
WRAPPERS = ("state_dict", "model", "model_state", "model_state_dict", "state_dict_ema", "model_ema")
DECIDED = {"attention", "kernel_sizes", "num_classes"}  # no options of load_checkpoint()
MARKING = threading.Lock()  # what is safe to load is marked for all threads at once
SHOWN = 6  # names of each kind in a message
MOST_BLOCKS = 1000  # of a network that is built; the deepest ResNet published has 333
DTYPES = (torch.float32, torch.float64, torch.float16, torch.bfloat16)
TIMM = (
    "; for a network of timm install timm, which builds its own ECA networks, or pass "
    "model=timm.create_model(name, num_classes=...)"
)


class CheckpointError(ValueError):
    """A file or state dict that is not loaded, with what does not fit.

    Args:
        message: what was expected, what came and what to do.
        missing: names that the network has and the checkpoint lacks.
        unexpected: names that the checkpoint has and the network lacks.
        mismatched: names of tensors of other shapes, or that are no plain floating-point numbers.
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


def load_checkpoint(
    source: str | os.PathLike[str] | Mapping[str, Any],
    model: nn.Module | None = None,
    *,
    key: str | None = None,
    **options: Any,
) -> nn.Module:
    """Load weights wholly or not at all, into a network of yours or into the one they describe.

    Without a model, the network is built from the tensors: a ResNet or MobileNetV2 of
    eca_fused.models, with ECA and every layer's own k, or without attention, with as many classes
    as the classifier has rows, in the dtype of its first convolution. That takes the ECA-Net
    authors' files, torchvision's, and those of timm's resnet50 and the like with ECA. timm's own
    ECA networks, such as ecaresnet50d, are built by timm, if it is installed, and converted.

    Wrappers (`state_dict`, `model`, `model_state`, `state_dict_ema` and others; the first of these
    that is there) and the prefixes `module.` of DataParallel and `_orig_mod.` of torch.compile are
    taken off. Files hold tensors and plain values only: one that holds code is refused, not run.

    Args:
        source: path of a file of torch.save() or, ending in .safetensors, of safetensors; or a
            state dict, in wrappers or not.
        model: network to load into, converted or not, compiled or not; None builds one.
        key: of the wrapper to take, such as "state_dict_ema".
        options: of the network that is built: fused, backend, device, dtype, see models.ResNet;
            for timm's networks these four alone.

    Returns:
        The model. One that is built is in training mode, as any new module.

    Raises:
        CheckpointError: the file holds code or no state dict, no network is known for it, names and
            shapes do not fit, which are listed, or a tensor has less memory than its shape says. A
            model that was given is as it was.
        TypeError: source is no path or mapping, model no module, options come with a model, or are
            what the tensors decide: attention, kernel_sizes and num_classes; or another dtype
            than float32, float64, float16 and bfloat16.
        ValueError: torch cannot use the device here.
        FileNotFoundError: there is no such file.
        ImportError: safetensors is needed and not installed.
    """
    if model is not None and not isinstance(model, nn.Module):
        raise TypeError(f"expected model as a torch.nn.Module, got {type(model).__name__}")
    if model is not None and options:
        raise TypeError(f"expected no options beside a model, got {', '.join(options)}")
    if decided := sorted(DECIDED & options.keys()):
        raise TypeError(
            f"expected no {', '.join(decided)}, which the tensors decide; build the network "
            "and pass it as model="
        )
    name = "the state dict" if isinstance(source, Mapping) else os.fspath(source)
    contents = source if isinstance(source, Mapping) else _read(Path(name))
    tensors = _unprefixed(_unwrapped(contents, key, name))
    size = None if isinstance(source, Mapping) else Path(name).stat().st_size
    _check_options(options)
    _check_memory(name, tensors, size, built=model is None)
    if model is not None:
        _check_fit(name, tensors, model, type(model).__name__)
        _load_or_restore(model, tensors)
        return model
    try:
        return _built(name, tensors, options)
    except CheckpointError:
        theirs = architectures.infer_timm(tensors)
        if theirs is None:
            raise
        return _timms(*theirs, tensors, **options)


def _built(name: str, tensors: dict[str, Tensor], options: dict[str, Any]) -> nn.Module:
    """The network of models/ that tensors describe, with them."""
    found = architectures.infer(tensors)
    if found is None:
        first = ", ".join(list(tensors)[:SHOWN])
        raise CheckpointError(
            f"{name}: expected the names of a ResNet or MobileNetV2 of torchvision or of the "
            f"ECA-Net authors, got {first} and so on{TIMM}"
        )
    if found.blocks > MOST_BLOCKS:
        raise CheckpointError(
            f"{name}: expected a network of at most {MOST_BLOCKS} blocks, got the names of "
            f"{found.blocks}; build it, and pass it as model="
        )
    model = found.build(**options | {"device": "meta"})
    _check_fit(name, found.tensors, model, found.title, hint=TIMM)
    try:
        model.to_empty(device=options.get("device") or torch.get_default_device())
    except (RuntimeError, MemoryError) as error:
        raise CheckpointError(f"{name}: no memory for {found.title}: {error}") from error
    model.load_state_dict(_renamed(model, found.tensors))
    return model


def _timms(
    title: str,
    build: Callable[[], nn.Module],
    tensors: dict[str, Tensor],
    *,
    fused: bool = True,
    backend: str = "auto",
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
) -> nn.Module:
    """A network of timm with these tensors, with fused layers."""
    model = build()
    _check_fit("the state dict", tensors, model, title)
    floating = (t.dtype for t in tensors.values() if t.is_floating_point())
    model.to(device or torch.get_default_device(), dtype or next(floating))
    if fused:
        convert(model, backend)
    model.load_state_dict(_renamed(model, tensors))
    return model


def _read(path: Path) -> Any:
    """The contents of a file, without running anything in it."""
    if path.is_dir():
        raise CheckpointError(f"expected {path} as a file of weights, it is a folder")
    if path.suffix == ".safetensors":
        try:
            from safetensors import SafetensorError
            from safetensors.torch import load_file
        except ImportError as error:
            raise ImportError(f"{path} needs safetensors: pip install safetensors") from error
        try:
            return load_file(path)
        except SafetensorError as error:
            raise CheckpointError(f"{path} is no file of safetensors: {error}") from error
    _check_stored(path)
    try:
        # timm keeps the arguments of its script, which are plain values too. What the caller has
        # marked as safe would be unmarked on leaving.
        with MARKING:
            safe = [argparse.Namespace, *_numpys_numbers()]
            marked = torch.serialization.get_safe_globals()
            with torch.serialization.safe_globals([s for s in safe if s not in marked]):
                return torch.load(path, map_location="cpu", weights_only=True)
    except OSError:
        raise
    except Exception as error:  # what it raises for a file that is none of its own varies
        found = re.search(r"GLOBAL (\S+)|(TorchScript)", str(error))
        if not found:
            raise CheckpointError(
                f"{path} is no whole file of torch.save(), or of another kind; download it again, "
                "and name files of safetensors .safetensors"
            ) from error
        raise CheckpointError(
            f"{path} is refused, and nothing of it was run: expected tensors and plain values, got "
            f"{found[1] or found[2]}, which loads by running code. If you trust the file, pass the "
            "state dict in torch.load(path, weights_only=False), or of torch.jit.load(path)"
        ) from error


def _check_stored(path: Path) -> None:
    """Raise CheckpointError for a compressed archive: it would become any size in memory.

    torch.save() stores what it writes as it is.
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
    """What a numpy scalar is made of in a file, such as the best accuracy so far."""
    try:
        numpy: Any = importlib.import_module("numpy")
    except ImportError:
        return []
    # Pickle has numbers as scalar(dtype, bytes), by a function whose module has been renamed.
    scalar = numpy.float64(0).__reduce__()[0]
    modules = ("numpy.core.multiarray", "numpy._core.multiarray")
    names = ["int8", "int16", "int32", "int64", "uint8", "uint16", "uint32", "uint64"]
    names += ["bool", "float16", "float32", "float64", "complex64", "complex128", "str"]
    return [
        *((scalar, f"{module}.scalar") for module in modules),
        numpy.dtype,
        *{type(numpy.dtype(name)) for name in names},
    ]


def _check_options(options: Mapping[str, Any]) -> None:
    """Raise TypeError, ValueError or RuntimeError unless a network can be on that device."""
    dtype = options.get("dtype")
    if dtype is not None and dtype not in DTYPES:
        raise TypeError(f"expected dtype as {_listed([str(d) for d in DTYPES])}, got {dtype!r}")
    device = options.get("device")
    if device is not None:
        try:
            torch.empty(1, device=device)
        except (RuntimeError, AssertionError, TypeError) as error:
            raise ValueError(
                f"expected device as one that torch can use here, got {device!r}: "
                f"{str(error).splitlines()[0]}"
            ) from error


def _check_memory(
    name: str, tensors: Mapping[str, Tensor], size: int | None, *, built: bool
) -> None:
    """Raise CheckpointError unless every tensor has the memory that its shape asks for.

    Before anything is allocated: a small file may hold tensors that repeat one number, or share
    their memory, by which it would ask for a network of any size. A network that is there already
    may share tensors, as one module under two names does.

    Args:
        name: for messages.
        tensors: of a state dict.
        size: of the file they are from, in bytes; None where there is none.
        built: whether the network is made from the tensors.
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
            f"{_listed(wrong)}; save them as they are, or after contiguous()",
            mismatched=tuple(entry.split(" ")[0] for entry in wrong),
        )
    scaled = [f"{key} ({t.dtype})" for key, t in tensors.items() if _needs_scales(t)]
    if scaled:
        raise CheckpointError(
            f"{name}: expected numbers in {_listed([str(d) for d in DTYPES])}, got "
            f"{_listed(scaled)}, which need scales; load them by the library that wrote them",
            mismatched=tuple(entry.split(" ")[0] for entry in scaled),
        )
    if built and size is not None and asked > size:
        raise CheckpointError(
            f"{name}: expected tensors of no more than its {size} bytes, got {asked} bytes, as "
            "tensors share their memory; save each with clone()"
        )


def _needs_scales(t: Tensor) -> bool:
    return t.dtype.is_floating_point and t.dtype not in DTYPES


def _unwrapped(contents: Any, key: str | None, name: str) -> dict[str, Tensor]:
    """The state dict in what a training script saved."""
    if key is not None:
        if not isinstance(contents, Mapping) or key not in contents:
            raise CheckpointError(f"{name}: expected an entry {key!r}, got {_entries(contents)}")
        contents = contents[key]
    for _ in range(len(WRAPPERS)):  # one in another; a file may hold itself
        if not isinstance(contents, Mapping) or _is_state_dict(contents):
            break
        inner = [contents[w] for w in WRAPPERS if isinstance(contents.get(w), Mapping)]
        if not inner:
            break
        contents = inner[0]
    if not isinstance(contents, Mapping) or not _is_state_dict(contents):
        raise CheckpointError(
            f"{name}: expected a state dict, names to tensors, or one under {', '.join(WRAPPERS)} "
            f"or key=, got {_entries(contents)}"
        )
    return dict(contents)


def _is_state_dict(contents: Mapping[Any, Any]) -> bool:
    return bool(contents) and all(
        isinstance(name, str) and isinstance(value, Tensor) for name, value in contents.items()
    )


def _entries(contents: Any) -> str:
    if not isinstance(contents, Mapping):
        return f"a {type(contents).__name__}"
    entries = [f"{name} ({type(value).__name__})" for name, value in contents.items()]
    return _listed(entries) if entries else "no entries"


def _clean_names(names: Iterable[str]) -> dict[str, str]:
    """Names without the prefixes of DataParallel, torch.compile and averages, by the names."""
    clean = {name: name.replace("_orig_mod.", "") for name in names}
    clean.pop("n_averaged", None)  # AveragedModel counts beside its module
    while clean and all(name.startswith("module.") for name in clean.values()):
        clean = {name: short.removeprefix("module.") for name, short in clean.items()}
    return clean


def _unprefixed(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    clean = _clean_names(tensors)
    found = {short: tensors[name] for name, short in clean.items()}
    if len(found) < len(clean):
        twice = [name for name, count in Counter(clean.values()).items() if count > 1]
        raise CheckpointError(f"expected one tensor of each name, got two of {_listed(twice)}")
    return found


def _own_tensors(model: nn.Module) -> dict[str, Tensor]:
    return {name: t for name, t in model.state_dict().items() if isinstance(t, Tensor)}


def _check_fit(
    name: str, tensors: Mapping[str, Tensor], model: nn.Module, title: str, hint: str = ""
) -> None:
    """Raise CheckpointError, with all that does not fit, unless tensors are those of a model."""
    targets = _unprefixed(_own_tensors(model))
    missing = [n for n in targets if n not in tensors and not _may_be_missing(n)]
    unexpected = [n for n in tensors if n not in targets]
    common = [n for n in targets if n in tensors]
    mismatched = [n for n in common if targets[n].shape != tensors[n].shape]
    lines = [f"{name} does not fit {title}; nothing was loaded{hint}"]
    for what, names, have in (
        ("missing", missing, targets),
        ("left over", unexpected, tensors),
    ):
        shapes = [f"{n} {tuple(have[n].shape)}" for n in names]
        lines += [f"  {what}: {_listed(shapes)}"] if names else []
    if mismatched:
        shapes = [
            f"{n} {tuple(tensors[n].shape)}, expected {tuple(targets[n].shape)}" for n in mismatched
        ]
        lines.append(f"  other shapes: {_listed(shapes, '; ')}")
    kinds = {n: _other_kind(tensors[n], targets[n]) for n in common if n not in mismatched}
    others = [n for n, kind in kinds.items() if kind]
    if others:
        shown = [f"{n} ({kinds[n]})" for n in others]
        lines.append(f"  no plain floating-point numbers: {_listed(shown)}")
        mismatched += others
    if len(lines) > 1:
        raise CheckpointError(
            "\n".join(lines), tuple(missing), tuple(unexpected), tuple(mismatched)
        )


def _other_kind(tensor: Tensor, target: Tensor) -> str:
    """What keeps the numbers of a tensor from being those of a parameter; "" if nothing does."""
    if tensor.is_meta or tensor.layout != torch.strided:
        return "meta" if tensor.is_meta else str(tensor.layout)
    # Such as quantised weights, whose scales are elsewhere.
    return str(tensor.dtype) if target.is_floating_point() > tensor.is_floating_point() else ""


def _may_be_missing(name: str) -> bool:
    """PyTorch before 0.4.1 did not count batches, and only a momentum of None reads the count."""
    return name.endswith("num_batches_tracked")


def _renamed(model: nn.Module, tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    """Tensors under a model's own names for them, with counts of 0 where they are missing."""
    own = _own_tensors(model)
    found = {
        name: tensors[short] if short in tensors else torch.zeros_like(own[name])
        for name, short in _clean_names(own).items()
    }
    return model.state_dict() | found


def _load_or_restore(model: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    before = {name: tensor.clone() for name, tensor in _own_tensors(model).items()}
    if any(tensor.is_meta for tensor in before.values()):
        raise CheckpointError(
            "expected a model with memory, got one on the meta device; "
            "call model.to_empty(device='cpu') first"
        )
    try:
        model.load_state_dict(_renamed(model, tensors))
    except Exception as error:
        # Names and shapes fit, so it was a hook of the model, with some tensors loaded already.
        with torch.no_grad():
            for name, tensor in _own_tensors(model).items():
                tensor.copy_(before[name])
        raise CheckpointError(
            f"the model's own loading failed, and it is as it was: {type(error).__name__}: {error}"
        ) from error


def _listed(entries: list[str], separator: str = ", ") -> str:
    more = len(entries) - SHOWN
    return separator.join(entries[:SHOWN]) + (f" and {more} more" if more > 0 else "")
