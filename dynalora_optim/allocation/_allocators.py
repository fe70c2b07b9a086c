"""The allocators of the paper (section 3.2) and of related work."""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import ClassVar, Literal

from dynalora_optim._base.checks import by_name
from dynalora_optim.allocation._context import AllocationContext, Allocator


@dataclass(frozen=True)
class TopK:
    """Chooses the k modules of highest importance y; ties keep the forward order."""

    def weights(self, context: AllocationContext) -> tuple[float, ...]:
        """Return y^, by which the modules are ranked."""
        return context.importance

    def select(self, context: AllocationContext) -> list[int]:
        """Return the first ``context.active`` modules of the ranking."""
        return context.ranking()[: context.active]


@dataclass(frozen=True)
class Threshold:
    """The smallest n >= 1 such that the n most important modules hold a share ``p`` of importance.

    The sum over these n of the normalised scores (equation 2) is at least ``p``. The optimizer's
    ``active`` is not used. The comparison is exact: ``p=0.7`` means 7/10.

    Raises:
        ValueError: ``p`` is not in [0, 1].
    """

    uses_active: ClassVar[bool] = False
    p: float = 0.5

    def __post_init__(self) -> None:
        if not 0 <= self.p <= 1:
            raise ValueError(
                f"Threshold(p={self.p!r}): p is a share of the total importance; pass a number "
                "in [0, 1]."
            )

    def select(self, context: AllocationContext) -> list[int]:
        """Return the fewest modules from the top of the ranking that reach the share."""
        scores = [Fraction(score) for score in context.scores]
        if not any(scores):
            scores = [Fraction(1)] * len(scores)
        needed = Fraction(str(self.p)) * sum(scores)
        chosen: list[int] = []
        held = Fraction(0)
        for m in context.ranking():
            chosen.append(m)
            held += scores[m]
            if held >= needed:
                break
        return chosen


@dataclass(frozen=True)
class Stochastic:
    """Draws modules in proportion to their importance y^ (equation 2).

    Attributes:
        sampling: ``"fixed"`` draws k different modules, one after the other. ``"bernoulli"`` is the
            paper's wording: each module is active with probability y^, independently of the
            others. That is one module on average, and the optimizer's ``active`` is not used. If
            no module is drawn this way, one is drawn in proportion to y^. So the probability of
            module m is ``y^_m + y^_m * prod_j (1 - y^_j)``.

    Raises:
        ValueError: ``sampling`` is neither of the two.
    """

    sampling: Literal["fixed", "bernoulli"] = "fixed"

    def __post_init__(self) -> None:
        if self.sampling not in ("fixed", "bernoulli"):
            raise ValueError(
                f"Stochastic(sampling={self.sampling!r}): pass 'fixed' or 'bernoulli'."
            )

    @property
    def uses_active(self) -> bool:
        """Whether a fixed number of modules is drawn."""
        return self.sampling == "fixed"

    def weights(self, context: AllocationContext) -> tuple[float, ...]:
        """Return y^."""
        return context.importance

    def select(self, context: AllocationContext) -> list[int]:
        """Return the modules that are drawn."""
        importance = self.weights(context)
        if self.sampling == "fixed":
            return context.sample(importance)
        drawn = [m for m, y in enumerate(importance) if context.generator.random() < y]
        return drawn or context.generator.choices(range(len(importance)), importance)


@dataclass(frozen=True)
class DiscountedStochastic:
    """Draws modules in proportion to y~ = y^ / C (equation 3).

    C is the number of updates that a module has received. C = 0 is replaced by 1, so that the
    weight of a module that was never chosen is finite. Exactly ``active`` different modules are
    drawn.
    """

    def weights(self, context: AllocationContext) -> list[float]:
        """Return y~."""
        pairs = zip(context.importance, context.updates, strict=True)
        return [y / max(c, 1) for y, c in pairs]

    def select(self, context: AllocationContext) -> list[int]:
        """Return the modules that are drawn."""
        return context.sample(self.weights(context))


@dataclass(frozen=True)
class UniformRandom:
    """Draws ``active`` modules, all sets equally likely: the control (R) of the paper's Table 1."""

    def weights(self, context: AllocationContext) -> list[float]:
        """Return the same weight for every module."""
        return [1.0] * len(context.scores)

    def select(self, context: AllocationContext) -> list[int]:
        """Return a uniform draw without replacement."""
        return context.generator.sample(range(len(context.scores)), context.active)


@dataclass(frozen=True)
class RoundRobin:
    """Chooses the next ``active`` modules in turn (BAdam, arXiv 2404.02827).

    Attributes:
        order: ``"ascending"``: in forward order, cyclically; ``"descending"``: in reverse order;
            ``"random"``: in a new random order in each cycle.
        seed: The seed of the random orders.

    Raises:
        ValueError: ``order`` is not one of the three.
    """

    order: Literal["ascending", "descending", "random"] = "ascending"
    seed: int = 0

    def __post_init__(self) -> None:
        if self.order not in ("ascending", "descending", "random"):
            raise ValueError(
                f"RoundRobin(order={self.order!r}): pass 'ascending', 'descending' or 'random'."
            )

    def select(self, context: AllocationContext) -> list[int]:
        """Return the ``active`` positions that follow the previous selection."""
        modules = len(context.scores)
        idle = context.idle or (0,) * modules
        if self.order == "random":
            return self._shuffled(context)
        if self.order == "descending":
            return [modules - 1 - m for m in self._next(context.active, idle[::-1])]
        return self._next(context.active, idle)

    def _shuffled(self, context: AllocationContext) -> list[int]:
        """Return a part of a random cycle; its last part is completed with modules of its first."""
        modules = len(context.scores)
        cycle, turn = divmod(context.reallocation, math.ceil(modules / context.active))
        order = random.Random(f"{self.seed}:{cycle}").sample(range(modules), modules)
        start = turn * context.active
        return [order[(start + offset) % modules] for offset in range(context.active)]

    def _next(self, active: int, idle: Sequence[int]) -> list[int]:
        modules = len(idle)
        ends = (m + 1 for m in range(modules) if idle[m] == 0 < idle[(m + 1) % modules])
        start = next(ends, 0)
        return [(start + offset) % modules for offset in range(active)]


SHORT_NAMES: dict[str, Callable[[], Allocator]] = {
    "topk": TopK,
    "threshold": Threshold,
    "stochastic": Stochastic,
    "discounted": DiscountedStochastic,
    "random": UniformRandom,
    "round_robin": RoundRobin,
}


def as_allocator(allocator: str | Allocator) -> Allocator:
    """Return ``allocator`` itself, or the default object behind its short name.

    Raises:
        ValueError: ``allocator`` is an unknown short name.
        TypeError: ``allocator`` is neither a name nor an object with ``select``.
    """
    return by_name(
        "allocator",
        allocator,
        SHORT_NAMES,
        kinds=(Allocator,),
        noun="allocator",
        method="select(context)",
    )
