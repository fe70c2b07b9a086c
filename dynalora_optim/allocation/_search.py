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
from functools import lru_cache

from dynalora_optim.allocation._boxes import thinned
from dynalora_optim.allocation._costs import Costs, Plan, Use
from dynalora_optim.allocation._gradients_alive import at_the_top, gradients_of
from dynalora_optim.allocation._partials import (
    CHECKPOINTED,
    IDLE,
    NEVER,
    Choices,
    Partial,
    Problem,
    Way,
    undominated,
    ways_of,
)

_MOST = 256  # partial plans that are kept of each block


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
    whole, choices, costs = costs, _one_choice(costs, costs.trainable), costs.at(lowest)
    everyone = Problem(costs, choices, (0.0,) * len(choices), limit, flops)
    shared = costs.base(lowest), _down_to(costs, lowest)
    plan = _best_plans(everyone, *shared).get(lowest)
    if not plan:
        worths = _positive(values) if costs.prefix else tuple(values)
        choosing = Problem(costs, _all_choices(costs), worths, limit, flops)
        plan = _best_plans(choosing, *shared).get(lowest)
    if costs.loop.is_even or (plan and whole.peak(plan) <= limit):
        return plan
    plans = (cheapest_plan(whole, whole.pinned | {block}, limit) for block in _alone(costs, lowest))
    fit = (plan for plan in plans if plan and (flops is None or whole.flops(plan) <= flops))
    return max(fit, key=lambda plan: sum(values[block] for block in plan.active), default=None)


def _alone(costs: Costs, lowest: int) -> Collection[int]:
    """Return the blocks any of which may train alone if the backward pass ends at ``lowest``."""
    if not costs.prefix:
        return [lowest]
    stop = costs.routes[0].first if costs.routes else len(costs.blocks)
    return costs.trainable.intersection(range(lowest, stop))


def cheapest_plan(costs: Costs, active: Collection[int], limit: int) -> Plan | None:
    """Return the plan of least work in which exactly these blocks train; None if none fits."""
    costs, lowest = costs.route_of(Plan(frozenset(active)))
    choices = _one_choice(costs, active)
    trained = None if costs.loop.is_even else frozenset(active)
    problem = Problem(costs, choices, (0.0,) * len(choices), limit, trained=trained)
    return _best_plans(problem, costs.base(lowest), lowest).get(lowest)


def least_peak(costs: Costs, lowest: int, active: Collection[int] | None = None) -> int:
    """Return the smallest peak of any plan whose backward pass ends at ``lowest``.

    If ``active`` is given, only plans in which exactly these blocks train are considered.
    """
    choices = _all_choices(costs) if active is None else _one_choice(costs, active)
    here = costs.at(lowest)
    lowest = here.first if here.prefix else lowest
    trained = None if active is None or here.loop.is_even else frozenset(active)
    problem = Problem(here, choices, None, 0, trained=trained)  # slack: what a peak lacks to 0
    return _least_peaks(problem, here.base(lowest), _down_to(here, lowest))[lowest]


def least_peak_of_one(costs: Costs, block: int) -> int:
    """Return the smallest peak if only this block trains, and those that always do."""
    active = costs.pinned | {block}
    return least_peak(costs, min(active), active)


def _down_to(costs: Costs, lowest: int) -> int:
    """Return the lowest of the lowest blocks that share one search: all but the first of a route.

    What further forwards need is not the same for any two, so that each has a search of its own.
    """
    return min(lowest, costs.first + 1) if costs.loop.is_even else lowest


def _all_choices(costs: Costs) -> Choices:
    trainable = costs.trainable
    trains = (block in trainable for block in range(len(costs.blocks)))
    both = ((True, False) if possible else (False,) for possible in trains)
    return tuple((True,) if b in costs.pinned else ways for b, ways in enumerate(both))


def _one_choice(costs: Costs, active: Collection[int]) -> Choices:
    return tuple((block in active,) for block in range(len(costs.blocks)))


def _positive(values: Sequence[float]) -> tuple[float, ...]:
    """Return the ``values``, those of 0 so small that they only count if there are no others."""
    least = min((value for value in values if value > 0), default=1.0)
    return tuple(value or least * 1e-9 for value in values)


@lru_cache(maxsize=256)
def _best_plans(problem: Problem, base: int, down_to: int) -> dict[int, Plan]:
    """Return the best plan for each lowest block from ``down_to`` up, if they have this base."""
    costs, plans = problem.costs, {}
    for lowest, partials in _whole(problem, base, down_to):
        below = _below(costs, base, lowest)
        fit = (
            p for p in _training(costs, partials) if _elsewhere(costs, below, p) <= problem.limit
        )
        best = min(fit, key=lambda p: (-p[2], p[3], -p[0], p[4]), default=None)
        if best:
            plans[lowest] = _plan(costs, lowest, best[-1])
    return plans


@lru_cache(maxsize=256)
def _least_peaks(problem: Problem, base: int, down_to: int) -> dict[int, int]:
    """Return the least peak for each lowest block from ``down_to`` up, if they have this base."""
    costs, peaks = problem.costs, {}
    bottom = costs.prefix.held if costs.prefix else 0
    for lowest, partials in _whole(problem, base, down_to):
        below = _below(costs, base, lowest)
        peaks[lowest] = min(
            max(bottom - p[0], _elsewhere(costs, below, p)) for p in _training(costs, partials)
        )
    return peaks


