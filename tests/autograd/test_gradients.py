"""Gradients: first and second derivatives, which of them are computed, and the ways to ask."""

import pytest
import torch
from torch.autograd import gradcheck, gradgradcheck

import eca_fused
from eca_fused.autograd.derivatives import plain_backward
from eca_fused.functional import ECAFunction
from eca_fused.ops import native
from helpers.cases import BACKENDS, LAYOUTS, MODES, make_case, needs_extension, plain

pytestmark = [pytest.mark.any_device, pytest.mark.parametrize("backend", BACKENDS)]

CASES = [
    {"shape": (2, 5, 3, 2), "k": 3},
    {"shape": (2, 5, 3, 2), "k": 1},
    {"shape": (2, 3, 2, 2), "k": 9},
    {"shape": (1, 4, 5), "k": 5, "own_taps": True},
    {"shape": (3, 4), "k": 3},
    {"shape": (2, 3, 2, 2, 2), "k": 3, "own_taps": True},
]


def float64(padding_mode="zeros", layout="contiguous", **kwargs):
    # Circular taps may wrap around once only.
    if padding_mode == "circular":
        kwargs["k"] = min(kwargs["k"], 2 * kwargs["shape"][1] + 1)
    case = make_case(dtype=torch.float64, padding_mode=padding_mode, layout=layout, **kwargs)
    case.x.requires_grad_()
    case.weight.requires_grad_()
    case.dy.requires_grad_()
    return case


def fused(case, backend):
    return lambda x, w: eca_fused.eca(x, w, padding_mode=case.padding_mode, backend=backend)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("padding_mode", MODES)
@pytest.mark.parametrize("kwargs", CASES)
def test_first_and_second_derivatives_by_finite_differences(backend, kwargs, padding_mode, layout):
    case = float64(padding_mode, layout, **kwargs)
    function = fused(case, backend)
    assert gradcheck(function, (case.x, case.weight))
    assert gradgradcheck(function, (case.x, case.weight), (case.dy,))


@pytest.mark.parametrize("needs", ["x", "weight"])
def test_second_derivatives_with_one_input_frozen(backend, needs):
    case = float64(shape=(2, 5, 3, 2), k=3)
    frozen = case.weight if needs == "x" else case.x
    frozen.requires_grad_(False)
    assert gradgradcheck(fused(case, backend), (case.x, case.weight), (case.dy,))


