"""The choice: of all plans whose peak fits, the one of highest value, and then of least work.

A plan is built from the last block down, so that one pass serves every lowest block: what lies
above a block does not depend on how far down the backward pass goes on. Of a partial plan four
numbers matter to what is still to come:

- its *slack*: the most bytes that the blocks below may hold, so that nothing above exceeds the
  limit. One number stands for all moments above, for they all grow with what is held below;
- the *gradients* above, which are alive while the blocks below run backward;
- its *value* and its *FLOPs* so far.

Of two partial plans one is dropped if the other is no worse in all four: whatever completes the one
completes the other. Few remain where blocks are alike, and then the plan found is the best.

Where blocks differ, their number can double with each block, and no fast way to the very best is
known: with two bounds (held bytes, gradients) this is a knapsack problem of two dimensions, which
has no fully polynomial approximation unless P = NP (Korte and Schrader, 1981). So no more than
`_MOST` partial plans are kept of each block (`_thinned`). They are sorted into boxes, equally wide
in gradients, value and FLOPs, and of each box the one of most slack is kept. It follows that

- the limit is never exceeded: each partial plan carries its own exact numbers, none is rounded;
- no more than 4 x `_MOST` partial plans are looked at per block: the time is linear in the blocks;
- whatever completes a plan that is dropped completes the one kept for it, as long as the latter's
  gradients, greater by less than the width of a box, fit as well. The loss of value and of work in
  one block is then less than the width of a box. The losses of all blocks add up at most.

Where all blocks train there is one dimension of boxes, the work, and a box is 1 / `_MOST` of the
work that recomputing can add. With 128 blocks that all differ, results are within 1% of a bound
that no plan can pass (`tests/test_search.py`).
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache, reduce
from itertools import accumulate, compress, groupby
from operator import and_
from typing import Any, TypeAlias

from dynalora_optim.allocation._costs import Costs, Plan

_MOST = 256  # partial plans that are kept of each block
Choices: TypeAlias = tuple[tuple[bool, ...], ...]  # per block: whether it may train, and may not
# Slack, gradients, value, FLOPs, and the choice: two bits per block, the last block's come first,
# so that of equal plans the smaller number is the one that recomputes, and leaves out, lower blocks.
Partial: TypeAlias = tuple[int, int, float, int, int]
_IDLE, _CHECKPOINTED = 2, 1


@dataclass(frozen=True)
class _Problem:
    """What may be chosen, what it is worth, and what it may not exceed."""

    costs: Costs
    choices: Choices
    values: tuple[float, ...] | None  # None: only the peak counts
    limit: int
    flops: float | None = None


def best_plan(
    costs: Costs, values: Sequence[float], limit: int, lowest: int, flops: float | None = None
) -> Plan | None:
    """Return the best plan whose backward pass ends at ``lowest``; None if none fits.

    Args:
        costs: What each choice costs.
        values: What it is worth that a block trains, one number >= 0 per block.
        limit: The bytes that the peak may not exceed.
        lowest: The lowest block that trains.
        flops: The FLOPs that the backward pass may not exceed.
    """
    blocks = range(len(costs.blocks))
    # Where every block may train no choice is worth more, and the values need not be looked at.
    everyone = _Problem(costs, _one_choice(costs, blocks), (0.0,) * len(blocks), limit, flops)
    plan = _plans(everyone, lowest).get(lowest)
    if plan:
        return plan
    choosing = _Problem(costs, _all_choices(costs), tuple(values), limit, flops)
    return _plans(choosing, lowest).get(lowest)


def cheapest_plan(costs: Costs, active: Collection[int], limit: int) -> Plan | None:
    """Return the plan of least work in which these blocks train; None if none fits."""
    choices = _one_choice(costs, active)
    problem = _Problem(costs, choices, (0.0,) * len(choices), limit)
    return _plans(problem, min(active)).get(min(active))


def least_peak(costs: Costs, lowest: int, active: Collection[int] | None = None) -> int:
    """Return the smallest peak of any plan whose backward pass ends at ``lowest``.

    Of those in which just these blocks train, if ``active`` names them.
    """
    choices = _all_choices(costs) if active is None else _one_choice(costs, active)
    return _least_peaks(costs, choices, costs.base(lowest))[lowest]


def _all_choices(costs: Costs) -> Choices:
    blocks = range(len(costs.blocks))
    return tuple((True,) if block in costs.pinned else (True, False) for block in blocks)


def _one_choice(costs: Costs, active: Collection[int]) -> Choices:
    return tuple((block in active,) for block in range(len(costs.blocks)))


def _plans(problem: _Problem, lowest: int) -> dict[int, Plan]:
    """Return the best plan for each lowest block that has the same base as this one."""
    return _best_plans(problem, problem.costs.base(lowest))


@lru_cache(maxsize=256)
def _best_plans(problem: _Problem, base: int) -> dict[int, Plan]:
    costs, plans = problem.costs, {}
    for lowest, partials in _whole(problem, base):
        below = _below(costs, base, lowest)
        fit = (p for p in partials if max(below, _at_prefix(costs, p)) <= problem.limit)
        best = min(fit, key=lambda p: (-p[2], p[3], -p[0], p[4]), default=None)
        if best:
            plans[lowest] = _plan(costs, lowest, best[-1])
    return plans


@lru_cache(maxsize=256)
def _least_peaks(costs: Costs, choices: Choices, base: int) -> dict[int, int]:
    """Return the least peak for each lowest block that has this base."""
    # With no limit to measure it against, slack is what a peak lacks to 0 bytes.
    problem, peaks = _Problem(costs, choices, None, 0), {}
    bottom = costs.prefix.held if costs.prefix else 0
    for lowest, partials in _whole(problem, base):
        below = _below(costs, base, lowest)
        peaks[lowest] = min(max(bottom - p[0], below, _at_prefix(costs, p)) for p in partials)
    return peaks


def _below(costs: Costs, base: int, lowest: int) -> int:
    """Return the most bytes alive while the blocks below the lowest run."""
    bottom = costs.prefix.held if costs.prefix else 0
    return max((base + bottom + block.below for block in costs.blocks[:lowest]), default=0)


def _at_prefix(costs: Costs, partial: Partial) -> int:
    """Return the bytes alive in the backward pass of what trains before the blocks."""
    return costs.backward_base + costs.prefix.backward + partial[1] if costs.prefix else 0


def _whole(problem: _Problem, base: int) -> Iterator[tuple[int, list[Partial]]]:
    """Yield each lowest block that has this base, from the last one down, and its plans."""
    costs, head = problem.costs, problem.costs.head
    slack = problem.limit - max(base + head.forward, costs.backward_base + head.backward)
    partials = [(slack, costs.head_gradients, 0.0, costs.flops(Plan(frozenset())), 0)]
    for block in reversed(range(len(costs.blocks))):
        if block in costs.lowest_blocks() and costs.base(block) == base:
            yield block, _longer(problem, base, partials, block, lowest=block)
        longer = _longer(problem, base, partials, block)
        partials = _thinned(_undominated(longer, bounded=problem.flops is not None))


def _longer(
    problem: _Problem, base: int, partials: Iterable[Partial], block: int, lowest: int = -1
) -> list[Partial]:
    """Return the ``partials`` that fit with ``block`` below them, in each of its ways."""
    costs, limit, values = problem.costs, problem.limit, problem.values
    bottom = costs.prefix.held if costs.prefix else 0
    least = -math.inf if values is None else bottom
    most = math.inf if problem.flops is None else problem.flops
    longer: list[Partial] = []
    for active in (True,) if block == lowest else problem.choices[block]:
        role = costs.role(block, lowest, active=active)
        gradients = costs.blocks[block].gradients if active else 0
        value = values[block] if values and active else 0.0
        for use, checkpointed in ((role.full, 0), (role.checkpointed, _CHECKPOINTED)):
            bits = (checkpointed if active else checkpointed + _IDLE) << 2 * block
            held, flops = use.held, use.flops if values else 0
            forward = limit - base - use.forward
            backward = limit - costs.backward_base - use.backward
            longer += [
                (slack, above + gradients, worth + value, work + flops, choice | bits)
                for room, above, worth, work, choice in partials
                if (slack := min(room - held, forward, backward - above)) >= least
                and work + flops <= most
            ]
    return longer


def _plan(costs: Costs, lowest: int, bits: int) -> Plan:
    blocks = range(lowest, len(costs.blocks))
    return Plan(
        frozenset(block for block in blocks if not bits >> 2 * block & _IDLE),
        frozenset(block for block in blocks if bits >> 2 * block & _CHECKPOINTED),
    )


def _undominated(partials: Iterable[Partial], *, bounded: bool) -> list[Partial]:
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


def _thinned(partials: list[Partial]) -> list[Partial]:
    """Return ``partials``, sorted by slack, or of each box the first, if there are too many."""
    if len(partials) <= _MOST:
        return partials
    sides = [_side([p[axis] for p in partials]) for axis in (1, 2, 3)]
    boxes = _MOST
    while True:
        found: dict[tuple[int, ...], Partial] = {}
        for partial, *shares in zip(partials, *sides, strict=True):
            found.setdefault(tuple([int(share * boxes) for share in shares]), partial)
            if len(found) > _MOST:
                break
        else:
            return [*found.values()]
        boxes = boxes * 2 // 3


def _side(numbers: list[float]) -> list[float]:
    """Return where the ``numbers`` lie between the least (0) and the greatest of them (1)."""
    least, greatest = min(numbers), max(numbers)
    return [(number - least) / (greatest - least or 1) for number in numbers]


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
