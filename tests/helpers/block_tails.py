"""Tails with ECA's gate as the CUDA kernels compute them, and what is right in float64."""

from collections.abc import Callable
from contextlib import suppress
from functools import partial
from typing import Any

import torch
from torch import Tensor

from eca_fused import reference
from helpers.cases import LAYOUTS, assert_near, in_layout, normal
from helpers.gpu_host import Forced, Outcome, Refused
from helpers.gpu_host_block_tails import BlockTailGpu
from helpers.tail_passes import activated


class BlockCase:
    """Random arguments of block_tail, and its results in float64."""

    def __init__(
        self,
        shape: tuple[int, ...],
        dtype: torch.dtype,
        layout: str,
        activation: str = "relu",
        identity: bool = True,
        mode: str = "zeros",
        own_taps: bool = False,
        k: int = 3,
        view: Callable[[Tensor], Tensor] | None = None,
        identity_view: Callable[[Tensor], Tensor] | None = None,
    ) -> None:
        g = torch.Generator().manual_seed(7)
        self.activation, self.layout, self.mode = activation, layout, mode
        self.wide = torch.float64 if dtype == torch.float64 else torch.float32

        def a_map(part: Callable[[Tensor], Tensor] | None) -> Tensor:
            whole = in_layout((normal(shape, g) + 0.5).to(dtype), layout)
            return whole if part is None else part(whole)

        self.x, self.dy = a_map(view), a_map(view)
        self.identity = a_map(identity_view or view) if identity else None
        n, c, _ = self.x.shape
        self.weight = normal((c if own_taps else 1, 1, k), g).to(dtype)
        self.scale = (normal((n,), g) + 1).to(self.wide)
        self.channels = normal((6, c), g).to(self.wide)

    def arguments(self) -> dict[str, Any]:
        return {
            "x": self.x, "identity": self.identity, "weight": self.weight, "scale": self.scale,
            "channels": self.channels, "layout": self.layout, "activation": self.activation,
            "circular": self.mode == "circular",
        }  # fmt: skip

    def exact(self, x: Tensor, identity: Tensor, weight: Tensor) -> tuple[Tensor, ...]:
        """v, the means of u, the gates and the distances, from maps and taps in float64."""
        alpha, beta, shift, centre, scale, identity_centre = self.channels.double()
        distance = x.mean(2) - centre
        mean = alpha * distance + beta
        gate = torch.sigmoid(reference.convolve(mean, weight, self.mode))
        factor = (gate * self.scale.double()[:, None])[..., None]
        u = alpha[:, None] * (x - centre[:, None]) + beta[:, None]
        v = factor * u + shift[:, None]
        if self.identity is not None:
            v = v + scale[:, None] * (identity - identity_centre[:, None])
        return v, mean, gate, distance

    def in_float64(self) -> tuple[Tensor, Tensor, Tensor]:
        other = self.x if self.identity is None else self.identity
        return self.x.double(), other.double(), self.weight.double()

    def magnitudes(self) -> tuple[Tensor, Tensor, Tensor]:
        """Of the terms of v, of the means of x - centre, and of what a sigmoid is taken of."""
        alpha, beta, shift, centre, scale, identity_centre = self.channels.double().abs()
        x, other, weight = (t.abs() for t in self.in_float64())
        distance = x.mean(2) + centre
        z = reference.convolve(alpha * distance + beta, weight, self.mode)
        u = alpha[:, None] * (x + centre[:, None]) + beta[:, None]
        # An error of z goes through the sigmoid, whose slope is 1/4.
        v = self.scale.double().abs()[:, None, None] * u * (1 + z[..., None] / 4)
        v = v + shift[:, None]
        if self.identity is not None:
            v = v + scale[:, None] * (other + identity_centre[:, None])
        return v, distance, z

    def kept_by(self, mask: Tensor) -> Tensor:
        n, c, s = self.x.shape
        rows, length = (c, s) if self.layout == "contiguous" else (s, c)
        bits = (mask.long()[:, None] >> torch.arange(8, device="cpu")) & 1
        kept = bits.reshape(n, rows, -1)[..., :length].bool()
        return kept if self.layout == "contiguous" else kept.transpose(1, 2)

    def mask(self, kept: Tensor) -> Tensor:
        rows = kept if self.layout == "contiguous" else kept.transpose(1, 2)
        padded = torch.nn.functional.pad(rows, (0, -rows.shape[2] % 8)).reshape(-1, 8)
        return (padded.long() << torch.arange(8, device="cpu")).sum(1).to(torch.uint8)


