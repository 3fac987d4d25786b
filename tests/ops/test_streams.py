"""Streams and CUDA graphs as networks use them, for every backend: memory, autograd, whole steps.

test_cuda.py has what is special to the CUDA kernels: forced plans on streams, replays side by side.
"""

import copy

import pytest
import torch
from torch import Tensor, nn

import eca_fused
from helpers.cases import LAYOUTS, Case, Results, make_case, run

BACKENDS = [
    name for name, status in eca_fused.backends().items() if "cuda" in (status.devices or ())
]
if not torch.cuda.is_available():
    reason = "needs a GPU: benchmarks/gpu_check.py on a machine that has one"
elif not BACKENDS:
    reason = "needs the CUDA kernels or Triton: make build ECA_FUSED_CUDA=1"
else:
    reason = ""
pytestmark = [
    pytest.mark.any_device,
    pytest.mark.needs_gpu,
    pytest.mark.skipif(bool(reason), reason=reason),
    pytest.mark.parametrize("backend", BACKENDS or ["native"]),
]


def case_on_gpu(layout: str = "contiguous", device: str = "cuda", seed: int = 0) -> Case:
    case = make_case((4, 64, 14, 14), 5, layout=layout, seed=seed)
    return Case(*(t.to(device) for t in (case.x, case.weight, case.dy)))


def ours(backend: str, case: Case) -> Results:
    return run(lambda x, w: eca_fused.eca(x, w, backend=backend), case)


def same(got: tuple[Tensor, ...], want: tuple[Tensor, ...]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


def busy() -> None:
    """Keep the current stream busy, for a tenth of a second or so."""
    torch.cuda._sleep(150_000_000)


def litter(*like: Tensor) -> list[Tensor]:
    """Memory of these sizes from what the current stream has free, filled with NaN."""
    return [torch.full_like(t, torch.nan) for t in like for _ in range(4)]


# ---- streams ----


@pytest.mark.parametrize("layout", LAYOUTS)
def test_x_may_go_while_the_kernels_wait(backend, layout):
    case = case_on_gpu(layout)
    want = ours(backend, case)
    stream = torch.cuda.Stream()
    x = case.x.clone(memory_format=torch.preserve_format)
    torch.cuda.synchronize()
    with torch.cuda.stream(stream):
        busy()
        y = eca_fused.eca(x, case.weight, backend=backend)
    x.record_stream(stream)
    del x
    kept = litter(case.x)
    torch.cuda.synchronize()
    assert torch.equal(y, want[0])
    assert all(t.isnan().all() for t in kept)  # nor did the kernels write there


@pytest.mark.parametrize("layout", LAYOUTS)
def test_what_a_call_keeps_is_memory_of_its_stream(backend, layout):
    # Means, gates and workspace are free again as soon as the call returns, long before the kernels
    # run: another stream must not be given their memory.
    case = case_on_gpu(layout)
    want = ours(backend, case)
    stream = torch.cuda.Stream()
    torch.cuda.synchronize()
    with torch.cuda.stream(stream):
        busy()
        got = ours(backend, case)
    kept = litter(case.x, case.weight, case.x[:, :, 0, 0].contiguous())
    torch.cuda.synchronize()
    assert same(got, want)
    assert all(t.isnan().all() for t in kept)


def test_a_backward_pass_that_another_stream_asks_for(backend):
    # Autograd runs it on the stream of the forward pass, and makes the asking stream wait.
    case = case_on_gpu()
    _, want_dx, want_dweight = ours(backend, case)
    x, weight = case.x.requires_grad_(), case.weight.requires_grad_()
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        busy()
        y = eca_fused.eca(x, weight, backend=backend)
    y.backward(case.dy)
    assert same((x.grad * 1, weight.grad * 1), (want_dx, want_dweight))
    torch.cuda.synchronize()


# ---- CUDA graphs ----


def network(backend: str) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        eca_fused.ECALayer(64, backend=backend),
        nn.ReLU(),
        eca_fused.ECALayer(64, padding_mode="circular", backend=backend),
    ).cuda()


def captured(step) -> torch.cuda.CUDAGraph:
    """A graph of a step; calls on a side stream take the memory that it needs before."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            step()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        step()
    torch.cuda.synchronize()
    return graph


def test_graphed_callables(backend):
    net = network(backend)
    other = copy.deepcopy(net)
    sample = case_on_gpu().x.requires_grad_()
    graphed = torch.cuda.make_graphed_callables(other, (sample,))
    for seed in range(1, 6):
        case = case_on_gpu(seed=seed)
        x = case.x.requires_grad_()
        results = []
        for function in (net, graphed):
            y = function(x)
            parameters = (net if function is net else other).parameters()
            grads = torch.autograd.grad(y, (x, *parameters), case.dy)
            results.append([t.detach().clone() for t in (y, *grads)])
        assert same(*results), f"replay {seed}"


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_graph_of_a_whole_training_step(backend, layout):
    nets = [network(backend) for _ in range(2)]
    static = case_on_gpu(layout)

    def step_of(net: nn.Sequential):
        optimizer = torch.optim.SGD(net.parameters(), lr=0.1)

        def step() -> None:
            optimizer.zero_grad(set_to_none=True)
            net(static.x).backward(static.dy)
            optimizer.step()

        return step

    eager = step_of(nets[1])
    graph = captured(step_of(nets[0]))
    nets[0].load_state_dict(nets[1].state_dict())  # the calls before have trained it
    before = nets[1][0].conv.weight.detach().clone()
    for seed in range(1, 6):
        new = case_on_gpu(layout, seed=seed)
        static.x.copy_(new.x)
        static.dy.copy_(new.dy)
        graph.replay()
        eager()
        torch.cuda.synchronize()
        parameters = [tuple(net.parameters()) for net in nets]
        assert same(*parameters), f"step {seed}"
    assert not torch.equal(nets[1][0].conv.weight, before)


@pytest.mark.parametrize("inplace", [False, True], ids=["fresh", "in place"])
def test_a_graph_of_inference(backend, inplace):
    layer = eca_fused.ECALayer(64, backend=backend, inplace=inplace).cuda()
    x = case_on_gpu().x
    y = torch.empty_like(x)

    def step() -> None:
        with torch.no_grad():
            y.copy_(layer(x))

    graph = captured(step)
    for seed in range(1, 6):
        new = case_on_gpu(seed=seed)
        x.copy_(new.x)
        graph.replay()
        torch.cuda.synchronize()
        # What is written in place is summed in another order.
        run = eca_fused.eca_ if inplace else eca_fused.eca
        want = run(new.x.clone(), layer.conv.weight.detach(), backend=backend)
        assert torch.equal(y, want), f"replay {seed}"
        assert torch.equal(x, want if inplace else new.x)


# ---- devices ----


@pytest.mark.skipif(
    torch.cuda.is_available() and torch.cuda.device_count() < 2, reason="needs two GPUs"
)
def test_a_layer_on_a_device_that_is_not_the_current_one(backend):
    layer = eca_fused.ECALayer(64, backend=backend).to("cuda:1")
    here = copy.deepcopy(layer).to("cuda:0")
    results = []
    for module, device in ((layer, "cuda:1"), (here, "cuda:0")):
        case = case_on_gpu(device=device)
        x = case.x.requires_grad_()
        y = module(x)
        grads = torch.autograd.grad(y, (x, module.conv.weight), case.dy)
        assert torch.cuda.current_device() == 0
        assert all(t.device == torch.device(device) for t in (y, *grads))
        results.append([t.detach().cpu() for t in (y, *grads)])
    assert same(*results)
