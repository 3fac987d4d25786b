"""torch.export and torch.compile of ResidualTail with batch norms, for batches of any size."""

import copy

import pytest
import torch
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend

from eca_fused import ECALayer, NormActAttention, ResidualTail
from eca_fused.attention import SE
from helpers.cases import needs_extension
from helpers.programs import own_operators
from helpers.tails import assert_same_state, batch_norm, called

pytestmark = pytest.mark.every_torch

C = 6
ATTENTIONS = {"ECA": lambda: ECALayer(C), "SE": lambda: SE(C, 2)}


def maps(samples, height=4, width=5):
    return [torch.randn(samples, C, height, width) for _ in range(2)]


def exported(tail, strict):
    batch = torch.export.Dim("batch", min=1, max=64)
    sizes = ({0: batch}, {0: batch})
    return torch.export.export(tail, tuple(maps(2)), dynamic_shapes=sizes, strict=strict)


@pytest.mark.parametrize("decomposed", [False, True])
@pytest.mark.parametrize("grad", [True, False])
@pytest.mark.parametrize("strict", [True, False])
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("name", ATTENTIONS)
def test_the_program_is_the_modules(name, training, strict, grad, decomposed):
    """Values and running statistics, for other batches than that of the export."""
    tail = ResidualTail(ATTENTIONS[name](), batch_norm(C), batch_norm(C)).train(training)
    twin = copy.deepcopy(tail)
    with torch.set_grad_enabled(grad):
        program = exported(tail, strict)
    for key, value in twin.state_dict().items():
        assert torch.equal(tail.state_dict()[key], value), key  # the export changed nothing
    module = (program.run_decompositions() if decomposed else program).module()
    with torch.no_grad():
        for samples in (1, 2, 5):
            given = maps(samples)
            torch.testing.assert_close(module(*given), called(twin, *given))
    assert_same_state(module, twin, exported=True)


@needs_extension
@pytest.mark.parametrize("grad", [True, False])
@pytest.mark.parametrize("training", [True, False])
def test_the_program_has_the_operators(training, grad):
    tail = ResidualTail(ECALayer(C), batch_norm(C), batch_norm(C)).train(training)
    with torch.set_grad_enabled(grad):
        program = exported(tail, strict=False)
    batch = {"batch_moments"} if training else set()
    gradient = {"tail_training"} if training else {"block_tail", "tail_coefficients"}
    assert own_operators(program) == batch | (gradient if grad else {"tail_inference"})


class Middle(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner = NormActAttention(ECALayer(C, backend="native"), nn.BatchNorm2d(C))

    def forward(self, x, _):
        return self.inner(x)


def tail_of_kernels():
    layer = ECALayer(C, backend="native")
    return ResidualTail(layer, nn.BatchNorm2d(C), nn.BatchNorm2d(C))


@needs_extension
@pytest.mark.parametrize("make", [tail_of_kernels, Middle])
def test_no_recompilation_for_another_size(make):
    module = make()
    twin = copy.deepcopy(module)
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(module, fullgraph=True, dynamic=True, backend=counter)
    # A compiler may restart, and call the backend twice.
    compiled(*(t.requires_grad_() for t in maps(2)))
    before = counter.frame_count
    twin.load_state_dict(module.state_dict())
    for samples, *size in ((2, 5, 6), (3, 5, 6), (5, 7, 6), (4, 8, 9)):
        given = maps(samples, *size)
        results = []
        for function, own in ((compiled, module), (twin, twin)):
            x, identity = (t.clone().requires_grad_() for t in given)
            y = function(x, identity)
            grads = torch.autograd.grad(y.square().sum(), [x, *own.parameters()])
            results.append((y, *grads, *own.buffers()))
        for got, want in zip(*results, strict=True):
            torch.testing.assert_close(got, want)
    assert counter.frame_count == before
