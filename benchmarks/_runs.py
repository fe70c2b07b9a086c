"""One row under way: a model, its optimizer, and the choices that it draws."""

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

Choice = tuple[tuple[str, ...], ...]  # who is active, what trains, what is checkpointed


@dataclass(frozen=True)
class Watched(Budget):
    """A `Budget` that keeps what it was asked."""

    contexts: list[AllocationContext] = field(default_factory=list, compare=False)

    def select(self, context: AllocationContext) -> list[int]:
        self.contexts.append(context)
        return super().select(context)

    def least_probability(self) -> float:
        """The smallest chance that any module had in any of the selections."""
        return min(min(self.probabilities(context)) for context in self.contexts)


@dataclass
class Run:
    """A row under way.

    Attributes:
        draws: The reallocations to count; 1 where nothing is drawn.
        redraw: Draws anew after a step, where the optimizer does not do so itself.
        budget: The allocator, if it is one.
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
        """One step of a user's loop, with its reallocation."""
        self.loss().backward()  # type: ignore[no-untyped-call]
        self.update()

    def update(self) -> None:
        self.optimizer.step()
        self.optimizer.zero_grad()
        if self.redraw:
            self.redraw()

    def choice(self) -> Choice:
        """All that the cost of a step depends on: who trains, and what is checkpointed."""
        active = getattr(self.optimizer, "active_groups", ())
        trains = [name for name, p in self.model.named_parameters() if p.requires_grad]
        switched = [
            name
            for name, module in self.model.named_modules()
            if getattr(module, "gradient_checkpointing", False) is True
        ]
        return tuple(active), tuple(trains), tuple(switched)

    def count(self, known: dict[Choice, Counted]) -> list[Counted]:
        """Count the step of each choice drawn, for ``draws`` reallocations.

        All choices are those that ``optimizer.step()`` (or `redraw`) made. A choice met for the
        first time takes a real step under the counters. One met before takes an update with
        hand-made gradients, zero for whatever is active: so the counters of updates and of compute,
        which the draws depend on, go on as in training, but the importance scores come from the
        real forwards only.
        """
        self.loss()  # a Budget measures on the first training forward: not counted
        counted = []
        for _ in range(self.draws):
            choice = self.choice()
            if choice in known:
                self._fill_gradients()
            else:
                known[choice] = count(self.loss, self.model)
            self.choices.append(choice)
            counted.append(known[choice])
            self.update()
        return counted

    def _fill_gradients(self) -> None:
        active = getattr(self.optimizer, "active_groups", None)
        allocated = set(getattr(self.optimizer, "groups", ()))
        for group in self.optimizer.param_groups:
            name = group.get("name")
            if active is None or name not in allocated or name in active:
                for parameter in group["params"]:
                    if parameter.requires_grad:
                        parameter.grad = torch.zeros_like(parameter)

    def timed_steps(self) -> list[tuple[float, Callable[[], None]]]:
        """Return steps to time, and the share of the counted steps that each stands for.

        Of a budget that is one for each distinct choice: steps of different choices take different
        times, and the median of some that were drawn would be that of one choice.
        """
        if self.budget is None:
            return [(1.0, self.step)]
        counted = Counter(self.choices)
        return [
            (number / len(self.choices), partial(self._step_with, choice))
            for choice, number in counted.items()
        ]

    def _step_with(self, choice: Choice) -> None:
        """Take a step with the groups of this choice, made active before it."""
        assert isinstance(self.optimizer, DynamicAllocationOptimizer)
        self.optimizer.hold(choice[0])
        self.step()

    def never_active(self) -> list[str]:
        """The allocated modules that were active in none of the choices counted."""
        ever = {name for active, *_ in self.choices for name in active}
        return [name for name in getattr(self.optimizer, "groups", ()) if name not in ever]
