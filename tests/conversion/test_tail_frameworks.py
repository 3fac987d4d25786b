"""convert(tails=True) with compilers, wrappers and modes of PyTorch."""

import copy
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from eca_fused import convert
from helpers.cases import needs_extension
from helpers.programs import own_operators
from helpers.residual_blocks import (
    Block,
    as_before,
    assert_the_same,
    converted,
    everywhere_something,
    image,
    steps,
    with_downsample,
)
from helpers.tails import assert_same_state

pytestmark = pytest.mark.every_torch


@pytest.fixture
def process_group() -> Iterator[None]:
    if not torch.distributed.is_available():
        pytest.skip("needs a torch with torch.distributed")
    store = torch.distributed.HashStore()
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


@pytest.mark.usefixtures("process_group")
def test_in_distributed_data_parallel() -> None:
    model = everywhere_something(nn.Sequential(Block(), with_downsample()))
    plain = copy.deepcopy(model)
    wrapped = nn.parallel.DistributedDataParallel(model)
    assert list(convert(wrapped, tails=True).tails) == ["module.0", "module.1"]
    assert_the_same(steps(wrapped, image()), steps(plain, image()))


@needs_extension
@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_compiled_afterwards(backend: str) -> None:
    model = nn.Sequential(converted(), converted(with_downsample()))
    plain = as_before(model)
    compiled = torch.compile(model, fullgraph=True, backend=backend)
    assert_the_same(steps(compiled, image()), steps(plain, image()))  # type: ignore[arg-type]


@needs_extension
@pytest.mark.parametrize("strict", [True, False])
@pytest.mark.parametrize("training", [True, False])
def test_exported_with_batches_of_any_size(training: bool, strict: bool) -> None:
    """The program has the operators of tails, and computes and counts as the blocks did."""
    model = nn.Sequential(converted(), converted(with_downsample())).train(training)
    plain = as_before(model).train(training)
    sizes = ({0: torch.export.Dim("batch", min=1, max=64)},)
    program = torch.export.export(model, (image(),), dynamic_shapes=sizes, strict=strict)
    assert ("tail_training" if training else "block_tail") in own_operators(program)
    module = program.module()
    with torch.no_grad():
        for samples in (1, 2, 5):
            x = torch.randn(samples, *image().shape[1:], dtype=torch.float64)
            torch.testing.assert_close(module(x), plain(x))
    assert_same_state(module, plain, exported=True)


@needs_extension
@pytest.mark.parametrize("channels_last", [False, True])
def test_which_tails_a_graph_has(channels_last: bool) -> None:
    graphs: list[str] = []

    def kept(graph: Any, inputs: Any) -> Any:
        graphs.append(graph.code)
        return graph

    memory_format = torch.channels_last if channels_last else torch.contiguous_format
    model = nn.Sequential(converted(), converted(with_downsample())).train()
    model = model.to(memory_format=memory_format)
    x = image().contiguous(memory_format=memory_format)
    torch.compile(model, fullgraph=True, backend=kept)(x)
    torch.compile(as_before(model), fullgraph=True, backend=kept)(x)
    # Tails that are operators have no calls of batch norms, of which each block has another.
    assert graphs[0].count("batch_norm(") == (2 if channels_last else 5)
    assert graphs[1].count("batch_norm(") == 5


def test_of_a_compiled_model_the_inner_modules() -> None:
    model = everywhere_something(nn.Sequential(Block(), with_downsample()))
    compiled, plain = torch.compile(model, backend="eager"), copy.deepcopy(model)
    assert_the_same(steps(compiled, image()), steps(plain, image()))  # type: ignore[arg-type]
    assert list(convert(compiled, tails=True).tails) == ["_orig_mod.0", "_orig_mod.1"]  # type: ignore[arg-type]
    assert_the_same(steps(compiled, image()), steps(plain, image()))  # type: ignore[arg-type]


def test_scripts_are_refused_and_traces_work() -> None:
    block = converted().eval()
    with pytest.raises(RuntimeError, match=r"call eca_fused.revert\(\) before torch.jit.script"):
        torch.jit.script(block)
    traced = torch.jit.trace(block, image())
    torch.testing.assert_close(traced(image()), block(image()))
    torch.testing.assert_close(
        torch.fx.symbolic_trace(nn.Sequential(block))(image()), block(image())
    )


@pytest.mark.parametrize(
    "mode",
    [
        torch.no_grad(),
        torch.inference_mode(),
        torch.device("meta"),
        torch.autocast("cpu"),
        FakeTensorMode(),
    ],
    ids=lambda mode: type(mode).__name__,
)
def test_under_modes(mode: Any) -> None:
    model = nn.Sequential(Block(), with_downsample())
    with mode:
        report = convert(model, tails=True)
    assert list(report.tails) == ["0", "1"], str(report)


def test_modules_without_memory() -> None:
    with torch.device("meta"):
        model = nn.Sequential(Block(), with_downsample())
    assert list(convert(model, tails=True).tails) == ["0", "1"]
    assert model(torch.empty(1, 8, 4, 4, device="meta")).is_meta
