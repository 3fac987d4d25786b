"""The passes of a residual block's tail as kernels do them, and what is right in float64."""

from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from helpers.cases import LAYOUTS, assert_near, in_layout, normal
from helpers.gpu_host import Outcome


class Passes(Protocol):
    """Kernels that do the passes: TailGpu of gpu_host_tails.py, TritonPasses of triton_tails.py."""

    def run(self, operation: str, x: Tensor, layout: str, **given: Any) -> Outcome:
        """The first and second map written, the mask, and sums; NaN or 255 where nothing was."""


# One pixel; planes below a vector; no multiples of it; multiples of 4 and not of 8; rows that need
# several tiles; channels that are whole vectors, and more than a block has columns for.
PASS_SHAPES = [
    (2, 8, 1),
    (3, 37, 5),
    (1, 1, 9),
    (4, 37, 49),
    (2, 64, 49),
    (2, 64, 196),
    (2, 60, 25),
    (2, 24, 64),
    (1, 8, 3136),
    (1, 3, 17000),
    (1, 8, 1225),
    (1, 2112, 4),
]
PASS_VIEWS = {
    "batch slice": lambda t: t[1:],
    "channel slice": lambda t: t[:, 8:24],
    "odd channels": lambda t: t[:, 3:10],
    "every second sample": lambda t: t[::2, :, :],
    "but for a channel": lambda t: t[:, 1:],
}
RESNET50 = [(256, 3136), (512, 784), (1024, 196), (2048, 49)]  # channels and pixels


def moved(outcome: Outcome, names: Sequence[str]) -> tuple[int, int]:
    """Bytes of distinct sectors in each launch, of the maps with these names and of the rest."""
    maps = others = 0
    for launch in outcome.traffic:
        for name, (read, written) in launch["buffers"].items():
            if name in names:
                maps += 32 * (read + written)
            else:
                others += 32 * (read + written)
    return maps, others


class Case:
    """Random maps and coefficients; everything in float64 under the names of csrc/eca.h."""

    def __init__(
        self,
        shape: tuple[int, ...],
        dtype: torch.dtype,
        layout: str,
        activation: str = "relu",
        identity: bool = True,
        view: Callable[[Tensor], Tensor] | None = None,
    ) -> None:
        g = torch.Generator().manual_seed(4)
        self.activation, self.layout = activation, layout
        wide = torch.float64 if dtype == torch.float64 else torch.float32

        def a_map() -> Tensor:
            whole = in_layout((normal(shape, g) + 0.5).to(dtype), layout)
            return whole if view is None else view(whole)

        self.x, self.dy = a_map(), a_map()
        self.identity = a_map() if identity else None
        n, c, _ = self.x.shape
        self.planes = normal((2, n, c), g).to(wide)
        self.channels = normal((3, c), g).to(wide)
        self.gradient_planes = normal((2, n, c), g).to(wide)
        self.gradient_channels = normal((4, c), g).to(wide)
        self.wide = wide

        centre, scale, identity_centre = self.channels.double()[:, None, :, None]
        p, q = self.planes.double()[..., None]
        self.from_centre = self.x.double() - centre
        other = torch.zeros((), device="cpu") if self.identity is None else self.identity.double()
        self.identity_from_centre = (
            other - identity_centre if identity else torch.zeros((), device="cpu")
        )
        by_identity = scale * self.identity_from_centre
        self.v = p * self.from_centre + q + by_identity
        self.terms = (p * self.from_centre).abs() + q.abs() + by_identity.abs()
        # In the dtype of the sums, an element near zero may have the other sign.
        self.kept = (
            p.to(wide) * (self.x.to(wide) - centre.to(wide))
            + q.to(wide)
            + (scale.to(wide) * self.identity_from_centre.to(wide))
        ) > 0

    def mask(self, kept: Tensor) -> Tensor:
        """The bytes of the kept elements (N, C, S) in the format of csrc/eca.h."""
        rows = kept if self.layout == "contiguous" else kept.transpose(1, 2)
        length = rows.shape[2]
        padded = torch.nn.functional.pad(rows, (0, -length % 8)).reshape(-1, 8)
        return (padded.long() << torch.arange(8, device="cpu")).sum(1).to(torch.uint8)

    def kept_by(self, mask: Tensor) -> Tensor:
        n, c, s = self.x.shape
        rows, length = (c, s) if self.layout == "contiguous" else (s, c)
        bits = (mask.long()[:, None] >> torch.arange(8, device="cpu")) & 1
        kept = bits.reshape(n, rows, -1)[..., :length].bool()
        return kept if self.layout == "contiguous" else kept.transpose(1, 2)

    def arguments(self) -> dict[str, Any]:
        return {"planes": self.planes, "channels": self.channels, "activation": self.activation}

    def gradient(self) -> Tensor:
        """g = dy * act'(v), in float64."""
        dy = self.dy.double()
        if self.activation == "none":
            return dy
        if self.activation == "relu":
            return torch.where(self.kept, dy, 0)
        v = self.v.clone().requires_grad_()
        function = getattr(torch.nn.functional, self.activation)
        return torch.autograd.grad(function(v), v, dy)[0]


