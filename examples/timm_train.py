"""timm's ECA models with fused ECA, for timm's own training script and for `timm.create_model`.

python examples/timm_train.py TRAIN_PY DATA --model fused_ecaresnet50d ...
torchrun --nproc-per-node 8 examples/timm_train.py TRAIN_PY DATA --model fused_ecaresnet50d ...

TRAIN_PY is train.py (or validate.py) of a clone of timm's repository, which pip does not install;
all that follows are its own arguments. Importing this file registers the models, each under its
name in timm with fused_ before it, for scripts of yours.
"""

import importlib
import runpy
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from torch import nn

from eca_fused import ECALayer

timm: Any = importlib.import_module("timm")
timm_eca: Any = importlib.import_module("timm.layers.eca")

__all__ = ["fuse", "register"]

PADDING_MODES = {timm_eca.EcaModule: "zeros", timm_eca.CecaModule: "circular"}


def fuse(model: nn.Module) -> nn.Module:
    """Replace the ECA modules of a timm model, in place, by ECALayers with the same parameters.

    Names, and so checkpoints and optimisers, stay as they are.

    Args:
        model: any module that holds EcaModules or CecaModules of timm.

    Returns:
        The model.

    Raises:
        ValueError: there is none, or one is not plain ECA.
    """
    found = [name for name, module in model.named_modules() if type(module) in PADDING_MODES]
    if not found:
        raise ValueError(
            f"expected a model with timm's EcaModule or CecaModule, found none in "
            f"{type(model).__name__}; timm.list_models('*eca*') names some"
        )
    for name in found:
        check_plain(name, model.get_submodule(name))
    for name in found:
        theirs: Any = model.get_submodule(name)
        ours = ECALayer(
            kernel_size=theirs.conv.kernel_size[0], padding_mode=PADDING_MODES[type(theirs)]
        )
        ours.conv.weight = theirs.conv.weight
        model.set_submodule(name, ours.train(theirs.training))
    return model


def check_plain(name: str, module: Any) -> None:
    """Raise ValueError unless a module is ECA as in the paper: one convolution and a sigmoid."""
    more = getattr(module, "conv2", None) is not None or module.conv.bias is not None
    if more or type(module.gate).__name__ != "Sigmoid":
        raise ValueError(
            f"expected {name} as one convolution without bias and a sigmoid, got {module}; "
            "ECALayer has no other form, so leave this model as it is"
        )


def register(name: str) -> str:
    """Make a model of timm known to it with fused ECA as well; its name there."""
    make: Callable[..., nn.Module] = timm.models.model_entrypoint(name)

    def fused(pretrained: bool = False, **arguments: Any) -> nn.Module:
        return fuse(make(pretrained, **arguments))

    fused.__name__ = fused.__qualname__ = f"fused_{name}"
    timm.models.register_model(fused)
    return fused.__name__


for _name in timm.list_models("*eca*", exclude_filters="fused_*"):
    register(_name)


def main(argv: Sequence[str]) -> int:
    """Run the script that the first argument names, with the others as its arguments."""
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
