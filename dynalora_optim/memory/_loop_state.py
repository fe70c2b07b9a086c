"""What a resumed run needs of the costs that were measured, and of the loop."""

from __future__ import annotations

from typing import Any

from dynalora_optim.memory._habits import Habits
from dynalora_optim.memory._shapes import MeasuredShapes


def saved_loop(shapes: MeasuredShapes, habits: Habits) -> dict[str, Any]:
    """Return plain numbers, strings and lists."""
    return {"shapes": shapes.state(), "habits": habits.state()}


def restored_loop(state: Any, *, modules: int) -> tuple[MeasuredShapes, Habits]:
    """Return what `saved_loop` made ``state`` from; None stands for a run without measurements.

    Raises:
        ValueError: It has another form, or is of other modules.
    """
    if state is None:
        return MeasuredShapes(), Habits()
    if not isinstance(state, dict) or not {"shapes", "habits"} <= state.keys():
        raise ValueError("state_dict has a 'loop' of another form.")
    shapes = MeasuredShapes.of(state["shapes"], modules=modules)
    return shapes, Habits.of(state["habits"], modules=modules)
