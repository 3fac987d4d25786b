"""Comparisons of the CUDA kernels of coefficients.cu, run on the host, with the CPU's operators."""

import itertools

import torch

from helpers.gpu_host_coefficients import CoefficientGpu

__all__ = [
    "check",
    "compare_coefficients",
    "compare_gradient_coefficients",
    "compare_running_statistics",
    "compare_statistics",
    "compare_totals",
]

ops = torch.ops.eca_fused


def sums_dtype(dtype):
    return torch.float64 if dtype == torch.float64 else torch.float32


def assert_same(got, want, dtype):
    """Both compute in float64; then they round once.

    In float64 the order of a sum shows: up to 20 terms, and taps times means up to 100.
    """
    for i, (a, b) in enumerate(zip(got, want, strict=True)):
        assert a.dtype == b.dtype
        eps = torch.finfo(a.dtype if a.dtype in (torch.float16, torch.bfloat16) else dtype).eps
        scale = float(b.abs().max()) if b.numel() else 0.0
        off = eps * (128 if dtype == torch.float64 else 4)
        torch.testing.assert_close(
            a, b, rtol=off, atol=off * scale, msg=lambda m, i=i: f"output {i}: {m}"
        )


def drawn(shape, dtype, seed=3):
    """x (N, C, 5), norms, and tensors of planes by name."""
    torch.manual_seed(seed)
    n, c = shape
    wide = sums_dtype(dtype)
    norm = [
        (torch.randn(c, dtype=torch.float64) * 30, torch.rand(c) + 0.5, torch.randn(c).to(dtype),
         torch.randn(c), 1e-5)
        for _ in range(2)
    ]  # fmt: skip
    planes = {
        "means": torch.randn(n, c, dtype=torch.float64) * 30,
        "gate": torch.rand(n, c).to(dtype),
        "made": torch.rand(n, c).to(wide),
        "scale": torch.rand(n).to(wide),
        "distance": torch.randn(n, c).to(wide),
        "dmean": torch.randn(n, c).to(wide),
    }
    return torch.randn(n, c, 5).to(dtype), norm, planes


def taps(c, k, own, dtype):
    return torch.randn(c if own else 1, 1, k).to(sums_dtype(dtype))


def compare_statistics(gpu: CoefficientGpu, shape):
    planes = torch.rand(2, *shape, dtype=torch.float64)
    planes[0] += 1e6
    assert_same(
        gpu.run("batch_statistics", planes, 15), ops.batch_statistics(planes, 15), torch.float64
    )


def compare_running_statistics(gpu, shape, dtype):
    planes = torch.rand(2, *shape, dtype=torch.float64)
    running = [torch.randn(shape[1]).to(dtype), torch.rand(shape[1]).to(dtype)]
    for factor in (0.0, 0.1, 1.0):
        mean, variance = ops.batch_statistics(planes, 15)
        values = 15 * shape[0]
        batch = (mean, variance * values / (values - 1))
        new = [
            (factor * b + (1 - factor) * old.double()).to(dtype)
            for b, old in zip(batch, running, strict=True)
        ]
        got = gpu.update(planes, 15, running, factor)
        assert_same(got, (mean, variance, *new), torch.float64)


def compare_coefficients(gpu, dtype, shape):
    x, (own, other), t = drawn(shape, dtype)
    none = (None,) * 4 + (0.0,)
    for k, per_channel, circular in ((1, False, False), (3, True, False), (5, False, True)):
        given = (taps(shape[1], k, per_channel, dtype), t["means"], None, t["scale"])
        args = (x, *given, *own, *other, circular, True)
        assert_same(gpu.run("tail_coefficients", *args), ops.tail_coefficients(*args), dtype)
    for given, norms, planes in (
        ((None, None, t["gate"], None), (own, none), True),
        ((None, None, t["gate"], t["scale"]), (none, other), True),
        ((None, t["means"], None, None), (own, other), False),
        ((None, None, None, None), (own, other), False),
        ((None, None, None, None), (none, none), True),
    ):
        args = (x, *given, *norms[0], *norms[1], False, planes)
        assert_same(gpu.run("tail_coefficients", *args), ops.tail_coefficients(*args), dtype)


def compare_totals(gpu, dtype, shape):
    x, (own, _), t = drawn(shape, dtype)
    none = (None,) * 4 + (0.0,)
    sums = torch.randn(3, *shape, dtype=torch.float64)
    for k, per_channel, circular in ((1, False, False), (3, True, False), (5, False, True)):
        weight = taps(shape[1], k, per_channel, dtype)
        given = (weight, t["made"], t["scale"], None, t["distance"])
        for norm, flags in itertools.product((own, none), ((True,) * 3, (False,) * 3)):
            args = (x, sums, *given, *norm, circular, *flags)
            assert_same(gpu.run("tail_totals", *args), ops.tail_totals(*args), dtype)
    for given in (
        (None, t["gate"], t["scale"], None, None),
        (None, t["gate"], None, t["dmean"], t["distance"]),
        (None, None, None, None, None),
    ):
        flags = (False, given[1] is not None, given[2] is not None, False)
        args = (x, sums[:2], *given, *own, *flags)
        assert_same(gpu.run("tail_totals", *args), ops.tail_totals(*args), dtype)


def compare_gradient_coefficients(gpu, dtype, shape):
    x, (own, other), t = drawn(shape, dtype)
    none = (None,) * 4 + (0.0,)
    totals, shares = torch.randn(2, 4, shape[1], dtype=torch.float64)
    for given, values in (
        ((totals, None), (10.0, 0.0)),
        ((totals, None), (10.0, 10.0)),
        ((totals, shares), (1.0, 0.0)),
        ((None, None), (0.0, 0.0)),
    ):
        for norms, planes in (((own, other), True), ((own, none), False), ((none, other), True)):
            rest = (t["gate"], t["scale"], t["dmean"], *norms[0], *norms[1], planes)
            args = (x, *given, *values, *rest)
            got = gpu.run("tail_gradient_coefficients", *args)
            assert_same(got, ops.tail_gradient_coefficients(*args), dtype)


def check(gpu: CoefficientGpu) -> None:
    """Raises at the first difference or fault."""
    for shape in ((2, 6), (9, 33), (20, 64)):
        compare_statistics(gpu, shape)
        compare_running_statistics(gpu, shape, torch.float32)
        compare_coefficients(gpu, torch.float32, shape)
        compare_totals(gpu, torch.float32, shape)
        compare_gradient_coefficients(gpu, torch.float32, shape)
