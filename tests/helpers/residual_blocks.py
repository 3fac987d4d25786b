"""Residual blocks for convert(tails=True), and how two forms of a network are compared."""

import copy
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from eca_fused import convert, revert
from helpers.eca_modules import eca_layer


class Block(nn.Module):
    """A residual block as the ECA-Net authors write it, with parts that a test can replace."""

    expansion = 1

    def __init__(self, attention: nn.Module | None = None, norm: Any = nn.BatchNorm2d) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(8, 8, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(8)
        self.relu = nn.ReLU(inplace=True)
        self.conv2 = nn.Conv2d(8, 8, 3, padding=1, bias=False)
        self.bn2 = norm(8)
        self.eca = eca_layer(8) if attention is None else attention
        self.alpha = 0.5
        self.downsample: nn.Module | None = None

    def branch(self, x: Tensor) -> Tensor:
        out = self.relu(self.bn1(self.conv1(x)))
        return self.eca(self.bn2(self.conv2(out)))  # type: ignore[no-any-return]

    def forward(self, x: Tensor) -> Tensor:
        residual = x
        out = self.branch(x)
        if self.downsample is not None:
            residual = self.downsample(x)
        out += residual
        return self.relu(out)  # type: ignore[no-any-return]


class Middle(nn.Module):
    """A block as RegNet has it, with norm, activation and attention in its middle."""

    def __init__(self, attention: nn.Module | None = None) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(8, 8, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(8)
        self.act1 = nn.ReLU(inplace=True)
        self.idle: nn.Module = nn.Identity()
        self.eca = eca_layer(8) if attention is None else attention
        self.conv2 = nn.Conv2d(8, 8, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(8)

    def middle(self, x: Tensor) -> Tensor:
        return self.eca(self.idle(self.act1(self.bn1(self.conv1(x)))))  # type: ignore[no-any-return]

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.bn2(self.conv2(self.middle(x))) + x)


class AuthorsBottleneck(nn.Module):
    """The ECA-Net authors' Bottleneck."""

    def __init__(self, channels: int, planes: int = 4, stride: int = 1) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, planes, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(planes)
        self.conv2 = nn.Conv2d(planes, planes, 3, stride, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(planes)
        self.conv3 = nn.Conv2d(planes, 4 * planes, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(4 * planes)
        self.relu = nn.ReLU(inplace=True)
        self.eca = eca_layer(4 * planes)
        self.downsample: nn.Module | None = None
        if stride > 1 or channels != 4 * planes:
            shortcut = nn.Conv2d(channels, 4 * planes, 1, stride, bias=False)
            self.downsample = nn.Sequential(shortcut, nn.BatchNorm2d(4 * planes))
        self.stride = stride

    def forward(self, x: Tensor) -> Tensor:
        residual = x
        out = self.relu(self.bn1(self.conv1(x)))
        out = self.relu(self.bn2(self.conv2(out)))
        out = self.eca(self.bn3(self.conv3(out)))
        if self.downsample is not None:
            residual = self.downsample(x)
        out += residual
        return self.relu(out)  # type: ignore[no-any-return]


class AuthorsInvertedResidual(nn.Module):
    """The block of the ECA-Net authors' MobileNetV2, whose attention ends a Sequential."""

    def __init__(self, channels: int, out: int, stride: int) -> None:
        super().__init__()
        inner = 2 * channels

        def unit(a: int, b: int, k: int, stride: int = 1, groups: int = 1) -> nn.Module:
            conv = nn.Conv2d(a, b, k, stride, k // 2, groups=groups, bias=False)
            return nn.Sequential(conv, nn.BatchNorm2d(b), nn.ReLU6(inplace=True))

        self.use_res_connect = stride == 1 and channels == out
        self.conv = nn.Sequential(
            unit(channels, inner, 1),
            unit(inner, inner, 3, stride, inner),
            nn.Conv2d(inner, out, 1, bias=False),
            nn.BatchNorm2d(out),
            eca_layer(out),
        )

    def forward(self, x: Tensor) -> Tensor:
        if self.use_res_connect:
            return x + self.conv(x)  # type: ignore[no-any-return]
        return self.conv(x)  # type: ignore[no-any-return]


def with_downsample() -> Block:
    block = Block()
    block.downsample = nn.Sequential(nn.Conv2d(8, 8, 1, bias=False), nn.BatchNorm2d(8))
    return block


def steps(model: nn.Module, x: Tensor, number: int = 2) -> tuple[Tensor, ...]:
    """The outputs and gradients of some steps of SGD, the state after them, and then eval's y."""
    torch.manual_seed(1)  # of drop paths
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3, momentum=0.9)
    found = []
    for _ in range(number):
        optimizer.zero_grad()
        y = model.train()(x)
        y.square().mean().backward()
        found += [y.detach(), *(p.grad.clone() for p in model.parameters() if p.grad is not None)]
        optimizer.step()
    found += [t.clone() for t in model.state_dict().values()]
    with torch.no_grad():
        found.append(model.eval()(x))
    return tuple(found)


def assert_the_same(got: tuple[Tensor, ...], want: tuple[Tensor, ...]) -> None:
    assert len(got) == len(want)
    for a, b in zip(got, want, strict=True):
        # Relative to the largest value: a sum that cancels keeps the errors of its terms.
        largest = float(b.abs().max()) if b.numel() else 0.0
        torch.testing.assert_close(a, b, rtol=1e-7, atol=1e-7 * max(largest, 1.0))


# ---- networks in training ----


class Training:
    """A network in training by SGD. Drop paths draw the same samples for each network."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model.train()
        self.optimizer = torch.optim.SGD(model.parameters(), lr=1e-6, momentum=0.9)

    def step(self, x: Tensor, number: int) -> list[Tensor]:
        """The output, all gradients and all buffers."""
        torch.manual_seed(number)
        self.optimizer.zero_grad()
        y = self.model(x)
        y.square().mean().backward()
        found = [y.detach()] + [p.grad for p in self.model.parameters() if p.grad is not None]
        self.optimizer.step()
        return [t.clone() for t in (*found, *self.model.buffers())]


def distance(got: list[Tensor], want: list[Tensor]) -> float:
    """The largest difference, relative to the largest value of its tensor or to 1e-3."""
    return max(
        float((a - b).abs().max() / b.abs().max().clamp(min=1e-3))
        for a, b in zip(got, want, strict=True)
    )


def assert_training_follows(
    model: nn.Module, plain: nn.Module, x: Tensor, number: int = 20
) -> None:
    """Outputs, gradients and buffers of each step, then outputs in evaluation.

    Training makes roundings larger. A third network, whose input differs in the last bits, shows
    by how much.
    """
    ours, theirs, other = Training(model), Training(plain), Training(copy.deepcopy(plain))
    nudge = 1 + 4 * torch.finfo(x.dtype).eps
    for step in range(number):
        torch.manual_seed(1000 + step)
        image = x + torch.randn_like(x)
        want = theirs.step(image, step)
        roundings = distance(other.step(image * nudge, step), want)
        assert roundings < 1e-4  # or a fault could hide
        assert distance(ours.step(image, step), want) <= 1e-9 + 100 * roundings
    with torch.no_grad():
        y, want_y, nudged = (t.model.eval()(x) for t in (ours, theirs, other))
    roundings = distance([nudged], [want_y])
    assert roundings < 1e-4
    assert distance([y], [want_y]) <= 1e-9 + 100 * roundings


# ---- blocks ----


def everywhere_something(model: nn.Module) -> Any:
    """The model in float64. No parameter is all zeros, with which timm starts many."""
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in model.double().parameters():
            if not parameter.any():
                parameter.uniform_(-0.5, 0.5)
    return model


def converted(block: nn.Module | None = None) -> Any:
    """A block in float64 with its tail as one operation."""
    block = everywhere_something(Block() if block is None else block)
    report = convert(block, tails=True)
    assert list(report.tails) == [""], str(report)
    return block


def image(requires_grad: bool = False) -> Tensor:
    generator = torch.Generator().manual_seed(2)
    x = torch.randn(2, 8, 6, 5, dtype=torch.float64, generator=generator)
    return x.requires_grad_(requires_grad)


def as_before(block: nn.Module) -> Any:
    """A copy of a converted block with its former forward."""
    plain = copy.deepcopy(block)
    revert(plain)
    return plain


def no_norm(channels: int) -> nn.Module:
    return nn.Identity()
