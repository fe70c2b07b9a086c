"""A row that is being measured: a model, its optimizer, and the choices that are drawn."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial

import torch
from _count import Counted, count
from torch import Tensor, nn
from torch.optim import Optimizer

from dynalora_optim import AllocationContext, Budget, DynamicAllocationOptimizer

Choice = tuple[tuple[str, ...], ...]  # active groups, trained parameters, checkpointed blocks


@dataclass(frozen=True)
class Watched(Budget):
    """A `Budget` that stores the contexts of its selections."""

    contexts: list[AllocationContext] = field(default_factory=list, compare=False)

    def select(self, context: AllocationContext) -> list[int]:
        self.contexts.append(context)
        return super().select(context)

    def least_probability(self) -> float:
        """Return the smallest probability that any module had in any selection."""
        return min(min(self.probabilities(context)) for context in self.contexts)


@dataclass
class Run:
    """A row that is being measured.

    Attributes:
        draws: Number of choices to count; 1 if nothing is drawn.
        redraw: Makes a new choice after a step, if the optimizer does not do that itself.
        budget: The allocator, if it is a budget.
    """

    model: nn.Module
    optimizer: Optimizer
    batch: dict[str, Tensor]
    draws: int = 1
    redraw: Callable[[], None] | None = None
    budget: Watched | None = None
    choices: list[Choice] = field(default_factory=list)

    def loss(self) -> Tensor:
        value: Tensor = self.model(**self.batch).loss
        return value

    def step(self) -> None:
        """Take one training step, with the choice at its end."""
        self.loss().backward()  # type: ignore[no-untyped-call]
        self.update()

    def update(self) -> None:
        self.optimizer.step()
        self.optimizer.zero_grad()
        if self.redraw:
            self.redraw()

    def choice(self) -> Choice:
        """Return all that the cost of a step depends on: what trains and what is checkpointed."""
        active = getattr(self.optimizer, "active_groups", ())
        trains = [name for name, p in self.model.named_parameters() if p.requires_grad]
        switched = [
            name
            for name, module in self.model.named_modules()
            if getattr(module, "gradient_checkpointing", False)
        ]
        return tuple(active), tuple(trains), tuple(switched)

    def count(self, known: dict[Choice, Counted]) -> list[Counted]:
        """Make ``draws`` choices, and return the counts of the step of each.

        ``optimizer.step()`` (or `redraw`) makes the choices. If a choice is new, a real step is
        taken and counted. If it was counted before, only the update is run, with gradients of zero
        for all active groups. So the counters of updates and of compute, which the choices depend
        on, change as in training. The importance scores come only from the real forward passes.
        """
        self.loss()  # a Budget measures in its first forward pass; this is not counted
        counted = []
        for _ in range(self.draws):
            choice = self.choice()
            if choice in known:
                self._fill_gradients()
            else:
                known[choice] = count(self.loss)
            self.choices.append(choice)
            counted.append(known[choice])
            self.update()
        return counted

    def resume(self, active: list[list[str]]) -> None:
        """Take the choices that an earlier run has counted, without counting again."""
        self.choices = [(tuple(names), (), ()) for names in active]
        if self.budget is not None:  # in its first steps it measures the blocks and the loop
            self.step()
            self.step()

    def _fill_gradients(self) -> None:
        active = getattr(self.optimizer, "active_groups", None)
        allocated = set(getattr(self.optimizer, "groups", ()))
        groups = getattr(self.optimizer, "module_groups", self.optimizer.param_groups)
        for group in groups:
            name = group.get("name")
            if active is None or name not in allocated or name in active:
                for parameter in group["params"]:
                    if parameter.requires_grad:
                        parameter.grad = torch.zeros_like(parameter)

    def timed_steps(self) -> list[tuple[float, Callable[[], None]]]:
        """Return the steps to time, each with its share of the counted steps.

        For a budget there is one step per distinct choice. Steps of different choices take
        different times, and a median over a few of them would be the time of only one choice.
        """
        if self.budget is None:
            return [(1.0, self.step)]
        counted = Counter(active for active, *_ in self.choices)
        return [
            (number / len(self.choices), partial(self._step_with, active))
            for active, number in counted.items()
        ]

    def _step_with(self, active: tuple[str, ...]) -> None:
        """Activate these groups, then take a step."""
        assert isinstance(self.optimizer, DynamicAllocationOptimizer)
        self.optimizer.hold(active)
        self.step()

    def never_active(self) -> list[str]:
        """Return the allocated modules that no counted choice made active."""
        ever = {name for active, *_ in self.choices for name in active}
        return [name for name in getattr(self.optimizer, "groups", ()) if name not in ever]
