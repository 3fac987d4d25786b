"""The results of the check: errors, tolerances and messages."""

import math
from dataclasses import dataclass

__all__ = ["Check", "Comparison", "TopFive"]


@dataclass(frozen=True)
class Comparison:
    """Errors of one quantity against float64, relative to its largest absolute value.

    Attributes:
        place: "stage 1" to "stage 4", or "logits".
        quantity: "y", "dx" and "dw" of an ECA layer, or "output" of the network up to this place.
        scale: the largest absolute value in float64.
        plain, fused: largest absolute error, divided by scale.
        floor: error allowed beyond plain PyTorch's own error, divided by scale.
    """

    place: str
    quantity: str
    scale: float
    plain: float
    fused: float
    floor: float

    @property
    def tolerance(self) -> float:
        return self.plain + self.floor

    @property
    def passed(self) -> bool:
        return self.fused <= self.tolerance  # false for NaN

    @property
    def used(self) -> float:
        """The share of the tolerance that the fused error takes; above 1 if it fails."""
        if self.fused == 0:
            return 0.0
        share = self.fused / self.tolerance if self.tolerance else math.inf
        return math.inf if math.isnan(share) else share

    def __str__(self) -> str:
        what = f"{self.quantity} of the ECA layers" if self.quantity != "output" else "output"
        return (
            f"{self.place}, {what}: fused is {self.fused:.2g} of the largest value "
            f"({self.scale:.3g}) away from float64, {self.tolerance:.2g} is allowed, "
            f"and plain is {self.plain:.2g} away"
        )


@dataclass(frozen=True)
class TopFive:
    """The five classes with the largest logits of one photograph.

    Attributes:
        photograph: its name.
        plain, fused: class indices, best first.
        gap: the largest difference of the plain logits of the two classes of any rank.
        allowed: the gap that rounding can close, twice the floor of the logits. Classes closer than
            this are a near-tie, and their order means nothing.
    """

    photograph: str
    plain: list[int]
    fused: list[int]
    gap: float
    allowed: float

    @property
    def passed(self) -> bool:
        return self.gap <= self.allowed

    @property
    def verdict(self) -> str:
        if self.plain == self.fused:
            return "same"
        return "same but for near-ties" if self.passed else "different"

    def __str__(self) -> str:
        return (
            f"top-5 of {self.photograph}: fused gives {self.fused}, plain {self.plain}, and logits "
            f"{self.gap:.2g} apart have changed places; near-ties end at {self.allowed:.2g}"
        )


@dataclass(frozen=True)
class Check:
    """All comparisons of a run."""

    layers: list[Comparison]
    stages: list[Comparison]
    top5: list[TopFive]

    @property
    def passed(self) -> bool:
        return not self.failures

    @property
    def failures(self) -> list[str]:
        """A line for each comparison that failed."""
        found: list[Comparison | TopFive] = [*self.layers, *self.stages, *self.top5]
        return [str(comparison) for comparison in found if not comparison.passed]