def activated(activation: str, v: Tensor) -> Tensor:
    return v if activation == "none" else getattr(torch.nn.functional, activation)(v)


def check_tail(gpu: Passes, case: Case, **how: Any) -> dict[str, Any]:
    relu = case.activation == "relu"
    outcome = gpu.run(
        "tail", case.x, case.layout, identity=case.identity, want_mask=relu,
        **case.arguments(), **how,
    )  # fmt: skip
    y, second, mask, sums = outcome.tensors
    want = activated(case.activation, case.v)
    assert_near("y", y, want, case.terms, case.x.dtype, case.wide)
    assert second.isnan().all()
    assert sums.isnan().all()
    if relu:
        kept = case.kept_by(mask)
        assert torch.equal(mask, case.mask(kept)), "bits behind the end of a row"
        far = case.v.abs() > 1e-5 * case.terms
        assert torch.equal(kept & far, (case.v > 0) & far), "mask"
    else:
        assert (mask == 255).all()
    return outcome.plan


def check_sums(gpu: Passes, case: Case, identity_sum: bool, **how: Any) -> dict[str, Any]:
    outcome = gpu.run(
        "tail_sums", case.x, case.layout, identity=case.identity, dy=case.dy,
        mask=case.mask(case.kept), identity_sum=identity_sum, **case.arguments(), **how,
    )  # fmt: skip
    sums = outcome.tensors[3]
    g = case.gradient()
    factors = [torch.ones((), device="cpu"), case.from_centre, case.identity_from_centre]
    for k in range(2 + identity_sum):
        terms = (case.dy.double() * factors[k]).expand_as(g) * 1.2
        want = (g * factors[k]).sum(2)
        near = (terms.abs().sum(2), torch.float64, case.wide)
        assert_near(f"sum {k}", sums[k], want, *near)
    if not identity_sum:
        assert sums[2].isnan().all()
    return outcome.plan


def check_gradients(
    gpu: Passes, case: Case, by: tuple[bool, bool], wants: tuple[bool, bool], **how: Any
) -> dict[str, Any]:
    outcome = gpu.run(
        "tail_gradients", case.x, case.layout, identity=case.identity, dy=case.dy,
        mask=case.mask(case.kept), gradient_planes=case.gradient_planes,
        gradient_channels=case.gradient_channels, by=by, wants=wants,
        **case.arguments(), **how,
    )  # fmt: skip
    dx, d_identity, _, _ = outcome.tensors
    g = case.gradient()
    p, r = case.gradient_planes.double()[..., None]
    q, ip, iq, ir = case.gradient_channels.double()[:, None, :, None]
    terms = [p * g, r, q * case.from_centre * by[0]]
    others = [ip * g, ir * by[1], iq * case.identity_from_centre * by[1]]
    for name, got, parts, wanted in (
        ("dx", dx, terms, wants[0]),
        ("d_identity", d_identity, others, wants[1]),
    ):
        if wanted:
            sizes = sum(t.abs() for t in parts) + (case.dy.double() * parts[0].abs().max()).abs()
            assert_near(name, got, sum(parts), sizes, case.x.dtype, case.wide)
        else:
            assert got.isnan().all()
    return outcome.plan


def check_moments(
    gpu: Passes, x: Tensor, layout: str, wide: torch.dtype, **how: Any
) -> dict[str, Any]:
    outcome = gpu.run("moments", x, layout, **how)
    mean, squares, third = outcome.tensors[3]
    values = x.double()
    want = values.mean(2)
    exact = (values - want[..., None]).square().sum(2)
    eps = torch.finfo(wide).eps
    spread = (exact / x.shape[2]).sqrt()
    assert ((mean - want).abs() <= 8 * eps * spread + 1e-15 * want.abs()).all(), "mean"
    # Parts are merged by their means, which are rounded too.
    lost = 16 * eps + 2e-16 * want.abs() / spread.clamp(min=1e-300)
    assert ((squares - exact).abs() <= lost.clamp(max=1) * exact + 1e-300).all(), "squares"
    assert third.isnan().all()
    return outcome.plan


def check(gpu: Passes) -> None:
    """All passes, for a few maps of float32. Raises at the first difference or fault."""
    for layout in LAYOUTS:
        for shape in ((2, 12, 49), (2, 60, 196), (1, 8, 3136), (2, 5, 7)):
            case = Case(shape, torch.float32, layout)
            check_tail(gpu, case)
            check_sums(gpu, case, True)
            check_gradients(gpu, case, (True, True), (True, True))
            check_moments(gpu, case.x, layout, case.wide)
