"""The search: of all plans whose peak fits, the highest value, and then the least work.

A plan is built from the last block down, so that one pass serves every lowest block: what lies
above a block does not depend on how far down the backward pass goes on. Of a partial plan four
numbers matter to what is still to come:

- its *slack*: the most bytes that the blocks below may hold, so that nothing above exceeds the
  limit. One number stands for all moments above, for they all grow with what is held below;
- the *gradients* above, which are alive while the blocks below run backward. (If all gradients are
  alive from the forward on, what the blocks below may hold includes their gradients.);
- its *value* and its *FLOPs* so far.

Of two partial plans one is dropped if the other is no worse in all four: whatever completes the one
completes the other. Few remain where blocks are alike, and then the plan found is the best.

Where blocks differ, their number can double with each block, and no fast way to the very best is
known: with two bounds (held bytes, gradients) this is a knapsack problem of two dimensions, which
has no fully polynomial approximation unless P = NP (Korte and Schrader, 1981). So few partial plans
are kept of each block (`_MOST`). If there are more, they are sorted into boxes, which are as wide
in gradients, value and FLOPs as it takes, and of each box the one of most slack is kept. So

- the limit is never exceeded: a partial plan has its own exact numbers, none is rounded;
- no more than 4 x `_MOST` partial plans are looked at per block: the time is linear in the blocks;
- whatever completes a plan that is dropped completes the one kept for it, unless the gradients or
  FLOPs of the latter, which are greater by less than a box is wide, are too many. Per block that
  loses less value, and less work, than a box is wide; over the blocks the losses add up at most.

In truth they hardly add up. `tests/test_search.py` holds results for 128 blocks that all differ
within 1% of wider searches: in value, and in work where all train. For a choice of fewer blocks
what is recomputed is planned once more, for these alone (`cheapest_plan`). Where memory and FLOPs
(`flops`) both leave no room for whole blocks of parameters the boxes are the widest, and 10% can
be lost.
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
_FINEST, _COARSER = 2**-16, 1.5  # the first width of a box, and the factor of each further one
_VALUE_FIRST = 64  # how much wider a box is in FLOPs where they only decide between equal values
Choices: TypeAlias = tuple[tuple[bool, ...], ...]  # per block: the allowed values of "it trains"
# Slack, gradients, value, FLOPs, and the choice: two bits per block, those of the last block first,
# so that of equal plans the smallest number recomputes, and leaves out, the lowest blocks.
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
        costs: The measured costs.
        values: For each block, a number >= 0: the value of training it.
        limit: The bytes that the peak may not exceed.
        lowest: The lowest block that trains.
        flops: The FLOPs that the backward pass may not exceed; None for no limit.
    """
    # If every block can train, no choice has a higher value. This search does not need the values.
    choices = _one_choice(costs, costs.trainable)
    everyone = _Problem(costs, choices, (0.0,) * len(choices), limit, flops)
    shared = costs.base(lowest), _down_to(costs, lowest)
    plan = _best_plans(everyone, *shared).get(lowest)
    if plan:
        return plan
    choosing = _Problem(costs, _all_choices(costs), tuple(values), limit, flops)
    return _best_plans(choosing, *shared).get(lowest)


def cheapest_plan(costs: Costs, active: Collection[int], limit: int) -> Plan | None:
    """Return the plan of least work in which exactly these blocks train; None if none fits."""
    choices = _one_choice(costs, active)
    problem, lowest = _Problem(costs, choices, (0.0,) * len(choices), limit), min(active)
    return _best_plans(problem, costs.base(lowest), lowest).get(lowest)


def least_peak(costs: Costs, lowest: int, active: Collection[int] | None = None) -> int:
    """Return the smallest peak of any plan whose backward pass ends at ``lowest``.

    If ``active`` is given, only plans in which exactly these blocks train are considered.
    """
    choices = _all_choices(costs) if active is None else _one_choice(costs, active)
    return _least_peaks(costs, choices, costs.base(lowest), _down_to(costs, lowest))[lowest]


def least_peak_of_one(costs: Costs, block: int) -> int:
    """Return the smallest peak if only this block trains, and those that always do."""
    return least_peak(costs, block, costs.pinned | {block})


def _down_to(costs: Costs, lowest: int) -> int:
    """Return the lowest of the lowest blocks that share one search: all but block 0.

    What further forwards need is not the same for any two, so that each has a search of its own.
    """
    return lowest if costs.loop.later else min(lowest, 1)


def _all_choices(costs: Costs) -> Choices:
    trains = (block in costs.trainable for block in range(len(costs.blocks)))
    both = ((True, False) if possible else (False,) for possible in trains)
    return tuple((True,) if b in costs.pinned else ways for b, ways in enumerate(both))


def _one_choice(costs: Costs, active: Collection[int]) -> Choices:
    return tuple((block in active,) for block in range(len(costs.blocks)))


@lru_cache(maxsize=256)
def _best_plans(problem: _Problem, base: int, down_to: int) -> dict[int, Plan]:
    """Return the best plan for each lowest block from ``down_to`` up, if they have this base."""
    costs, plans = problem.costs, {}
    for lowest, partials in _whole(problem, base, down_to):
        fit = (p for p in partials if _elsewhere(costs, base, lowest, p) <= problem.limit)
        best = min(fit, key=lambda p: (-p[2], p[3], -p[0], p[4]), default=None)
        if best:
            plans[lowest] = _plan(costs, lowest, best[-1])
    return plans


