"""What is kept for the backward pass, for how long, and PyTorch's ways to keep less of it."""

import gc
import weakref
from collections import Counter

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import (
    CheckpointPolicy,
    checkpoint,
    checkpoint_sequential,
    create_selective_checkpoint_contexts,
)

import eca_fused
from eca_fused.ops.backend import select
from helpers.cases import BACKENDS, DEVICE, LAYOUTS, VIEWS, Case, assert_same_sums, make_case, run

pytestmark = [pytest.mark.any_device, pytest.mark.parametrize("backend", BACKENDS)]


def fused(backend):
    return lambda x, w: eca_fused.eca(x, w, backend=backend)


def same(ours: tuple[Tensor, ...], want: tuple[Tensor, ...]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(ours, want, strict=True))


class Calls(TorchDispatchMode):
    """Counts the operators that run."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[object] = Counter()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.counts[function] += 1
        return function(*args, **(kwargs or {}))

    def of(self, backend: str) -> tuple[int, int]:
        """How often a backend's kernels ran, forward and backward."""
        kernels = select(torch.empty(1), backend)
        forward = self.counts[kernels.forward] + self.counts[kernels.inference]
        return forward, self.counts[kernels.backward]


# ---- what is kept ----


class Kept:
    """Saved-tensor hooks that note what is packed, and give back what `change` makes of it."""

    def __init__(self, change=lambda t: t) -> None:
        self.packed: list[Tensor] = []
        self.unpacked = 0
        self.change = change

    def pack(self, t: Tensor) -> Tensor:
        self.packed.append(t.detach())
        return self.change(t)

    def unpack(self, t: Tensor) -> Tensor:
        self.unpacked += 1
        return t

    def hooks(self) -> torch.autograd.graph.saved_tensors_hooks:
        return torch.autograd.graph.saved_tensors_hooks(self.pack, self.unpack)


@pytest.mark.parametrize("view", ["whole", "batch slice", "channel slice"])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_x_taps_means_and_gates_are_all_that_is_kept(backend, dtype, layout, view):
    case = make_case((3, 8, 5, 4), dtype=dtype, layout=layout)
    x = VIEWS[view](case.x).requires_grad_()
    kept = Kept()
    with kept.hooks():
        y = eca_fused.eca(x, case.weight, backend=backend)
    saved_x, weight, mean, gate = kept.packed
    assert saved_x.data_ptr() == x.data_ptr()  # not a copy
    assert weight.data_ptr() == case.weight.data_ptr()
    assert mean.shape == gate.shape == x.shape[:2]
    assert mean.dtype == gate.dtype == torch.float32
    torch.testing.assert_close(mean, x.detach().float().mean((2, 3)))
    assert kept.unpacked == 0
    y.sum().backward()
    assert kept.unpacked == 4
    assert len(kept.packed) == 4  # a backward pass without create_graph keeps nothing


def test_nothing_is_kept_where_no_gradient_is_needed(backend):
    case = make_case((2, 8, 5, 4))
    weight = case.weight.requires_grad_()
    kept = Kept()
    with kept.hooks():
        eca_fused.eca(case.x, weight.detach(), backend=backend)
        with torch.no_grad():
            eca_fused.eca(case.x, weight, backend=backend)
        with torch.inference_mode():
            eca_fused.eca(case.x, weight, backend=backend)
    assert kept.packed == []


@pytest.mark.parametrize("after", ["the backward pass", "y is gone"])
def test_what_is_kept_goes(backend, after):
    case = make_case((2, 8, 5, 4))
    weight = case.weight.requires_grad_()
    x = case.x * 2
    here = weakref.ref(x)
    gc.disable()  # a cycle of references would keep x until the collector comes
    try:
        y = eca_fused.eca(x, weight, backend=backend)
        del x
        assert here() is not None
        if after == "y is gone":
            del y
        else:
            y.sum().backward()
        assert here() is None
    finally:
        gc.enable()


# ---- hooks on it ----


def test_hooks_may_give_back_copies(backend):
    case = make_case((2, 8, 5, 4), dtype=torch.float64)
    with Kept(torch.clone).hooks():
        assert same(run(fused(backend), case), run(fused(backend), case))


def test_gradients_of_gradients_from_copies(backend):
    case = make_case((2, 8, 5, 4), dtype=torch.float64)
    x, weight = case.x.requires_grad_(), case.weight.requires_grad_()

    def penalty() -> tuple[Tensor, ...]:
        y = eca_fused.eca(x, weight, backend=backend)
        grads = torch.autograd.grad(y, (x, weight), case.dy, create_graph=True)
        return torch.autograd.grad(sum(g.pow(2).sum() for g in grads), (x, weight))

    kept = Kept(torch.clone)
    with kept.hooks():
        ours = penalty()
    assert kept.unpacked > 4
    assert same(ours, penalty())


@pytest.mark.parametrize("layout", LAYOUTS)
def test_what_is_kept_may_move_to_the_host(backend, layout):
    case = make_case((2, 8, 5, 4), layout=layout)
    want = run(fused(backend), case)
    # PyTorch makes the host's copies on the default device, which the tests set to the GPU.
    with torch.device("cpu"), torch.autograd.graph.save_on_cpu(pin_memory=DEVICE == "cuda"):
        ours = run(fused(backend), case)
    # Maps come back from pinned memory contiguous, and a GPU runs other kernels for those.
    for a, b in zip(ours, want, strict=True):
        assert_same_sums(a, b)


# ---- checkpoints ----


def network(backend: str) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 8, 3),
        eca_fused.ECALayer(8, backend=backend),
        nn.ReLU(),
        eca_fused.ECALayer(8, backend=backend, padding_mode="circular"),
    )


