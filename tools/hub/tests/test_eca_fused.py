"""The kernels against the definition, for `nix run .#ci-test`."""

import pytest
import torch

import eca_fused

DEVICES = ["cpu"] + ["cuda"] * torch.cuda.is_available()


@pytest.mark.kernels_ci
@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_eca(device, dtype):
    x = torch.randn(2, 16, 7, 7).to(device, dtype).requires_grad_()
    weight = torch.randn(1, 1, 3).to(device, dtype).requires_grad_()
    y = eca_fused.eca(x, weight, backend="native")
    expected = eca_fused.reference.eca(x.double(), weight.double())
    torch.testing.assert_close(y, expected.to(dtype))
    found = torch.autograd.grad(y.sum(), (x, weight))
    wanted = torch.autograd.grad(expected.sum(), (x, weight))
    torch.testing.assert_close(found, wanted)
