"""A bound on how long a module may be idle, for any allocator."""

from __future__ import annotations

from dataclasses import dataclass

from dynalora_optim._base.checks import whole_number
from dynalora_optim.allocation._allocators import as_allocator
from dynalora_optim.allocation._context import AllocationContext, Allocator, CostAware


@dataclass(frozen=True)
class Bounded:
    """Limits how long a module is idle, and changes another allocator's choice as little as needed.

    No module is idle for more than n = ``max_idle_periods`` periods in a row: it must be in one of
    the next r = n + 1 - idle selections. Selections of k modules can meet all these deadlines if
    and only if, for every d >= 1, at most k d modules have r <= d. So of the modules with
    r <= d + 1, this selection takes at least (their number) - k d.

    The optimizer's ``active`` is k, even if the allocator itself does not use it.

    Attributes:
        allocator: An allocator, or the short name of one.
        max_idle_periods: How many selections in a row may leave a module out.

    Raises:
        TypeError: ``allocator`` is neither an allocator nor a name.
        ValueError: The name is unknown, the allocator decides from costs, or the bound is below 1.

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
                "must be chosen may not fit within the costs that this allocator allows. Use "
                "Budget(floor=...), which chooses each module with some probability."
            )
        object.__setattr__(self, "allocator", allocator)

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

    def select(self, context: AllocationContext) -> list[int]:
        """Return the allocator's choice, with urgent modules in place of its last ones."""
        preferred = list(self._inner.select(context))
        modules = range(len(context.scores))
        # First the modules that the allocator chose, then the others, the longest idle first.
        order = [*preferred, *sorted(set(modules) - {*preferred}, key=lambda m: -context.idle[m])]
        chosen: list[int] = []
        for d in range(self.max_idle_periods + 1):
            urgent = [m for m in order if self.max_idle_periods - context.idle[m] <= d]
            missing = len(urgent) - context.active * d - len({*urgent} & {*chosen})
            chosen += [m for m in urgent if m not in chosen][: max(missing, 0)]
        del chosen[context.active :]  # only after `active` was lowered during the run
        room = max(len(preferred) - len(chosen), 0)
        return chosen + [m for m in preferred if m not in chosen][:room]
