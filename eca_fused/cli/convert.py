"""`python -m eca_fused convert`: what convert() and load_checkpoint() make of a network."""

import argparse
import contextlib
import difflib
import importlib
import importlib.util
import json
import os
import sys
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from eca_fused.cli.common.options import Options, positive
from eca_fused.cli.common.packages import PACKAGES_MISSING
from eca_fused.conversion import CheckpointError, Conversion, convert, load_checkpoint
from eca_fused.conversion.checkpoints import title_of, weights

__all__ = ["main"]

BAD_ARGUMENTS = 2  # argparse's own exit status
TIMM = "timm:"
SAFETENSORS = ".safetensors"


class Refused(Exception):
    """What was expected, what came and what to do."""


@dataclass(frozen=True)
class Network:
    """A network with weights, before the conversion."""

    title: str
    model: nn.Module
    tensors: Mapping[str, Tensor]  # by the names that a written file has


def parser() -> argparse.ArgumentParser:
    """The options of the command."""
    made = Options(
        "convert",
        description="Load weights into their network, or build a network of timm, convert it, and "
        "report what was converted, what was left and why. Nothing is written without --output.",
        status="0, 2 for bad arguments, networks or files, 3 if a package is missing",
        examples=[
            "convert timm:ecaresnet26t --tails",
            "convert weights.pth",
            "convert weights.pth --arch timm:eca_nfnet_l0 --output plain.safetensors",
        ],
    )
    made.add_argument(
        "source",
        metavar="CHECKPOINT|timm:NAME",
        help="a file of weights, of torch.save() or safetensors; or a network of timm",
    )
    made.add_argument(
        "--arch",
        metavar="timm:NAME",
        help="the network of the file (default: the one that fits the names and shapes in it)",
    )
    made.add_argument(
        "--classes", type=positive, metavar="N", help="of the network (default: its own number)"
    )
    made.add_argument(
        "--key", help='the entry of the file to take, such as "state_dict_ema" (the first known)'
    )
    made.add_argument("--pretrained", action="store_true", help="download the weights of timm:NAME")
    made.add_argument(
        "--tails",
        action="store_true",
        help="also convert the ends of residual blocks, and attention in their middle",
    )
    made.add_argument(
        "--output",
        type=Path,
        metavar="FILE",
        help="write the weights as a plain state dict, without wrappers and prefixes of names, "
        "which loads without eca_fused; .safetensors or a file of torch.save()",
    )
    made.add_argument("--json", action="store_true", help="one JSON document on standard output")
    return made


def check_arguments(args: argparse.Namespace) -> None:
    """Raise Refused for arguments that do not go together."""
    from_timm = args.source.startswith(TIMM)
    if from_timm:
        for name in ("arch", "key"):
            if getattr(args, name) is not None:
                raise Refused(f"--{name} is for a file of weights, got {args.source}; leave it out")
        if args.output and not args.pretrained:
            raise Refused(
                f"the weights of {args.source} would be random, so --output would write noise; "
                "add --pretrained, or name a file of weights"
            )
    elif args.pretrained:
        raise Refused("--pretrained is for timm:NAME, and this file has weights; leave it out")
    elif args.classes and not args.arch:
        raise Refused("--classes is for timm:NAME and --arch; the file decides, so leave it out")
    if args.arch is not None and not args.arch.startswith(TIMM):
        raise Refused(f"expected --arch as timm:NAME, got {args.arch!r}")


# ---- the network ----


def timms(name: str, **options: Any) -> nn.Module:
    """A network of timm.

    Raises:
        Refused: there is no such network, or it cannot be built.
        ImportError: timm does not import.
    """
    try:
        timm: Any = importlib.import_module("timm")
    except ImportError as error:
        if importlib.util.find_spec("timm") is None:
            raise ImportError(f"{TIMM}{name} needs timm: pip install timm") from error
        raise ImportError(f"{TIMM}{name} needs timm, which does not import: {error}") from error
    if not timm.is_model(name):
        similar = difflib.get_close_matches(name, timm.list_models(), n=4)
        hint = f"similar are {', '.join(similar)}" if similar else "timm.list_models() lists them"
        raise Refused(f"expected NAME of {TIMM}NAME as a network of timm, got {name!r}; {hint}")
    try:
        model: nn.Module = timm.create_model(name, **options)
    except Exception as error:  # timm's own, or of a download
        raise Refused(f"timm cannot build {name}: {type(error).__name__}: {error}") from error
    return model


def network(args: argparse.Namespace) -> Network:
    """The network that the arguments name, with its weights."""
    classes = {} if args.classes is None else {"num_classes": args.classes}
    if args.source.startswith(TIMM):
        name = args.source.removeprefix(TIMM)
        model = timms(name, pretrained=args.pretrained, **classes)
        state = "its own weights" if args.pretrained else "random weights"
        return Network(f"{name} of timm, with {state}", model, model.state_dict())
    path = Path(args.source)
    if not path.exists():
        raise Refused(
            f"expected a file of weights or {TIMM}NAME, got {args.source!r}, and there is no such "
            f"file{misspelt(args.source)}"
        )
    tensors = weights(path, args.key)
    if args.arch is None:
        return fitting(path, tensors, args.key)
    name = args.arch.removeprefix(TIMM)
    model = timms(name, **classes)
    try:
        load_checkpoint(path, model, key=args.key)
    except CheckpointError as error:
        hint = not (error.missing or error.unexpected or args.classes)
        raise extended(error, "the number of its classes is --classes" if hint else "") from error
    return Network(f"{name} of timm", model, tensors)