def _training(costs: Costs, partials: list[Partial]) -> list[Partial]:
    """Return those in which a block trains: if what comes before the blocks does, none has to."""
    if not costs.prefix:
        return partials
    none = sum(IDLE << 2 * block for block in range(costs.first, len(costs.blocks)))
    return [partial for partial in partials if partial[-1] & none != none]


def _below(costs: Costs, base: int, lowest: int) -> int:
    """Return the most bytes alive in the forward of what is below the lowest block."""
    bottom = costs.prefix.held if costs.prefix else 0
    forwards = (block.below for block in costs.blocks[costs.first : lowest])
    most = max(forwards, default=None)
    before = costs.before + costs.loop.stale
    return before if most is None else max(before, base + bottom + most)


def _elsewhere(costs: Costs, below: int, partial: Partial) -> int:
    """Return the most bytes alive at the moments that its slack does not stand for.

    They are the forward of what is below the lowest block, the backward of what trains before the
    blocks, and the optimizer's step.
    """
    trained = partial[1] + costs.prefix_gradients
    standing = trained * costs.loop.standing
    in_blocks = partial[1] - costs.head_gradients
    most = max(below + standing, trained + costs.loop.temporary(in_blocks))
    if costs.prefix:
        gradients = trained * costs.loop.waiting + partial[1] * costs.loop.grows
        backward = costs.backward_base + costs.in_backward(costs.prefix)
        most = max(most, backward + gradients + costs.kept)
    return costs.loop.carried + costs.loop.resident.of_active(in_blocks) + most


def _whole(problem: Problem, base: int, down_to: int) -> Iterator[tuple[int, list[Partial]]]:
    """Yield each block down to ``down_to``, from the last one on, and the plans that end there.

    Blocks of later lists are not yielded: a plan that ends there has another route.
    """
    costs = problem.costs
    alive = costs.loop.carried + at_the_top(problem, base, down_to)
    partials = [(problem.limit - alive, costs.head_gradients, 0.0, costs.outer_flops, 0)]
    last = costs.routes[0].first if costs.routes else len(costs.blocks)
    ranges = {stop - 1: first for first, stop in costs.own if first < stop}
    block = len(costs.blocks) - 1
    while block >= down_to:
        if block in ranges:
            partials = _own(problem, base, partials, range(ranges[block], block + 1))
            block = ranges[block] - 1
            continue
        if block < last:
            yield block, _longer(problem, base, partials, block, ways_of(problem, block, block))
        partials = _fewer(problem, _longer(problem, base, partials, block, ways_of(problem, block)))
        block -= 1


def _own(problem: Problem, base: int, partials: list[Partial], blocks: range) -> list[Partial]:
    """Return the ``partials`` with these ``blocks`` below them, which no earlier list reaches.

    From their lowest block that trains down, or all of them, they run without a graph.
    """
    ended = partials
    for block in reversed(blocks):
        can_train = True in problem.choices[block]
        ways = ways_of(problem, block, block) if can_train else []
        lowest = _longer(problem, base, partials, block, ways)
        partials = _fewer(problem, _longer(problem, base, partials, block, ways_of(problem, block)))
        below = Use(problem.costs.blocks[block].below, 0, NEVER, NEVER, 0)
        idle = [(below, 0, 0.0, IDLE)] if False in problem.choices[block] else []
        ended = _fewer(problem, [*lowest, *_longer(problem, base, ended, block, idle)])
    return ended


def _fewer(problem: Problem, partials: Iterable[Partial]) -> list[Partial]:
    return thinned(problem, undominated(partials, bounded=problem.flops is not None), _MOST)


def _longer(
    problem: Problem, base: int, partials: Sequence[Partial], block: int, ways: Iterable[Way]
) -> list[Partial]:
    """Return the ``partials`` that fit with ``block`` below them, in each of its ways."""
    costs, limit, counts = problem.costs, problem.limit, problem.values is not None
    least = -math.inf if not counts else costs.prefix.held if costs.prefix else 0
    limit -= costs.loop.carried
    stands, standing, waiting = gradients_of(problem)
    grown = stands + costs.loop.grows  # gradients of each parameter above, in the backward
    most = math.inf if problem.flops is None else problem.flops
    state = costs.loop.resident.of_active  # alive at all moments while its block is active
    beside = [state(partial[1] - costs.head_gradients) for partial in partials]
    longer: list[Partial] = []
    for use, gradients, value, kind in ways:
        bits = kind << 2 * block
        # What is alive beside that of the blocks above, in this block too.
        own = (gradients + costs.prefix_gradients) * stands + state(gradients)
        held = use.held + gradients * stands + state(gradients)
        flops = use.flops if counts else 0
        forward = limit - base - use.forward - own - standing
        backward = limit - costs.backward_base - costs.in_backward(use) - costs.kept - own - waiting
        longer += [
            (slack, above + gradients, worth + value, work + flops, choice | bits)
            for (room, above, worth, work, choice), more in zip(partials, beside, strict=True)
            if work + flops <= most
            and (
                slack := min(
                    room - held,
                    forward - above * stands - more,
                    backward - above * grown - more,
                )
            )
            >= least
        ]
    if counts or not costs.prefix:
        return longer
    return [(room, above, min(worth, 1.0), 0, choice) for room, above, worth, _, choice in longer]


def _plan(costs: Costs, lowest: int, bits: int) -> Plan:
    blocks = range(lowest, len(costs.blocks))
    return Plan(
        frozenset(block for block in blocks if not bits >> 2 * block & IDLE),
        frozenset(block for block in blocks if bits >> 2 * block & CHECKPOINTED),
    )
