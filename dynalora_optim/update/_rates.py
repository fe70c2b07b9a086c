"""Global and local learning-rate time (section 3.4 of the paper).

Global: all modules follow one schedule, whether they are active or not. Local: each module follows
the schedule at its own pace, by the number of updates that it has received, C. Moments and step
counts are always local: a module's optimizer state advances only while the module is active.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Literal, Protocol, TypeAlias

from torch.optim.lr_scheduler import LambdaLR

from dynalora_optim.update._param_groups import ParamGroup

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

    def local_time(self, name: str) -> tuple[int, float]:
        """Return the number of updates of a group, and the share of modules that are active."""
        ...


class LocalLR:
    """A learning rate per module: its initial rate times a factor of its number of updates.

    Args:
        factor: A function of the step, or a ``torch.optim.lr_scheduler.LambdaLR`` (all of
            ``transformers.get_*_schedule``), whose functions are used. The scheduler may be built
            on the optimizer before it is wrapped, or on the wrapper. Its own step count is not
            used, so that you do not have to call its ``step()``.
        horizon: ``"unscaled"``: at its u-th update a module uses factor(u). ``"scaled"``:
            factor(u / share), where share is the share of modules that are active, so that on
            average a module reaches the end of the schedule at the end of the run.

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
        self.is_from_scheduler = isinstance(factor, LambdaLR)
        self._factors = list(factor.lr_lambdas) if isinstance(factor, LambdaLR) else [factor]
        self._horizon = horizon

    def factors(self, lines: Sequence[int]) -> list[Factor]:
        """Return one factor per param group of the wrapper.

        Args:
            lines: Per param group, the number of the user group that it was split from.

        Raises:
            ValueError: The scheduler's functions are neither one, nor one per param group, nor one
                per user group.
        """
        if len(self._factors) == 1:
            return self._factors * len(lines)
        if len(self._factors) == len(lines):
            return self._factors
        if len(self._factors) == len(set(lines)):
            return [self._factors[line] for line in lines]
        raise ValueError(
            f"LocalLR got a scheduler of {len(self._factors)} functions, but your optimizer has "
            f"{len(set(lines))} param groups, split into {len(lines)}. Build the scheduler on this "
            "optimizer, before or after it is wrapped."
        )

    def time(self, updates: int, share: float) -> int:
        """Return the step of the schedule for a module that has had ``updates`` updates."""
        return round(updates / share) if self._horizon == "scaled" else updates


LrTime: TypeAlias = "Literal['global', 'local'] | LocalLR"


def is_from_scheduler(lr_time: LrTime) -> bool:
    """Return whether the rates are computed with the functions of a scheduler."""
    return isinstance(lr_time, LocalLR) and lr_time.is_from_scheduler


