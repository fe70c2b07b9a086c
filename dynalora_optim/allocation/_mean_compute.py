"""Keeping the mean compute of selections within a bound: by their probabilities."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from dynalora_optim.allocation._context import AllocationContext
from dynalora_optim.allocation._tilt import tilt

_SPREAD = 2  # the number of selections that compensate for too much compute


@dataclass(frozen=True)
class MeanCompute:
    """Turns weights of plans into probabilities. Costs are shares of the backward pass of all.

    Attributes:
        bound: The most that the mean selection may cost; None for no bound.
        floor: The share of probability that is the same for all plans; a tenth of it if ``bound``
            does not allow more.

    Raises:
        TypeError: A value is not a number.
        ValueError: A value is out of range.
    """

    bound: float | None
    floor: float

    def __post_init__(self) -> None:
        check_number("compute", self.bound or 0, "a share (float), or None for no bound")
        check_number("floor", self.floor, "a share (float) in (0, 1]")
        if self.bound is not None and not 0 < self.bound < math.inf:
            raise ValueError(
                f"Budget(compute={self.bound!r}) is not a positive share of the backward pass "
                "with all modules active; pass one such as 0.6, or None for no bound."
            )
        if not 0 < self.floor <= 1:
            raise ValueError(
                f"Budget(floor={self.floor!r}): every module needs a probability above 0; pass a "
                "share in (0, 1]."
            )

    def probabilities(
        self, weights: Sequence[float], costs: Sequence[float], context: AllocationContext
    ) -> list[float]:
        """Mix the uniform floor with the weights, which are tilted to the compute that is left.

        Raises:
            ValueError: The bound is too small for these plans. It is not checked where some must
                be chosen, because other selections compensate for it.
        """
        floor, count = self.floor, len(costs)
        if self.bound is None:
            return [floor / count + (1 - floor) * w for w in weights]
        if not context.must:
            self.check(costs)
        debt = (context.mean_compute - self.bound) * context.reallocation
        target = self.bound - debt / _SPREAD
        mean, least = sum(costs) / count, min(costs)
        if mean > least:  # lower the floor, at most to a tenth, before exceeding the bound
            affordable = (target - least) / (mean - least)
            floor = min(floor, max(affordable, floor / 10))
        left = (target - floor * mean) / (1 - floor) if floor < 1 else target
        tilted = tilt(weights, costs, left)
        return [floor / count + (1 - floor) * p for p in tilted]

    def least(self, costs: Sequence[float]) -> float:
        """Return the least that the mean selection among plans of these costs can cost."""
        mean = sum(costs) / len(costs)
        return min(costs) + self.floor / 10 * (mean - min(costs))

    def check(self, costs: Sequence[float]) -> None:
        """Raise unless plans of these costs can be drawn.

        Raises:
            ValueError: Even the cheapest ones exceed the bound.
        """
        if self.bound is not None and self.bound < self.least(costs):
            raise ValueError(
                f"Budget(compute={self.bound}) is too small to give every module a probability "
                f"above 0; pass at least {up(self.least(costs))}."
            )

    def turns(self, turns: Sequence[float], costs: Sequence[float]) -> Turns:
        """Return what it takes that each of some plans has its turn, now and again.

        Args:
            turns: The cost of the cheapest plan of each turn.
            costs: The costs of the plans that are drawn without need.

        Raises:
            ValueError: The bound is too small for these plans.
        """
        self.check(costs)
        # A turn is a draw too: with the probability of the floor it trains more than it must.
        free, dearest = self.least(costs), max([*turns, *costs])
        drawn = (turn + self.floor / 10 * (dearest - turn) for turn in turns)
        return Turns(len(turns), free, sum(drawn) - free * len(turns), self.bound)


@dataclass(frozen=True)
class Turns:
    """What it takes that each of some plans has its turn once in a number of selections.

    The other selections compensate for what the turns cost more. At the most, they are all as cheap
    as draws can be.

    Attributes:
        count: The number of turns.
        free: The least that the mean of the other selections can cost.
        extra: What all turns together cost more than that.
        bound: The most that the mean selection may cost; None for no bound.
    """

    count: int
    free: float = 0.0
    extra: float = 0.0
    bound: float | None = None

    @property
    def least(self) -> float:
        """The least number of selections; infinite if none is enough."""
        if self.bound is None or self.extra <= 0:
            return self.count
        room = self.bound - self.free
        return max(self.count, math.ceil(self.extra / room - 1e-9)) if room > 0 else math.inf

    def check(self, selections: int, budget: str) -> None:
        """Raise if this many ``selections`` are too few.

        Raises:
            ValueError: They are.
        """
        if selections >= self.least:
            return
        enough = [f"max_idle_periods={self.least - 1}"] if self.least < math.inf else []
        reason = f"it takes {self.count} choices that fit to activate every module once"
        if self.bound is not None and selections >= self.count:
            enough.append(f"compute={up(self.free + self.extra / selections)}")
            reason = f"to activate every module once in {selections} selections costs more"
        raise ValueError(
            f"max_idle_periods={selections - 1} cannot be kept with {budget}: {reason}; pass at "
            f"least {' or '.join(enough)}."
        )


def check_number(name: str, value: float, remedy: str) -> None:
    """Raise unless an argument of `Budget` is a number.

    Raises:
        TypeError: It is not.
    """
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"Budget({name}={value!r}) is not a number; pass {remedy}.")


def up(share: float) -> float:
    """Return ``share`` with three digits, rounded up."""
    return math.ceil(share * 1000) / 1000
