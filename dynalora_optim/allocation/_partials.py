"""What the search may choose, its partial plans, and which of them no other one replaces."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import reduce
from itertools import accumulate, compress, groupby
from operator import and_
from typing import Any, TypeAlias

from dynalora_optim.allocation._costs import Costs, Use

Choices: TypeAlias = tuple[tuple[bool, ...], ...]  # per block: the allowed values of "it trains"
# Slack, gradients, value, FLOPs, and the choice: two bits per block, those of the last block first,
# so that of equal plans the smallest number recomputes, and leaves out, the lowest blocks.
Partial: TypeAlias = tuple[int, int, float, int, int]
IDLE, CHECKPOINTED = 2, 1
NEVER = -(2**62)  # bytes at a moment that does not come
# One way of a block: what it costs, the gradients and the value that it adds, and its two bits.
Way: TypeAlias = tuple[Use, int, float, int]


@dataclass(frozen=True)
class Problem:
    """What may be chosen, what it is worth, and what it may not exceed.

    Attributes:
        costs: The costs of the route.
        choices: What may be chosen.
        values: For each block its value; None if only the peak counts.
        limit: The bytes that the peak may not exceed.
        flops: The FLOPs that the backward pass may not exceed; None for no limit.
        trained: The blocks that train, if that is no choice; else None.
    """

    costs: Costs
    choices: Choices
    values: tuple[float, ...] | None
    limit: int
    flops: float | None = None
    trained: frozenset[int] | None = None


def ways_of(problem: Problem, block: int, lowest: int = -1) -> list[Way]:
    """Return the ways of ``block`` if the gradient reaches it."""
    costs, cost, values = problem.costs, problem.costs.blocks[block], problem.values
    ways: list[Way] = []
    alone = float(costs.prefix is not None)  # of values that do not count: whether any block trains
    is_lowest = block == lowest and not (costs.prefix and block == costs.first)
    for active in (True,) if is_lowest else problem.choices[block]:
        role = cost.lowest if is_lowest else cost.active if active else cost.idle
        gradients, idle = (cost.gradients, 0) if active else (0, IDLE)
        value = (values[block] if values else alone) if active else 0.0
        ways.append((role.full, gradients, value, idle))
        ways.append((role.checkpointed, gradients, value, idle | CHECKPOINTED))
    return ways


def undominated(partials: Iterable[Partial], *, bounded: bool) -> list[Partial]:
    """Return, from the most slack down, those to which none other is equal or better.

    Without a bound on FLOPs any value is worth any work; with it, less work may be worth more
    value later on.
    """
    ordered = sorted(partials, key=lambda p: (-p[0], p[1], -p[2], p[3], p[4]))
    orders: list[list[Any]] = [[p[1] for p in ordered]]
    if bounded:
        orders += [[-p[2] for p in ordered], [p[3] for p in ordered]]
    else:
        orders += [[(-p[2], p[3]) for p in ordered]]
    orders = [order for order in orders if order and min(order) < max(order)]
    if not orders:
        return ordered[:1]
    if len(orders) == 1:
        least = [*accumulate(orders[0], min)]
        changes = (place == 0 or least[place] < least[place - 1] for place in range(len(least)))
        return [*compress(ordered, changes)]
    no_worse = [reduce(and_, masks) for masks in zip(*map(_no_greater, orders), strict=True)]
    first = [not others & ((1 << place) - 1) for place, others in enumerate(no_worse)]
    return [*compress(ordered, first)]


def _no_greater(keys: Sequence[Any]) -> list[int]:
    """Return for each key where there are keys that are no greater, as the bits of a number."""
    found, masks = 0, [0] * len(keys)
    for _, alike in groupby(sorted(range(len(keys)), key=keys.__getitem__), keys.__getitem__):
        places = list(alike)
        for place in places:
            found |= 1 << place
        for place in places:
            masks[place] = found
    return masks
