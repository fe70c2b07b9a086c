"""Measuring the costs of choices before the step that needs them, and planning each forward."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator
from contextlib import contextmanager
from functools import partial, reduce
from typing import Any

from torch.utils.hooks import RemovableHandle

from dynalora_optim._base.collectives import gathered
from dynalora_optim._base.trees import elements
from dynalora_optim._costing_state import CostingState
from dynalora_optim._driver import ModuleDriver
from dynalora_optim._holdings import Holder, Holdings, total_of
from dynalora_optim.allocation._allocation import Allocation
from dynalora_optim.allocation._costs import Costs, Plan
from dynalora_optim.allocation._joined import joined
from dynalora_optim.allocation._resident import Resident
from dynalora_optim.importance._tracker import ImportanceTracker
from dynalora_optim.memory._announce import announce
from dynalora_optim.memory._block_meter import BlockMeter
from dynalora_optim.memory._passes import Around
from dynalora_optim.memory._planned import Planned
from dynalora_optim.memory._shapes import Measure, Shape, shape_of
from dynalora_optim.update._pause import PausedState
from dynalora_optim.update._rule import UpdateRule

_KEPT = 1024  # plans that are kept


class StepCosting(CostingState):
    """Measures training batches and plans each forward, for an allocator that decides by costs."""

    def __init__(
        self,
        meter: BlockMeter,
        allocation: Allocation,
        driver: ModuleDriver,
        tracker: ImportanceTracker,
    ) -> None:
        self._tracker = tracker
        self._handles: list[RemovableHandle] = []
        self._is_measuring = False
        super().__init__(meter, allocation, driver)

    def attach(self, holder: Holder, rule: UpdateRule, paused: PausedState) -> None:
        """Listen to each training forward, if the allocation needs costs.

        Args:
            holder: The optimizer, of which only a weak reference is kept.
            rule: Its update rule.
            paused: What happens to the state of modules that pause.
        """
        self.close()
        if (total := total_of(self._allocation.allocator)) is not None:
            places = self._meter.model, self._meter.blocks
            self._holdings = Holdings(holder, rule, *places, paused=paused, total=total)
        if self._allocation.needs_costs:
            self._handles = announce(self._meter.model, self._meter.blocks, self)

    def close(self) -> None:
        """Stop listening to forwards."""
        for handle in self._handles:
            handle.remove()
        self._handles = []

    def prepare(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Measure a batch that no forward follows.

        Raises:
            RuntimeError: The model is not in training mode.
            ValueError: The forward cannot be held within the budget.
        """
        if self._allocation.needs_costs:
            self._check_training("measure()")
            self.before_forward(args, kwargs)
            self._now = None

    def _check_training(self, method: str) -> None:
        if not self._meter.model.training:
            raise RuntimeError(f"{method} measures training: call model.train() first.")

    def before_forward(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Measure a batch that no measured one covers, and plan this forward.

        Raises:
            ValueError: The forward cannot be held within the budget.
        """
        if self._is_measuring:
            return
        self._now = None
        if self._allocation.costs is None:
            self.restart()  # groups may have been added since: older costs do not know them
        self._count_holdings(args, kwargs)
        if self._allocation.costs is None:  # all ranks run their first forward together
            self._habits.resident = reduce(Resident.merged, gathered(self._habits.resident))
        self._habits.standing |= self._ranks.has_gradients()
        batch, around = (shape_of(args, kwargs), elements(args, kwargs)), self._passes.around()
        measure = partial(self._shapes.measured, (args, kwargs), batch[0], self._measured)
        if self._ranks.is_together:
            agreed = self._ranks.agree(batch, around, measure, self._fits)
            costs, around, of_ranks = agreed.joined, agreed.around, agreed.costs
        else:
            costs = self._known(batch, around, measure)
            of_ranks = (costs,) if costs else ()
        if costs is not None:
            here, plan = self._planned_or_refused(costs, around, of_ranks)
            switch = self._driver.switch
            now = self._now = Planned.of(costs, here, plan, can_keep=switch.can_keep)
            switch.recompute(costs.in_model(plan.checkpointed), keeping=costs.in_model(now.keeping))
            self._shapes.recomputes = bool(plan.checkpointed)

    def _known(self, batch: tuple[Shape, int], around: Around, measure: Measure) -> Costs | None:
        """Return costs that hold for this batch; measure it if no measured one will do."""
        shape, size = batch
        costs = self._shapes.find(shape, size)
        if costs is None:
            costs = self._costs_of(*measure(exact=False))
        if costs is None or self._shapes.is_of(shape, costs) or self._fits(costs, around):
            return costs
        return self._costs_of(*measure(exact=True))

    def _fits(self, costs: Costs, around: Around) -> bool:
        """Return whether the budget holds a forward of these costs, which are of a larger batch."""
        try:
            self._planned(costs, around)
        except ValueError:
            return False
        return True

    def _planned_or_refused(
        self, costs: Costs, around: Around, of_ranks: Iterable[Costs]
    ) -> tuple[Costs, Plan]:
        """Plan a forward; what earlier ones keep is released where only that makes room for it.

        Raises:
            ValueError: The forward cannot be held within the budget.
        """
        try:
            if around.least == around.carried or self._fits(costs, around):
                return self._planned(costs, around, with_fewer=True)
            found = self._planned(costs, around.released, with_fewer=True)
        except ValueError:  # do not expect such a batch again, but as many forwards as there were
            for measured in of_ranks:
                self._shapes.drop(measured)
            if around.before:
                self._habits.see_together([*around.before, costs])
            raise
        self._driver.switch.release()
        self._allocation.count_forward(self._passes.release(), 0)
        return found

    def after_forward(self, output: Any) -> None:
        """Follow the graph of this forward, which takes memory until its backward."""
        if (now := self._now) and not self._is_measuring:
            costs = now.costs
            self._allocation.count_forward(costs.flops(now.plan), costs.flops(costs.all_active))
            self._passes.follow(output, costs, now.left())

    def _costs_of(self, shape: Shape, found: Costs) -> Costs | None:
        """Keep what was measured; the result is None for a batch without rows: it has no costs."""
        measured = [found]
        if self._allocation.costs is None:  # all ranks run their first forward together
            measured = gathered(measured[0])
        measured = [costs for costs in measured if costs.flops(costs.all_active)]
        if not measured:
            return None
        costs = reduce(joined, measured)
        self._shapes.add(shape, costs)
        self._plans.clear()  # its keys hold for as long as the measured costs are kept
        return costs

    def _measured(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Costs:
        is_probing = self._driver.is_probing
        try:
            return self.measure(args, kwargs)
        finally:
            self._resume(is_probing)

    def _take_costs(self, *, is_between: bool) -> None:
        """Let the allocation know what a step takes now; groups that do not fit become inactive."""
        known = self._allocation.costs
        if known is not None and (self._ranks.may_differ or self._version == self._habits.version):
            return
        expected = self._habits.expected()
        self._version = self._habits.version
        if expected != known:
            keeps_probing = not self._allocation.is_trial
            with self._fewer(keeps_probing=keeps_probing, is_between=is_between):
                self._allocation.take_costs(expected)

    @contextmanager
    def _fewer(self, *, keeps_probing: bool, is_between: bool) -> Iterator[None]:
        """Let the allocation make groups inactive within it, then do so with their modules.

        ``is_between``: the backward of earlier forwards is still to come.
        """
        is_probing = self._driver.is_probing and keeps_probing
        before = self._allocation.chosen if is_probing else frozenset(self._active())
        yield
        with self._driver.switch.former.recalled(is_between):
            self._resume(is_probing)
        self._driver.drop_gradients(before - self._allocation.chosen, arriving=is_between)

    def _planned(
        self, costs: Costs, around: Around, *, with_fewer: bool = False
    ) -> tuple[Costs, Plan]:
        """Return the costs of this forward in the loop, and its plan.

        If other forwards precede it, groups may become inactive to fit it ``with_fewer``.

        Raises:
            ValueError: The forward cannot be held within the budget.
        """
        before, carried, stale = around.before, around.carried, around.stale
        situation = (id(costs), *map(id, before), carried, stale)
        if situation + self._what_applies() not in self._plans:
            pattern = self._habits.pattern
            try:
                self._habits.see_forward(costs, len(before))
                self._take_costs(is_between=bool(before))
                here = self._habits.in_loop(costs, before, carried=carried, stale=stale)
                may_leave = with_fewer and bool(before) and not self._ranks.may_differ
                plan = self._plan_at(here, with_fewer=may_leave)
            except ValueError:
                self._habits.pattern = pattern
                self._plans.clear()
                raise
            if len(self._plans) >= _KEPT:
                self._plans.clear()
            # With the objects whose ids are in the key: joined costs are kept nowhere else.
            self._plans[situation + self._what_applies()] = here, plan, costs, before
        return self._plans[situation + self._what_applies()][:2]

    def _plan_at(self, here: Costs, *, with_fewer: bool) -> Plan:
        """Return the plan of a forward; ``with_fewer`` groups active where it has no other.

        Raises:
            ValueError: There is no plan.
        """
        try:
            return self._allocation.plan_at(here, self._active())
        except ValueError:
            if not with_fewer:
                raise
        with self._fewer(keeps_probing=False, is_between=True):
            self._allocation.fit(here)
        return self._allocation.plan_at(here, self._active())

    def _active(self) -> Collection[str]:
        """Return the groups that get gradients in the next backward."""
        is_probing = self._driver.is_probing
        return self._allocation.names if is_probing else self._allocation.chosen

    def _what_applies(self) -> tuple[object, ...]:
        return frozenset(self._active()), self._habits.version

    def measure(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Costs:
        """Return the costs of every choice for this batch; the caller then applies the choice."""
        self._is_measuring = True
        self._driver.close_probe()
        groups = [self._driver.group(name) for name in self._allocation.names]
        try:
            with self._tracker.paused(), self._driver.switch.former.paused():
                switch, known = self._driver.switch, self._allocation.costs
                return self._meter.measure(groups, switch, args, kwargs, known, room=self._room())
        finally:
            self._is_measuring = False

    def current(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Costs, Plan]:
        """Return the costs of this batch, or else the costs already measured, and the current plan.

        Raises:
            RuntimeError: There are no costs and no batch, or the model is not in training mode.
        """
        costs = self._allocation.costs
        if args or kwargs:
            self._check_training("memory_report()")
            self._count_holdings(args, kwargs)
            costs = self._habits.beside(self._measured(args, kwargs))
            if self._habits.is_known:
                costs = self._habits.in_loop(costs, [], carried=0, stale=0)
        if costs is None:
            raise RuntimeError(
                "memory_report() has no batch, and none was measured so far. Pass a batch as you "
                "pass it to the model, such as memory_report(**batch)."
            )
        return costs, self._allocation.plan_at(costs, self._allocation.chosen)

    def block_names(self, costs: Costs) -> list[str]:
        """Return the dotted paths of the model's blocks, as ``costs`` number them."""
        return [self._meter.blocks[place].name for place in costs.positions]

    def _resume(self, is_probing: bool) -> None:
        probe = self._allocation.everyone if is_probing else None
        self._driver.apply(self._allocation.choice, probe=probe)
