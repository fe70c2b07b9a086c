"""Memory against cost: whether one front lies below another, and the plots."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path

Point = tuple[float, float]  # (peak memory, cost), both as shares of the reference


def pareto(points: Sequence[Point]) -> list[Point]:
    """Return the points that no other one beats in both, by rising memory."""
    kept: list[Point] = []
    for point in sorted(points):
        if not kept or point[1] < kept[-1][1]:
            kept.append(point)
    return kept


def between(points: Sequence[Point], memory: float) -> float:
    """Return the cost at ``memory`` on the straight lines between neighbouring points.

    Below the least memory there is none; above the most nothing becomes cheaper.
    """
    front = pareto(points)
    if memory < front[0][0]:
        return math.inf
    for (low, costly), (high, cheap) in pairwise(front):
        if memory <= high:
            return costly + (cheap - costly) * (memory - low) / (high - low)
    return front[-1][1]


def worst_ratio(ours: Sequence[Point], peers: Sequence[Point], steps: int = 1000) -> float:
    """Return the largest of our cost over the peers', at any memory that the peers' front spans.

    The peers are given the lines between their points (a mixture of two settings), ours only the
    points themselves: at each memory the cheapest row whose peak is no higher. Peaks are compared
    to three decimals, as they are printed: the scores of the modules are a few hundred bytes.
    """
    front = pareto(peers)
    low, high = front[0][0], front[-1][0]
    worst = 0.0
    for step in range(steps + 1):
        memory = low + (high - low) * step / steps
        fit = (cost for peak, cost in ours if round(peak, 3) <= round(memory, 3))
        cost = min(fit, default=math.inf)
        worst = max(worst, cost / between(peers, memory))
    return worst


def worst_point(ours: Sequence[Point], peers: Sequence[Point]) -> float:
    """Return the largest of a row's cost over the peers' at the memory of that row."""
    return max(cost / between(peers, memory) for memory, cost in ours)


Series = Mapping[str, Mapping[str, Point]]  # legend -> label -> point


def plot(path: Path, title: str, panels: Mapping[str, Series]) -> None:
    """Draw one panel per cost: each series a line of labelled points, by rising memory."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 5), layout="constrained")
    figure.suptitle(title)
    for axes, (cost, series) in zip(figure.subplots(1, len(panels)), panels.items(), strict=True):
        for turn, ((name, points), marker) in enumerate(
            zip(series.items(), "os^vDP", strict=False)
        ):
            xs, ys = zip(*sorted(points.values()), strict=True)
            axes.plot(xs, ys, f"{marker}-", label=name, markersize=5)
            for label, point in points.items():
                place = (4, -11) if turn % 2 else (4, 5)  # neighbours do not cover each other
                axes.annotate(label, point, xytext=place, textcoords="offset points", fontsize=8)
        axes.set(xlabel="peak memory / peft LoRA", ylabel=f"{cost} / peft LoRA")
        axes.margins(0.12)
        axes.set(xlim=(0, None), ylim=(0, None))
        axes.grid(alpha=0.3)
    figure.legend(*axes.get_legend_handles_labels(), loc="outside lower center", ncols=3)
    figure.savefig(path, dpi=100)
