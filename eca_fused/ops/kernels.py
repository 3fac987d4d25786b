"""The interface of a backend: the operators that its kernels compute."""

from typing import Protocol

from torch import Tensor

__all__ = ["Kernels"]


class Kernels(Protocol):
    """A backend's operators, implemented by the modules native.py and triton/.

    Each operator checks its arguments and raises the errors of eca(), pool() or rescale(). None has
    a gradient; autograd/ adds the gradients. Maps are (N, C, *spatial), taps (1 or C, 1, k), means
    and gates (N, C).
    """

    name: str  # as users give it to eca(backend=)
    description: str  # what it runs on
    devices: frozenset[str]  # types of device that it runs on

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
