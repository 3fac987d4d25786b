"""The compiled extension: loads it, or says why it is missing, and describes its operators.

`forward`, `backward`, `inference` and `inference_` are this backend's side of the contract; a
backend is a module that has these four.
"""

import torch
from torch import Tensor

from eca_fused.checks import check
from eca_fused.layout import output_strides

__all__ = ["backward", "devices", "forward", "inference", "inference_", "missing"]

missing: str | None = None  # the reason why there are no native kernels
devices: frozenset[str] = frozenset()  # device types that the extension was compiled for
description = ""

try:
    import eca_fused._C as _C

    _info = _C.build_info()
    devices = frozenset({"cpu", "cuda"} if _info["cuda"] else {"cpu"})
    description = f"CPU ({_info['cpu_capability']})" + (" and CUDA" if _info["cuda"] else "")
    forward = torch.ops.eca_fused.forward.default
    backward = torch.ops.eca_fused.backward.default
    inference = torch.ops.eca_fused.inference.default
    inference_ = torch.ops.eca_fused.inference_.default
except Exception as error:  # a broken build may fail in any way, and must not break the import
    devices = frozenset()
    missing = (
        f"the compiled extension could not be loaded, or is another version's "
        f"({type(error).__name__}: {error}); build it with `pip install .` in the source folder"
    )

if missing is None:

    def _mode(circular: bool) -> str:
        return "circular" if circular else "zeros"

    def _like(x: Tensor) -> Tensor:
        return x.new_empty_strided(x.shape, output_strides(x))

    @torch.library.register_fake("eca_fused::forward")
    def _(x: Tensor, weight: Tensor, circular: bool = False) -> tuple[Tensor, Tensor, Tensor]:
        check(x, weight, _mode(circular))
        dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
        mean, gate = (x.new_empty(x.shape[:2], dtype=dtype) for _ in range(2))
        return _like(x), mean, gate

    @torch.library.register_fake("eca_fused::inference")
    def _(x: Tensor, weight: Tensor, circular: bool = False) -> Tensor:
        check(x, weight, _mode(circular))
        return _like(x)

    @torch.library.register_fake("eca_fused::inference_")
    def _(x: Tensor, weight: Tensor, circular: bool = False) -> None:
        check(x, weight, _mode(circular))

    @torch.library.register_fake("eca_fused::backward")
    def _(
        dy: Tensor,
        x: Tensor,
        weight: Tensor,
        mean: Tensor,
        gate: Tensor,
        circular: bool = False,
        need_dx: bool = True,
        need_dweight: bool = True,
    ) -> tuple[Tensor, Tensor]:
        check(x, weight, _mode(circular))
        dx = _like(x) if need_dx else x.new_empty(0)
        dweight = weight.new_empty(weight.shape if need_dweight else 0)
        return dx, dweight
