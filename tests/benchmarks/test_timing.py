"""How the benchmarks take times: rounds, statistics, what is timed and what is not."""

import itertools
import weakref

import pytest
import torch

from eca_fused.cli.common import measure
from lib import cases, contenders, devices, gpu_timing, timing

pytestmark = pytest.mark.every_torch

CASE = cases.Case((3, 8, 4, 4), 3, "bfloat16", "channels_last")


def test_rounds_are_interleaved_in_any_order_and_the_first_do_not_count():
    order = []

    def sample(name):
        order.append(name)
        return float(len(order))

    found = measure.interleaved(sample, ["a", "b", "c"], rounds=40)
    rounds = ["".join(order[i : i + 3]) for i in range(0, len(order), 3)]
    assert len(rounds) == 40 + measure.WARM_UP_ROUNDS
    assert set(rounds) == {"abc", "acb", "bac", "bca", "cab", "cba"}
    counted = 3 * measure.WARM_UP_ROUNDS
    for name, values in found.items():
        assert values == [i + 1 for i in range(counted, len(order)) if order[i] == name]


def test_a_short_call_is_made_once_before_it_is_timed_and_keeps_its_output(monkeypatch):
    clock, alive, most = [0.0], [], []

    def call():
        clock[0] += 1 if len(seen) else 100  # the first one of a sample finds cold caches
        seen.append(clock[0])
        made = torch.zeros(1)
        alive.append(weakref.ref(made))
        most.append(sum(ref() is not None for ref in alive))
        return (made,)

    seen = []
    monkeypatch.setattr(devices.time, "perf_counter", lambda: clock[0])
    recording = devices.Direct([call])
    recording.forget()
    seen.clear(), alive.clear(), most.clear()
    assert recording.sample(5) == 1000.0
    assert most == [1, 1, 2, 2, 2, 2]
    seen.clear()
    assert recording.sample(1) == 100_000.0


def test_statistics():
    values = [5.0, 1.0, 3.0, 2.0, 4.0, 100.0]
    assert timing.statistics_of(values) == {"median": 3.5, "p20": 2.0, "p80": 5.0, "samples": 6}


def test_ratios_are_taken_round_by_round():
    # The machine was ten times slower in one of the rounds: that must not show in a ratio.
    found = timing.summarise({"native": [1.0, 10.0, 1.0], "copy": [2.0, 20.0, 2.0]}, 4000)
    assert found["copy"]["times_ours"] == {"median": 2.0, "p20": 2.0, "p80": 2.0, "samples": 3}
    assert found["native"]["of_copy"]["p80"] == 2.0
    assert found["native"]["gbps"] == 4.0


def test_what_comes_before_a_call_is_not_timed(monkeypatch):
    clock = [0.0]
    monkeypatch.setattr(devices.time, "perf_counter", lambda: clock[0])

    def passes(seconds):
        clock[0] += seconds
        return ()

    recording = devices.Direct([lambda: passes(2)], before=lambda: passes(100))
    assert recording.sample(3) == 2000.0
    assert devices.Direct([lambda: passes(2), lambda: passes(3)]).sample(4) == 5000.0


@pytest.mark.parametrize("direction", cases.DIRECTIONS)
def test_on_a_cpu_the_map_of_a_call_has_just_been_written(direction):
    device = devices.Cpu()
    inputs = contenders.make_inputs(CASE, device)
    first = inputs.xs[0].clone(), inputs.dys[0].clone()
    written = inputs.dys[0] if direction == "backward" else inputs.xs[0]
    layer = contenders.with_taps(contenders.plain, inputs.taps)
    recording = contenders.record(direction, layer, inputs, device)
    calls = recording.replay, recording.replay, lambda: recording.sample(2)
    versions = []
    for call in calls:
        versions.append(written._version)
        call()
    assert [later - earlier for earlier, later in itertools.pairwise(versions)] == [1, 1]
    assert written._version == versions[-1] + 3  # one call of this sample is not timed
    assert torch.equal(inputs.xs[0], first[0])
    assert torch.equal(inputs.dys[0], first[1])


def test_on_a_gpu_calls_rotate_among_maps_that_nothing_writes():
    device = devices.device_named("dry-run")
    inputs = contenders.make_inputs(CASE, device)
    assert len(inputs.xs) > 1
    assert device.writer(inputs.xs[0]) is None


def test_short_calls_are_repeated_and_long_ones_have_fewer_rounds():
    class Fixed(devices.Cpu):
        def sample(self, recording, replays):
            seen.append((recording.ms, replays))
            return recording.ms

    class Fake:
        calls = 1

        def __init__(self, ms):
            self.ms = ms

    seen = []
    found = timing.call_times(Fixed(), {"short": Fake(0.01), "long": Fake(400.0)}, rounds=25)
    assert {replays for ms, replays in seen[2:] if ms == 0.01} == {100}
    assert len(found["long"]) == Fixed.fewest_rounds
    assert found["short"][0] == 10.0
    # Who is repeated finds its maps in the caches, so if one is, then all are.
    assert {replays for ms, replays in seen[2:] if ms == 400.0} == {2}
    seen.clear()
    timing.call_times(Fixed(), {"less": Fake(1.1), "long": Fake(400.0)}, rounds=25)
    assert {replays for _, replays in seen} == {1}


def test_the_maps_of_a_graph_are_larger_than_the_cache():
    for case in cases.gpu_cases():
        calls = measure.rotation(2 * case.map_bytes, 60 << 20, gpu_timing.LONGEST_ROTATION)
        assert calls >= 2
        assert calls * 2 * case.map_bytes >= 3 * (60 << 20) or calls == gpu_timing.LONGEST_ROTATION
