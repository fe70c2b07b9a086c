"""Collecting the values of an optimizer's parts for the state dict, and loading them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from dynalora_optim._costing import StepCosting
from dynalora_optim._settings import changed, log_changes
from dynalora_optim.allocation._allocation import Allocation
from dynalora_optim.allocation._saved_costs import saved_costs
from dynalora_optim.importance._tracker import ImportanceTracker
from dynalora_optim.state._validate import check_modules, check_values
from dynalora_optim.update._param_groups import ParamGroup
from dynalora_optim.update._pieces import Pieces
from dynalora_optim.update._rates import Rates


class RunState:
    """The values that a resumed run needs in addition to the wrapped optimizer's own state."""

    def __init__(
        self,
        allocation: Allocation,
        costing: StepCosting,
        tracker: ImportanceTracker,
        rates: Rates,
        *,
        pieces: Pieces,
        settings: Mapping[str, str],
    ) -> None:
        self._settings = settings
        self._allocation = allocation
        self._costing = costing
        self._tracker = tracker
        self._rates = rates
        self._pieces = pieces

    def values(self, groups: Sequence[ParamGroup], *, is_probing: bool) -> list[dict[str, Any]]:
        """Return the values to save with each of the param groups."""
        clock = {
            **self._allocation.clock_state(),
            "settings": dict(self._settings),
            "probing": is_probing,
        }
        costs = self._allocation.costs
        once: dict[str, Any] = {"costs": None, "loop": None}  # large: in the first group only
        if costs:
            once = {"costs": saved_costs(costs), "loop": self._costing.state()}
        return [
            {
                **clock,
                **({} if line else once),
                **self._rates.group_state(line),
                "param_names": names,
                "modules": modules,
                "numbers": self._pieces.own_numbers(groups, line),
            }
            for line, (names, modules) in enumerate(
                zip(self._pieces.names(groups), self._modules(groups), strict=True)
            )
        ]

    def _modules(self, groups: Sequence[ParamGroup]) -> list[dict[str, dict[str, Any]]]:
        """Return the values of each module, in the first param group that has parameters of it."""
        scores = self._tracker.state_dict()
        found: list[dict[str, dict[str, Any]]] = [{} for _ in groups]
        seen: set[str] = set()
        for part in self._pieces.parts(groups):
            if part.name not in seen and (state := self._allocation.group_state(part.name)):
                found[part.line][part.name] = {**state, **scores.get(part.name, {})}
            seen.add(part.name)
        return found

    def check(
        self,
        values: Sequence[Mapping[str, Any]],
        groups: Sequence[ParamGroup],
        record: Any,
        names: Sequence[str],
    ) -> None:
        """Raise unless `load` can load ``values``, one mapping per param group, and the ``record``.

        Args:
            values: The saved values.
            groups: The param groups.
            record: The saved history.
            names: The allocated groups, with those that join before the values are loaded.

        Raises:
            ValueError: They are damaged, or from a run with other settings.
        """
        own = self.values(groups, is_probing=False)
        check_values(values, own, record)
        by_name = _by_name(values)
        template = {**self._allocation.new_state(), **self._tracker.new_state()}
        check_modules(by_name, names, template)
        clock = self._clock(values)
        if not self._has_other_scores(clock):
            self._tracker.check_state(by_name)
        self._allocation.check_state(clock, by_name, names)
        self._costing.check_state(clock.get("loop"))
        self._rates.check_state(values)

    def load(
        self,
        values: Sequence[Mapping[str, Any]],
        groups: Sequence[ParamGroup],
        record: Sequence[Mapping[str, Any]],
    ) -> None:
        """Load values and a record that `check` has accepted."""
        by_name, clock = _by_name(values), self._clock(values)
        log_changes(clock["settings"], self._settings)
        self._allocation.load_state(clock, by_name, record)
        self._costing.load_state(clock.get("loop"))
        if self._has_other_scores(clock):
            self._tracker.restart()
            self._tracker.end_step(self._allocation.steps)
        else:
            self._tracker.load_state_dict(by_name, step=self._allocation.steps)
        self._rates.load_state(values)
        self._pieces.load(groups, [saved["numbers"] for saved in values])

    def _has_other_scores(self, clock: Mapping[str, Any]) -> bool:
        return "importance" in changed(clock["settings"], self._settings)

    def _clock(self, values: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        """Return the saved values that belong to no module, with the new settings where changed.

        A setting that the user has changed in the code counts; one that was changed during the run,
        such as ``active``, goes on.
        """
        clock, own = _once(values), self._allocation.clock_state()
        kept = {"active": "active_setting", "seed": "seed"}
        for name in changed(clock["settings"], self._settings) & kept.keys():
            clock[kept[name]] = own[kept[name]]
        return clock

    def restart(self, groups: Sequence[ParamGroup]) -> None:
        """Start again from the first step, without scores and rates."""
        self._allocation.restart()
        self._costing.restart()
        self._tracker.restart()
        self._rates.restart()
        self._pieces.load(groups, [{} for _ in groups])


def _by_name(values: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    return {name: state for saved in values for name, state in saved["modules"].items()}


def _once(values: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Return the values that belong to no module; the costs are in one of the groups."""
    return {key: value for saved in reversed(values) for key, value in saved.items()}
