"""timm's ECA models with fused ECA, for timm's own training script and for `timm.create_model`.

python examples/timm_train.py TRAIN_PY DATA --model fused_ecaresnet50d ...
torchrun --nproc-per-node 8 examples/timm_train.py TRAIN_PY DATA --model fused_ecaresnet50d ...

TRAIN_PY is train.py (or validate.py) from a clone of timm's repository; pip does not install it.
The other arguments are those of the script. For your own scripts, import this file: it registers
each model under its name in timm with the prefix fused_.
"""

import importlib
import runpy
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from torch import nn

import eca_fused

timm: Any = importlib.import_module("timm")

__all__ = ["fuse", "register"]


def fuse(model: nn.Module) -> nn.Module:
    """Turn the ECA modules of a timm model into fused ECALayers, in place: all of them or none.

    Names stay the same, so checkpoints and optimisers still fit. To convert only some modules, use
    eca_fused.convert().

    Args:
        model: any module that holds EcaModules or CecaModules of timm.

    Returns:
        The model.

    Raises:
        ValueError: the model has no such module, or one is not plain ECA.
    """
    report = eca_fused.convert(model)
    if report.left:
        eca_fused.revert(model)
        raise ValueError(
            f"expected only plain ECA, so nothing was fused; convert() gives:\n{report}"
        )
    if not report.converted:
        raise ValueError(
            f"expected a model with timm's EcaModule or CecaModule, found none in "
            f"{type(model).__name__}; timm.list_models('*eca*') names some"
        )
    return model


def register(name: str) -> str:
    """Register a timm model in timm with fused ECA as well; return its new name."""
    make: Callable[..., nn.Module] = timm.models.model_entrypoint(name)

    def fused(pretrained: bool = False, **arguments: Any) -> nn.Module:
        return fuse(make(pretrained, **arguments))

    fused.__name__ = fused.__qualname__ = f"fused_{name}"
    timm.models.register_model(fused)
    return fused.__name__


for _name in timm.list_models("*eca*", exclude_filters="fused_*"):
    register(_name)


def main(argv: Sequence[str]) -> int:
    """Run the script that the first argument names, with the other arguments."""
    if not argv or not Path(argv[0]).is_file():
        got = repr(argv[0]) if argv else "nothing"
        print(
            f"error: expected the path of timm's train.py as the first argument, got {got}; "
            "git clone https://github.com/huggingface/pytorch-image-models has it",
            file=sys.stderr,
        )
        return 2
    sys.argv = list(argv)
    sys.path.insert(0, str(Path(argv[0]).resolve().parent))
    runpy.run_path(argv[0], run_name="__main__")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
