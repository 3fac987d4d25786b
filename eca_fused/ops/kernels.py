"""The interface of a backend: the operators that its kernels compute."""

from typing import Protocol

from torch import Tensor

__all__ = ["GatingKernels", "Kernels", "TailKernels"]


class TailKernels(Protocol):
    """The operators of a residual block's tail, on the devices that a backend has them for.

    What they compute is in csrc/eca.h and csrc/coefficients.h; their schemas are in
    csrc/tail_ops.cpp, csrc/coefficient_ops.cpp and csrc/whole_tail_ops.cpp. x, the identity and
    y are (N, C, *spatial). Coefficients, in the dtype of sums over x: planes (2, N, C) has p and q;
    channels (3, C) has centre, identity_scale and identity_centre. `activation` is a place in
    ACTIVATIONS. The mask, for ReLU, is bytes in an order that only the backend knows.
    """

    # Those where tail_backward() is one of them, and batch_moments() takes running statistics.
    whole_tail_devices: frozenset[str]

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
        scale: Tensor | None,
        channels: Tensor,
        circular: bool,
        activation: int,
        need_mask: bool,
        /,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """y, the mask, the means of x - centre (N, C) and the gates (N, C).

        scale is (N,), None for 1. channels (6, C) has shift, alpha, beta, centre, identity_scale
        and identity_centre.
        """

    def block_tail_backward(
        self,
        dy: Tensor,
        x: Tensor,
        identity: Tensor | None,
        mask: Tensor,
        weight: Tensor,
        scale: Tensor | None,
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

    def tail_inference(
        self,
        x: Tensor,
        identity: Tensor | None,
        weight: Tensor | None,
        means: Tensor | None,
        gate: Tensor | None,
        scale: Tensor | None,
        mean: Tensor | None,
        variance: Tensor | None,
        gamma: Tensor | None,
        beta: Tensor | None,
        eps: float,
        identity_mean: Tensor | None,
        identity_variance: Tensor | None,
        identity_gamma: Tensor | None,
        identity_beta: Tensor | None,
        identity_eps: float,
        circular: bool,
        activation: int,
        /,
    ) -> Tensor:
        """y alone, with taps, or a gate (N, C), or none.

        means, those of x (N, C) if moments() found them, go with taps; scale is as for
        block_tail(). The norms' arguments are those of tail_coefficients().
        """

    def tail_training(
        self,
        x: Tensor,
        identity: Tensor | None,
        weight: Tensor | None,
        means: Tensor | None,
        gate: Tensor | None,
        scale: Tensor | None,
        mean: Tensor | None,
        variance: Tensor | None,
        gamma: Tensor | None,
        beta: Tensor | None,
        eps: float,
        identity_mean: Tensor | None,
        identity_variance: Tensor | None,
        identity_gamma: Tensor | None,
        identity_beta: Tensor | None,
        identity_eps: float,
        circular: bool,
        activation: int,
        /,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
        """y, the mask, planes, channels, and as tail_coefficients() the gate and distance.

        The arguments are those of tail_coefficients(). Taps need the means.
        """

    def tail_backward(
        self,
        dy: Tensor,
        x: Tensor,
        identity: Tensor | None,
        mask: Tensor,
        planes: Tensor,
        channels: Tensor,
        weight: Tensor | None,
        gate: Tensor | None,
        scale: Tensor | None,
        distance: Tensor | None,
        mean: Tensor | None,
        variance: Tensor | None,
        gamma: Tensor | None,
        beta: Tensor | None,
        eps: float,
        identity_mean: Tensor | None,
        identity_variance: Tensor | None,
        identity_gamma: Tensor | None,
        identity_beta: Tensor | None,
        identity_eps: float,
        values: float,
        identity_values: float,
        circular: bool,
        activation: int,
        needed: int,
        /,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
        """The gradients of x, identity, weight, gate, scale and the four parameters of norms.

        One of a process alone: between its sums and its gradients, nothing is exchanged. needed has
        a bit for each gradient, in this order; of the others, some are empty. values are as for
        tail_gradient_coefficients(), and the rest is what tail_training() took and gave.
        """

    def batch_moments(
        self,
        x: Tensor,
        running_mean: Tensor | None = None,
        running_variance: Tensor | None = None,
        factor: float = 0.0,
        /,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """moments(x), and the mean and variance (C,) of the batch, all in float64.

        Writes factor * the batch's mean + (1 - factor) * running_mean into running_mean (C,), and
        likewise the unbiased variance; does not bump their version counters.
        """

    def tail_coefficients(
        self,
        x: Tensor,
        weight: Tensor | None,
        means: Tensor | None,
        gate: Tensor | None,
        scale: Tensor | None,
        mean: Tensor | None,
        variance: Tensor | None,
        gamma: Tensor | None,
        beta: Tensor | None,
        eps: float,
        identity_mean: Tensor | None,
        identity_variance: Tensor | None,
        identity_gamma: Tensor | None,
        identity_beta: Tensor | None,
        identity_eps: float,
        circular: bool,
        need_planes: bool,
        /,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """planes, channels (6, C) as for block_tail(), the gate of taps, means of x - centre.

        What is not asked for is empty: planes and the gate without need_planes, the means of
        x - centre without means (N, C), those of x. Of x only shape and dtype are read.
        """

    def tail_totals(
        self,
        x: Tensor,
        sums: Tensor,
        weight: Tensor | None,
        gate: Tensor | None,
        scale: Tensor | None,
        dmean: Tensor | None,
        distance: Tensor | None,
        mean: Tensor | None,
        variance: Tensor | None,
        gamma: Tensor | None,
        beta: Tensor | None,
        eps: float,
        circular: bool,
        need_dgate: bool,
        need_dscale: bool,
        need_dweight: bool,
        /,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """Totals, and the gradients of gate, scale, the means of norm(x) (with taps) and the taps.

        The totals (4, C) are, in float64, the sums over a channel of du, du * (x - centre), g and
        g * (identity - its centre), with du the gradient of norm(x). dmean is added to du.
        """

    def tail_gradient_coefficients(
        self,
        x: Tensor,
        totals: Tensor | None,
        shares: Tensor | None,
        values: float,
        identity_values: float,
        gate: Tensor | None,
        scale: Tensor | None,
        dmean: Tensor | None,
        mean: Tensor | None,
        variance: Tensor | None,
        gamma: Tensor | None,
        beta: Tensor | None,
        eps: float,
        identity_mean: Tensor | None,
        identity_variance: Tensor | None,
        identity_gamma: Tensor | None,
        identity_beta: Tensor | None,
        identity_eps: float,
        need_planes: bool,
        /,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
        """gradient_planes and gradient_channels, and the gradients of the norms' parameters.

        values says how many of a channel the statistics are of, 0 for running statistics. shares
        are the totals divided by them, where they are of several processes.
        """


class GatingKernels(TailKernels, Protocol):
    """The operators of attention after an activation, on the devices that a backend has them for.

    What they compute is in csrc/eca.h; their schemas are in csrc/gated_ops.cpp. Coefficients, in
    the dtype of sums over x: channels (3, C) has p, q and centre. `activation` is a place in
    ops.gating.ACTIVATIONS. The statistics of batches and the arithmetic between the passes are
    those of tails.
    """

    one_pass_gating_devices: frozenset[str]  # those where gated_block() is one of them

    def activated_sums(
        self, dy: Tensor | None, x: Tensor, channels: Tensor, activation: int, for_norm: bool, /
    ) -> Tensor:
        """(1 or 5, N, C) in float64: sums of z, or of dy * z and what a norm's gradients need."""

    def gated(self, x: Tensor, gate: Tensor, channels: Tensor, activation: int, /) -> Tensor:
        """y like x, for a gate (N, C) in the dtype of sums over x."""

    def gated_gradients(
        self,
        dy: Tensor,
        x: Tensor,
        planes: Tensor,
        channels: Tensor,
        gradient_channels: Tensor,
        activation: int,
        by_x: bool,
        /,
    ) -> Tensor:
        """dx; planes (2, N, C) has gate and shift, gradient_channels (2, C) slope and offset."""

    def gated_block(
        self, x: Tensor, weight: Tensor, channels: Tensor, circular: bool, activation: int, /
    ) -> tuple[Tensor, Tensor, Tensor]:
        """y with ECA's gate, the means of z (N, C) and the gates (N, C)."""


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
    one_pass_tail_devices: frozenset[str]  # those where block_tail() is one of them
    gating_devices: frozenset[str]  # those where it has the operators of GatingKernels

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
