"""`Budget`: which groups are active if memory and compute are bounded (not in the paper).

Freezing random modules saves almost no memory: layers above the lowest active module keep their
activations even if they are frozen, because the gradient passes through them. So a selection starts
with a *lowest block*: below it no graph is recorded. From this block up, checkpointing makes the
activations fit into the memory, and every block that can train within the budget is active. The
gradient passes through these blocks in any case, so that freezing them would save almost nothing.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import ClassVar, cast

from dynalora_optim._base.checks import by_name
from dynalora_optim.allocation._allocators import (
    DiscountedStochastic,
    Stochastic,
    TopK,
    UniformRandom,
)
from dynalora_optim.allocation._amounts import check_amounts, memory_amount, total_amount
from dynalora_optim.allocation._causes import too_small, total_limit
from dynalora_optim.allocation._context import AllocationContext, Weighted
from dynalora_optim.allocation._costs import Costs, Plan
from dynalora_optim.allocation._cover import (
    covering_plans,
    draw_shares,
    drawn_by,
    fewest_plans,
    holding,
    including,
    least_peak_of_any,
    most_needed,
    plans_to_draw,
    shares,
)
from dynalora_optim.allocation._mean_compute import MeanCompute, Turns, up
from dynalora_optim.allocation._search import best_plan, cheapest_plan, least_peak
from dynalora_optim.importance._normalise import normalised

_BASES: dict[str, Callable[[], Weighted]] = {
    "discounted": DiscountedStochastic,
    "stochastic": Stochastic,
    "random": UniformRandom,
    "topk": TopK,
}


@dataclass(frozen=True)
class Budget:
    """Chooses modules so that no step exceeds a peak memory, nor the mean step a compute cost.

    A selection draws the lowest block b that trains, with a probability in proportion to its
    importance per unit of cost, y~_b / FLOPs_b. The blocks that train with it are the exact best
    choice that fits; each block is kept in full or checkpointed. All costs are measured on the
    first batch, and again on each larger one. The optimizer's ``active`` is not used. To limit how
    long a module can wait, put the budget into a `Bounded`.

    Attributes:
        memory: The most bytes alive in forward and backward, in addition to weights, optimizer
            state and batch: a share (float in (0, 1]) of the peak of the whole step with all
            modules active and nothing checkpointed, or bytes: an int, or a text such as
            ``"20GiB"`` (GiB, MiB, KiB, GB, MB, kB or bytes), which is read back as an int.
        compute: The most FLOPs of the mean backward pass, recomputation included, as a share of the
            backward pass with all modules active; None for no bound. If one selection exceeds it,
            the next ones take less.
        base: Gives the weights y~: ``"discounted"`` (equation 3), ``"stochastic"`` (equation 2),
            ``"random"``, or any allocator that has ``weights(context)``. With ``"topk"`` nothing is
            drawn: the modules of the largest total importance that fit are chosen, and each
            selection is within ``compute``.
        floor: The share of selections whose lowest block is drawn uniformly. Each of n blocks is
            active with a probability of at least floor / n, or of a tenth of that if a small
            ``compute`` does not allow more.
        total: In place of ``memory``: the most bytes (an int or a text) of everything that the
            process holds for training: weights, buffers, float32 copies, optimizer state at its
            largest, the batch, and the step. Or ``"device"``: what a GPU can give.

    Raises:
        TypeError: An argument is not a number.
        ValueError: A number is out of range; or both or none of ``memory`` and ``total`` are given.
    """

    uses_active: ClassVar[bool] = False

    memory: float | str | None = None
    compute: float | None = None
    base: str | Weighted = "discounted"
    floor: float = 0.1
    total: int | str | None = None

    def __post_init__(self) -> None:
        check_amounts(self.memory, self.total)
        name, amount = ("memory", memory_amount) if self.total is None else ("total", total_amount)
        object.__setattr__(self, name, amount(getattr(self, name)))
        MeanCompute(self.compute, self.floor)  # checks both
        base = by_name(
            "base",
            self.base,
            _BASES,
            kinds=(Weighted,),
            noun="allocator with weights",
            method="weights(context)",
        )
        object.__setattr__(self, "base", base)

    def limit(self, costs: Costs) -> int:
        """Return the peak, in bytes, that no step exceeds.

        With ``total`` it is what is left for the step and for the state of what is active.
        """
        if self.total is not None:
            return total_limit(self.total, costs.loop.resident)
        share = cast(float, self.memory)
        return share if isinstance(share, int) else _share_of(costs.whole_peak, share)

    def select(self, context: AllocationContext) -> list[int]:
        """Return the modules of the plan that is drawn.

        Raises:
            ValueError: Not every block can train within the budget.
        """
        plans, probabilities = self._distribution(context)
        (plan,) = context.generator.choices(plans, probabilities)
        return _groups(_costs(context), plan)

    def probabilities(self, context: AllocationContext) -> tuple[float, ...]:
        """Return the probability with which `select` activates each module.

        Raises:
            ValueError: Not every block can train within the budget.
        """
        costs = _costs(context)
        sums = [0.0] * len(costs.group_blocks)
        for plan, probability in zip(*self._distribution(context), strict=True):
            for group in _groups(costs, plan):
                sums[group] += probability
        return tuple(min(total, 1.0) for total in sums)

    def plan(self, costs: Costs, chosen: Collection[int]) -> Plan:
        """Return what to checkpoint while the ``chosen`` modules are active.

        Raises:
            ValueError: Training these modules exceeds the budget.
        """
        active = costs.blocks_of(chosen)
        limit = self.limit(costs)
        sparing = costs.sparing(active)
        if not costs.loop.is_known and costs.peak(sparing) <= limit:
            return sparing
        plan = cheapest_plan(costs, active, limit)
        if plan is None:
            least = least_peak(costs, min(active), active)
            raise ValueError(self._too_small(costs, least, f"blocks {sorted(active)}"))
        return plan

    def fitting(self, costs: Costs, chosen: Collection[int]) -> list[int]:
        """Return the ``chosen`` modules that fit: without those in as many lowest blocks as needed.

        Raises:
            ValueError: Not every block can train within the budget.
        """
        blocks = costs.group_blocks
        if not (self._is_fixed or costs.loop.is_between):
            self._plans(costs, [0.0] * len(costs.blocks))
        for lowest in sorted(costs.blocks_of(chosen)):
            kept = [m for m in chosen if (block := blocks[m]) is None or block >= lowest]
            active = costs.blocks_of(kept)
            if least_peak(costs, min(active), active) <= self.limit(costs):
                return kept
        highest = max(costs.blocks_of(chosen))
        least = least_peak(costs, highest, costs.blocks_of([]) | {highest})
        raise ValueError(self._too_small(costs, least, f"blocks down to {highest}"))

    def cover(self, costs: Costs, selections: int) -> list[list[int]]:
        """Return sets of modules that fit, the cheapest first; together they are all modules.

        Raises:
            ValueError: They cannot take turns within this many ``selections``.
        """
        limit = self.limit(costs)
        draws = draw_shares(costs, limit)
        plans = covering_plans(costs, limit, self._most_flops(costs))
        missing = holding(costs).difference(*(plan.active for plan in plans))
        if missing or not (draws or self._is_fixed):
            what, least = most_needed(costs, every_lowest=not self._is_fixed)
            if least > limit:
                raise ValueError(self._too_small(costs, least, what))
            block = frozenset({min(missing, default=0)})
            raise ValueError(self._none_fits(including(costs, block), f"block {min(block)}"))
        turns = Turns(len(plans))
        if not self._is_fixed:
            turns = MeanCompute(self.compute, self.floor).turns(shares(costs, plans), draws)
        turns.check(selections, f"Budget({_amount(self)}, compute={self.compute})")
        return [_groups(costs, plan) for plan in plans]

    def _distribution(self, context: AllocationContext) -> tuple[list[Plan], list[float]]:
        """Return the plans, one for each lowest block, and the probability of each."""
        costs = _costs(context)
        values = self._values(context)
        if self._is_fixed:
            return [self._top(costs, values)], [1.0]
        plans = self._found(costs, values) if context.must else self._plans(costs, values)
        flops = shares(costs, plans)
        worths = (drawn_by(costs, values, plan) for plan in plans)
        weights = [worth / f for worth, f in zip(worths, flops, strict=True)]
        mean_compute = MeanCompute(self.compute, self.floor)
        return plans, mean_compute.probabilities(normalised(weights), flops, context)

    def _plans(self, costs: Costs, values: Sequence[float]) -> list[Plan]:
        plans = plans_to_draw(costs, values, self.limit(costs))
        if not plans:
            what, least = most_needed(costs, every_lowest=True)
            raise ValueError(self._too_small(costs, least, what))
        return plans

    def _found(self, costs: Costs, values: Sequence[float]) -> list[Plan]:
        """Return the best plan for each lowest block for which one fits.

        Raises:
            ValueError: None fits.
        """
        limit, flops = self.limit(costs), self._most_flops(costs)
        found = (best_plan(costs, values, limit, low, flops) for low in costs.lowest_blocks())
        plans = [plan for plan in found if plan]
        if not plans:  # a search that must leave out plans can miss the few that are cheap enough
            fewest = fewest_plans(costs, limit)
            plans = [plan for plan in fewest if flops is None or costs.flops(plan) <= flops]
        if not plans:
            raise ValueError(self._none_fits(costs, "any block"))
        return plans

    def _top(self, costs: Costs, values: Sequence[float]) -> Plan:
        def worth(plan: Plan) -> tuple[float, int]:
            return sum(values[block] for block in plan.active), -costs.flops(plan)

        return max(self._found(costs, values), key=worth)

    def _values(self, context: AllocationContext) -> list[float]:
        """Return the importance y~ of each block: the sum over its modules."""
        costs = _costs(context)
        assert not isinstance(self.base, str)
        worth = self.base.weights(context)
        values = [0.0] * len(costs.blocks)
        for block, y in zip(costs.group_blocks, worth, strict=True):
            if block is not None:
                values[block] += y
        return values

    @property
    def _is_fixed(self) -> bool:
        """Whether nothing is drawn, and so each selection alone keeps to ``compute``."""
        return isinstance(self.base, TopK)

    def _most_flops(self, costs: Costs) -> int | None:
        """Return the FLOPs that no single selection may exceed; None for no limit."""
        if self.compute is None or not self._is_fixed:
            return None
        return _share_of(costs.flops(costs.all_active), self.compute)

    def _none_fits(self, costs: Costs, what: str) -> str:
        fewest = fewest_plans(costs, self.limit(costs))
        if not fewest:
            return self._too_small(costs, least_peak_of_any(costs), what)
        share = min(shares(costs, fewest))
        return (
            f"Budget(compute={self.compute}) is too small for every choice that fits the memory; "
            f"pass at least {up(share)}."
        )

    def _too_small(self, costs: Costs, least: int, what: str) -> str:
        return too_small(_amount(self), costs, least, what)


def _costs(context: AllocationContext) -> Costs:
    if context.costs is None:
        raise ValueError(
            "Budget needs measured costs; use it as the allocator of a DynamicAllocationOptimizer."
        )
    costs = context.costs
    return including(costs, costs.blocks_of(context.must)) if context.must else costs


def _share_of(whole: int, share: float) -> int:
    """Return a share of ``whole``, rounded down; 0.29 means exactly 29/100, unlike the float."""
    return math.floor(Fraction(str(share)) * whole)


def _groups(costs: Costs, plan: Plan) -> list[int]:
    """Return the modules in the plan's blocks, and those after the blocks, which cost nothing."""
    places = enumerate(costs.group_blocks)
    return [group for group, block in places if block is None or block in plan.active]


def _amount(budget: Budget) -> str:
    return f"memory={budget.memory}" if budget.total is None else f"total={budget.total!r}"
