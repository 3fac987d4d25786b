"""Bad input: a clear error before any work, whatever the backend."""

import pytest
import torch

import eca_fused
from eca_fused.ops import checks
from helpers.cases import BACKENDS, DEVICE, needs_extension

pytestmark = pytest.mark.any_device

NAMES = [*BACKENDS, "reference", "auto"]
no_triton = pytest.mark.skipif("triton" in BACKENDS, reason="needs a device without Triton")


def x(*shape, **kwargs):
    return torch.ones(shape or (2, 4, 3, 3), **kwargs)


def taps(*shape, **kwargs):
    return torch.ones(shape or (1, 1, 3), **kwargs)


def described(value):
    """A test id for a tensor."""
    return f"{value.dtype} {tuple(value.shape)}" if isinstance(value, torch.Tensor) else None


BAD = {
    "integer x": (
        x(dtype=torch.int64),
        taps(),
        TypeError,
        "float32, float64, float16 or bfloat16, got torch.int64; convert",
    ),
    "boolean x": (x(dtype=torch.bool), taps(), TypeError, "got torch.bool"),
    "complex x": (x(dtype=torch.complex64), taps(), TypeError, "got torch.complex64"),
    "float8 x": (x(dtype=torch.float8_e5m2), taps(), TypeError, "got torch.float8_e5m2"),
    "one dimension": (x(4), taps(), ValueError, r"\(N, C, \*spatial\).*got \(4,\); add"),
    "no dimension": (torch.tensor(1.0), taps(), ValueError, r"got \(\)"),
    "four spatial dimensions": (
        x(1, 4, 1, 1, 1, 1),
        taps(),
        ValueError,
        "0 to 3 spatial dimensions",
    ),
    "x is no tensor": ([1.0], taps(), TypeError, "expected x as a torch.Tensor, got list"),
    "taps are no tensor": (x(), [1.0], TypeError, "expected weight as a torch.Tensor, got list"),
    "even k": (x(), taps(1, 1, 4), ValueError, "odd number of taps k, got 4"),
    "no taps": (x(), taps(1, 1, 0), ValueError, "odd number of taps k, got 0"),
    "taps without dimensions": (
        x(),
        taps(3),
        ValueError,
        r"\(1, 1, k\), or \(C, 1, k\) = \(4, 1, k\).*got \(3,\)",
    ),
    "taps for other channels": (x(), taps(5, 1, 3), ValueError, r"got \(5, 1, 3\)"),
    "taps with inputs": (x(), taps(1, 2, 3), ValueError, r"got \(1, 2, 3\)"),
    "taps of an unsupported dtype": (
        x(),
        taps(dtype=torch.int32),
        TypeError,
        "taps of dtype torch.float32, got torch.int32; convert",
    ),
    "float64 taps for float32 x": (x(), taps(dtype=torch.float64), TypeError, "got torch.float64"),
    "float16 taps for bfloat16 x": (
        x(dtype=torch.bfloat16),
        taps(dtype=torch.float16),
        TypeError,
        "torch.float32 or torch.bfloat16, the dtype of x, got torch.float16",
    ),
    "sparse x": (
        x(4, 4).to_sparse(),
        taps(),
        TypeError,
        "expected x as a dense tensor, got layout torch.sparse_coo; use to_dense",
    ),
    "sparse taps": (x(), taps().to_sparse(), TypeError, "expected weight as a dense tensor"),
    "taps on another device": (
        x(),
        taps(device="meta"),
        ValueError,
        f"device of x, {DEVICE}(:0)?, got meta; move",
    ),
}


@pytest.mark.parametrize("grad", [False, True], ids=["inference", "training"])
@pytest.mark.parametrize("backend", NAMES)
@pytest.mark.parametrize("name", BAD)
def test_bad_input(name, backend, grad):
    bad_x, weight, error, message = BAD[name]
    if grad and isinstance(bad_x, torch.Tensor) and bad_x.dtype.is_floating_point:
        bad_x = bad_x.clone().requires_grad_()
    with pytest.raises(error, match=message):
        eca_fused.eca(bad_x, weight, backend=backend)
    with torch.no_grad(), pytest.raises(error, match=message):
        eca_fused.eca_(bad_x, weight, backend=backend)


