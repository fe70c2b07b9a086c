"""What a step keeps alive beside one forward and its backward: the habits of the user's loop."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

from dynalora_optim.allocation._resident import NOTHING, Resident


@dataclass(frozen=True)
class Loop:
    """What is alive in a step in addition to the forward and backward at hand; in bytes.

    The defaults describe a loop that calls the model once per step, keeps only the loss, and begins
    each forward without gradients.

    Attributes:
        is_known: Whether a whole step of the loop was seen. Before that a plan holds as little as
            it can, so that other forwards of the first step fit too.
        is_between: Whether other forwards of the same backward precede this one. What every block
            needs is then no question: the first of them has decided it.
        carried: What earlier forwards hold for their backward.
        stale: What is alive of earlier steps until the forward is over, such as an output.
        standing: How many gradients of each parameter that trains are alive in the forward: one in
            gradient accumulation.
        waiting: How many are alive in the backward before it makes its own: those of the forward,
            and sums that autograd keeps until all forwards before this backward have added theirs.
        grows: Whether the backward makes further gradients; else it adds to those that wait.
        keeps_output: Whether the model's output stays alive until the backward is over.
        update: The temporary tensors of the optimizer's step.
        followers: The costs of the further forwards before the backward, each in this loop.
        reference: The peak with all modules active and nothing checkpointed, of the whole step; 0
            for that of the forward and backward at hand.
        resident: What the process holds beside the step, for a budget on everything.
    """

    is_known: bool = True
    is_between: bool = False
    carried: int = 0
    stale: int = 0
    standing: int = 0
    waiting: int = 0
    grows: bool = True
    keeps_output: bool = False
    update: int = 0
    followers: tuple[Any, ...] = ()
    reference: int = 0
    resident: Resident = NOTHING

    @property
    def is_even(self) -> bool:
        """Whether as many gradients are alive in the forward as in the backward."""
        return self.standing == self.waiting and not self.followers

    def later(self, active: Collection[int]) -> int:
        """Return the most bytes of the further forwards if these blocks train.

        Each leaves the least alive that it can.
        """
        peak = left = 0
        for costs in self.followers:
            plan = costs.sparing(active)
            peak, left = max(peak, left + costs.peak(plan)), left + costs.left(plan)
        return peak

    def temporary(self, gradients: int) -> int:
        """Return the temporary bytes of an update of blocks whose gradients have so many bytes."""
        return max(self.update, self.resident.temporary(gradients))


ALONE = Loop()  # one forward and its backward, with nothing beside them
