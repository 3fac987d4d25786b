"""The passes of attention after an activation as CUDA kernels do them, against float64."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from helpers.cases import LAYOUTS, assert_near, in_layout, normal
from helpers.gating import Exact, spread
from helpers.gpu_host_gating import GatingGpu


class Case:
    """Random maps and coefficients."""

    def __init__(
        self,
        shape: tuple[int, ...],
        dtype: torch.dtype,
        layout: str,
        activation: str = "relu",
        view: Callable[[Tensor], Tensor] | None = None,
    ) -> None:
        g = torch.Generator().manual_seed(5)
        self.activation, self.layout, self.dtype = activation, layout, dtype
        self.wide = torch.float64 if dtype == torch.float64 else torch.float32

        def a_map() -> Tensor:
            whole = in_layout((normal(shape, g) + 0.5).to(dtype), layout)
            return whole if view is None else view(whole)

        self.x, self.dy = a_map(), a_map()
        n, c, _ = self.x.shape
        self.planes, self.channels, self.gradient_channels = (
            normal(sizes, g).to(self.wide) for sizes in ((2, n, c), (3, c), (2, c))
        )
        self.exact = Exact(self.x, self.channels, activation)

    def arguments(self) -> dict[str, Any]:
        return {
            "planes": self.planes,
            "channels": self.channels,
            "gradient_channels": self.gradient_channels,
            "activation": self.activation,
        }


def check_gated(gpu: GatingGpu, case: Case, **how: Any) -> None:
    y, sums = gpu.run("gated", case.x, case.layout, **case.arguments(), **how).tensors
    gate = spread(case.planes[0].double(), case.x)
    terms = 1.5 * gate * case.exact.v_terms
    assert_near("y", y, gate * case.exact.z, terms, case.dtype, case.wide)
    assert sums.isnan().all()


def check_sums(gpu: GatingGpu, case: Case, gradient: bool, for_norm: bool, **how: Any) -> None:
    dy = case.dy if gradient else None
    y, sums = gpu.run(
        "activated_sums", case.x, case.layout, dy=dy, for_norm=for_norm, **case.arguments(), **how
    ).tensors
    given = case.dy if gradient else torch.ones_like(case.x)
    want, terms = case.exact.sums(given), case.exact.sums_terms(given)
    assert len(sums) == (5 if for_norm else 1)
    for k, got in enumerate(sums):
        assert_near(f"sum {k}", got, want[k], terms[k], torch.float64, case.wide)
    assert y.isnan().all()


def check_gradients(gpu: GatingGpu, case: Case, by_x: bool, **how: Any) -> None:
    dx, sums = gpu.run(
        "gated_gradients", case.x, case.layout, dy=case.dy, by_x=by_x, **case.arguments(), **how
    ).tensors
    channels = case.gradient_channels * by_x
    want = case.exact.gradient(case.dy, case.planes, channels)
    terms = case.exact.gradient_terms(case.dy, case.planes, channels)
    assert_near("dx", dx, want, terms, case.dtype, case.wide)
    assert sums.isnan().all()


def check_all(gpu: GatingGpu, case: Case, **how: Any) -> None:
    check_gated(gpu, case, **how)
    check_sums(gpu, case, False, False, **how)
    check_sums(gpu, case, True, True, **how)
    check_gradients(gpu, case, True, **how)


def check(gpu: GatingGpu) -> None:
    """All passes, for a few maps of float32. Raises at the first difference or fault."""
    for layout in LAYOUTS:
        for shape in ((2, 12, 49), (2, 60, 196), (1, 8, 3136), (2, 5, 7)):
            for activation in ("hardswish", "silu"):
                check_all(gpu, Case(shape, torch.float32, layout, activation))