@pytest.mark.parametrize("backend", NAMES)
def test_circular_taps_that_wrap_more_than_once(backend):
    with pytest.raises(
        ValueError, match="wrap around more than once: k = 11 needs 5 channels or more, x has 4"
    ):
        eca_fused.eca(x(), taps(1, 1, 11), padding_mode="circular", backend=backend)
    with pytest.raises(RuntimeError, match="wrapping around"):
        torch.nn.Conv1d(1, 1, 11, padding=5, padding_mode="circular")(x(2, 1, 4))


@pytest.mark.parametrize("backend", NAMES)
@pytest.mark.parametrize("mode", ["reflect", "", None, 3])
def test_unknown_padding_mode(mode, backend):
    with pytest.raises(ValueError, match="expected padding_mode 'zeros' or 'circular', got"):
        eca_fused.eca(x(), taps(), padding_mode=mode, backend=backend)
    with pytest.raises(ValueError, match="expected padding_mode"):
        eca_fused.ECALayer(4, padding_mode=mode)


@pytest.mark.parametrize("backend", ["cuda", "", None])
def test_unknown_backend(backend):
    message = "expected backend as one of auto, native, triton, reference, got"
    with pytest.raises(ValueError, match=message):
        eca_fused.eca(x(), taps(), backend=backend)
    with pytest.raises(ValueError, match=message):
        eca_fused.ECALayer(4, backend=backend)
    with pytest.raises(ValueError, match=message), eca_fused.use_backend(backend):
        pass


@pytest.mark.parametrize("k", [2, 0, -1, -3])
def test_even_or_negative_kernel_size(k):
    with pytest.raises(ValueError, match=f"odd kernel_size from 1 up, got {k}"):
        eca_fused.ECALayer(64, k)


@pytest.mark.parametrize("k", [3.0, "3", True, (3,)])
def test_kernel_size_that_is_no_int(k):
    with pytest.raises(TypeError, match="expected kernel_size as an int"):
        eca_fused.ECALayer(64, k)


@pytest.mark.parametrize("channels", [0, -4])
def test_channels_below_one(channels):
    for make in (eca_fused.ECALayer, eca_fused.kernel_size):
        with pytest.raises(ValueError, match=f"expected channels from 1 up, got {channels}"):
            make(channels)
    with pytest.raises(ValueError, match="expected channels"):
        eca_fused.ECALayer(channels, 3)


@pytest.mark.parametrize("channels", [64.0, "64", True])
def test_channels_that_are_no_int(channels):
    with pytest.raises(TypeError, match="expected channels as an int"):
        eca_fused.ECALayer(channels)


def test_gamma_of_zero():
    with pytest.raises(ValueError, match="gamma other than zero, got 0"):
        eca_fused.ECALayer(64, gamma=0)


@pytest.mark.parametrize("backend", NAMES)
@pytest.mark.parametrize("which", ["x", "the taps"])
def test_inplace_refuses_where_a_gradient_needs_x(which, backend):
    layer = eca_fused.ECALayer(4, inplace=True, backend=backend)
    layer.conv.weight.requires_grad_(which == "the taps")
    data = x()
    map_ = (data.clone().requires_grad_() * 1) if which == "x" else data.clone()
    with pytest.raises(
        RuntimeError, match=f"overwrite the x that the gradient of {which} needs.*no_grad"
    ):
        layer(map_)
    assert torch.equal(map_, data)
    with torch.no_grad():
        assert not torch.equal(layer(map_), data)


@pytest.mark.parametrize("backend", NAMES)
def test_inplace_refuses_a_tensor_of_inference_mode_outside_of_it(backend):
    with torch.inference_mode():
        inference_tensor = x()
        eca_fused.eca_(inference_tensor, taps(), backend=backend)
    with torch.no_grad(), pytest.raises(RuntimeError, match="inference mode"):
        eca_fused.eca_(inference_tensor, taps(), backend=backend)


