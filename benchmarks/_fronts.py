"""Plots of memory against cost, and comparisons of two Pareto fronts."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path

Point = tuple[float, float]  # (peak memory, cost), both as shares of the reference


def pareto(points: Sequence[Point]) -> list[Point]:
    """Return the points that no other point beats in memory and cost, sorted by memory."""
    kept: list[Point] = []
    for point in sorted(points):
        if not kept or point[1] < kept[-1][1]:
            kept.append(point)
    return kept


def between(points: Sequence[Point], memory: float) -> float:
    """Return the cost at ``memory`` on the straight lines between neighbouring points.

    It is infinite below the smallest memory, and constant above the largest.
    """
    front = pareto(points)
    if memory < front[0][0]:
        return math.inf
    for (low, costly), (high, cheap) in pairwise(front):
        if memory <= high:
            return costly + (cheap - costly) * (memory - low) / (high - low)
    return front[-1][1]


def worst_ratio(ours: Sequence[Point], peers: Sequence[Point], steps: int = 1000) -> float:
    """Return the largest ratio of our cost to the peers' cost, over the memory of their front.

    If our smallest peak is larger than theirs, it is over the memory from there on. Between two
    points the peers' cost is interpolated, as if two settings were mixed. Our cost is that of our
    cheapest row with at most this peak, without interpolation. Peaks are rounded to three decimals,
    as they are printed, because the scores of the modules take a few hundred bytes.
    """
    front = pareto(peers)
    low, high = max(front[0][0], pareto(ours)[0][0]), front[-1][0]
    ratios = []
    for step in range(steps + 1):
        memory = low + (high - low) * step / steps
        fit = (cost for peak, cost in ours if round(peak, 3) <= round(memory, 3))
        cost = min(fit, default=math.inf)
        ratios.append(cost / between(peers, memory))
    return max(ratios)  # nan if all are: nothing was timed


def worst_point(ours: Sequence[Point], peers: Sequence[Point]) -> float:
    """Return the largest ratio of a row's cost to the peers' cost at the memory of that row."""
    return max(cost / between(peers, memory) for memory, cost in ours)


Series = Mapping[str, Mapping[str, Point]]  # legend -> label -> point


def plot(path: Path, title: str, panels: Mapping[str, Series]) -> None:
    """Draw one panel per cost, with one line per series. Its points are labelled."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 5), layout="constrained")
    figure.suptitle(title)
    places = figure.subplots(1, len(panels), squeeze=False).flat
    for axes, (cost, series) in zip(places, panels.items(), strict=True):
        for turn, ((name, points), marker) in enumerate(
            zip(series.items(), "os^vDP", strict=False)
        ):
            xs, ys = zip(*sorted(points.values()), strict=True)
            axes.plot(xs, ys, f"{marker}-", label=name, markersize=5)
            for label, (x, y) in points.items():
                # Labels of neighbours do not overlap: those of other series, and of this one.
                below, is_left = turn % 2, any(0 < other - x < 0.05 for other in xs)
                axes.annotate(
                    label,
                    (x, y),
                    xytext=(-4 if is_left else 4, -11 if below else 5),
                    ha="right" if is_left else "left",
                    textcoords="offset points",
                    fontsize=8,
                )
        axes.set(xlabel="peak memory / peft LoRA", ylabel=f"{cost} / peft LoRA")
        axes.margins(0.12)
        axes.set(xlim=(0, None), ylim=(0, None))
        axes.grid(alpha=0.3)
    figure.legend(*axes.get_legend_handles_labels(), loc="outside lower center", ncols=3)
    figure.savefig(path, dpi=100)
