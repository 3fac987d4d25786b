"""The interface of a backend: the operators that its kernels compute."""

from typing import Protocol

from torch import Tensor

__all__ = ["Kernels", "TailKernels"]


class TailKernels(Protocol):
    """The operators of a residual block's tail, on the devices that a backend has them for.

    What they compute is in csrc/eca.h; their schemas are in csrc/tail_ops.cpp. x, the identity and
    y are (N, C, *spatial). Coefficients, in the dtype of sums over x: planes (2, N, C) has p and q;
    channels (3, C) has centre, identity_scale and identity_centre. `activation` is a place in
    ACTIVATIONS. The mask, for ReLU, is bytes in an order that only the backend knows.
    """

    def moments(self, x: Tensor, /) -> Tensor:
        """(2, N, C) in float64: means of the planes, and sums of squared distances from them."""

    def tail(
        self,
        x: Tensor,
        identity: Tensor | None,
        planes: Tensor,
        channels: Tensor,
        activation: int,
        need_mask: bool,
        /,
    ) -> tuple[Tensor, Tensor]:
        """y like x, and the mask."""

    def tail_sums(
        self,
        dy: Tensor,
        x: Tensor,
        identity: Tensor | None,
        mask: Tensor,
        planes: Tensor,
        channels: Tensor,
        activation: int,
        identity_sum: bool,
        /,
    ) -> Tensor:
        """(2 or 3, N, C) in float64: sums of g, g * (x - centre), g * (identity - its centre)."""

    def tail_gradients(
        self,
        dy: Tensor,
        x: Tensor,
        identity: Tensor | None,
        mask: Tensor,
        planes: Tensor,
        channels: Tensor,
        gradient_planes: Tensor,
        gradient_channels: Tensor,
        activation: int,
        by_x: bool,
        by_identity: bool,
        need_dx: bool,
        need_d_identity: bool,
        /,
    ) -> tuple[Tensor, Tensor]:
        """dx = p g + q (x - centre) + r and d_identity likewise; empty if not needed.

        gradient_planes (2, N, C) has p and r; gradient_channels (4, C) has q, identity p, q and r.
        """

    def block_tail(
        self,
        x: Tensor,
        identity: Tensor | None,
        weight: Tensor,
        scale: Tensor,
        channels: Tensor,
        circular: bool,
        activation: int,
        need_mask: bool,
        /,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """y, the mask, the means of x - centre (N, C) and the gates (N, C).

        scale is (N,); channels (6, C) has alpha, beta, shift, centre, identity_scale and
        identity_centre.
        """

    def block_tail_backward(
        self,
        dy: Tensor,
        x: Tensor,
        identity: Tensor | None,
        mask: Tensor,
        weight: Tensor,
        scale: Tensor,
        channels: Tensor,
        distance: Tensor,
        gate: Tensor,
        circular: bool,
        activation: int,
        identity_sum: bool,
        need_dx: bool,
        need_d_identity: bool,
        need_dweight: bool,
        /,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """dx, d_identity, sums as tail_sums(), the gradient of the means of norm(x), dweight."""


class Kernels(Protocol):
    """A backend's operators, implemented by the modules native.py and triton/.

    Each operator checks its arguments and raises the errors of eca(), pool() or rescale(). None has
    a gradient; autograd/ adds the gradients. Maps are (N, C, *spatial), taps (1 or C, 1, k), means
    and gates (N, C).
    """

    name: str  # as users give it to eca(backend=)
    description: str  # what it runs on
    devices: frozenset[str]  # types of device that it runs on
    tail_devices: frozenset[str]  # those where it has the operators of TailKernels too

    def forward(
        self, x: Tensor, weight: Tensor, circular: bool, /
    ) -> tuple[Tensor, Tensor, Tensor]:
        """y like x, and the mean and gate for backward(), in the dtype of the sums."""

    def backward(
        self,
        dy: Tensor,
        x: Tensor,
        weight: Tensor,
        mean: Tensor,
        gate: Tensor,
        circular: bool,
        need_dx: bool,
        need_dweight: bool,
        /,
    ) -> tuple[Tensor, Tensor]:
        """dx and dweight; an empty tensor for one that is not needed."""

    def inference(self, x: Tensor, weight: Tensor, circular: bool, /) -> Tensor:
        """y alone."""

    def inference_(self, x: Tensor, weight: Tensor, circular: bool, /) -> None:
        """Write y over x; neither checks for gradients nor bumps the version counter."""

    def inference_into(self, x: Tensor, weight: Tensor, out: Tensor, circular: bool, /) -> None:
        """Write y into out, likewise."""

    def pool(self, x: Tensor, /) -> Tensor:
        """Means (N, C), in the dtype of x."""

    def rescale(self, x: Tensor, gate: Tensor, shift: Tensor | None = None, /) -> Tensor:
        """gate * x, or gate * x + shift, like x."""

    def rescale_backward(
        self, dy: Tensor, x: Tensor, gate: Tensor, need_dx: bool, /
    ) -> tuple[Tensor, Tensor]:
        """dx = gate * dy, empty if not needed, and dgate = sum(dy * x) like the gate."""