@pytest.mark.parametrize("padding_mode", MODES)
def test_third_derivatives(backend, padding_mode):
    case = float64(padding_mode, shape=(2, 4, 2, 2), k=3)
    dx, dw = torch.autograd.grad(
        (eca_fused.eca(case.x, case.weight, padding_mode=padding_mode, backend=backend) ** 3).sum(),
        (case.x, case.weight),
        create_graph=True,
    )
    want_dx, want_dw = torch.autograd.grad(
        (plain(case)(case.x, case.weight) ** 3).sum(), (case.x, case.weight), create_graph=True
    )
    for got, want in ((dx, want_dx), (dw, want_dw)):
        for order in range(2):
            torch.testing.assert_close(got, want)
            if order == 1:
                break
            seed = torch.randn_like(got)
            got = torch.autograd.grad((got * seed).sum().pow(2), case.x, create_graph=True)[0]
            want = torch.autograd.grad((want * seed).sum().pow(2), case.x, create_graph=True)[0]
            got = torch.autograd.grad(got.pow(2).sum(), case.weight, retain_graph=True)[0]
            want = torch.autograd.grad(want.pow(2).sum(), case.weight, retain_graph=True)[0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gradient_penalty_in_lower_precision(backend, dtype):
    case = make_case((2, 8, 6, 6), dtype=dtype)

    def penalty(function, dtype):
        x = case.x.detach().to(dtype).requires_grad_()
        w = case.weight.detach().to(dtype).requires_grad_()
        (dx,) = torch.autograd.grad(function(x, w), x, case.dy.to(dtype), create_graph=True)
        return torch.autograd.grad(dx.pow(2).sum(), (x, w))

    ours = penalty(fused(case, backend), dtype)
    exact = penalty(plain(case), torch.float64)
    usual = penalty(plain(case), dtype)
    for got, want, other in zip(ours, exact, usual, strict=True):
        assert got.dtype == dtype
        allowed = (other.double() - want).abs().max() + torch.finfo(dtype).eps * want.abs().max()
        assert (got.double() - want).abs().max() <= allowed


@needs_extension
@pytest.mark.parametrize("needs", [("x",), ("weight",), ("x", "weight")])
def test_only_needed_gradients_are_computed(backend, needs):
    asked = []

    class Spy:
        forward = native.forward

        @staticmethod
        def backward(*args):
            asked.append(args[-2:])
            return native.backward(*args)

    case = make_case((2, 5, 3, 2))
    x, weight = case.x.requires_grad_("x" in needs), case.weight.requires_grad_("weight" in needs)
    ECAFunction.apply(x, weight, False, Spy).backward(case.dy)
    assert asked == [("x" in needs, "weight" in needs)]
    assert (x.grad is not None) == ("x" in needs)
    assert (weight.grad is not None) == ("weight" in needs)
    for name, tensor in (("x", x), ("weight", weight)):
        if name in needs:
            other = {"x": case.x, "weight": case.weight}
            leaves = {k: v.detach().clone().requires_grad_() for k, v in other.items()}
            plain(case)(leaves["x"], leaves["weight"]).backward(case.dy)
            torch.testing.assert_close(tensor.grad, leaves[name].grad)


def test_no_graph_where_none_is_needed(backend):
    case = make_case((2, 5, 3, 2))
    assert eca_fused.eca(case.x, case.weight, backend=backend).grad_fn is None
    with torch.no_grad():
        y = eca_fused.eca(case.x.requires_grad_(), case.weight, backend=backend)
    assert not y.requires_grad


def test_backward_twice_and_retain_graph(backend):
    case = float64(shape=(2, 5, 3, 2), k=3)
    y = eca_fused.eca(case.x, case.weight, backend=backend)
    once = torch.autograd.grad(y, case.x, case.dy.detach(), retain_graph=True)[0]
    assert torch.equal(once, torch.autograd.grad(y, case.x, case.dy.detach())[0])
    with pytest.raises(RuntimeError, match="second time"):
        torch.autograd.grad(y, case.x, case.dy.detach())


def test_changing_a_saved_tensor_is_noticed(backend):
    case = make_case((2, 5, 3, 2))
    weight = case.weight.requires_grad_()
    y = eca_fused.eca(case.x, weight, backend=backend)
    case.x.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


def test_batched_gradients_keep_their_graph(backend):
    case = float64(shape=(2, 4, 2, 2), k=3)
    seeds = torch.randn(3, *case.x.shape, dtype=torch.float64)

    def derived(function):
        batched = torch.autograd.grad(
            function(case.x, case.weight),
            (case.x, case.weight),
            seeds,
            is_grads_batched=True,
            create_graph=True,
        )
        assert all(g.requires_grad for g in batched)
        loss = sum(g.pow(2).sum() for g in batched)
        return (*batched, *torch.autograd.grad(loss, (case.x, case.weight)))

    for ours, want in zip(derived(fused(case, backend)), derived(plain(case)), strict=True):
        torch.testing.assert_close(ours, want)


@pytest.mark.parametrize("padding_mode", MODES)
@pytest.mark.parametrize("own_taps", [False, True], ids=["shared", "own"])
def test_the_plain_backward_is_that_of_the_definition(backend, own_taps, padding_mode):
    case = float64(padding_mode, shape=(2, 5, 3, 2), k=3, own_taps=own_taps)
    y = plain(case)(case.x, case.weight)
    want = torch.autograd.grad(y, (case.x, case.weight), case.dy)
    ours = plain_backward(case.dy, case.x, case.weight, circular=padding_mode == "circular")
    for got, expected in zip(ours, want, strict=True):
        torch.testing.assert_close(got, expected)
