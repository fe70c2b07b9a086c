"""Costs that hold for each of several batches."""

from __future__ import annotations

from dataclasses import fields, is_dataclass, replace
from typing import Any

from dynalora_optim.allocation._costs import Costs
from dynalora_optim.allocation._loop import ALONE

_KEPT = 256  # results that are kept; a run asks for the same ones in every step
_results: dict[tuple[int, int], tuple[Costs, Costs, Costs]] = {}  # by the ids of the first two


def joined(one: Costs, other: Costs) -> Costs:
    """Return costs of the same model that are nowhere less than ``one`` and ``other``.

    If these are the costs of one of them, that very object is returned.
    """
    if one is other:
        return one
    key = id(one), id(other)  # to hash so many numbers takes as long as to join them
    if key not in _results:
        if len(_results) >= _KEPT:
            _results.clear()
        _results[key] = one, other, _joined(one, other)  # all kept, so that no id is used again
    return _results[key][2]


def _joined(one: Costs, other: Costs) -> Costs:
    if one == other:
        return one
    if one.order != other.order:
        raise ValueError(
            "Budget: the lists of blocks of the model run in another order than in an earlier "
            "batch, or on another rank, so that no one plan holds for both. Use an allocator "
            "without a memory budget, such as 'discounted'."
        )
    both = replace(_largest(one, other), loop=ALONE, own=_shorter(one, other))
    both = replace(both, routes=tuple(map(_joined, one.routes, other.routes)))
    # The entry lowers the base, which may not be less than those of the two: see `Costs.base`.
    base = max(costs.in_no_loop().base(0) for costs in (one, other))
    both = replace(both, entry=min(both.entry, max(both.forward_base - base, 0)))
    return one if both == one else both


def _shorter(one: Costs, other: Costs) -> tuple[tuple[int, int], ...]:
    """Return where neither batch lets the gradient of an earlier list in."""
    pairs = zip(one.own, other.own, strict=True)
    return tuple((first, min(stop, other_stop)) for (first, stop), (_, other_stop) in pairs)


def _largest(one: Any, other: Any) -> Any:
    if is_dataclass(one) and not isinstance(one, type):
        names = [field.name for field in fields(one)]
        return replace(one, **{n: _largest(getattr(one, n), getattr(other, n)) for n in names})
    if isinstance(one, tuple):
        return tuple(map(_largest, one, other))
    if isinstance(one, (bool, frozenset)) or one is None or other is None:
        return other if one is None else one
    return max(one, other)
