"""The exact search: of all plans whose peak fits, the highest value, and then the least work.

For a given lowest block the plans are searched block by block, from the bottom up. A partial plan
is dropped if another one holds no more bytes, has no higher peak, and is not worse: every way to
complete the first also completes the second. Few partial plans remain, because blocks are similar.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import TypeAlias

from dynalora_optim.allocation._costs import Costs, Plan

Choices: TypeAlias = tuple[tuple[bool, ...], ...]  # per block: the allowed values of "it trains"


@dataclass(frozen=True)
class _Bounds:
    """The limits of a plan, and the block at which its backward pass ends."""

    limit: int
    lowest: int
    flops: float | None = None


@dataclass(frozen=True)
class _Partial:
    """A plan for the blocks from the lowest up to some block.

    Attributes:
        held: The bytes that these blocks hold.
        peak: The most bytes alive in the backward of any of them, with the gradients of those above
            it in this plan.
        value: The sum of the values of the blocks that train.
        flops: The FLOPs of their backward.
        plan: Which of these blocks train, and which are checkpointed.
    """

    plan: Plan
    held: int
    peak: int
    value: float = 0.0
    flops: int = 0

    def beats(self, other: _Partial, *, bounded: bool) -> bool:
        """Return whether this plan is at least as good, however both are completed."""
        if self.held > other.held or self.peak > other.peak:
            return False
        if bounded:  # less work may allow more value in the blocks above
            return self.value >= other.value and self.flops <= other.flops
        return (self.value, -self.flops) >= (other.value, -other.flops)


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
    blocks = range(len(costs.blocks))
    bounds = _Bounds(limit, lowest, flops)
    # If every block can train, no choice has a higher value. This search does not need the values:
    # with zeros in their place, its result is found in the cache of `_search` the next time.
    everyone = _search(costs, _one_choice(costs, blocks), (0.0,) * len(blocks), bounds)
    if everyone:
        return everyone
    return _search(costs, _all_choices(costs, lowest), tuple(values), bounds)


def cheapest_plan(costs: Costs, active: Collection[int], limit: int) -> Plan | None:
    """Return the plan of least work in which exactly these blocks train; None if none fits."""
    choices = _one_choice(costs, active)
    return _search(costs, choices, (0.0,) * len(choices), _Bounds(limit, min(active)))


def least_peak(costs: Costs, lowest: int, active: Collection[int] | None = None) -> int:
    """Return the smallest peak of any plan whose backward pass ends at ``lowest``.

    If ``active`` is given, only plans in which exactly these blocks train are considered.
    """
    choices = _all_choices(costs, lowest) if active is None else _one_choice(costs, active)
    values = (0.0,) * len(choices)
    low, high = 0, costs.peak(Plan(frozenset(active or costs.pinned | {lowest})))
    while low < high:
        middle = (low + high) // 2
        if _search(costs, choices, values, _Bounds(middle, lowest)):
            high = middle
        else:
            low = middle + 1
    return high


def _all_choices(costs: Costs, lowest: int) -> Choices:
    must = costs.pinned | {lowest}
    blocks = range(len(costs.blocks))
    return tuple((True,) if block in must else (True, False) for block in blocks)


def _one_choice(costs: Costs, active: Collection[int]) -> Choices:
    return tuple((block in active,) for block in range(len(costs.blocks)))


@lru_cache(maxsize=1024)
def _search(
    costs: Costs, choices: Choices, values: tuple[float, ...], bounds: _Bounds
) -> Plan | None:
    """Return the best plan in which each block trains or not as its ``choices`` allow."""
    bottom = costs.prefix.held if costs.prefix else 0
    base = costs.base(bounds.lowest)
    if any(base + bottom + block.below > bounds.limit for block in costs.blocks[: bounds.lowest]):
        return None
    partials = [_Partial(Plan(frozenset()), bottom, _prefix_peak(costs))]
    for block in range(bounds.lowest, len(costs.blocks)):
        longer = (
            step
            for partial in partials
            for active in choices[block]
            for step in _steps(costs, partial, block, bounds, values[block] if active else None)
        )
        partials = _undominated(longer, bounded=bounds.flops is not None)
    head = max(base + costs.head.forward, costs.backward_base + costs.head.backward)
    outer = costs.flops(Plan(frozenset()))
    whole = (
        partial
        for partial in partials
        if partial.held + head <= bounds.limit
        and (bounds.flops is None or partial.flops + outer <= bounds.flops)
    )
    best = max(whole, key=lambda partial: (partial.value, -partial.flops), default=None)
    return best.plan if best else None


def _prefix_peak(costs: Costs) -> int:
    if not costs.prefix:
        return 0
    at_end = costs.backward_base + costs.prefix.backward
    return at_end + costs.head_gradients


def _steps(
    costs: Costs, below: _Partial, block: int, bounds: _Bounds, value: float | None
) -> Iterator[_Partial]:
    """Yield ``below`` with one more block, in full and checkpointed; with a value it trains."""
    active = value is not None
    role = costs.role(block, bounds.lowest, active=active)
    gradients = costs.blocks[block].gradients if active else 0
    own, none = frozenset({block}), frozenset[int]()
    for use, checkpointed in ((role.full, none), (role.checkpointed, own)):
        at_backward = costs.backward_base + below.held + use.backward + costs.head_gradients
        at_forward = costs.base(bounds.lowest) + below.held + use.forward
        peak = max(below.peak + gradients, at_backward)
        if max(peak, at_forward) <= bounds.limit:
            yield _Partial(
                Plan(
                    below.plan.active | (own if active else none),
                    below.plan.checkpointed | checkpointed,
                ),
                below.held + use.held,
                peak,
                below.value + (value or 0.0),
                below.flops + use.flops,
            )


def _undominated(partials: Iterable[_Partial], *, bounded: bool) -> list[_Partial]:
    kept: list[_Partial] = []
    for partial in sorted(partials, key=lambda p: (p.held, p.peak, -p.value, p.flops)):
        if not any(other.beats(partial, bounded=bounded) for other in kept):
            kept.append(partial)
    return kept
