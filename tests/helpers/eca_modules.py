"""ECA as others write it, in modules and in networks, for convert() to recognise."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

Results = tuple[Tensor, ...]


class eca_layer(nn.Module):
    """ECA under the authors' name, with their parts."""

    def __init__(self, channel: int, k_size: int = 3) -> None:
        super().__init__()
        self.avg_pool = nn.AdaptiveAvgPool2d(1)
        self.conv = nn.Conv1d(1, 1, k_size, padding=k_size // 2, bias=False)
        self.sigmoid = nn.Sigmoid()

    def forward(self, x: Tensor) -> Tensor:
        mean = self.avg_pool(x).flatten(2).transpose(1, 2)  # (N, 1, C)
        gate: Tensor = self.sigmoid(self.conv(mean)).transpose(1, 2)
        return x * gate[..., None]


class WrapAround(nn.Module):
    """Not of a known name: cECA by its parts."""

    def __init__(self, k_size: int) -> None:
        super().__init__()
        self.gap = nn.AdaptiveAvgPool2d((1, 1))
        modes = {"padding": "same", "padding_mode": "circular", "bias": False}
        self.conv = nn.Conv1d(1, 1, k_size, **modes)  # type: ignore[arg-type]

    def forward(self, x: Tensor) -> Tensor:
        rows = self.conv(self.gap(x).flatten(2).mT)
        return x * torch.sigmoid(rows).mT[..., None]


class Sequences(nn.Module):
    """Not of a known name: ECA over sequences, its sigmoid a function."""

    def __init__(self) -> None:
        super().__init__()
        self.pool = nn.AdaptiveAvgPool1d(1)
        self.conv = nn.Conv1d(1, 1, 5, padding=2, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return x * self.conv(self.pool(x).mT).sigmoid().mT


class Functional(nn.Module):
    """Not of a known name: ECA whose pooling is a function, as many detectors have it."""

    def __init__(self, pool: Any, k_size: int = 3) -> None:
        super().__init__()
        self.pool = pool
        self.conv = nn.Conv1d(1, 1, k_size, padding=k_size // 2, bias=False)
        self.sigmoid = nn.Sigmoid()

    def forward(self, x: Tensor) -> Tensor:
        rows = self.conv(self.pool(x).reshape(x.shape[0], 1, -1))
        return x * self.sigmoid(rows).reshape(*x.shape[:2], *(x.dim() - 2) * [1])


def mean_of_pixels(x: Tensor) -> Tensor:
    return x.mean((2, 3), keepdim=True)


def pooled_to_one(x: Tensor) -> Tensor:
    return F.adaptive_avg_pool2d(x, 1)


def pooled_by_its_size(x: Tensor) -> Tensor:
    return F.avg_pool2d(x, x.shape[2:])


def mean_of_a_sequence(x: Tensor) -> Tensor:
    _, _, steps = x.shape
    return x.sum(-1) / steps


def pooled_to_the_largest(x: Tensor) -> Tensor:
    return F.adaptive_max_pool2d(x, 1)


class C2f(nn.Module):
    """A detector's block: bottlenecks that share an input and are concatenated, ECA in each."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        half = channels // 2
        self.cv1 = nn.Conv2d(channels, channels, 1)
        self.m = nn.ModuleList(
            nn.Sequential(nn.Conv2d(half, half, 3, padding=1), nn.SiLU(), eca_layer(half))
            for _ in range(2)
        )
        self.cv2 = nn.Conv2d(2 * channels, channels, 1)
        self.eca = eca_layer(channels, 5)

    def forward(self, x: Tensor) -> Tensor:
        maps = list(self.cv1(x).chunk(2, 1))
        maps += [maps[-1] + block(maps[-1]) for block in self.m]
        return self.eca(self.cv2(torch.cat(maps, 1)))  # type: ignore[no-any-return]


class Decoder(nn.Module):
    """A segmentation network: attention by name before and after each joint with the encoder."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.ModuleList([nn.Conv2d(3, 8, 3, 2, 1), nn.Conv2d(8, 16, 3, 2, 1)])
        self.attention = nn.ModuleDict({"skip": eca_layer(24), "out": nn.Sequential(eca_layer(8))})
        self.up = nn.Conv2d(24, 8, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        fine = self.encoder[0](x)
        coarse = nn.functional.interpolate(self.encoder[1](fine), scale_factor=2.0)
        joint = self.attention["skip"](torch.cat([coarse, fine], 1))
        return self.attention["out"](self.up(joint))  # type: ignore[no-any-return]


def results(model: nn.Module, x: Tensor) -> Results:
    """The output of a model, and the gradients of x and of all parameters that have one."""
    x = x.detach().requires_grad_()
    y = model(x)
    dy = torch.randn(y.shape, generator=torch.Generator().manual_seed(1), dtype=y.dtype)
    inputs = [x, *(p for p in model.parameters() if p.requires_grad)]
    return y.detach(), *torch.autograd.grad(y, inputs, dy)


def assert_same(got: Results, want: Results) -> None:
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b)


def image(*shape: int) -> Tensor:
    return torch.randn(*(shape or (2, 8, 6, 5)), dtype=torch.float64)
