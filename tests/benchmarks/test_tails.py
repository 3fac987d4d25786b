"""benchmarks/tails.py, on a pretended GPU and on a CPU."""

import json

import pytest
import torch
from torch import nn

import report
import tails
from helpers.cases import needs_extension
from lib import cases, devices
from lib.packing import pack, unpack

pytestmark = pytest.mark.every_torch

LAYERS = [(8, 6, 5, 3)]


@pytest.fixture
def small(monkeypatch):
    monkeypatch.setitem(cases.NETWORKS, "resnet50", LAYERS)


def rows_of(tmp_path, *arguments):
    path = tmp_path / "tails.json"
    options = ["--rounds", "2", "--batch", "2", "--output", str(path), *arguments]
    status = tails.main(["--device", "dry-run", *options])
    return status, json.loads(path.read_text()), path


@needs_extension
def test_tails_of_a_network(small, tmp_path, capsys):
    status, result, path = rows_of(tmp_path, "--layout", "channels_last")
    assert status == 0, result["remarks"]
    places = [(row["tail"], row["direction"]) for row in result["rows"]]
    assert places == [(tail, way) for tail in tails.TAILS for way in tails.DIRECTIONS]
    for row in result["rows"]:
        assert set(row["contenders"]) == {"copy", *tails.CONTENDERS}
    assert report.main([str(path)]) == 0
    text = capsys.readouterr().out
    assert "| norm | 2x8x6x5 k=3 | bfloat16 | channels_last | forward and backward |" in text
    assert "no attention / ours" in text


def test_ideal_bytes():
    """Maps and bits of a mask: the sums of csrc/eca.h."""
    case = cases.TailCase((2, 8, 6, 5), 3, "bfloat16", "contiguous", "norm")
    one, mask = 2 * 8 * 30 * 2, 2 * 8 * 30 // 8
    assert case.ideal_bytes("forward") == 4 * one
    assert case.ideal_bytes("forward and backward") == 10 * one + 3 * mask
    block = cases.TailCase((2, 8, 6, 5), 3, "bfloat16", "contiguous", "block")
    assert block.ideal_bytes("forward") == 3 * one
    assert block.ideal_bytes("forward and backward") == 7 * one + 2 * mask


@needs_extension
def test_packed_results_have_the_same_bytes(small, tmp_path):
    _, result, _ = rows_of(tmp_path, "--tail", "block", "--contender", "native")
    again = unpack(json.loads(pack(result)))
    for row, other in zip(result["rows"], again["rows"], strict=True):
        assert row["ideal_bytes"] == other["ideal_bytes"]


class Wrong(tails.Modules):
    def forward(self, x, identity):
        return super().forward(x, identity) * 1.001


def test_a_wrong_tail_is_not_timed(small, tmp_path, monkeypatch):
    real = tails.contenders

    def with_a_wrong_one(case, device):
        found = real(case, device)
        eager = found["eager"]
        return found | {"native": Wrong(eager.bn, eager.attention)}

    monkeypatch.setattr(tails, "contenders", with_a_wrong_one)
    options = ("--dtype", "float32", "--tail", "norm", "--layout", "contiguous")
    status, result, _ = rows_of(tmp_path, *options, "--contender", "native", "eager")
    assert status == 1
    assert all("native: output 0 has relative error" in what for what in result["remarks"])
    assert all(set(row["contenders"]) == {"copy", "eager"} for row in result["rows"])


def test_gradients_are_not_judged_where_rounding_decides():
    case = cases.TailCase((2, 8, 6, 5), 3, "float32", "contiguous", "norm")
    device = devices.device_named("cpu")
    inputs = tails.make_inputs(case, device)
    found = tails.contenders(case, device)
    with torch.no_grad():
        v = (
            found["no attention"]
            .double()
            .before_relu(*(m.double() for m in (inputs.xs[0], inputs.identities[0])))
        )
        inputs.identities[0][0, 0, 0, 0] -= v[0, 0, 0, 0].float()
    found["no attention"].float()
    assert isinstance(found["no attention"], nn.Module)
    assert inputs.dys[0].count_nonzero() == inputs.dys[0].numel()
    tails.Judge(found, inputs)
    assert inputs.dys[0][0, 0, 0, 0] == 0
    assert inputs.dys[0].count_nonzero() > 0.9 * inputs.dys[0].numel()
