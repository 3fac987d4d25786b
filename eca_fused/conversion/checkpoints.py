"""load_checkpoint(): loads a network from a file of weights, completely or not at all."""

import os
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from eca_fused.conversion import architectures
from eca_fused.conversion.files import (
    DTYPES,
    SHOWN,
    CheckpointError,
    check_memory,
    listed,
    read,
)
from eca_fused.conversion.modules import convert

__all__ = ["CheckpointError", "load_checkpoint", "title_of", "weights"]

# Keys under which training scripts store the state dict: the authors', timm's, and others'.
WRAPPERS = ("state_dict", "model", "model_state", "model_state_dict", "state_dict_ema", "model_ema")
DECIDED = {"attention", "kernel_sizes", "num_classes"}  # by the tensors, so not options
MOST_BLOCKS = 1000  # of a network that is built; the deepest published ResNet has 333
TIMM = (
    "; for a network of timm install timm, which builds its own ECA networks, or pass "
    "model=timm.create_model(name, num_classes=...)"
)


def load_checkpoint(
    source: str | os.PathLike[str] | Mapping[str, Any],
    model: nn.Module | None = None,
    *,
    key: str | None = None,
    **options: Any,
) -> nn.Module:
    """Load weights completely or not at all, into a given network or into one built from them.

    Without a model, the tensors define the network: a ResNet or MobileNetV2 of eca_fused.models,
    with ECA and every layer's own k, or without attention. It has as many classes as the classifier
    has rows, and the dtype of its first convolution. This covers the files of the ECA-Net authors,
    of torchvision, and of timm's resnet50 and the like with ECA. timm, if it is installed, builds
    its own ECA networks, such as ecaresnet50d; these are then converted.

    Wrappers are taken off (`state_dict`, `model`, `model_state`, `state_dict_ema` and others; the
    first of these that is there), and so are the prefixes `module.` of DataParallel and
    `_orig_mod.` of torch.compile. A file may hold only tensors and plain values. One that holds
    code is refused, not run.

    Args:
        source: path of a file of torch.save() or, ending in .safetensors, of safetensors; or a
            state dict, with or without wrappers.
        model: network to load into, converted or not, compiled or not; None builds one.
        key: of the wrapper to take, such as "state_dict_ema".
        options: of the network that is built: fused, backend, device, dtype, see models.ResNet;
            for timm's networks only these four.

    Returns:
        The model. One that is built is in training mode, like any new module.

    Raises:
        CheckpointError: the file holds code or no state dict; its network is not known; names or
            shapes do not fit (they are listed); or a tensor has less memory than its shape needs.
            A given model stays as it was.
        TypeError: source is neither a path nor a mapping; model is not a module; options come with
            a model, or include attention, kernel_sizes or num_classes, which the tensors decide; or
            dtype is not float32, float64, float16 or bfloat16.
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
    name = _name(source)
    tensors = weights(source, key)
    size = None if isinstance(source, Mapping) else Path(name).stat().st_size
    _check_options(options)
    check_memory(name, tensors, size, built=model is None)
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


def weights(
    source: str | os.PathLike[str] | Mapping[str, Any], key: str | None = None
) -> dict[str, Tensor]:
    """The tensors of a file or state dict by name, without wrappers and prefixes.

    Args and errors are those of load_checkpoint(), which checks more.
    """
    name = _name(source)
    contents = source if isinstance(source, Mapping) else read(Path(name))
    return _unprefixed(_unwrapped(contents, key, name))


def _name(source: str | os.PathLike[str] | Mapping[str, Any]) -> str:
    return "the state dict" if isinstance(source, Mapping) else os.fspath(source)


def title_of(tensors: Mapping[str, Tensor]) -> str | None:
    """What load_checkpoint() builds from these tensors; None if it does not know them."""
    if found := architectures.infer(tensors):
        return found.title
    theirs = architectures.infer_timm(tensors)
    return None if theirs is None else f"{theirs[0]} of timm"


def _check_options(options: Mapping[str, Any]) -> None:
    """Raise TypeError or ValueError unless a network can have this dtype and device."""
    dtype = options.get("dtype")
    if dtype is not None and dtype not in DTYPES:
        raise TypeError(f"expected dtype as {listed([str(d) for d in DTYPES])}, got {dtype!r}")
    device = options.get("device")
    if device is not None:
        try:
            torch.empty(1, device=device)
        except (RuntimeError, AssertionError, TypeError) as error:
            raise ValueError(
                f"expected device as one that torch can use here, got {device!r}: "
                f"{str(error).splitlines()[0]}"
            ) from error


def _built(name: str, tensors: dict[str, Tensor], options: dict[str, Any]) -> nn.Module:
    """The network of models/ that the tensors describe, with the tensors loaded."""
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


def _unwrapped(contents: Any, key: str | None, name: str) -> dict[str, Tensor]:
    """The state dict in what a training script saved."""
    if key is not None:
        if not isinstance(contents, Mapping) or key not in contents:
            raise CheckpointError(f"{name}: expected an entry {key!r}, got {_entries(contents)}")
        contents = contents[key]
    for _ in range(len(WRAPPERS)):  # wrappers may be nested; a file may even contain itself
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
    return listed(entries) if entries else "no entries"


def _clean_names(names: Iterable[str]) -> dict[str, str]:
    """Names without the prefixes of DataParallel, torch.compile and AveragedModel, by full name."""
    clean = {name: name.replace("_orig_mod.", "") for name in names}
    clean.pop("n_averaged", None)  # the counter that AveragedModel has beside its module
    while clean and all(name.startswith("module.") for name in clean.values()):
        clean = {name: short.removeprefix("module.") for name, short in clean.items()}
    return clean


def _unprefixed(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    clean = _clean_names(tensors)
    found = {short: tensors[name] for name, short in clean.items()}
    if len(found) < len(clean):
        twice = [name for name, count in Counter(clean.values()).items() if count > 1]
        raise CheckpointError(f"expected one tensor of each name, got two of {listed(twice)}")
    return found


def _own_tensors(model: nn.Module) -> dict[str, Tensor]:
    return {name: t for name, t in model.state_dict().items() if isinstance(t, Tensor)}


def _check_fit(
    name: str, tensors: Mapping[str, Tensor], model: nn.Module, title: str, hint: str = ""
) -> None:
    """Raise CheckpointError with everything that does not fit, unless the tensors fit a model."""
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
        lines += [f"  {what}: {listed(shapes)}"] if names else []
    if mismatched:
        shapes = [
            f"{n} {tuple(tensors[n].shape)}, expected {tuple(targets[n].shape)}" for n in mismatched
        ]
        lines.append(f"  other shapes: {listed(shapes, '; ')}")
    kinds = {n: _other_kind(tensors[n], targets[n]) for n in common if n not in mismatched}
    others = [n for n, kind in kinds.items() if kind]
    if others:
        shown = [f"{n} ({kinds[n]})" for n in others]
        lines.append(f"  not plain floating-point numbers: {listed(shown)}")
        mismatched += others
    if len(lines) > 1:
        raise CheckpointError(
            "\n".join(lines), tuple(missing), tuple(unexpected), tuple(mismatched)
        )


def _other_kind(tensor: Tensor, target: Tensor) -> str:
    """Why the numbers of a tensor cannot be those of a parameter; "" if they can."""
    if tensor.is_meta or tensor.layout != torch.strided:
        return "meta" if tensor.is_meta else str(tensor.layout)
    # For example quantised weights, whose scales are elsewhere.
    return str(tensor.dtype) if target.is_floating_point() > tensor.is_floating_point() else ""


def _may_be_missing(name: str) -> bool:
    """PyTorch before 0.4.1 had no batch count, and only a momentum of None reads the count."""
    return name.endswith("num_batches_tracked")


def _renamed(model: nn.Module, tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    """Tensors under a model's own names, with counts of 0 where those are missing."""
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
        # Names and shapes fit, so the model's own code failed, after some tensors were loaded.
        with torch.no_grad():
            for name, tensor in _own_tensors(model).items():
                tensor.copy_(before[name])
        raise CheckpointError(
            f"the model's own loading failed, and it is as it was: {type(error).__name__}: {error}"
        ) from error