def fitting(path: Path, tensors: Mapping[str, Tensor], key: str | None) -> Network:
    """The network that the tensors of a file describe."""
    title = title_of(tensors)
    if title is None:
        names = ", ".join(list(tensors)[:3])
        no_timm = importlib.util.find_spec("timm") is None
        first = "install timm, whose networks are not known without it, or " if no_timm else ""
        raise Refused(
            f"{path}: expected the weights of a ResNet, a MobileNetV2 or an ECA network of timm, "
            f"got tensors named {names} and so on; {first}name their network by --arch timm:NAME"
        )
    try:
        return Network(title, load_checkpoint(path, key=key, fused=False), tensors)
    except CheckpointError as error:
        raise extended(error, "on the command line, that is --arch timm:NAME") from error


def extended(error: CheckpointError, hint: str) -> Refused:
    """The error with a hint at the end of its first line."""
    first, newline, rest = str(error).partition("\n")
    return Refused(f"{first}; {hint}{newline}{rest}" if hint else str(error))


def misspelt(source: str) -> str:
    """A hint for timm's name without its prefix."""
    try:
        timm: Any = importlib.import_module("timm")
    except ImportError:
        return ""
    return f"; the network of timm is {TIMM}{source}" if timm.is_model(source) else ""


# ---- the file ----


def check_output(path: Path) -> None:
    """Raise Refused or ImportError if a file cannot be written, before anything is computed."""
    if path.exists() or path.is_symlink():
        raise Refused(f"expected --output as a new file, but {path} exists; choose another name")
    if not path.parent.is_dir():
        raise Refused(f"--output {path}: there is no folder {path.parent}; make it first")
    if not os.access(path.parent, os.W_OK):
        raise Refused(f"--output {path}: the folder {path.parent} cannot be written to")
    if path.suffix == SAFETENSORS and importlib.util.find_spec("safetensors") is None:
        raise ImportError(f"{path} needs safetensors: pip install safetensors")


def write(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Write a state dict through another file, so that there is a whole one or none.

    Raises:
        Refused: it cannot be written, or does not read as it was written.
    """
    plain = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in tensors.items()}
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        if path.suffix == SAFETENSORS:
            library: Any = importlib.import_module("safetensors.torch")
            partial.write_bytes(library.save(plain, metadata={"format": "pt"}))
            found = library.load(partial.read_bytes())
        else:
            torch.save(plain, partial)
            found = torch.load(partial, weights_only=True)
        if found.keys() != plain.keys() or not all(same(found[n], plain[n]) for n in plain):
            raise OSError("it does not read as it was written")
        os.replace(partial, path)
    except (OSError, RuntimeError) as error:  # RuntimeError: how torch.save() says "disk full"
        reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
        line = reason.partition("\n")[0]
        raise Refused(
            f"--output {path} cannot be written, and nothing is left of it: {line}"
        ) from (error)
    finally:
        partial.unlink(missing_ok=True)


def same(a: Tensor, b: Tensor) -> bool:
    """Equal bits, NaN too."""
    return a.dtype == b.dtype and torch.equal(
        a.flatten().view(torch.uint8), b.flatten().view(torch.uint8)
    )


# ---- the report ----


def document(
    args: argparse.Namespace, found: Network, report: Conversion, parameters: int
) -> dict[str, Any]:
    """The report for JSON."""
    return {
        "source": args.source,
        "network": found.title,
        "class": f"{type(found.model).__module__}.{type(found.model).__qualname__}",
        "tensors": len(found.tensors),
        "parameters": parameters,
        "dtypes": dict(
            Counter(str(t.dtype).removeprefix("torch.") for t in found.tensors.values())
        ),
        "tails": args.tails,
        "converted": dict(report.converted),
        "blocks": dict(report.tails),
        "left": dict(report.left),
        "already_fused": list(report.already_fused),
        "output": str(args.output) if args.output else None,
    }


def text(facts: dict[str, Any], report: Conversion) -> str:
    dtypes = ", ".join(f"{count} {dtype}" for dtype, count in facts["dtypes"].items())
    call = f"convert(model{', tails=True' if facts['tails'] else ''})"
    lines = [
        f"{facts['source']}: {facts['network']}",
        f"  class {facts['class']}",
        f"  {facts['tensors']} tensors ({dtypes}), {facts['parameters']:,} parameters",
        "",
        f"{call}: {report}",
    ]
    if not (report.converted or report.tails or report.already_fused):
        lines.append("Nothing was converted, so eca_fused would not change this network.")
        if not facts["tails"]:
            lines.append("With --tails, blocks without ECA are converted too.")
    if facts["output"]:
        lines += ["", f"wrote {facts['output']}: {facts['tensors']} tensors, a plain state dict"]
    return "\n".join(lines)


def run(args: argparse.Namespace) -> tuple[dict[str, Any], Conversion]:
    check_arguments(args)
    if args.output:
        check_output(args.output)
    found = network(args)
    parameters = sum(p.numel() for p in found.model.parameters())
    report = convert(found.model, tails=args.tails)
    facts = document(args, found, report, parameters)
    if args.output:
        write(args.output, found.tensors)
    return facts, report


def main(argv: Sequence[str]) -> int:
    """Convert a network, and report what came of it.

    Returns:
        The exit status: 0, 2 for bad arguments, networks or files, 3 if a package is missing.

    Raises:
        SystemExit: 2 for bad arguments, 0 after --help.
    """
    args = parser().parse_args(argv)
    try:
        # Output of other packages must not get into the JSON document.
        with contextlib.redirect_stdout(sys.stderr):
            facts, report = run(args)
    except (Refused, CheckpointError) as error:
        print(f"error: {error}", file=sys.stderr)
        return BAD_ARGUMENTS
    except ImportError as error:
        print(f"error: {error}", file=sys.stderr)
        return PACKAGES_MISSING
    print(json.dumps(facts, indent=2) if args.json else text(facts, report))
    return 0
