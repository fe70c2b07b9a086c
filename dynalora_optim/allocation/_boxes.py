"""Keeping few partial plans: of each box in gradients, value and FLOPs the one of most slack."""

from __future__ import annotations

from dynalora_optim.allocation._partials import Partial, Problem

_FINEST, _COARSER = 2**-16, 1.5  # the first width of a box, and the factor of each further one
_NEAR = 3  # widths that are tried one by one
_VALUE_FIRST = 64  # how much wider a box is in FLOPs where they only decide between equal values


def thinned(problem: Problem, partials: list[Partial], most: int) -> list[Partial]:
    """Return ``partials``, sorted by slack, or of each box the first, if there are too many."""
    if len(partials) <= most:
        return partials
    per_limit, per_value, per_work = _box(problem)
    scaled = [(p[1] / per_limit, p[2] / per_value, p[3] / per_work) for p in partials]
    too_fine, kept = -1, None  # exponents of widths
    while kept is None or kept[0] - too_fine > _NEAR:
        tried = (too_fine + kept[0]) // 2 if kept else 2 * too_fine + 8
        found = _in_boxes(partials, scaled, _FINEST * _COARSER**tried, most)
        if found is None:
            too_fine = tried
        else:
            kept = tried, found
    # A finer division can have fewer boxes than a coarser one, so the last few are all tried.
    for tried in range(max(0, too_fine - _NEAR), kept[0]):
        found = _in_boxes(partials, scaled, _FINEST * _COARSER**tried, most)
        if found is not None:
            return found
    return kept[1]


def _in_boxes(
    partials: list[Partial], scaled: list[tuple[float, float, float]], width: float, most: int
) -> list[Partial] | None:
    """Return the first of ``partials`` in each box of this width; None if they are too many."""
    found: dict[tuple[int, ...], Partial] = {}
    for partial, (gradients, value, flops) in zip(partials, scaled, strict=True):
        box = int(gradients / width), int(value / width), int(flops / width)
        found.setdefault(box, partial)
        if len(found) > most:
            return None
    return [*found.values()]


def _box(problem: Problem) -> tuple[float, float, float]:
    """Return how much gradients, value and FLOPs a box of width 1 has."""
    value, work = sum(problem.values or ()), problem.costs.flops(problem.costs.all_active)
    if value and problem.flops is None:
        work *= _VALUE_FIRST
    return max(problem.limit, 1), value or 1.0, work