@pytest.mark.parametrize("backend", NAMES)
def test_inplace_on_nothing(backend):
    nothing = torch.randn(0, 4, 1).expand(0, 4, 3)
    with torch.no_grad():
        assert eca_fused.eca_(nothing, taps(), backend=backend) is nothing


@pytest.mark.parametrize("backend", NAMES)
def test_inplace_on_overlapping_memory(backend):
    overlapping = x(1, 4, 3, 3).expand(2, -1, -1, -1)
    with torch.no_grad(), pytest.raises(RuntimeError, match="more than one element"):
        eca_fused.eca_(overlapping, taps(), backend=backend)


@no_triton
def test_the_default_is_blamed_where_it_is_to_blame():
    with eca_fused.use_backend("triton"), pytest.raises(RuntimeError, match="ECA_FUSED_BACKEND"):
        eca_fused.eca(x(), taps())


@no_triton
def test_triton_says_why_it_cannot_be_used():
    with pytest.raises(
        RuntimeError, match=r"'triton', which the argument asked for, cannot be used: .*use 'auto'"
    ):
        eca_fused.eca(x(), taps(), backend="triton")


@needs_extension
class TestOperators:
    """The operators validate on their own, for callers that skip eca()."""

    ops = torch.ops.eca_fused

    @pytest.mark.parametrize(
        "name",
        [
            n
            for n in BAD
            if "sparse" not in n
            and "no tensor" not in n
            and "are no" not in n
            and "device" not in n
        ],
    )
    def test_bad_input(self, name):
        """In the words of eca(), which raises before an operator is called."""
        bad_x, weight, error, message = BAD[name]
        with pytest.raises(error) as raised:
            eca_fused.eca(bad_x, weight)
        for op in (self.ops.forward, self.ops.inference, self.ops.inference_):
            with pytest.raises(RuntimeError, match=message) as found:
                op(bad_x, weight)
            assert str(found.value).startswith(f"eca_fused: {raised.value}")

    def test_circular(self):
        with pytest.raises(RuntimeError, match="wrap around more than once: k = 11"):
            self.ops.forward(x(), taps(1, 1, 11), True)

    @pytest.mark.parametrize(
        ("name", "wrong"),
        [
            ("dy", x(2, 4, 3, 4)),
            ("dy", x(2, 4, 9)),
            ("dy", x(dtype=torch.float64)),
            ("mean", x(2, 5)),
            ("gate", x(2, 4, dtype=torch.float16)),
            ("weight", taps(1, 1, 2)),
        ],
        ids=described,
    )
    def test_backward(self, name, wrong):
        args = {"dy": x(), "x": x(), "weight": taps(), "mean": x(2, 4), "gate": x(2, 4)}
        args[name] = wrong
        check = {
            "dy": lambda: checks.check_dy(args["x"], args["dy"]),
            "weight": lambda: checks.check(args["x"], args["weight"], False),
        }.get(name, lambda: checks.check_saved(args["x"], args["mean"], args["gate"]))
        with pytest.raises(ValueError, match="expected") as raised:
            check()
        with pytest.raises(RuntimeError) as found:
            self.ops.backward(*args.values())
        assert str(found.value).startswith(f"eca_fused: {raised.value}")

    @pytest.mark.parametrize(
        "gate", [x(2, 5), x(8), x(2, 4, dtype=torch.int64), x(2, 4, 1, 1)], ids=described
    )
    def test_rescale(self, gate):
        with pytest.raises((TypeError, ValueError)) as raised:
            eca_fused.rescale(x(), gate)
        with pytest.raises(RuntimeError) as found:
            self.ops.rescale(x(), gate, None)
        assert str(found.value).startswith(f"eca_fused: {raised.value}")

    @pytest.mark.parametrize("out", [x(2, 4, 3, 4), x(2, 4), x(dtype=torch.float64)], ids=described)
    def test_out(self, out):
        with pytest.raises((TypeError, ValueError)) as raised, torch.no_grad():
            eca_fused.eca(x(), taps(), out=out)
        with pytest.raises(RuntimeError) as found:
            self.ops.inference_into(x(), taps(), out)
        assert str(found.value).startswith(f"eca_fused: {raised.value}")
