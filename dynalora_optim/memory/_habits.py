"""Learning from the steps so far what the user's loop keeps alive beside a forward and backward."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from dynalora_optim.allocation._costs import Costs, Plan
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
        self.keeps_output = False
        self.update = 0.0
        self.pattern: list[Costs] = []
        self.resident: Resident = NOTHING

    @property
    def version(self) -> tuple[object, ...]:
        """A value that changes whenever something was learned."""
        places = tuple(map(id, self.pattern))
        habits = self.is_known, self.standing, self.keeps_output, self.update
        return *habits, places, self.resident

    def see_forward(self, costs: Costs, place: int) -> None:
        """Learn the costs of a forward that so many others precede, if so many are expected."""
        if place < max(len(self.pattern), 1):
            self.pattern = merged(self.pattern, [*self.pattern[:place], costs])

    def see_backward(self, alive: Sequence[Costs], keeps_output: bool) -> None:
        """Learn from a backward that begins: which forwards precede it, and what is kept."""
        self.keeps_output |= keeps_output
        self.see_together(alive)

    def see_together(self, alive: Sequence[Costs]) -> None:
        """Learn the costs of forwards that are alive together."""
        self.pattern = merged(self.pattern, alive)

    def merge(self, other: Habits) -> None:
        """Expect what another rank has seen, too."""
        self.is_known |= other.is_known
        self.standing |= other.standing
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
        later = _later(chain[len(before) + 1 :])
        loop = Loop(
            is_known=self.is_known,
            carried=carried,
            stale=stale,
            standing=self.standing or bool(later) or bool(before),
            keeps_output=self.keeps_output or not self.is_known,
            update=round(self.update * max(largest, costs.outer_gradients)),
            later=later,
            resident=self._resident(chain),
        )
        return replace(costs, loop=replace(loop, reference=self._reference(chain, loop)))

    def beside(self, costs: Costs) -> Costs:
        """Return the ``costs`` of a forward alone, beside what the process holds."""
        return costs.in_loop(resident=self._resident([costs]))

    def _reference(self, chain: Sequence[Costs], loop: Loop) -> int:
        """Return the peak of a step with everything active and nothing checkpointed."""
        peak, left = 0, 0
        for costs in chain:
            alone = Loop(
                stale=costs.output if self.keeps_output else 0,
                standing=self.standing or len(chain) > 1,
                keeps_output=self.keeps_output,
                update=loop.update,
            )
            here = replace(costs, loop=alone)
            peak = max(peak, left + here.peak(here.all_active))
            left += here.left(here.all_active)
        return peak

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


def _later(followers: Sequence[Costs]) -> tuple[int, ...]:
    """Return what further forwards need in addition to gradients, for each lowest block.

    It is the peak of the last of them, if each leaves the least alive that it can.
    """
    if not followers:
        return ()
    lean = [_without_gradients(costs) for costs in followers]
    return tuple(_least_peak(lean, lowest) for lowest in range(len(lean[0].blocks)))


def _least_peak(followers: Sequence[Costs], lowest: int) -> int:
    peak, left = 0, 0
    for costs in followers:
        active = costs.pinned | frozenset(range(lowest, len(costs.blocks)))
        plan: Plan = costs.sparing(active)
        peak = max(peak, left + costs.peak(plan))
        left += costs.left(plan)
    return peak


def _without_gradients(costs: Costs) -> Costs:
    blocks = tuple(replace(block, gradients=0) for block in costs.blocks)
    routes = tuple(map(_without_gradients, costs.routes))
    bare = replace(costs, blocks=blocks, routes=routes, head_gradients=0, prefix_gradients=0)
    return replace(bare, loop=Loop(keeps_output=True))
