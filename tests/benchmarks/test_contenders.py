"""Who is timed, and that a wrong contender is not."""

import contextlib
import gc
import re
import weakref

import pytest
import torch

import layers
from helpers.cases import needs_extension
from helpers.results import wrong_contenders
from lib import cases, checking, contenders, devices, gpu_timing

pytestmark = pytest.mark.every_torch

CASE = cases.Case((3, 8, 4, 4), 3, "bfloat16", "channels_last")


@needs_extension
def test_a_wrong_contender_is_reported_and_not_timed(device, monkeypatch):
    inputs = contenders.make_inputs(CASE, device)
    judge = checking.Judge(inputs)
    running = wrong_contenders(inputs.taps)
    found = {
        direction: layers.measure_direction(direction, inputs, running, judge, device, rounds=1)
        for direction in cases.DIRECTIONS
    }
    failed = {direction: " ".join(one["failed"]) for direction, one in found.items()}
    assert re.search(r"eager: y of input 0 has relative error 0\.(1|09\d),", failed["forward"])
    assert "timm: RuntimeError: nothing works" in failed["forward"]
    assert "compile:" not in failed["forward"]
    assert "compile: dx of input 0 has relative error 0.5" in failed["backward"]
    assert "dweight of input 0" in failed["forward and backward"]
    assert {"copy", "native", "compile"} <= set(found["forward"]["contenders"])
    assert set(found["backward"]["contenders"]) == {"copy", "native"}
    for direction, maps in zip(cases.DIRECTIONS, (2, 3, 5), strict=True):
        assert found[direction]["ideal_bytes"] == maps * 3 * 8 * 4 * 4 * 2


def test_a_graph_keeps_what_its_replays_read(monkeypatch):
    # Only the captured calls refer to the memory that a backward pass saved.
    class Stub:
        capture_begin = capture_end = replay = lambda self: None

    monkeypatch.setattr(torch.cuda, "CUDAGraph", Stub)
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: contextlib.nullcontext())
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    read = torch.ones(3)
    alive = weakref.ref(read)
    recording = gpu_timing.Recording([lambda read=read: (read + 1,)], None)
    del read
    gc.collect()
    assert alive() is not None
    del recording
    gc.collect()
    assert alive() is None


def test_outputs_that_a_call_does_not_write_are_found(monkeypatch):
    device = devices.device_named("dry-run")
    inputs = contenders.make_inputs(CASE, device)
    layer = contenders.with_taps(contenders.plain, inputs.taps)
    recording = contenders.record("forward", layer, inputs, device)
    judge = checking.Judge(inputs)
    assert judge.faults(recording, "forward") == []
    monkeypatch.setattr(recording, "replay", lambda: None)
    assert "relative error nan" in judge.faults(recording, "forward")[0]


@needs_extension
def test_contenders_that_write_into_existing_memory_are_right():
    device = devices.Cpu()
    inputs = contenders.make_inputs(CASE, device)
    judge = checking.Judge(inputs)
    found = contenders.record_existing_memory(inputs, device)
    assert set(found) == {"native in place", "native given", "eager given", "copy given"}
    for name, recording in found.items():
        assert bool(judge.faults(recording, "forward")) == (name == "copy given"), name


def test_the_form_for_compilation_is_the_same_function():
    x = torch.randn(2, 9, 4, 4, dtype=torch.float64)
    for k in (1, 3, 7):
        weight = torch.randn(1, 1, k, dtype=torch.float64)
        torch.testing.assert_close(contenders.shifted(x, weight), contenders.plain(x, weight))
