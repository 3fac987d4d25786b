"""benchmarks/calls.py and networks.py, on a pretended GPU."""

import json

import pytest
import torch

import calls
import networks
import report
from eca_fused import ECALayer
from helpers.cases import needs_extension
from lib import cases, devices

pytestmark = pytest.mark.every_torch

CASE = cases.Case((3, 8, 4, 4), 3, "bfloat16", "channels_last")


@needs_extension
def test_host_time_of_small_calls(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(calls, "SHAPES", calls.SHAPES[:1])
    path = tmp_path / "calls.json"
    assert calls.main(["--device", "dry-run", "--rounds", "2", "--output", str(path)]) == 0
    forward, both = json.loads(path.read_text())["rows"]
    assert {"native", "eager", "compile", "sigmoid", "native, graph"} <= set(forward["contenders"])
    assert {"native", "eager", "compile", "sigmoid"} <= set(both["contenders"])
    assert report.main([str(path)]) == 0
    assert "| 1x64x7x7, float32 | forward and backward |" in capsys.readouterr().out


@needs_extension
def test_compiled_networks_run_the_kernels_by_name_too():
    found = networks.built("mobilenetv2", devices.device_named("cpu"), "contiguous", "compiled")
    layers = {
        kind: {m.backend for m in net.modules() if isinstance(m, ECALayer)}
        for kind, net in found.items()
    }
    assert layers == {
        "none": set(), "plain ECA": {"auto"}, "fused ECA": {"auto"}, "native ECA": {"native"},
        "tails": {"auto"}, "native tails": {"native"},
    }  # fmt: skip


def test_whole_networks(tmp_path, capsys):
    pytest.importorskip("matplotlib", reason="needs matplotlib: pip install eca-fused[demo]")
    path, picture = tmp_path / "networks.json", tmp_path / "networks.png"
    arguments = ["--device", "dry-run", "--rounds", "1", "--batch", "2", "--size", "32"]
    arguments += ["--layout", "channels_last", "--output", str(path), "--plot", str(picture)]
    assert networks.main(arguments) == 0
    rows = json.loads(path.read_text())["rows"]
    assert [(one["network"], one["pass"]) for one in rows] == [
        (name, pass_) for name in networks.USUAL for pass_ in networks.PASSES
    ]
    for one in rows:
        assert list(one["contenders"]) == ["none", "plain ECA", "fused ECA", "tails"]
        assert 0 < one["difference"] < 1e-3
        memory = {kind: entry["peak_bytes"] for kind, entry in one["contenders"].items()}
        assert all(value > 0 for value in memory.values())
    assert report.main([str(path)]) == 0
    text = capsys.readouterr().out
    place = "| mobilenetv2 | 2x3x32x32 | float32 | channels_last | eager | training step |"
    assert f"{place} fused ECA |" in text
    assert picture.read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(("name", "attention"), [("seresnet50", "SE"), ("eca_nfnet_l0", "ECA")])
def test_networks_with_other_attention_and_of_timm(name, attention):
    if name == "eca_nfnet_l0":
        pytest.importorskip("timm", reason="needs timm: pip install timm")
    found = networks.built(name, devices.device_named("cpu"), "contiguous", "eager")
    assert list(found) == ["none", f"plain {attention}", f"fused {attention}", "tails"]
    parameters = {kind: sum(p.numel() for p in net.parameters()) for kind, net in found.items()}
    assert parameters["none"] < parameters["tails"]
    assert len({n for kind, n in parameters.items() if kind != "none"}) == 1
    difference = networks.difference(found, torch.randn(1, 3, 32, 32))
    assert 0 < difference < 1e-3
