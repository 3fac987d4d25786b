"""Memory formats and views: what is read in place, what the result's strides are."""

import pytest
import torch
from torch.profiler import ProfilerActivity, profile

import eca_fused
from eca_fused.ops.results import output_strides
from helpers.cases import (
    BACKENDS,
    DEVICE,
    DTYPES,
    LAYOUTS,
    READ_IN_PLACE,
    Case,
    assert_as_accurate,
    assert_same_sums,
    in_layout,
    make_case,
    name_of,
    plain,
    run,
)

pytestmark = [pytest.mark.any_device, pytest.mark.parametrize("backend", BACKENDS)]


def result(case, backend):
    return run(lambda x, w: eca_fused.eca(x, w, backend=backend), case)


@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
@pytest.mark.parametrize(
    ("shape", "memory_format"),
    [
        ((2, 6, 5, 4), torch.contiguous_format),
        ((2, 6, 5, 4), torch.channels_last),
        ((2, 6, 1, 1), torch.channels_last),
        ((1, 6, 5, 4), torch.channels_last),
        ((2, 6, 3, 5, 4), torch.contiguous_format),
        ((2, 6, 3, 5, 4), torch.channels_last_3d),
    ],
)
def test_result_and_gradient_keep_the_memory_format(backend, shape, memory_format, dtype):
    case = make_case(shape, dtype=dtype)
    case.x = case.x.contiguous(memory_format=memory_format)
    y, dx, _ = result(case, backend)
    assert y.stride() == case.x.stride()
    assert dx.stride() == case.x.stride()
    assert y.is_contiguous(memory_format=memory_format)


def copies(function, *tensors) -> list[str]:
    """Names of the operators that copy or allocate a whole map while the function runs."""
    with profile(activities=[ProfilerActivity.CPU]) as trace:
        function(*tensors)
    return [
        e.name
        for e in trace.events()
        if e.name in ("aten::copy_", "aten::clone", "aten::contiguous")
    ]


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("view", READ_IN_PLACE)
def test_views_with_dense_samples_are_read_in_place(backend, view, layout):
    whole = make_case((5, 12, 6, 7), layout=layout)
    x, dy = READ_IN_PLACE[view](whole.x), READ_IN_PLACE[view](whole.dy)
    assert_as_accurate(result(Case(x, whole.weight, dy), backend), Case(x, whole.weight, dy))
    weight = whole.weight.clone().requires_grad_()

    def forward_and_backward(x, dy):
        x = x.detach().requires_grad_()
        torch.autograd.grad(eca_fused.eca(x, weight, backend=backend), (x, weight), dy)

    assert "aten::copy_" not in copies(forward_and_backward, x, dy)
    assert "aten::copy_" in copies(forward_and_backward, x[..., 1:5], dy[..., 1:5])
    y = eca_fused.eca(x, whole.weight, backend=backend)
    memory_format = torch.channels_last if layout == "channels_last" else torch.contiguous_format
    assert y.is_contiguous(memory_format=memory_format)
    assert y.stride() == output_strides(x)


OTHERS = {
    "a spatial slice": lambda t: t[..., 1:5],
    "every second pixel": lambda t: t[:, :, ::2],
    "every second channel": lambda t: t[:, ::2],
    "height and width swapped": lambda t: t.transpose(2, 3),
    "samples and channels swapped": lambda t: t.transpose(0, 1),
    "samples innermost": lambda t: t.permute(1, 2, 3, 0).contiguous().permute(3, 0, 1, 2),
    "expanded samples": lambda t: t[:1].expand(4, -1, -1, -1),
    "expanded channels": lambda t: t[:, :1].expand(-1, 12, -1, -1),
    "expanded pixels": lambda t: t[:, :, :1, :1].expand(-1, -1, 6, 7),
    "one number": lambda t: t[:1, :1, :1, :1].expand(3, 12, 6, 7),
    "flipped": lambda t: t.flip(3),
}


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("view", OTHERS)
def test_any_other_view_is_right_too(backend, view, layout):
    whole = make_case((5, 12, 6, 7), layout=layout)
    x, dy = OTHERS[view](whole.x), OTHERS[view](whole.dy)
    case = Case(x, whole.weight, dy)
    y, dx, dweight = result(case, backend)
    assert_as_accurate((y, dx, dweight), case)
    assert y.stride() == output_strides(x)
    if not torch._debug_has_internal_overlap(x):
        before = x.clone()
        with torch.no_grad():
            assert eca_fused.eca_(x, whole.weight, backend=backend) is x
        assert_same_sums(x, y)
        assert not torch.equal(x, before)


SMALL = {
    "one pixel of a map": lambda: torch.randn(4, 12, 7, 7)[:, :, 0, 0],
    "one pixel, its dimensions kept": lambda: torch.randn(4, 12, 7, 7)[:, :, 2:3, 2:3],
    "one pixel of a channels_last map": lambda: torch.randn(4, 7, 7, 12).movedim(3, 1)[:, :, 2, 2],
    "every second of the channels alone": lambda: torch.randn(3, 24)[:, ::2],
    "channels alone, transposed": lambda: torch.randn(12, 5).t(),
    "the first channels of 1x1 maps": lambda: torch.randn(3, 24, 1, 1)[:, :12],
    "a line of expanded pixels": lambda: torch.randn(2, 12, 5)[..., None].expand(2, 12, 5, 6),
    "expanded lines": lambda: torch.randn(2, 12, 1, 6).expand(2, 12, 5, 6),
    "one channel of expanded pixels": lambda: torch.randn(2, 1, 40, 1).expand(2, 1, 40, 9),
    "a volume with an expanded depth": lambda: torch.randn(2, 4, 1, 3, 5).expand(2, 4, 6, 3, 5),
}


