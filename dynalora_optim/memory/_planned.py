"""A forward that has a plan: its costs, what is recomputed, and what it leaves for its backward."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from dynalora_optim.allocation._costs import Costs, Plan
from dynalora_optim.memory._passes import Left


@dataclass(frozen=True)
class Planned:
    """The plan of a forward.

    Attributes:
        costs: The measured costs of its batch.
        here: These costs in the loop.
        plan: The plan.
        keeping: Blocks that keep what they need until it is released: if other forwards follow, one
            of them may turn out to need that memory.
    """

    costs: Costs
    here: Costs
    plan: Plan
    keeping: frozenset[int]

    @staticmethod
    def of(costs: Costs, here: Costs, plan: Plan, *, can_keep: Callable[[int], bool]) -> Planned:
        """Return the plan of a forward; ``can_keep`` is asked for positions in the model."""
        reached = (block for block, _ in here.roles(plan)) if here.loop.followers else ()
        keeping = {b for b in reached if b not in plan.checkpointed and can_keep(here.positions[b])}
        return Planned(costs, here, plan, frozenset(keeping))

    def left(self) -> Left:
        """Return what the forward leaves alive for its backward."""
        held = self.here.left(self.plan)
        if not self.keeping:
            return Left(held, held)
        released = Plan(self.plan.active, self.plan.checkpointed | self.keeping)
        flops = self.here.flops(released) - self.here.flops(self.plan)
        return Left(held, self.here.left(released), flops)
