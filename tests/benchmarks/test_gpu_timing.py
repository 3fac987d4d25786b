"""What the benchmarks ask of a GPU, on a pretended one: events, profiler, nvidia-smi."""

from types import SimpleNamespace

import pytest
import torch

from lib import gpu_timing, machine, tables

pytestmark = pytest.mark.every_torch


class Clock:
    """A GPU's time in milliseconds, which only its work moves."""

    def __init__(self):
        self.ms = 0.0

    def event(self, enable_timing):
        assert enable_timing
        clock = self

        class Event:
            def record(self):
                self.at = clock.ms

            def synchronize(self):
                pass

            def elapsed_time(self, end):
                return end.at - self.at

        return Event()


@pytest.fixture
def clock(monkeypatch):
    made = Clock()
    monkeypatch.setattr(torch.cuda, "Event", made.event)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    return made


class Work:
    """A recording of four calls, whose first replay takes longer than the others."""

    calls = 4

    def __init__(self, clock):
        self.clock, self.replays = clock, 0

    def replay(self):
        self.replays += 1
        self.clock.ms += 100 if self.replays == 1 else 2


def test_a_sample_is_of_the_replays_after_the_first(clock):
    work = Work(clock)
    assert gpu_timing.sample(work, 5) == 2
    assert work.replays == 6


def test_the_clocks_are_brought_up_for_as_long_as_is_asked(clock, monkeypatch):
    class Matrix:
        def __matmul__(self, other):
            clock.ms += 1

    monkeypatch.setattr(torch, "randn", lambda *size, device, dtype: Matrix())
    gpu_timing.spin_up(0.3)
    assert 300 <= clock.ms < 300 + 20


class Trace:
    """Stands for torch.profiler.profile."""

    seen = (("DeviceType.CUDA", 30.0), ("DeviceType.CPU", 500.0), ("DeviceType.CUDA", 90.0))

    def __init__(self, activities):
        assert activities == [torch.profiler.ProfilerActivity.CUDA]

    def __enter__(self):
        return self

    def __exit__(self, *_):
        pass

    def events(self):
        return [
            SimpleNamespace(
                device_type=kind, time_range=SimpleNamespace(elapsed_us=lambda us=us: us)
            )
            for kind, us in self.seen
        ]


def test_the_profiler_counts_the_gpu_alone_for_each_call(clock, monkeypatch):
    monkeypatch.setattr(torch.profiler, "profile", Trace)
    assert gpu_timing.profiled_us(Work(clock), replays=3) == (30 + 90) / 3 / 4
    monkeypatch.setattr(Trace, "seen", (("DeviceType.CPU", 500.0),))
    assert gpu_timing.profiled_us(Work(clock)) is None


def test_a_profiler_that_does_not_run_is_said(clock, monkeypatch, capsys):
    def refuses(activities):
        raise RuntimeError("CUPTI_ERROR_INSUFFICIENT_PRIVILEGES")

    monkeypatch.setattr(torch.profiler, "profile", refuses)
    assert gpu_timing.profiled_us(Work(clock)) is None
    assert "does not run here: CUPTI_ERROR_INSUFFICIENT_PRIVILEGES" in capsys.readouterr().out


NVIDIA_SMI = """#!/bin/sh
[ "$1 $2" = "-i GPU-abc" ] && [ "$4" = "--format=csv,noheader" ] || exit 2
case $3 in *driver_version,clocks.sm,clocks.mem,temperature.gpu,power.draw) ;; *) exit 3 ;; esac
echo "580.1, 1980 MHz, 3201 MHz, 41, 77.5 W"
"""


@pytest.fixture
def gpu(monkeypatch, tmp_path):
    properties = SimpleNamespace(
        name="NVIDIA H200", major=9, minor=0, multi_processor_count=132,
        L2_cache_size=60 << 20, total_memory=141 << 30, uuid="abc",
    )  # fmt: skip
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    monkeypatch.setenv("PATH", str(tmp_path))
    return tmp_path / "nvidia-smi"


def test_a_result_says_on_which_gpu_and_in_what_state(gpu):
    gpu.write_text(NVIDIA_SMI)
    gpu.chmod(0o755)
    found = machine.machine(SimpleNamespace(kind="cuda"))
    state = {"driver": "580.1", "clocks.sm": "1980 MHz", "clocks.mem": "3201 MHz"}
    state |= {"temperature.gpu": "41", "power.draw": "77.5 W"}
    assert machine.gpu_state() == state
    assert found.items() >= {**state, "gpu": "NVIDIA H200", "capability": "9.0"}.items()
    assert tables.where(found).startswith("NVIDIA H200, driver 580.1, CUDA ")


def test_a_result_without_nvidia_smi_has_no_state(gpu):
    assert machine.gpu_state() == {}
    gpu.write_text("#!/bin/sh\nexit 9\n")
    gpu.chmod(0o755)
    assert machine.gpu_state() == {}
    found = machine.machine(SimpleNamespace(kind="cuda"))
    assert "driver unknown" in tables.where(found)