@lru_cache(maxsize=256)
def _least_peaks(costs: Costs, choices: Choices, base: int, down_to: int) -> dict[int, int]:
    """Return the least peak for each lowest block from ``down_to`` up, if they have this base."""
    # With no limit to measure it against, slack is what a peak lacks to 0 bytes.
    problem, peaks = _Problem(costs, choices, None, 0), {}
    bottom = costs.prefix.held if costs.prefix else 0
    for lowest, partials in _whole(problem, base, down_to):
        peaks[lowest] = min(
            max(bottom - p[0], _elsewhere(costs, base, lowest, p)) for p in partials
        )
    return peaks


def _elsewhere(costs: Costs, base: int, lowest: int, partial: Partial) -> int:
    """Return the most bytes alive at the moments that its slack does not stand for.

    They are the forward of what is below the lowest block, the backward of what trains before the
    blocks, and the optimizer's step.
    """
    trained = partial[1] + costs.prefix_gradients
    standing = trained if costs.loop.standing else 0
    bottom = costs.prefix.held if costs.prefix else 0
    below = [base + bottom + block.below for block in costs.blocks[:lowest]]
    moments = [moment + standing for moment in (costs.before + costs.loop.stale, *below)]
    if costs.prefix:
        gradients = standing or partial[1]
        moments.append(costs.backward_base + costs.prefix.backward + gradients + costs.kept)
    in_blocks = partial[1] - costs.head_gradients
    moments.append(trained + costs.update(in_blocks))
    return costs.loop.carried + costs.loop.resident.of_active(in_blocks) + max(moments)


def _whole(problem: _Problem, base: int, down_to: int) -> Iterator[tuple[int, list[Partial]]]:
    """Yield each block down to ``down_to``, from the last one on, and the plans that end there."""
    costs = problem.costs
    standing = costs.outer_gradients if costs.loop.standing else 0
    alive = costs.loop.carried + costs.after_blocks(base, down_to) + standing
    flops = costs.flops(Plan(frozenset()))
    partials = [(problem.limit - alive, costs.head_gradients, 0.0, flops, 0)]
    for block in reversed(range(down_to, len(costs.blocks))):
        yield block, _longer(problem, base, partials, block, lowest=block)
        longer = _longer(problem, base, partials, block)
        partials = _thinned(problem, _undominated(longer, bounded=problem.flops is not None))


def _longer(
    problem: _Problem, base: int, partials: Sequence[Partial], block: int, lowest: int = -1
) -> list[Partial]:
    """Return the ``partials`` that fit with ``block`` below them, in each of its ways."""
    costs, limit, values = problem.costs, problem.limit, problem.values
    least = -math.inf if values is None else costs.prefix.held if costs.prefix else 0
    stands, limit = costs.loop.standing, limit - costs.loop.carried
    before = costs.prefix_gradients if stands else 0
    most = math.inf if problem.flops is None else problem.flops
    state = costs.loop.resident.of_active  # alive at all moments while its block is active
    beside = [state(partial[1] - costs.head_gradients) for partial in partials]
    longer: list[Partial] = []
    for active in (True,) if block == lowest else problem.choices[block]:
        role = costs.role(block, lowest, active=active)
        gradients = costs.blocks[block].gradients if active else 0
        value = values[block] if values and active else 0.0
        # What is alive beside that of the blocks above, in this block too.
        own = (gradients + before if stands else 0) + state(gradients)
        for use, checkpointed in ((role.full, 0), (role.checkpointed, _CHECKPOINTED)):
            bits = (checkpointed if active else checkpointed + _IDLE) << 2 * block
            held = use.held + gradients * stands + state(gradients)
            flops = use.flops if values else 0
            forward = limit - base - use.forward - own
            backward = limit - costs.backward_base - use.backward - costs.kept - own
            longer += [
                (slack, above + gradients, worth + value, work + flops, choice | bits)
                for (room, above, worth, work, choice), more in zip(partials, beside, strict=True)
                if work + flops <= most
                and (
                    slack := min(
                        room - held, forward - above * stands - more, backward - above - more
                    )
                )
                >= least
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


def _thinned(problem: _Problem, partials: list[Partial]) -> list[Partial]:
    """Return ``partials``, sorted by slack, or of each box the first, if there are too many."""
    if len(partials) <= _MOST:
        return partials
    per_limit, per_value, per_work = _box(problem)
    scaled = [(p[1] / per_limit, p[2] / per_value, p[3] / per_work) for p in partials]
    width = _FINEST
    while True:
        found: dict[tuple[int, ...], Partial] = {}
        for partial, (gradients, value, flops) in zip(partials, scaled, strict=True):
            box = int(gradients / width), int(value / width), int(flops / width)
            found.setdefault(box, partial)
            if len(found) > _MOST:
                break
        else:
            return [*found.values()]
        width *= _COARSER


def _box(problem: _Problem) -> tuple[float, float, float]:
    """Return how much gradients, value and FLOPs a box of width 1 has."""
    value, work = sum(problem.values or ()), problem.costs.flops(problem.costs.all_active)
    if value and problem.flops is None:
        work *= _VALUE_FIRST
    return max(problem.limit, 1), value or 1.0, work


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
