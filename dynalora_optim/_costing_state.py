"""What was measured and learned of a run so far, and how that is saved."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

from dynalora_optim._base.collectives import gathered
from dynalora_optim._driver import ModuleDriver
from dynalora_optim._holdings import Holdings, room_to_measure
from dynalora_optim._ranks import Ranks
from dynalora_optim.allocation._allocation import Allocation
from dynalora_optim.allocation._costs import Costs, Plan
from dynalora_optim.memory._block_meter import BlockMeter
from dynalora_optim.memory._habits import Habits
from dynalora_optim.memory._loop_state import restored_loop, saved_loop
from dynalora_optim.memory._passes import Passes
from dynalora_optim.memory._planned import Planned
from dynalora_optim.memory._room import gradient_bytes
from dynalora_optim.memory._shapes import MeasuredShapes
from dynalora_optim.memory._updates import Updates

T = TypeVar("T")


class CostingState:
    """The measured costs of batches and the habits of the loop; the subclass adds to them."""

    def __init__(self, meter: BlockMeter, allocation: Allocation, driver: ModuleDriver) -> None:
        self._meter = meter
        self._allocation = allocation
        self._driver = driver
        self._holdings: Holdings | None = None  # only for a budget on everything
        self.restart()

    def restart(self) -> None:
        """Forget all costs, and what was learned about the loop."""
        self._shapes = MeasuredShapes()
        self._follow(Habits())

    def _follow(self, habits: Habits) -> None:
        self._habits = habits
        self._passes = Passes(self._see_backward)
        self._ranks = Ranks(self._meter, self._driver, self._shapes, habits)
        self._now: Planned | None = None  # the forward that runs
        self._version: object = None  # of the habits that the allocation knows
        self._plans: dict[object, tuple[Costs, Plan, Costs, tuple[Costs, ...]]] = {}
        self._updates = Updates(habits)

    def _see_backward(self, alive: list[Costs], **seen: bool) -> None:
        self._habits.see_backward(alive, gradients=self._ranks.has_gradients(), **seen)

    def __getstate__(self) -> dict[str, Any]:
        # The keys of the plans are ids of objects that a copy has not; holdings are the owner's.
        return {**vars(self), "_plans": {}, "_holdings": None}

    def _room(self) -> int | None:
        """Return the bytes that measuring may take now; None for any number."""
        blocks = len(self._meter.blocks)
        limit = room_to_measure(self._allocation.allocator, self._habits.resident, blocks)
        if limit is None:
            return None
        around = self._passes.around()
        return limit - around.carried - around.stale - gradient_bytes(self._meter.model)

    def _count_holdings(self, args: Any, kwargs: Any) -> None:
        """Count what is alive beside the step, and again if there is new state."""
        holdings, known = self._holdings, self._habits.resident.weights
        if holdings and (not known or holdings.has_new_state()):
            self._habits.resident = holdings.count(args, kwargs)

    def end_trial(self) -> None:
        """After the passes of the first step, let the allocation select as the step ends.

        Raises:
            ValueError: The budget cannot hold a step of this loop. Then nothing is updated.
        """
        if not self._allocation.needs_costs or self._habits.is_known:
            return
        self._habits.is_known = True
        self._merge()
        if not self._allocation.is_trial:
            return
        try:
            self._allocation.take_costs(self._habits.expected())
        except ValueError:
            self._habits.is_known = False
            raise
        self._allocation.end_trial()

    def watched(self, update: Callable[[], T], largest: Callable[[], int]) -> T:
        """Run an optimizer's ``update``; see `Updates`."""
        watches = self._allocation.needs_costs
        return self._updates.watched(update, largest) if watches else update()

    def share(self) -> None:
        """Share with all ranks what each has measured and seen, and take the costs of all."""
        if not self._allocation.needs_costs:
            return
        self._merge()
        if self._habits.pattern:
            self._allocation.take_costs(self._habits.expected())

    def _merge(self) -> None:
        """Learn what all ranks have seen, so that they decide alike."""
        for other in gathered(self._habits):
            self._habits.merge(other)

    def state(self) -> dict[str, Any]:
        """Return the values that a resumed run needs, as plain numbers, strings and lists."""
        return saved_loop(self._shapes, self._habits)

    def check_state(self, state: Any) -> None:
        """Raise unless `load_state` can load ``state``.

        Raises:
            ValueError: It has another form, or is of other modules.
        """
        restored_loop(state, modules=len(self._allocation.names))

    def load_state(self, state: Any) -> None:
        """Load what `state` returned; None stands for a run that has measured nothing."""
        self._shapes, habits = restored_loop(state, modules=len(self._allocation.names))
        self._follow(habits)
