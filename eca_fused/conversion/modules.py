"""convert() gives a model fused layers and fused parts of blocks in place; revert() undoes it."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from eca_fused.conversion import recognise as recognition
from eca_fused.conversion.recognise import NotPlainECA
from eca_fused.conversion.tailed import PROGRAM, former, tailed
from eca_fused.conversion.tails import examine
from eca_fused.layer import ECALayer
from eca_fused.ops.backend import check_backend

__all__ = ["Conversion", "convert", "revert"]

# The key in a converted module's __dict__, so that copies and pickles have it too.
ORIGINAL = "_eca_fused_original"
SHOWN = 4  # names in a line of a report


@dataclass(frozen=True)
class Conversion:
    """What convert() did. str() gives a report.

    A module in several places is listed under its first name.

    Args:
        converted: the former class of each module that is now a fused ECALayer, by name.
        left: the reason for each module that looks like ECA, and with tails=True for each residual
            block, that was left unchanged, by name.
        already_fused: names of the ECALayers and of the blocks that were fused before.
        tails: the class of each block with parts that are one operation now, and these parts, by
            name: "attention" is a norm, an activation and attention, "tail" the end of the block.
    """

    converted: Mapping[str, str]
    left: Mapping[str, str]
    already_fused: tuple[str, ...] = ()
    tails: Mapping[str, str] = field(default_factory=dict)

    def __str__(self) -> str:
        if not (self.converted or self.left or self.already_fused or self.tails):
            return "no ECA modules found"
        tails = f", blocks {len(self.tails)}" if self.tails else ""
        lines = [f"converted {len(self.converted)}{tails}, left {len(self.left)}"]
        lines += _grouped(self.converted)
        lines += [f"  in {line.strip()}" for line in _grouped(self.tails)]
        lines += [f"  left {line.strip()}" for line in _grouped(self.left)]
        if self.already_fused:
            lines.append(f"  fused before: {_listed(self.already_fused)}")
        return "\n".join(lines)


def convert(
    model: nn.Module, backend: str = "auto", inplace: bool = False, *, tails: bool = False
) -> Conversion:
    """Turn a model's ECA modules into fused ECALayers, and on request its blocks' tails, in place.

    It recognises timm's EcaModule and CecaModule, the ECA-Net authors' eca_layer, ECALayers with
    fused=False, and modules built like these: global average pooling (a module or a function), a
    Conv1d(1, 1, k) and a sigmoid. The forward of each module that is not ours is tried against
    plain ECA, see recognise.padding_mode(). A module that computes anything else is left unchanged,
    with the reason in the report: other gates, biases and the MLP of timm's options, subclasses,
    hooks and children of your own classes that would no longer be called, TorchScript. All modules
    are examined before the first is changed.

    The modules stay the same objects and change their class to ECALayer. So parameters, hooks,
    state dict, optimizers, dtype, device, modules in several places and references from elsewhere
    all stay as they are. The model itself may be such a module. Nothing outside of the model
    changes. Convert before torch.compile, FSDP and torch.jit.script. In DistributedDataParallel and
    compiled models the inner modules are converted.

    With tails=True, residual blocks compute their tail as one operation, as ResidualTail does. The
    tail is batch norm or attention or both, a drop path, the addition and an activation. Without an
    addition, as where MobileNetV2 strides, it is batch norm and attention. Batch norm, activation
    and attention in the middle of a block become one operation too, as NormActAttention computes
    it: that is where RegNet, MobileNetV3 and EfficientNet have theirs. Blocks are found by the
    graph of their forward. For each kind of block, copies run with and without the change, and must
    give the same output, gradients and running statistics. A block keeps its submodules and stays
    an instance of its class. Modules of a tail that later get hooks are called.

    Args:
        model: any module.
        backend: of the layers, see eca().
        inplace: of the layers, for inference: each overwrites its input, which nothing else may
            need.
        tails: also make the tails of residual blocks, and norms with activation and attention in
            the middle of blocks, one operation each.

    Returns:
        What was converted, what was left and why. Print it.

    Raises:
        TypeError: model is not a module.
        ValueError: there is no such backend.
    """
    _check_module(model)
    check_backend(backend)
    converted, left, fused = {}, {}, []
    found = []  # all are examined before the first is changed
    for name, module in list(model.named_modules()):
        if not recognition.looks_like_eca(module):
            continue
        if isinstance(module, ECALayer) and module.fused:
            fused.append(name)
            continue
        before = _class_name(module)
        try:
            options = _as_eca_layer(module, backend, inplace)
        except NotPlainECA as reason:
            left[name] = f"{before}: {reason}"
        else:
            converted[name] = before
            found.append((module, options))
    for module, options in found:
        own = vars(module)
        original = (type(module), {name: own[name] for name in options if name in own})
        module.__class__ = ECALayer
        own.update(options)
        own[ORIGINAL] = original
    if not tails:
        return Conversion(converted, left, tuple(fused))
    blocks = examine(model)
    modules = dict(model.named_modules())
    names = {}
    for name, program in blocks.programs.items():
        block: Any = modules[name]
        names[name] = f"{_class_name(block)}: {program}"
        vars(block)[PROGRAM] = program
        block.__class__ = tailed(type(block))
    return Conversion(converted, left | blocks.left, (*fused, *blocks.tailed), names)


def revert(model: nn.Module) -> int:
    """Undo convert(): every module gets its former class back and keeps its trained weights.

    Works on copies and on models loaded from a pickle too. Hooks and attributes that were added
    after the conversion stay.

    Args:
        model: any module.

    Returns:
        The number of reverted modules, layers and blocks.

    Raises:
        TypeError: model is not a module.
        RuntimeError: other code has changed the class of a module since; nothing is reverted.
    """
    _check_module(model)
    modules = {n: m for n, m in model.named_modules() if ORIGINAL in vars(m)}
    for name, module in modules.items():
        if type(module) is not ECALayer:
            raise RuntimeError(
                f"expected {name or 'the model'} as the ECALayer that convert() made, got "
                f"{type(module).__name__}; undo what came after the conversion first"
            )
    blocks = {n: m for n, m in model.named_modules() if PROGRAM in vars(m)}
    for name, block in blocks.items():
        if former(block) is None:
            raise RuntimeError(
                f"expected {name or 'the model'} as the block that convert() made, got "
                f"{type(block).__name__}; undo what came after the conversion first"
            )
    for block in blocks.values():
        del vars(block)[PROGRAM]
        block.__class__ = former(block)
    for module in modules.values():
        cls, attributes = vars(module).pop(ORIGINAL)
        for name in (*_options("zeros", "auto", False), "taps_name"):
            vars(module).pop(name, None)
        vars(module).update(attributes)
        module.__class__ = cls
    return len(modules) + len(blocks)


def _as_eca_layer(module: nn.Module, backend: str, inplace: bool) -> dict[str, Any]:
    """The attributes that make a module an ECALayer. The module is not changed.

    Raises:
        NotPlainECA: it cannot become one.
    """
    if isinstance(module, ECALayer):
        recognition.check_class(module)
        options = _options(module.padding_mode, backend, inplace or module.overwrites)
    else:
        options = _options(recognition.padding_mode(module), backend, inplace)
        options["taps_name"] = recognition.taps_name(module)
    try:
        object.__new__(type(module)).__class__ = ECALayer
    except TypeError as error:  # for example a class with __slots__
        raise NotPlainECA(f"its class cannot be exchanged: {error}") from error
    return options


def _options(padding_mode: str, backend: str, inplace: bool) -> dict[str, Any]:
    """The attributes of an ECALayer that are not modules."""
    return {"padding_mode": padding_mode, "fused": True, "backend": backend, "overwrites": inplace}


def _check_module(model: nn.Module) -> None:
    if not isinstance(model, nn.Module):
        raise TypeError(f"expected model as a torch.nn.Module, got {type(model).__name__}")


def _class_name(module: nn.Module) -> str:
    return str(getattr(module, "original_name", type(module).__name__))


def _grouped(names: Mapping[str, str]) -> list[str]:
    """A line for each value, with its names."""
    groups: dict[str, list[str]] = {}
    for name, value in names.items():
        groups.setdefault(value, []).append(name)
    return [f"  {value}: {_listed(group)}" for value, group in groups.items()]


def _listed(names: list[str] | tuple[str, ...]) -> str:
    shown = [name or "the model itself" for name in names[:SHOWN]]
    more = len(names) - len(shown)
    return ", ".join(shown) + (f" and {more} more" if more else "")
