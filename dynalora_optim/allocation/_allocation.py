"""The allocation of a run: which groups are active, and when and how the next ones are chosen."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from functools import partial
from typing import Any

from dynalora_optim.allocation._allocation_state import AllocationState
from dynalora_optim.allocation._choice import Choice
from dynalora_optim.allocation._costs import Costs, Plan
from dynalora_optim.allocation._counters import GroupCounters
from dynalora_optim.allocation._cover import alone
from dynalora_optim.allocation._record import Reallocation
from dynalora_optim.allocation._search import least_peak_of_one
from dynalora_optim.groups._layout import BlockLayout
from dynalora_optim.importance._normalise import usable_scores


class Allocation(AllocationState):
    """Chooses among named groups, counts their updates, and keeps the record.

    It holds names and numbers only, no modules.

    Args:
        names: The groups to choose among, in forward order.
        layout: The blocks that hold the groups; given only if blocks in which nothing trains are
            to be recomputed.
        **settings: The other arguments of `AllocationState`.
    """

    def __init__(
        self, names: Iterable[str], *, layout: BlockLayout | None = None, **settings: Any
    ) -> None:
        super().__init__(names, **settings)
        self._layout = layout
        self.restart()

    def restart(self) -> None:
        """Start again from the first step, with the current settings."""
        self.chosen = frozenset()
        self._counters = GroupCounters(self.names)
        self._clock.restart()
        self.record.load_state_dict([])
        self._spending.restart()
        self._selector.selections = 0
        if self.needs_costs:
            self.chosen = frozenset(self.names)
        else:
            self.select(dict.fromkeys(self.names, 0.0))

    @property
    def choice(self) -> Choice:
        """The choice that applies now.

        Raises:
            ValueError: The allocator refuses the groups that were chosen.
        """
        return self.choice_of(self.chosen)

    @property
    def everyone(self) -> Choice:
        """The choice in which all groups are active."""
        return self.choice_of(self.names)

    def choice_of(self, names: Collection[str]) -> Choice:
        """Return the choice in which these groups are active.

        Raises:
            ValueError: The allocator does not allow these groups to be active together.
        """
        plan = self._spending.plan(self._positions(names))
        if plan:
            assert self.costs
            return Choice(frozenset(names), self.costs.in_model(plan.checkpointed))
        idle = self._layout.idle(names) if self._layout else frozenset[int]()
        return Choice(frozenset(names), idle)

    @property
    def is_trial(self) -> bool:
        """Whether nothing was selected so far, because the costs of a whole step are not known."""
        return self.needs_costs and not self._selector.selections and not self._clock.is_stopped

    def take_costs(self, costs: Costs) -> None:
        """Use these costs: for the first choice, or to fit the current choice to them.

        Until a whole step is known, the groups that take the least memory are active.

        Raises:
            ValueError: The allocator cannot make any choice. Then nothing is changed.
        """
        former, self._spending.costs = self.costs, costs
        try:
            if self.is_trial:
                self._try_out(costs)
            else:
                self.fit(costs)
        except ValueError:
            self._spending.costs = former
            raise

    def fit(self, costs: Costs) -> None:
        """Fit the current choice to these ``costs``, which are of one forward of a step.

        Raises:
            ValueError: No group can stay active. Then nothing is changed.
        """
        self._keep(self._spending.fitting(costs, self._positions(self.chosen)))

    def plan_at(self, costs: Costs, names: Collection[str]) -> Plan:
        """Return the plan with these groups active at ``costs``; without a budget it keeps all.

        Raises:
            ValueError: The allocator does not allow these groups to be active together.
        """
        return self._spending.plan_at(costs, self._positions(names))

    def count_forward(self, flops: int, of_all: int) -> None:
        """Count the FLOPs of the backward of a forward, and what they are with all active."""
        self._spending.count_forward(flops, of_all)

    def end_trial(self) -> None:
        """Select after the next step: from then on the costs are those of a whole step."""
        self._clock.demand()

    def _try_out(self, costs: Costs) -> None:
        # Of equal ones the last: the backward pass ends there first.
        least = min(reversed(alone(costs)), key=partial(least_peak_of_one, costs))
        active = costs.blocks_of([]) | {least}
        chosen = [g for g, block in enumerate(costs.group_blocks) if block in {None, *active}]
        self._spending.fitting(costs, chosen)
        self._keep(chosen)

    def _keep(self, kept: Collection[int]) -> None:
        """Make these groups active and no others, and record it."""
        chosen = self._selector.named(self.names, kept)
        if chosen != self.chosen or not self.record:
            self.chosen = chosen
            before = self.record[-1].scores if self.record else {}  # without groups that are new
            scores = {name: before.get(name, 0.0) for name in self.names}
            self.record.append(Reallocation(self.steps, scores, self.active_names()))

    def names_with(self, names: Collection[str], order: Iterable[str]) -> list[str]:
        """Return the names of all groups and of these new ones, sorted by ``order``."""
        places = {name: place for place, name in enumerate(order)}
        # Groups whose modules are no longer in the model come last; they still count.
        return sorted([*self.names, *names], key=lambda n: places.get(n, len(places)))

    def extend(
        self, names: Collection[str], order: Iterable[str], layout: BlockLayout | None = None
    ) -> None:
        """Add groups and sort all groups by ``order``.

        If all groups are active, so are the new ones; the first ones, if a selection would choose
        all of them. If not, they wait for the next selection.
        It follows the next step, because a schedule such as `Once` may never ask for another.

        Raises:
            ValueError: The allocator's own check refuses this many groups.
        """
        self._active.check(len(self.names) + len(names))
        is_everyone = len(self.chosen) == len(self.names)
        if not self.names:  # the first ones: would a selection choose all of them?
            chosen = self._active.resolve(len(names))
            is_everyone = self._clock.is_warming_up or chosen == len(names)
        self._counters.add(names)
        self.names = self.names_with(names, order)
        self._layout = layout if self._layout else None
        self._spending.costs = None  # a budget measures them again
        if is_everyone:
            self.chosen |= frozenset(names)
        if is_everyone and self.record:
            scores = {**self.record[-1].scores, **dict.fromkeys(names, 0.0)}
            self.record.append(Reallocation(self.steps, scores, self.active_names()))
        elif names and not is_everyone:
            self._clock.demand()

    def select(self, scores: Mapping[str, float]) -> frozenset[str]:
        """Choose by these scores and record it; return the chosen groups that were inactive."""
        usable = usable_scores(scores)
        before = self.chosen
        if self._selector.selections:
            self._counters.count_selection(before)  # without groups that had to leave since
        self.chosen = self._selection(usable)
        self.record.append(Reallocation(self.steps, usable, self.active_names()))
        self._selector.selections += 1
        self._clock.settle()
        if self._selector.selections == 1:
            return frozenset()  # at the start of training no group returns from a pause
        self._counters.mark_returned(self.chosen - before, self.steps)
        return self.chosen - before

    def _selection(self, scores: Mapping[str, float]) -> frozenset[str]:
        if self._clock.is_warming_up or not self.names:
            return frozenset(self.names)
        return self._selector.choose(
            self.names,
            scores,
            self._counters,
            active=self._active.resolve(len(self.names)),
            costs=self.costs,
            mean_compute=self._spending.mean_compute(self.steps),
        )

    def hold(self, names: Collection[str]) -> None:
        """Make these groups active, and never choose again.

        Raises:
            ValueError: A name is unknown, no name is given, or the allocator does not allow these
                groups to be active together.
        """
        unknown = [name for name in names if name not in self.updates]
        if unknown or not names:
            raise ValueError(
                f"hold({list(names)!r}): {unknown[0]!r} is not a module group; pass some of "
                f"{self.names}."
                if unknown
                else "hold() got no module group; at least one must be active."
            )
        self.choice_of(names)
        self._keep(self._positions(names))
        self._clock.stop()

    def advance(self, updated: Iterable[str]) -> bool:
        """Count one optimizer step that ``updated`` these groups; return whether to reallocate."""
        self._counters.count_updates(updated, self.steps + 1)
        if self.needs_costs:
            self._spending.advance(self._positions(self.chosen))
        self.record.advance()
        return self._clock.advance()
