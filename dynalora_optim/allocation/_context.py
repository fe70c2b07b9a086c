"""What an allocator is, and what it receives: numbers only.

An allocator is any object with ``select(context) -> indices``. It receives an `AllocationContext`
(the scores, the update counters, how many modules to choose, a random generator) and returns the
positions of the modules to activate. It never sees a module or a tensor, so that it can be tested
without a model and written in ten lines.

An allocator may also have some of these:

* ``weights(context)``: the weights in proportion to which modules are drawn (`Weighted`). A
  `Budget` can draw by the same weights.
* ``plan`` and ``fitting``: it decides from measured costs, and decides which blocks are recomputed
  (`CostAware`).
* ``cover``: it knows sets of modules that fit, and activates one of them on demand (`Covering`), so
  that `Bounded` can limit how long a module waits.
* ``uses_active = False``: it decides itself how many modules are active.
* ``check(active, modules)``: raises ValueError if ``active`` of ``modules`` cannot be active.
"""

from __future__ import annotations

import math
import random
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

from dynalora_optim.allocation._costs import Costs, Plan
from dynalora_optim.importance._normalise import normalised


@dataclass(frozen=True)
class AllocationContext:
    """What an allocator decides from. Modules are numbered 0 .. M-1 in forward order.

    Attributes:
        scores: The importance y of each module (equation 1), finite and >= 0.
        updates: The counter C of each module: the gradient updates it has received.
        active: How many modules to choose (1 <= active <= M).
        reallocation: The number of selections made before this one.
        generator: The random numbers of this selection, equal on every rank and after a resume.
        idle: How many selections in a row have left each module out; () if this is not counted.
        costs: The costs of all choices; None if they are not measured.
        mean_compute: The FLOPs of the mean backward pass so far, as a share of one with all modules
            active.
        must: Modules that this selection must activate; only a `Covering` allocator gets any.
    """

    scores: tuple[float, ...]
    updates: tuple[int, ...]
    active: int
    reallocation: int
    generator: random.Random
    idle: tuple[int, ...] = ()
    costs: Costs | None = None
    mean_compute: float = 0.0
    must: tuple[int, ...] = ()

    @property
    def importance(self) -> tuple[float, ...]:
        """The scores normalised to sum to 1 (equation 2); uniform before any score exists."""
        return normalised(self.scores)

    def ranking(self) -> list[int]:
        """Return the modules from the most to the least important.

        Ties keep the forward order. Before any score exists the order is random.
        """
        modules = range(len(self.scores))
        if not any(self.scores):
            return self.generator.sample(modules, len(modules))
        return sorted(modules, key=lambda m: -self.scores[m])

    def sample(self, weights: Sequence[float]) -> list[int]:
        """Draw ``active`` different modules one after the other, each in proportion to its weight.

        Modules of weight 0 are drawn only if no others are left, and then uniformly.
        """
        # Exponential races (Efraimidis & Spirakis 2006): the arrival time of module m is
        # exponential with rate w_m. The first k to arrive are distributed like successive draws.
        # Logarithms keep very small and very large weights distinct.
        arrivals = []
        for m, weight in enumerate(weights):
            clock = math.log(-math.log1p(-self.generator.random()) or math.ulp(0.0))
            arrival = clock - math.log(weight) if weight > 0 else math.inf
            arrivals.append((arrival, clock, m))
        return [m for *_, m in sorted(arrivals)[: self.active]]


@runtime_checkable
class Allocator(Protocol):
    """Chooses the active modules of the next period."""

    def select(self, context: AllocationContext) -> Collection[int]:
        """Return the positions of the modules to activate, at least one, each once."""
        ...


@runtime_checkable
class Weighted(Allocator, Protocol):
    """Draws modules in proportion to weights, which others can read."""

    def weights(self, context: AllocationContext) -> Sequence[float]:
        """Return the weight of each module, >= 0."""
        ...


@runtime_checkable
class CostAware(Allocator, Protocol):
    """Decides from measured costs, and decides which blocks are recomputed.

    The optimizer measures the costs on the first training batch and on each larger one. Before the
    first measurement nothing is selected; after it ``context.costs`` is always set.
    """

    def plan(self, costs: Costs, chosen: Collection[int]) -> Plan:
        """Return which blocks are recomputed while the ``chosen`` modules are active.

        Raises:
            ValueError: These modules cannot be active together.
        """
        ...

    def fitting(self, costs: Costs, chosen: Collection[int]) -> Collection[int]:
        """Return those of the ``chosen`` modules that stay active at new, higher ``costs``.

        Raises:
            ValueError: No module can stay active.
        """
        ...


@runtime_checkable
class Covering(CostAware, Protocol):
    """Also knows sets of modules that take turns, and activates one of them on demand.

    ``select`` activates at least the modules of ``context.must``, which are one of these sets.
    """

    def cover(self, costs: Costs, selections: int) -> Sequence[Collection[int]]:
        """Return sets of modules, each of which can be active at once; together they are all.

        The result depends on the arguments only. The first sets are those of least compute.

        Raises:
            ValueError: Not every set can be active once in this many ``selections``.
        """
        ...


def uses_active(allocator: Allocator) -> bool:
    """Return whether the optimizer's ``active`` sets how many modules ``allocator`` chooses."""
    return bool(getattr(allocator, "uses_active", True))
