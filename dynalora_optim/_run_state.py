"""Collecting the values of an optimizer's parts for the state dict, and loading them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from dynalora_optim._costing import StepCosting
from dynalora_optim.allocation._allocation import Allocation
from dynalora_optim.allocation._saved_costs import saved_costs
from dynalora_optim.importance._tracker import ImportanceTracker
from dynalora_optim.state._validate import check_values
from dynalora_optim.update._rates import Rates


class RunState:
    """The values that a resumed run needs in addition to torch's own state, per param group."""

    def __init__(
        self,
        allocation: Allocation,
        costing: StepCosting,
        tracker: ImportanceTracker,
        rates: Rates,
    ) -> None:
        self._allocation = allocation
        self._costing = costing
        self._tracker = tracker
        self._rates = rates

    def values(
        self, names: Sequence[str], lines: Sequence[int], *, is_probing: bool
    ) -> list[dict[str, Any]]:
        """Return the values of the param groups of these ``names``."""
        clock = {
            **self._allocation.clock_state(),
            "importance": self._tracker.description,
            "probing": is_probing,
        }
        scores = self._tracker.state_dict()
        costs = self._allocation.costs
        once: dict[str, Any] = {"costs": None, "loop": None}  # large: in the first group only
        if costs:
            once = {"costs": saved_costs(costs), "loop": self._costing.state()}
        return [
            {
                **clock,
                **(once if position == 0 else {}),
                **self._allocation.group_state(name),
                **scores.get(name, {}),
                **self._rates.group_state(lines, position),
            }
            for position, name in enumerate(names)
        ]

    def check(
        self,
        values: Sequence[Mapping[str, Any]],
        names: Sequence[str],
        lines: Sequence[int],
        record: Any,
    ) -> None:
        """Raise unless `load` can load ``values`` and the ``record``.

        Raises:
            ValueError: They are damaged, or from a run with other settings.
        """
        by_name = dict(zip(names, values, strict=True))
        check_values(values, self.values(names, lines, is_probing=False), record)
        self._tracker.check_description(values[0]["importance"])
        self._tracker.check_state(by_name)
        self._allocation.check_state(values[0], by_name)
        self._costing.check_state(values[0].get("loop"))
        self._rates.check_state(lines, values)

    def load(
        self,
        values: Sequence[Mapping[str, Any]],
        names: Sequence[str],
        lines: Sequence[int],
        record: Sequence[Mapping[str, Any]],
    ) -> None:
        """Load values and a record that `check` has accepted."""
        by_name = dict(zip(names, values, strict=True))
        self._allocation.load_state(values[0], by_name, record)
        self._costing.load_state(values[0].get("loop"))
        self._tracker.load_state_dict(by_name, step=self._allocation.steps)
        self._rates.load_state(lines, values)

    def restart(self) -> None:
        """Start again from the first step, without scores and rates."""
        self._allocation.restart()
        self._costing.restart()
        self._tracker.restart()
        self._rates.restart()
