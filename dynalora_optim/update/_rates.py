"""Global and local learning-rate time (section 3.4 of the paper).

Global: all modules follow one schedule, whether they are active or not. Local: each module follows
the schedule at its own pace, by the number of updates that it has received, C. Moments and step
counts are always local: a module's optimizer state advances only while the module is active.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, Protocol, TypeAlias

import torch
from torch import Tensor
from torch.optim.lr_scheduler import LambdaLR

from dynalora_optim.update._param_groups import LINE, ParamGroup

Factor: TypeAlias = Callable[[int], float]


class RateClock(Protocol):
    """The numbers from which learning rates are computed."""

    @property
    def steps(self) -> int:
        """The optimizer steps done."""
        ...

    @property
    def updates(self) -> Mapping[str, int]:
        """The number of updates that each allocated group has received."""
        ...

    def age(self, name: str) -> int | None:
        """Return the steps since the group returned from a pause; None if it never has."""
        ...

    def local_time(self, name: str) -> int:
        """Return the number of updates of a group."""
        ...

    def scaled_time(self, name: str) -> int:
        """Return how far a group is in a schedule for the whole run."""
        ...


class LocalLR:
    """A learning rate per module: its initial rate times a factor of its number of updates.

    Args:
        factor: A function of the step, or a ``torch.optim.lr_scheduler.LambdaLR`` (all of
            ``transformers.get_*_schedule``), whose functions are used. The scheduler may be built
            on the optimizer before it is wrapped, or on the wrapper. Its own step count is not
            used, so that you do not have to call its ``step()``.
        horizon: ``"unscaled"``: at its u-th update a module uses factor(u). ``"scaled"``:
            factor(t) with t = u / share, where share is the share of modules that the steps so far
            have updated, on average. So at step s of the run, a module with the mean number of
            updates is at t = s, and reaches the end of the schedule at the end of the run. t is
            rounded; it is never beyond s, and never falls.

    Raises:
        TypeError: ``factor`` is neither a function nor a ``LambdaLR``.
        ValueError: ``horizon`` is neither of the two.

    Example:
        >>> schedule = get_linear_schedule_with_warmup(inner, 10, 200)  # doctest: +SKIP
        >>> DynamicAllocationOptimizer(inner, model, lr_time=LocalLR(schedule))
    """

    def __init__(
        self,
        factor: LambdaLR | Factor,
        horizon: Literal["unscaled", "scaled"] = "unscaled",
    ) -> None:
        if horizon not in ("unscaled", "scaled"):
            raise ValueError(f"LocalLR(horizon={horizon!r}): pass 'unscaled' or 'scaled'.")
        if not isinstance(factor, LambdaLR) and not callable(factor):
            raise TypeError(
                f"LocalLR({factor!r}): pass a function of the step, or a LambdaLR; the rate of "
                f"other schedulers is not a function of the step. Use lr_time='local' with these."
            )
        self._factors = list(factor.lr_lambdas) if isinstance(factor, LambdaLR) else [factor]
        self._horizon = horizon

    def __repr__(self) -> str:
        names = [
            getattr(factor, "__qualname__", type(factor).__qualname__) for factor in self._factors
        ]
        return f"LocalLR({', '.join(names)}, horizon={self._horizon!r})"

    def check(self, groups: int) -> None:
        """Raise unless there is a function for each of so many param groups.

        Raises:
            ValueError: The scheduler's functions are neither one nor one per param group.
        """
        if len(self._factors) not in (1, groups):
            raise ValueError(
                f"LocalLR got a scheduler of {len(self._factors)} functions, but your optimizer "
                f"has {groups} param groups. Build the scheduler on this optimizer, before or "
                "after it is wrapped."
            )

    def factor(self, line: int) -> Factor:
        """Return the factor of the param group of this number."""
        if len(self._factors) > 1:
            self.check(max(line + 1, len(self._factors)))
        return self._factors[line if len(self._factors) > 1 else 0]

    def time(self, name: str, clock: RateClock) -> int:
        """Return the step of the schedule that is used for the next update of a module."""
        is_scaled = self._horizon == "scaled"
        return clock.scaled_time(name) if is_scaled else clock.local_time(name)


LrTime: TypeAlias = "Literal['global', 'local'] | LocalLR"


class Rates:
    """The learning rate that each piece of a param group uses at its next update.

    ``"local"`` makes any scheduler local: the rates that it sets are stored, and at its u-th update
    a module uses the rate of the scheduler at step u. This rate is always stored already, because
    no module has had more updates than there were steps.
    """

    def __init__(self, lr_time: LrTime, warmup: int) -> None:
        if lr_time not in ("global", "local") and not isinstance(lr_time, LocalLR):
            raise ValueError(f"lr_time={lr_time!r}: pass 'global', 'local' or a LocalLR.")
        self.lr_time: LrTime = lr_time
        self.last: dict[tuple[int, str], Any] = {}  # the rate of each piece at its last update
        self.warmup = warmup
        self._history: dict[int, list[float]] = {}  # "local": per param group, its rate by step

    def replace(self, lr_time: LrTime, groups: Sequence[ParamGroup], steps: int) -> None:
        """Use another ``lr_time`` from now on.

        Raises:
            ValueError: It does not fit ``groups``, or needs the rates of the ``steps`` already
                done.
        """
        Rates(lr_time, self.warmup).check(groups)
        if steps and lr_time == "local":
            raise ValueError(
                f"lr_time='local' needs the rates from the first step on, but {steps} steps are "
                "done; set it before the first step, or use a LocalLR."
            )
        self.lr_time = lr_time
        self.restart()

    def check(self, groups: Sequence[ParamGroup]) -> None:
        """Raise if the rates cannot be computed for these param groups.

        Raises:
            ValueError: A `LocalLR` does not fit them, or a group has no rate.
        """
        if isinstance(self.lr_time, LocalLR):
            self.lr_time.check(len(groups))
        without = [i for i, group in enumerate(groups) if group.get("lr") is None]
        if without and self._is_own:
            option = "Pause(warmup)" if self.lr_time == "global" else "lr_time"
            value = self.warmup if self.lr_time == "global" else self.lr_time
            raise ValueError(
                f"{option}={value!r} sets learning rates, but param group {without[0]} of the "
                "optimizer has none (lr=None): the optimizer computes its own. Leave this option "
                "out, or build the optimizer with a rate."
            )

    @property
    def _is_own(self) -> bool:
        """Whether a piece may use another rate than its param group."""
        return self.lr_time != "global" or self.warmup > 0

    def apply(self, pieces: Sequence[ParamGroup], clock: RateClock) -> None:
        """Put the rates of the next update into ``pieces``."""
        self._record(pieces, clock.steps)
        if self._is_own:
            made: dict[float, Tensor] = {}
            for piece in pieces:
                rate = self._scheduled(piece, clock) * self._ramp(clock.age(piece["name"]))
                piece["lr"] = _like(piece["lr"], rate, made)
        self.last.update({(piece[LINE], piece["name"]): piece.get("lr") for piece in pieces})

    def _ramp(self, age: int | None) -> float:
        """Return the factor of the first steps after a return: 1/n, 2/n, ... 1."""
        return 1.0 if age is None or not self.warmup else min(1.0, (age + 1) / self.warmup)

    def _scheduled(self, piece: ParamGroup, clock: RateClock) -> float:
        name, line = piece["name"], piece[LINE]
        if isinstance(self.lr_time, LocalLR):
            factor = self.lr_time.factor(line)
            initial = piece["initial_lr"] if "initial_lr" in piece else piece["lr"]
            return float(initial) * factor(self.lr_time.time(name, clock))
        if self.lr_time == "local" and name in clock.updates:
            # The rate of the schedule at the step that equals the group's number of updates.
            return self._history[line][clock.updates[name]]
        return float(piece["lr"])

    def group_state(self, line: int) -> dict[str, Any]:
        """Return the rates to save with a param group."""
        return {"lr_history": list(self._history.get(line, []))}

    def check_state(self, states: Sequence[Mapping[str, Any]]) -> None:
        """Raise if ``"local"`` needs rates of past steps that the saved run does not have.

        Raises:
            ValueError: It was saved with another ``lr_time``.
        """
        steps = states[0]["steps"]
        # A group that was added since the last step has none yet.
        if self.lr_time == "local" and max(len(s["lr_history"]) for s in states) < steps:
            raise ValueError(
                f"state_dict lacks rates of its {steps} steps, which lr_time='local' needs: it was "
                "saved with another lr_time. Build the optimizer with the settings of the one that "
                "saved it."
            )

    def load_state(self, states: Sequence[Mapping[str, Any]]) -> None:
        """Load what `group_state` returned, one mapping per param group."""
        self.restart()
        self._history = {line: list(state["lr_history"]) for line, state in enumerate(states)}

    def restart(self) -> None:
        """Delete the rates of all steps."""
        self._history, self.last = {}, {}

    def _record(self, pieces: Sequence[ParamGroup], step: int) -> None:
        """Store the rates that a scheduler has set for this step."""
        if self.lr_time == "local":
            for line, rate in {piece[LINE]: piece["lr"] for piece in pieces}.items():
                history = self._history.setdefault(line, [])
                # A param group that was added in mid-run has its rate of now at all steps before.
                history += [float(rate)] * (step - len(history))
                history[step:] = [float(rate)]


def _like(former: Any, rate: float, made: dict[float, Tensor]) -> Any:
    """Return ``rate`` as a tensor if the ``former`` rate is one; equal ones are one tensor."""
    if not isinstance(former, Tensor):
        return rate
    if rate not in made:
        made[rate] = torch.full_like(former, rate)
    return made[rate]