@pytest.mark.parametrize("view", SMALL)
def test_few_pixels_and_partly_expanded_ones(backend, view):
    x, dy = SMALL[view](), SMALL[view]()
    case = Case(x, torch.randn(1, 1, 3), dy)
    y, dx, dweight = result(case, backend)
    assert_as_accurate((y, dx, dweight), case)
    assert y.stride() == dx.stride() == output_strides(x)
    for other in (torch.randn(x.shape), in_layout(torch.randn(x.shape), "channels_last")):
        for mixed in (Case(other, case.weight, dy), Case(x, case.weight, other)):
            assert_as_accurate(result(mixed, backend), mixed)


def test_the_gradient_of_a_sum_over_one_dimension(backend):
    # autograd expands it along that dimension alone.
    case = make_case((2, 4, 5, 6))
    factor = torch.randn(2, 4, 5)

    def gradients(function):
        x, w = case.x.clone().requires_grad_(), case.weight.clone().requires_grad_()
        (function(x, w).sum(3) * factor).sum().backward()
        return x.grad, w.grad

    ours = gradients(lambda x, w: eca_fused.eca(x, w, backend=backend))
    for got, want in zip(ours, gradients(plain(case)), strict=True):
        torch.testing.assert_close(got, want)


@pytest.mark.parametrize("x_layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("gradient", ["contiguous", "channels_last", *OTHERS])
def test_gradients_of_any_layout(backend, gradient, x_layout):
    case = make_case((5, 12, 6, 7), layout=x_layout)
    whole = make_case((12, 12, 12, 12), seed=1).dy
    views = {
        "a spatial slice": whole[:5, :, 2:8, 1:8],
        "every second pixel": whole[:5, :, ::2, :7],
        "every second channel": whole.repeat(1, 2, 1, 1)[:5, ::2, :6, :7],
        "height and width swapped": whole[:5, :, :7, :6].transpose(2, 3),
        "samples and channels swapped": whole[:, :5, :6, :7].transpose(0, 1),
        "samples innermost": whole.permute(1, 2, 3, 0)[..., :6, :7, :5].permute(3, 0, 1, 2),
        "expanded samples": whole[:1, :, :6, :7].expand(5, -1, -1, -1),
        "expanded channels": whole[:5, :1, :6, :7].expand(-1, 12, -1, -1),
        "expanded pixels": whole[:5, :, :1, :1].expand(-1, -1, 6, 7),
        "one number": whole[:1, :1, :1, :1].expand(5, 12, 6, 7),
        "flipped": whole[:5, :, :6, :7].flip(3),
    }
    case.dy = views[gradient] if gradient in views else in_layout(case.dy, gradient)
    assert_as_accurate(result(case, backend), case)


def test_taps_of_any_layout(backend):
    case = make_case((2, 8, 5, 5), k=5, own_taps=True)
    case.weight = torch.randn(5, 1, 8).transpose(0, 2)
    assert not case.weight.is_contiguous()
    assert_as_accurate(result(case, backend), case)


@pytest.mark.parametrize("offset", range(1, 17, 3))
@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
def test_any_alignment(backend, dtype, offset):
    case = make_case((3, 5, 9, 11), dtype=dtype)
    buffer = torch.empty(case.x.numel() + offset, dtype=dtype)
    case.x = buffer[offset:].view(case.x.shape).copy_(case.x)
    assert_as_accurate(result(case, backend), case)


@pytest.mark.parametrize("far", ["samples", "rows"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_offsets_beyond_2_to_the_31(backend, layout, far, tmp_path):
    """Samples, channels or pixels are so far apart that an offset in 32 bits would be wrong."""
    case = make_case((2, 3, 1, 2), dtype=torch.bfloat16, layout=layout)
    sample, row = (2**31 + 16, 8) if far == "samples" else (8, 2**31 + 16)
    strides = (sample, row, 2, 1) if layout == "contiguous" else (sample, 1, 2 * row, row)
    last = sum((n - 1) * stride for n, stride in zip(case.x.shape, strides, strict=True))
    if DEVICE == "cpu":  # a sparse file: only touched pages take room
        memory = torch.from_file(str(tmp_path / "far"), True, last + 1, dtype=torch.bfloat16)
    else:
        memory = torch.empty(last + 1, dtype=torch.bfloat16)
    x = memory.as_strided(case.x.shape, strides).copy_(case.x)
    if backend == "native":  # Triton's interpreter copies all that it is given
        assert copies(lambda x, w: eca_fused.eca(x, w, backend=backend), x, case.weight) == []
    ours = result(Case(x, case.weight, case.dy), backend)
    for got, want in zip(ours, result(case, backend), strict=True):
        assert torch.equal(got, want)