def check_forward(gpu: BlockTailGpu, case: BlockCase, **how: Any) -> Outcome:
    relu = case.activation == "relu"
    outcome = gpu.run_block(**case.arguments(), want_mask=relu, **how)
    y, mask, distance, gate = outcome.tensors
    v, _, want_gate, want_distance = case.exact(*case.in_float64())
    terms, distance_terms, z = case.magnitudes()
    assert_near("y", y, activated(case.activation, v), terms, case.x.dtype, case.wide)
    assert_near("distance", distance, want_distance, distance_terms, case.wide, case.wide)
    assert_near("gate", gate, want_gate, 1 + z / 4, case.wide, case.wide)
    if relu:
        kept = case.kept_by(mask)
        assert torch.equal(mask, case.mask(kept)), "bits behind the end of a row"
        # In the dtype of the sums, an element near zero may have the other sign.
        far = v.abs() > 1e-5 * terms
        assert torch.equal(kept & far, (v > 0) & far), "mask"
    else:
        assert (mask == 255).all()
    return outcome


def check_backward(
    gpu: BlockTailGpu,
    case: BlockCase,
    identity_sum: bool,
    wants: tuple[bool, bool, bool] = (True, True, True),
    **how: Any,
) -> Outcome:
    x, other, weight = (t.requires_grad_() for t in case.in_float64())
    v, mean, gate, distance = case.exact(x, other, weight)
    mean.retain_grad()
    kept = v.detach() > 0
    dy = case.dy.double()
    y = v * kept if case.activation == "relu" else activated(case.activation, v)
    (g,) = torch.autograd.grad(y, v, dy, retain_graph=True)
    asked = [x, weight, mean] + ([] if case.identity is None else [other])
    want = torch.autograd.grad(y, asked, dy)
    saved = (case.mask(kept), distance.detach().to(case.wide), gate.detach().to(case.wide))
    if case.activation != "relu":
        saved = (torch.full_like(saved[0], 255), *saved[1:])
    outcome = gpu.run_block(
        **case.arguments(), dy=case.dy, saved=saved, identity_sum=identity_sum, wants=wants, **how
    )
    dx, d_identity, sums, dmean, dweight = outcome.tensors

    alpha, beta, _, centre, identity_scale, identity_centre = case.channels.double()
    from_centre = x.detach() - centre[:, None]
    factors = [torch.ones((), device="cpu"), from_centre, other.detach() - identity_centre[:, None]]
    big = 1.2 * dy.abs()  # of g, as no slope is larger
    for i in range(2 + identity_sum):
        near = ((big * factors[i].abs()).sum(2), torch.float64, case.wide)
        assert_near(f"sum {i}", sums[i], (g * factors[i]).sum(2), *near)
    of_u = alpha[:, None].abs() * from_centre.abs() + beta[:, None].abs()
    of_gate = (big * of_u).sum(2) * case.scale.double().abs()[:, None]
    of_mean = reference.convolve(of_gate, weight.detach().abs().flip(2), case.mode)
    if case.weight.shape[0] != 1:  # the taps of other channels
        of_mean = of_gate.amax() * weight.detach().abs().amax(0).sum() + 0 * of_gate
    assert_near("dmean", dmean, want[2], of_mean, case.wide, case.wide)
    pixels = x.shape[2]
    of_dx = (alpha.abs() * of_mean / pixels)[..., None]
    of_dx = of_dx + case.scale.double().abs()[:, None, None] * alpha.abs()[:, None] * big
    if wants[0]:
        assert_near("dx", dx, want[0], of_dx, case.x.dtype, case.wide)
    else:
        assert dx.isnan().all()
    if wants[1]:
        right = want[3] if case.identity is not None else identity_scale[:, None] * g
        terms = identity_scale.abs()[:, None] * big
        assert_near("d_identity", d_identity, right, terms, case.x.dtype, case.wide)
    else:
        assert d_identity.isnan().all()
    if wants[2]:
        _, distance_terms, _ = case.magnitudes()
        of_means = alpha.abs() * distance_terms + beta.abs()
        terms = of_gate.sum() * of_means.max() + 0 * want[1]
        assert_near("dweight", dweight, want[1], terms, case.weight.dtype, case.wide)
    else:
        assert dweight.isnan().all()
    return outcome


def check(gpu: BlockTailGpu) -> None:
    """Every strategy, for a few maps of float32. Raises at the first difference or fault."""
    ways = [
        Forced("rows", tile=4, threads=128, depth=7), Forced("rows", depth=13, threads=512),
        Forced("runs", tile=8, threads=128, depth=2), Forced("two_pass"),
        Forced("columns", tile=16, threads=128, depth=4), Forced("kept", depth=8), Forced("kept"),
    ]  # fmt: skip
    for layout in LAYOUTS:
        for shape in ((2, 48, 49), (2, 24, 196), (1, 8, 3136), (2, 5, 7)):
            case = BlockCase(shape, torch.float32, layout)
            for forced in ways:
                for check_one in (check_forward, partial(check_backward, identity_sum=False)):
                    with suppress(Refused):
                        check_one(gpu, case, forced=forced)
            check_backward(gpu, case, True)
