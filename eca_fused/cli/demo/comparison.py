"""The results of the check: errors, tolerances and messages."""

from dataclasses import dataclass

from eca_fused.cli.common.comparison import Comparison

__all__ = ["Check", "Comparison", "TopFive"]


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
