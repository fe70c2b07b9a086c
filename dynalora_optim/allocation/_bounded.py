"""A bound on how long a module may stay idle, whatever the allocator."""

from __future__ import annotations

from dataclasses import dataclass

from dynalora_optim._base.checks import whole_number
from dynalora_optim.allocation._allocators import as_allocator
from dynalora_optim.allocation._context import AllocationContext, Allocator, CostAware


@dataclass(frozen=True)
class Bounded:
    """Another allocator's choice, changed as little as keeps every module's idle time in bounds.

    No module is idle for more than n = ``max_idle_periods`` periods in a row: it has to be in one
    of the next r = n + 1 - idle selections. Selections of k modules can meet all deadlines from
    now on exactly if for every d >= 1 at most k d modules have r <= d; so of the modules with
    r <= d + 1, this selection takes at least (their number) - k d.

    The optimizer's ``active`` is k, also where the allocator itself makes no use of it.

    Attributes:
        allocator: An allocator, or the short name of one.
        max_idle_periods: How many selections in a row may leave a module out.

    Raises:
        TypeError: ``allocator`` is neither an allocator nor a name.
        ValueError: An unknown name, an allocator that decides from costs, or a bound below 1.

    Example:
        >>> DynamicAllocationOptimizer(inner, model, allocator=Bounded("discounted", 4))
    """

    allocator: str | Allocator
    max_idle_periods: int

    def __post_init__(self) -> None:
        whole_number("max_idle_periods", self.max_idle_periods, least=1, of="periods")
        allocator = as_allocator(self.allocator)
        if isinstance(allocator, CostAware):
            raise ValueError(
                f"Bounded({type(allocator).__name__}(...), {self.max_idle_periods}): a module that "
                "is due may not fit into the costs that this allocator keeps. "
                "Budget(floor=...) gives each module its chance."
            )
        object.__setattr__(self, "allocator", allocator)

    @property
    def _inner(self) -> Allocator:
        assert not isinstance(self.allocator, str)
        return self.allocator

    def check(self, active: int, modules: int) -> None:
        """Raise if ``active`` of ``modules`` cannot keep the bound.

        Raises:
            ValueError: The message names the least bound and the least count that would do.
        """
        n = self.max_idle_periods
        if active * (n + 1) < modules:
            raise ValueError(
                f"max_idle_periods={n} cannot be kept with {active} of {modules} modules active: "
                f"pass at least {-(-modules // active) - 1}, or raise active to "
                f"{-(-modules // (n + 1))}."
            )

    def select(self, context: AllocationContext) -> list[int]:
        """Return the allocator's choice with the most urgent modules in place of its last ones."""
        preferred = list(self._inner.select(context))
        modules = range(len(context.scores))
        # The allocator's own picks first, then those that have waited longest.
        order = [*preferred, *sorted(set(modules) - {*preferred}, key=lambda m: -context.idle[m])]
        chosen: list[int] = []
        for d in range(self.max_idle_periods + 1):
            urgent = [m for m in order if self.max_idle_periods - context.idle[m] <= d]
            missing = len(urgent) - context.active * d - len({*urgent} & {*chosen})
            chosen += [m for m in urgent if m not in chosen][: max(missing, 0)]
        del chosen[context.active :]  # only after `active` was lowered in mid-run
        room = max(len(preferred) - len(chosen), 0)
        return chosen + [m for m in preferred if m not in chosen][:room]
