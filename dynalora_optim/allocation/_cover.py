"""Few plans that together train every block, so that no block has to wait for long."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import lru_cache

from dynalora_optim.allocation._costs import Costs, Plan
from dynalora_optim.allocation._search import (
    best_plan,
    cheapest_plan,
    least_peak,
    least_peak_of_one,
)


def including(costs: Costs, blocks: frozenset[int]) -> Costs:
    """Return the same costs with these blocks among those that always train."""
    return replace(costs, pinned=costs.pinned | blocks)


def holding(costs: Costs) -> frozenset[int]:
    """Return the blocks that hold groups and do not train in any case."""
    return costs.blocks_of(range(len(costs.group_blocks))) - costs.pinned


def alone(costs: Costs) -> list[int]:
    """Return the blocks of which each can train without others, but those that always do."""
    lowest = costs.lowest_blocks()
    return sorted(b for b in costs.choosable if b in lowest or b >= costs.reached)


def shares(costs: Costs, plans: Sequence[Plan]) -> list[float]:
    """Return the FLOPs of each plan as a share of those with all modules active."""
    return [costs.flops(plan) / costs.flops(costs.all_active) for plan in plans]


def plans_to_draw(costs: Costs, values: Sequence[float], limit: int) -> list[Plan]:
    """Return plans such that each block trains in one; none if a block, or a lowest, does not fit.

    There is one plan for each lowest block, the best. If the gradient goes down to a block in any
    case, and not all blocks from there up fit together, there are several for this one.

    Args:
        costs: The measured costs.
        values: For each block, a number >= 0: the value of training it.
        limit: The bytes that no peak may exceed.
    """
    plans = []
    for lowest in costs.lowest_blocks():
        plan = best_plan(costs, values, limit, lowest)
        above = {b for b in holding(costs) if b >= lowest} if lowest == costs.reached else set()
        if plan is None:
            return []
        if above <= plan.active:
            plans.append(plan)
        else:
            plans += covering_plans(costs, limit, least=lowest)
            if above.difference(*(plan.active for plan in plans)):
                return []
    return plans


def drawn_by(costs: Costs, values: Sequence[float], plan: Plan) -> float:
    """Return the value by which a plan is drawn: of its lowest block, if that is a choice."""
    free = plan.active - costs.pinned or plan.active
    if min(free) < costs.reached:
        return values[min(free)]
    return sum(values[block] for block in free) / len(free)


@lru_cache(maxsize=16)
def draw_shares(costs: Costs, limit: int) -> tuple[float, ...]:
    """Return the `shares` of the plans that are drawn if all blocks are equally important.

    They are empty if the backward pass cannot go down to every block that may be the lowest.
    """
    plans = plans_to_draw(costs, [1.0] * len(costs.blocks), limit)
    return tuple(shares(costs, plans))


def fewest_plans(costs: Costs, limit: int) -> list[Plan]:
    """Return, for each lowest block, the cheapest plan in which no other trains that need not.

    If none of these fits, because blocks that train hold less than others, return any that fit.
    """
    nothing = [0.0] * len(costs.blocks)
    fewest = [cheapest_plan(costs, costs.pinned | {block}, limit) for block in alone(costs)]
    if not any(fewest):
        fewest = [best_plan(costs, nothing, limit, lowest) for lowest in costs.lowest_blocks()]
    return [plan for plan in fewest if plan]


@lru_cache(maxsize=16)
def covering_plans(
    costs: Costs, limit: int, flops: float | None = None, *, least: int = 0
) -> tuple[Plan, ...]:
    """Return plans that together train each block with groups that can train, the cheapest first.

    Each plan trains the lowest block that is still left, and as many others that are left as fit.
    The backward pass goes down to this block in any case. If blocks are alike, no fewer plans
    would do: the higher the backward pass ends, the more blocks fit.

    Args:
        costs: The measured costs.
        limit: The bytes that no peak may exceed.
        flops: The FLOPs that no backward pass may exceed; None for no limit.
        least: The first of the blocks that the plans are to train.
    """
    left = frozenset(block for block in holding(costs) if block >= least)
    plans: list[Plan] = []
    while left:
        plan = _widest(costs, left, limit, flops)
        plans += [plan] if plan else []
        left -= plan.active if plan else {min(left)}
    return tuple(sorted(plans, key=costs.flops))


def least_peak_of_any(costs: Costs) -> int:
    """Return the smallest peak of any plan; in loops of several forwards, of one with one block.

    There `least_peak` of a lowest block is only a bound, which no plan need reach.
    """
    if costs.loop.is_even:
        return min(least_peak(costs, lowest) for lowest in costs.lowest_blocks())
    return min(least_peak_of_one(costs, block) for block in alone(costs))


def most_needed(costs: Costs, *, every_lowest: bool) -> tuple[str, int]:
    """Return which training takes the most memory if all blocks take turns, and its least peak.

    Args:
        costs: The measured costs.
        every_lowest: Whether the backward pass must also be able to end at every block.
    """
    needs = {
        f"block {block}": least_peak_of_any(including(costs, frozenset({block})))
        for block in holding(costs)
    }
    if every_lowest:
        for lowest in costs.lowest_blocks():
            needs[f"blocks down to {lowest}"] = least_peak(costs, lowest)
    return max(needs.items(), key=lambda need: need[1])


def _widest(costs: Costs, left: frozenset[int], limit: int, flops: float | None) -> Plan | None:
    """Return the plan of the highest lowest block that trains the first and most of ``left``."""
    having, count = including(costs, frozenset({min(left)})), len(costs.blocks)
    # Most blocks that are left; of these the lowest; and then as many others as fit. So nothing
    # fits beside the plan's blocks, and the plan is the same for every importance.
    values = [
        1 + (count - block) / count**2 if block in left else 1 / count**4 for block in range(count)
    ]
    found = (best_plan(having, values, limit, b, flops) for b in reversed(having.lowest_blocks()))
    return next((plan for plan in found if plan), None)
