"""What was measured and learned of a run so far, and how that is saved."""

from __future__ import annotations

from typing import Any

from dynalora_optim._holdings import Holdings
from dynalora_optim.allocation._allocation import Allocation
from dynalora_optim.allocation._costs import Costs, Plan
from dynalora_optim.memory._habits import Habits
from dynalora_optim.memory._passes import Passes
from dynalora_optim.memory._shapes import MeasuredShapes

WATCHED = 2  # optimizer steps whose temporary tensors are counted


class CostingState:
    """The measured costs of batches and the habits of the loop; the subclass adds to them."""

    def __init__(self, allocation: Allocation) -> None:
        self._allocation = allocation
        self._holdings: Holdings | None = None  # only for a budget on everything
        self.restart()

    def restart(self) -> None:
        """Forget all costs, and what was learned about the loop."""
        self._shapes = MeasuredShapes()
        self._follow(Habits())

    def _follow(self, habits: Habits) -> None:
        self._habits = habits
        self._passes = Passes(habits.see_backward)
        # Of the forward that runs: its costs, its costs in the loop, and its plan.
        self._now: tuple[Costs, Costs, Plan] | None = None
        self._version: object = None  # of the habits that the allocation knows
        self._plans: dict[object, tuple[Costs, Plan]] = {}
        self._watched = 0  # optimizer steps whose temporary tensors were counted

    def __getstate__(self) -> dict[str, Any]:
        # The keys of the plans are ids of objects that a copy has not; holdings are the owner's.
        return {**vars(self), "_plans": {}, "_holdings": None}

    def state(self) -> dict[str, Any]:
        """Return the values that a resumed run needs, as plain numbers, strings and lists."""
        return {"shapes": self._shapes.state(), "habits": self._habits.state()}

    def check_state(self, state: Any) -> None:
        """Raise unless `load_state` can load ``state``.

        Raises:
            ValueError: It has another form, or is of other modules.
        """
        self._restored(state)

    def load_state(self, state: Any) -> None:
        """Load what `state` returned; None stands for a run that has measured nothing."""
        self._shapes, habits = self._restored(state)
        self._follow(habits)
        if habits.is_known:
            self._watched = WATCHED

    def _restored(self, state: Any) -> tuple[MeasuredShapes, Habits]:
        if state is None:
            return MeasuredShapes(), Habits()
        if not isinstance(state, dict) or not {"shapes", "habits"} <= state.keys():
            raise ValueError("state_dict has a 'loop' of another form.")
        modules = len(self._allocation.names)
        shapes = MeasuredShapes.of(state["shapes"], modules=modules)
        return shapes, Habits.of(state["habits"], modules=modules)
