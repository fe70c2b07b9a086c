"""A bound on how long a module may be idle, for any allocator."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from typing import Any, cast

from dynalora_optim._base.checks import whole_number
from dynalora_optim.allocation._allocators import as_allocator
from dynalora_optim.allocation._context import (
    AllocationContext,
    Allocator,
    CostAware,
    Covering,
    uses_active,
)
from dynalora_optim.allocation._costs import Costs, Plan


@dataclass(frozen=True, repr=False)
class Bounded:
    """Limits how long a module is idle, and changes another allocator's choice as little as needed.

    No module is idle for more than n = ``max_idle_periods`` periods in a row: it must be in one of
    the next r = n + 1 - idle selections. Selections of k modules can meet all these deadlines if
    and only if, for every d >= 1, at most k d modules have r <= d. So of the modules with
    r <= d + 1, this selection takes at least (their number) - k d.

    The optimizer's ``active`` is k, even if the allocator itself does not use it.

    If the allocator decides from costs, as `Budget` does, it names sets of modules that fit, and
    these sets take turns: each must be active once in n + 1 selections. The rule above holds with
    sets in place of modules, and k = 1. A set that must go now is active in full, together with
    what else the allocator draws within its bounds. All other selections are those of the allocator
    alone. Such a bound is refused at the first batch, with the smallest that the sets can keep.

    Attributes:
        allocator: An allocator, or the short name of one.
        max_idle_periods: How many selections in a row may leave a module out.

    Raises:
        TypeError: ``allocator`` is neither an allocator nor a name.
        ValueError: The name is unknown, the allocator decides from costs but has no method
            ``cover``, or the bound is below 1.

    Example:
        >>> DynamicAllocationOptimizer(inner, model, allocator=Bounded("discounted", 4))
    """

    allocator: str | Allocator
    max_idle_periods: int

    def __new__(cls, allocator: object = None, *_: Any, **__: Any) -> Bounded:
        """Return an object that decides from costs if ``allocator`` does."""
        return object.__new__(_BoundedByCosts if isinstance(allocator, CostAware) else cls)

    def __post_init__(self) -> None:
        whole_number("max_idle_periods", self.max_idle_periods, least=1, of="periods")
        allocator = as_allocator(self.allocator)
        if isinstance(allocator, CostAware) and not isinstance(allocator, Covering):
            raise ValueError(
                f"Bounded({type(allocator).__name__}(...), {self.max_idle_periods}): a module that "
                "must be chosen may not fit within the costs that this allocator allows. Give it a "
                "method cover(costs, selections), as Budget has."
            )
        object.__setattr__(self, "allocator", allocator)

    def __repr__(self) -> str:
        return f"Bounded({self.allocator!r}, {self.max_idle_periods})"

    @property
    def _inner(self) -> Allocator:
        assert not isinstance(self.allocator, str)
        return self.allocator

    def check(self, active: int, modules: int) -> None:
        """Raise if ``active`` of ``modules`` cannot keep the bound.

        Raises:
            ValueError: The bound cannot be kept. The message names the smallest bound and the
                smallest count that are possible.
        """
        n = self.max_idle_periods
        if active * (n + 1) < modules:
            raise ValueError(
                f"max_idle_periods={n} cannot be kept with {active} of {modules} modules active: "
                f"pass at least {-(-modules // active) - 1}, or raise active to "
                f"{-(-modules // (n + 1))}."
            )

    def select(self, context: AllocationContext) -> Collection[int]:
        """Return the allocator's choice, with urgent modules in place of its last ones."""
        preferred = list(self._inner.select(context))
        modules = range(len(context.scores))
        # First the modules that the allocator chose, then the others, the longest idle first.
        order = [*preferred, *sorted(set(modules) - {*preferred}, key=lambda m: -context.idle[m])]
        chosen = self._due(order, context.idle, context.active)
        room = max(len(preferred) - len(chosen), 0)
        return chosen + [m for m in preferred if m not in chosen][:room]

    def _due(self, order: Sequence[int], idle: Sequence[int], at_once: int) -> list[int]:
        """Return which must go now, if as many as ``at_once`` go in each selection."""
        due: list[int] = []
        for d in range(self.max_idle_periods + 1):
            urgent = [m for m in order if self.max_idle_periods - idle[m] <= d]
            missing = len(urgent) - at_once * d - len({*urgent} & {*due})
            due += [m for m in urgent if m not in due][: max(missing, 0)]
        return due[:at_once]  # there are more only after `active` was lowered, or costs have grown


class _BoundedByCosts(Bounded):
    """A bound for an allocator that decides from costs; see `Bounded`."""

    @property
    def _inner(self) -> Covering:
        return cast(Covering, self.allocator)

    @property
    def uses_active(self) -> bool:
        """Whether the optimizer's ``active`` sets how many modules the allocator chooses."""
        return uses_active(self._inner)

    def check(self, active: int, modules: int) -> None:
        """Do nothing: what is possible depends on the costs, which are not measured yet."""

    def select(self, context: AllocationContext) -> Collection[int]:
        """Return the allocator's choice, which includes the modules that must be active now.

        Raises:
            ValueError: The allocator refuses these costs, or cannot keep the bound.
        """
        return self._inner.select(self._with_due(context))

    def probabilities(self, context: AllocationContext) -> Sequence[float]:
        """Return the probability with which `select` activates each module.

        Raises:
            ValueError: The allocator refuses these costs, or cannot keep the bound.
        """
        found: Sequence[float] = cast(Any, self._inner).probabilities(self._with_due(context))
        return found

    def plan(self, costs: Costs, chosen: Collection[int]) -> Plan:
        """Return the allocator's plan for the ``chosen`` modules.

        Raises:
            ValueError: The allocator refuses them.
        """
        return self._inner.plan(costs, chosen)

    def fitting(self, costs: Costs, chosen: Collection[int]) -> Collection[int]:
        """Return those of the ``chosen`` modules that the allocator keeps at higher ``costs``.

        Raises:
            ValueError: The allocator keeps none, or cannot keep the bound at these costs.
        """
        if not costs.loop.is_between:
            self._inner.cover(costs, self.max_idle_periods + 1)
        return self._inner.fitting(costs, chosen)

    def _with_due(self, context: AllocationContext) -> AllocationContext:
        """Return the context with the set of modules that must be active now, if there is one."""
        if context.costs is None:
            return context  # the allocator says what is missing
        sets = self._inner.cover(context.costs, self.max_idle_periods + 1)
        idle = [max(context.idle[m] for m in modules) for modules in sets]
        # Of those that wait equally long, the cheapest first: the backward pass of a later one goes
        # further down, and so may train them again.
        order = sorted(range(len(sets)), key=lambda s: -idle[s])
        due = self._due(order, idle, at_once=1)
        return replace(context, must=tuple(sets[due[0]])) if due else context
