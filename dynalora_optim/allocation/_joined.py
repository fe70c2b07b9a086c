"""Costs that hold for each of several batches."""

from __future__ import annotations

from dataclasses import fields, is_dataclass, replace
from typing import Any

from dynalora_optim.allocation._costs import Costs
from dynalora_optim.allocation._loop import ALONE


def joined(one: Costs, other: Costs) -> Costs:
    """Return costs of the same model that are nowhere less than ``one`` and ``other``.

    If these are the costs of one of them, that very object is returned.
    """
    if one is other or one == other:
        return one
    # A larger entry would lower the peak: see `Costs.base`.
    entry = min(one.entry, other.entry)
    both = replace(_largest(one, other), entry=entry, loop=ALONE)
    return one if both == one else both


def _largest(one: Any, other: Any) -> Any:
    if is_dataclass(one) and not isinstance(one, type):
        names = [field.name for field in fields(one)]
        return replace(one, **{n: _largest(getattr(one, n), getattr(other, n)) for n in names})
    if isinstance(one, tuple):
        return tuple(map(_largest, one, other))
    if isinstance(one, (bool, frozenset)) or one is None or other is None:
        return other if one is None else one
    return max(one, other)