def gradients(backend: str, forward) -> tuple[tuple[Tensor, ...], tuple[int, int]]:
    """Gradients of x and all parameters, and how often the kernels ran."""
    net = network(backend)
    x = torch.randn(2, 3, 8, 8, requires_grad=True)
    with Calls() as calls:
        y = forward(net, x)
        grads = torch.autograd.grad(y.pow(2).sum(), (x, *net.parameters()))
    return grads, calls.of(backend)


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_a_checkpoint_computes_again_what_it_did_not_keep(backend, use_reentrant):
    def forward(net, x):
        return checkpoint(net, x, use_reentrant=use_reentrant)

    want, once = gradients(backend, lambda net, x: net(x))
    if use_reentrant:  # which forbids autograd.grad()
        net = network(backend)
        x = torch.randn(2, 3, 8, 8, requires_grad=True)
        with Calls() as mode:
            forward(net, x).pow(2).sum().backward()
        ours, calls = (x.grad, *(p.grad for p in net.parameters())), mode.of(backend)
    else:
        ours, calls = gradients(backend, forward)
    assert once == (2, 2)
    assert calls == (4, 2)
    assert same(ours, want)


def test_a_checkpoint_keeps_its_arguments_alone(backend):
    case = make_case((2, 8, 5, 4))
    x = case.x.requires_grad_()
    kept = Kept()
    with kept.hooks():
        y = checkpoint(fused(backend), x, case.weight, use_reentrant=False)
    # Up to torch 2.12 an empty tensor is packed too.
    packed = {t.data_ptr() for t in kept.packed if t.numel()}
    assert packed <= {x.data_ptr(), case.weight.data_ptr()}
    y.backward(case.dy)
    assert same((x.grad,), run(fused(backend), case)[1:2])


def test_checkpoints_of_a_sequence(backend):
    want, _ = gradients(backend, lambda net, x: net(x))
    ours, calls = gradients(
        backend, lambda net, x: checkpoint_sequential(net, 2, x, use_reentrant=False)
    )
    assert calls == (3, 2)  # the last part is not checkpointed
    assert same(ours, want)


def test_second_derivatives_through_a_checkpoint(backend):
    case = make_case((2, 8, 5, 4), dtype=torch.float64)
    x, weight = case.x.requires_grad_(), case.weight.requires_grad_()

    def penalty(function) -> tuple[Tensor, ...]:
        y = function(x, weight)
        grads = torch.autograd.grad(y, (x, weight), case.dy, create_graph=True)
        return torch.autograd.grad(sum(g.pow(2).sum() for g in grads), (x, weight))

    ours = penalty(lambda x, w: checkpoint(fused(backend), x, w, use_reentrant=False))
    assert same(ours, penalty(fused(backend)))


@pytest.mark.parametrize("policy", ["saved", "computed again", "listed"])
def test_a_policy_may_name_the_operators(backend, policy):
    operator = select(torch.empty(1), backend).forward

    def choose(ctx, op, *args, **kwargs):
        must_save = op == operator and policy == "saved"
        return CheckpointPolicy.MUST_SAVE if must_save else CheckpointPolicy.PREFER_RECOMPUTE

    rule = [operator] if policy == "listed" else choose

    def forward(net, x):
        return checkpoint(
            net,
            x,
            use_reentrant=False,
            context_fn=lambda: create_selective_checkpoint_contexts(rule),
        )

    want, _ = gradients(backend, lambda net, x: net(x))
    ours, calls = gradients(backend, forward)
    assert calls == (4 if policy == "computed again" else 2, 2)
    assert same(ours, want)


# ---- modes ----


def test_anomaly_mode_names_the_function(backend):
    case = make_case((2, 8, 5, 4))
    x = case.x.requires_grad_()
    with (
        pytest.warns(UserWarning, match="Anomaly Detection"),
        torch.autograd.detect_anomaly(),
        pytest.raises(RuntimeError, match="'ECAFunctionBackward' returned nan values in its 0th"),
        pytest.warns(UserWarning, match="Error detected in ECAFunctionBackward"),
    ):
        eca_fused.eca(x, case.weight, backend=backend).backward(torch.full_like(x, torch.nan))


def test_anomaly_mode_changes_nothing(backend):
    case = make_case((2, 8, 5, 4))
    want = run(fused(backend), case)
    with pytest.warns(UserWarning, match="Anomaly Detection"), torch.autograd.detect_anomaly():
        assert same(run(fused(backend), case), want)


@pytest.mark.parametrize("made", ["inside", "outside"])
def test_inference_mode(backend, made):
    case = make_case((2, 8, 5, 4))
    layer = eca_fused.ECALayer(8, backend=backend)
    want = layer(case.x).detach()
    with torch.inference_mode():
        x = case.x.clone() if made == "inside" else case.x
        y = layer(x)
        assert y.is_inference()
        assert torch.equal(y, want)
        assert layer.requires_grad_(True).conv.weight.requires_grad
        layer.overwrites = True
        assert layer(x) is x
    assert_same_sums(x, want)


def test_a_tensor_of_inference_mode_cannot_be_kept(backend):
    case = make_case((2, 8, 5, 4))
    with torch.inference_mode():
        x = case.x.clone()
    with pytest.raises(RuntimeError, match="Inference tensors cannot be saved for backward"):
        eca_fused.eca(x, case.weight.requires_grad_(), backend=backend)
    y = eca_fused.eca(x.clone(), case.weight, backend=backend)
    assert same(run(fused(backend), Case(x.clone(), case.weight.detach(), case.dy))[:1], (y,))
