"""Learning from the steps so far what the user's loop keeps alive beside a forward and backward."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from dynalora_optim.allocation._costs import Costs
from dynalora_optim.allocation._joined import joined
from dynalora_optim.allocation._loop import Loop
from dynalora_optim.allocation._resident import NOTHING, Resident
from dynalora_optim.allocation._saved_costs import restored_costs, saved_costs

_ELEMENT = 8  # the bytes of an element of a batch, at the most


class Habits:
    """What the loop was seen to do. What was seen once is expected from then on.

    Attributes:
        is_known: Whether a whole step was seen.
        standing: Whether a forward began while parameters had gradients.
        waiting: Whether a backward began while parameters had gradients.
        apart: Whether forwards that were alive together were used by several backwards.
        keeps_output: Whether an output of the model was alive when its backward began.
        update: The most bytes of temporary tensors of an optimizer's step, as a share of the
            largest gradient of a block.
        pattern: The costs of the forwards that precede one backward, each the largest seen in its
            place.
        resident: What the process holds beside the step, for a budget on everything. A resumed run
            counts it anew.
    """

    def __init__(self) -> None:
        self.is_known = False
        self.standing = False
        self.waiting = False
        self.apart = False
        self.keeps_output = False
        self.update = 0.0
        self.pattern: list[Costs] = []
        self.resident: Resident = NOTHING

    @property
    def version(self) -> tuple[object, ...]:
        """A value that changes whenever something was learned."""
        places = tuple(map(id, self.pattern))
        return *self.seen, places, self.resident

    @property
    def seen(self) -> tuple[object, ...]:
        """What was learned beside the costs of forwards and what the process holds."""
        flags = self.is_known, self.standing, self.waiting, self.apart, self.keeps_output
        return *flags, self.update

    def see_forward(self, costs: Costs, place: int) -> None:
        """Learn the costs of a forward that so many others precede, if so many are expected."""
        if place < max(len(self.pattern), 1):
            self.pattern = merged(self.pattern, [*self.pattern[:place], costs])

    def see_backward(
        self, alive: Sequence[Costs], *, keeps_output: bool, apart: bool, gradients: bool
    ) -> None:
        """Learn from a backward that begins.

        Args:
            alive: The costs of the forwards that precede it.
            keeps_output: Whether an output of them is still alive.
            apart: Whether some of them have preceded an earlier backward, too.
            gradients: Whether parameters have gradients.
        """
        self.keeps_output |= keeps_output
        self.apart |= apart
        self.waiting |= gradients
        self.see_together(alive)

    def see_together(self, alive: Sequence[Costs]) -> None:
        """Learn the costs of forwards that are alive together."""
        self.pattern = merged(self.pattern, alive)

    def merge(self, other: Habits) -> None:
        """Expect what another rank has seen, too."""
        self.is_known |= other.is_known
        self.standing |= other.standing
        self.waiting |= other.waiting
        self.apart |= other.apart
        self.keeps_output |= other.keeps_output
        self.update = max(self.update, other.update)
        self.pattern = merged(self.pattern, other.pattern)
        self.resident = self.resident.merged(other.resident)

    def expected(self) -> Costs:
        """Return the costs of the first forward of a step that takes the most."""
        first = self.pattern[0]
        stale = first.output if self.keeps_output else 0
        return self.in_loop(first, before=[], carried=0, stale=stale)

    def in_loop(self, costs: Costs, before: Sequence[Costs], *, carried: int, stale: int) -> Costs:
        """Return the ``costs`` of a forward that follows those of ``before``, in this loop."""
        chain = merged(self.pattern, [*before, costs])
        largest = max(block.gradients for block in costs.blocks)
        followers = chain[len(before) + 1 :]
        if followers:  # one of them may need what this forward keeps
            costs = costs.releasable
        places = range(len(before) + 1, len(chain))
        beside = [self._gradients(place, len(chain)) for place in places]
        keeps = self.keeps_output or not self.is_known
        later = [
            replace(one.releasable, loop=replace(loop, keeps_output=keeps))
            for one, loop in zip(followers, beside, strict=True)
        ]
        loop = replace(
            self._gradients(len(before), len(chain)),
            # The graph of this forward may wait for the backward of one before it.
            is_known=self.is_known and not (self.apart and before),
            is_between=bool(before),
            carried=carried + (sum(map(_least_left, followers)) if self.apart else 0),
            stale=stale,
            keeps_output=keeps,
            update=round(self.update * max(largest, costs.outer_gradients)),
            followers=tuple(later),
            resident=self._resident(chain),
        )
        return replace(costs, loop=replace(loop, reference=self._reference(chain, loop)))

    def beside(self, costs: Costs) -> Costs:
        """Return the ``costs`` of a forward alone, beside what the process holds."""
        return costs.in_loop(resident=self._resident([costs]))

    def _reference(self, chain: Sequence[Costs], loop: Loop) -> int:
        """Return the peak of a step with everything active and nothing checkpointed."""
        peak, left = 0, 0
        for place, costs in enumerate(chain):
            alone = replace(
                self._gradients(place, len(chain)),
                stale=costs.output if self.keeps_output else 0,
                keeps_output=self.keeps_output,
                update=loop.update,
            )
            here = replace(costs, loop=alone)
            peak = max(peak, left + here.peak(here.all_active))
            left += here.left(here.all_active)
        return peak

    def _gradients(self, place: int, forwards: int) -> Loop:
        """Return which gradients are alive in one of so many forwards before a backward.

        The backward pass begins with the last forward. Autograd sums the gradients of all of them,
        and keeps the sums to the end.
        """
        is_last = place + 1 == forwards
        waiting = (self.standing or self.waiting) + (not is_last)
        grows = not waiting or (is_last and forwards > 1)
        return Loop(standing=int(self.standing), waiting=waiting, grows=grows)

    def _resident(self, chain: Sequence[Costs]) -> Resident:
        """Return what the process holds, with the batches of these forwards."""
        if not self.resident.weights:
            return NOTHING
        return replace(self.resident, batch=_ELEMENT * sum(costs.batch for costs in chain))

    def state(self) -> dict[str, Any]:
        """Return the values that a resumed run needs."""
        values = {**vars(self), "pattern": [saved_costs(costs) for costs in self.pattern]}
        return {name: value for name, value in values.items() if name != "resident"}

    @staticmethod
    def of(state: Mapping[str, Any], *, modules: int) -> Habits:
        """Return what `state` was made from.

        Raises:
            ValueError: ``state`` has another form.
        """
        habits = Habits()
        pattern: Any = state.get("pattern")
        for name, value in habits.state().items():
            if type(state.get(name)) is not type(value):
                raise ValueError(f"state_dict: {name}={state.get(name)!r} is not a valid value.")
            setattr(habits, name, state[name])
        habits.pattern = [restored_costs(costs, modules=modules) for costs in pattern]
        return habits


def merged(pattern: Sequence[Costs], seen: Sequence[Costs]) -> list[Costs]:
    """Return the largest costs in each place of two sequences of forwards."""
    both = [joined(one, other) for one, other in zip(pattern, seen, strict=False)]
    longer = pattern if len(pattern) > len(seen) else seen
    return [*both, *longer[len(both) :]]


def _least_left(costs: Costs) -> int:
    """Return what a forward leaves alive at the least, wherever its backward ends."""
    return costs.left(costs.sparing(costs.trainable))