class Rates:
    """The learning rate that each param group uses at its next update.

    ``"local"`` makes any scheduler local: the rates that it sets are stored, and at its u-th update
    a module uses the rate of the scheduler at step u. This rate is always stored already, because
    no module has had more updates than there were steps.
    """

    def __init__(self, lr_time: LrTime, warmup: int) -> None:
        if lr_time not in ("global", "local") and not isinstance(lr_time, LocalLR):
            raise ValueError(f"lr_time={lr_time!r}: pass 'global', 'local' or a LocalLR.")
        self.lr_time: LrTime = lr_time
        self.last: list[Any] = []  # the rate of each param group at the last update
        self.warmup = warmup
        self._history: dict[int, list[float]] = {}  # "local": per user group, its rate by step

    def replace(self, lr_time: LrTime, lines: Sequence[int], steps: int) -> None:
        """Use another ``lr_time`` from now on.

        Raises:
            ValueError: It does not fit ``lines``, or needs the rates of the ``steps`` already done.
        """
        Rates(lr_time, self.warmup).check(lines)
        if steps and lr_time == "local":
            raise ValueError(
                f"lr_time='local' needs the rates from the first step on, but {steps} steps are "
                "done; set it before the first step, or use a LocalLR."
            )
        self.lr_time = lr_time
        self.restart()

    def check(self, lines: Sequence[int]) -> None:
        """Raise if a `LocalLR` does not fit the param groups, which ``lines`` describes.

        Raises:
            ValueError: See `LocalLR.factors`.
        """
        if isinstance(self.lr_time, LocalLR):
            self.lr_time.factors(lines)

    def _current(
        self, groups: Sequence[ParamGroup], lines: Sequence[int], clock: RateClock
    ) -> list[Any]:
        """Return the rate of each group at its next update."""
        ramps = [self._ramp(clock.age(group["name"])) for group in groups]
        rates = self._scheduled(groups, lines, clock)
        return [rate * ramp if ramp < 1 else rate for rate, ramp in zip(rates, ramps, strict=True)]

    def _ramp(self, age: int | None) -> float:
        """Return the factor of the first steps after a return: 1/n, 2/n, ... 1."""
        return 1.0 if age is None or not self.warmup else min(1.0, (age + 1) / self.warmup)

    def _scheduled(
        self, groups: Sequence[ParamGroup], lines: Sequence[int], clock: RateClock
    ) -> list[Any]:
        if self.lr_time == "global":
            return [group["lr"] for group in groups]
        if isinstance(self.lr_time, LocalLR):
            factors = self.lr_time.factors(lines)
            return [
                float(group["initial_lr"] if "initial_lr" in group else group["lr"])
                * factor(self.lr_time.time(*clock.local_time(group["name"])))
                for group, factor in zip(groups, factors, strict=True)
            ]
        return [
            # The rate of the schedule at the step that equals the group's number of updates.
            self._history[line][clock.updates[group["name"]]]
            if group["name"] in clock.updates
            else group["lr"]
            for line, group in zip(lines, groups, strict=True)
        ]

    @contextmanager
    def applied(
        self, groups: Sequence[ParamGroup], lines: Sequence[int], clock: RateClock
    ) -> Iterator[None]:
        """Put the local rates into the groups for one update, then restore the scheduler's."""
        self._record(groups, lines, clock.steps)
        scheduled = [group["lr"] for group in groups]
        is_global = self.lr_time == "global" and not self.warmup
        self.last = scheduled if is_global else self._current(groups, lines, clock)
        for group, rate in zip(groups, self.last, strict=True):
            group["lr"] = rate
        try:
            yield
        finally:
            for group, rate in zip(groups, scheduled, strict=True):
                group["lr"] = rate

    def group_state(self, lines: Sequence[int], position: int) -> dict[str, Any]:
        """Return the rates to save with a param group, if it is the first of its user group."""
        line = lines[position]
        is_first = lines.index(line) == position
        return {"lr_history": list(self._history.get(line, []))} if is_first else {}

    def check_state(self, lines: Sequence[int], states: Sequence[Mapping[str, Any]]) -> None:
        """Raise if ``"local"`` needs rates of past steps that the saved run does not have.

        Raises:
            ValueError: It was saved with another ``lr_time``, or other param groups of the user.
        """
        history = self._saved_history(lines, states)
        steps = states[0]["steps"]
        if self.lr_time == "local" and (
            len(history.get(0, [])) < steps or history.keys() != set(lines)
        ):
            raise ValueError(
                f"state_dict lacks rates of its {steps} steps, which lr_time='local' needs: it was "
                "saved with another lr_time or other param groups. Build the optimizer with the "
                "settings of the one that saved it."
            )

    def load_state(self, lines: Sequence[int], states: Sequence[Mapping[str, Any]]) -> None:
        """Load what `group_state` returned, one mapping per param group."""
        self._history = self._saved_history(lines, states)

    def restart(self) -> None:
        """Delete the rates of all steps."""
        self._history = {}

    def _saved_history(
        self, lines: Sequence[int], states: Sequence[Mapping[str, Any]]
    ) -> dict[int, list[float]]:
        return {
            line: list(states[position]["lr_history"])
            for line, position in ((line, lines.index(line)) for line in set(lines))
            if "lr_history" in states[position]
        }

    def _record(self, groups: Sequence[ParamGroup], lines: Sequence[int], step: int) -> None:
        """Store the rates that a scheduler has set for this step."""
        if self.lr_time == "local":
            rates = dict(zip(lines, (group["lr"] for group in groups), strict=True))
            for line, rate in rates.items():
                self._history.setdefault(line, [])[step:] = [float(rate)]
