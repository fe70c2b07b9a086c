"""Figures of a sweep: each is drawn where its runs exist, and says which would be needed else."""

from __future__ import annotations

import re
import statistics
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from _compare import Cell, Sweep
from _methods import METHODS, method

# Okabe and Ito's colours, told apart by all; then the same with other dashes.
COLOURS = ["#000000", "#E69F00", "#56B4E9", "#009E73", "#D55E00", "#0072B2", "#CC79A7"]
DASHES = ["-", "--", ":"]


@dataclass(frozen=True)
class Figure:
    """One figure.

    Attributes:
        name: Its file's, without the suffix.
        title: What it shows.
        draw: Draws it on a matplotlib figure; returns False where there are no runs for it.
        methods: What `glue.py --methods` takes to make such runs.
    """

    name: str
    title: str
    draw: Callable[[Sweep, str, Any], bool]
    methods: str


def save(figure: Figure, sweep: Sweep, reference: str, folder: Path) -> Path | None:
    """Draw a figure beside its place and rename it; None where there are no runs for it."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure as Canvas

    canvas = Canvas(layout="constrained")
    FigureCanvasAgg(canvas)
    if not figure.draw(sweep, reference, canvas):
        return None
    path, beside = folder / f"{figure.name}.png", folder / f".{figure.name}.tmp.png"
    canvas.savefig(beside, dpi=150)
    return beside.replace(path)


def _losses(sweep: Sweep, reference: str, canvas: Any) -> bool:
    """Validation loss over the steps, a panel a task."""
    plain = [name for name in sweep.methods if name in METHODS]
    if not plain:
        return False
    canvas.set_size_inches(4.2 * len(sweep.tasks) + 1.8, 4)
    panels = canvas.subplots(1, len(sweep.tasks), squeeze=False)[0]
    for axes, task in zip(panels, sweep.tasks, strict=True):
        for style, name in zip(_styles(), plain, strict=False):
            if (name, task) in sweep.cells:
                axes.plot(*_curve(sweep.cells[name, task]), label=name, **style)
        axes.set(title=task, xlabel="step", ylabel="validation loss", yscale="log")
        axes.grid(alpha=0.3, which="both")
    handles = {label: line for axes in panels for line, label in zip(*_legend(axes), strict=True)}
    canvas.legend(handles.values(), handles.keys(), loc="outside right center", fontsize="small")
    return True


def _curve(cell: Cell) -> tuple[list[int], list[float]]:
    """Steps and losses, the mean over the seeds."""
    at: dict[int, list[float]] = defaultdict(list)
    for run in cell.runs:
        for evaluation in run["evaluations"]:
            at[evaluation["step"]].append(evaluation["loss"])
    return list(at), [statistics.fmean(losses) for losses in at.values()]


def _memory(sweep: Sweep, reference: str, canvas: Any) -> bool:
    """The peak against the quality, a point a method."""
    tasks = sweep.shared(reference)
    names = [name for name in sweep.methods if sweep.shared(name, reference) == tasks]
    if len(names) < 2:
        return False
    canvas.set_size_inches(8.5, 5)
    axes = canvas.subplots()
    for style, name in zip(_styles(), names, strict=False):
        peak = statistics.fmean(
            sweep.cells[name, t].largest("peak_bytes")
            / sweep.cells[reference, t].largest("peak_bytes")
            for t in tasks
        )
        marker = {"marker": "osD"[DASHES.index(style.pop("linestyle"))], "linestyle": "none"}
        axes.plot([peak], [100 * sweep.average(name, tasks)], label=name, **style, **marker)
    axes.set(
        xlabel=f"largest peak of a step, in units of {reference}'s",
        ylabel="test metric x 100, mean over tasks",
        title="Memory against quality",
    )
    axes.set_xlim(left=0)
    axes.grid(alpha=0.3)
    canvas.legend(loc="outside right center", fontsize="small")
    return True


def _by_option(option: str, series: str, xlabel: str) -> Callable[[Sweep, str, Any], bool]:
    """The quality against a numeric option, a line for each value of ``series``."""

    def draw(sweep: Sweep, reference: str, canvas: Any) -> bool:
        lines: dict[str, dict[float, float]] = defaultdict(dict)
        for name in sweep.methods:
            allocation = method(name).allocation or {}
            shared = sweep.shared(name, reference)
            if f"{option}=" in name and shared:
                label = str(allocation.get(series, "discounted")) if series else name.split("@")[0]
                lines[label][float(allocation[option])] = 100 * sweep.average(name, shared)
        if not lines:
            return False
        canvas.set_size_inches(6.5, 4)
        _draw_lines(canvas.subplots(), lines, xlabel)
        canvas.legend(loc="outside right center", fontsize="small")
        return True

    return draw


def _draw_lines(axes: Any, lines: Mapping[str, Mapping[float, float]], xlabel: str) -> None:
    for style, (label, points) in zip(_styles(), lines.items(), strict=False):
        xs = sorted(points)
        axes.plot(xs, [points[x] for x in xs], marker="o", label=label, **style)
    axes.set(xlabel=xlabel, ylabel="test metric x 100, mean over tasks")
    axes.locator_params(axis="x", integer=True)
    axes.grid(alpha=0.3)


def _heatmaps(sweep: Sweep, reference: str, canvas: Any) -> bool:
    """The share of the steps in which each module was active, a panel a method."""
    shown = {}
    for name in sweep.methods:
        cells = [sweep.cells[name, task] for task in sweep.shared(name)]
        if name in METHODS and any(cell.runs[0]["counts"] for cell in cells):
            shown[name] = _shares(cells)
    if not shown:
        return False
    canvas.set_size_inches(1.5 + 1.9 * len(shown), 4.2)
    panels = canvas.subplots(1, len(shown), squeeze=False)[0]
    for axes, (name, shares) in zip(panels, shown.items(), strict=True):
        image = _heatmap(axes, name, shares)
    canvas.colorbar(image, ax=panels, label="share of the steps that a module was active")
    return True


def _heatmap(axes: Any, name: str, shares: Mapping[tuple[int, str], float]) -> Any:
    layers = sorted({layer for layer, _ in shares})
    modules = sorted({module for _, module in shares})
    rows = [[shares.get((layer, module), float("nan")) for module in modules] for layer in layers]
    image = axes.imshow(rows, aspect="auto", cmap="viridis", vmin=0, vmax=1, origin="lower")
    axes.set_xticks(range(len(modules)), modules, rotation=40, ha="right")
    axes.set_yticks(range(len(layers)), layers)
    axes.set(title=name, ylabel="layer" if axes.get_subplotspec().is_first_col() else "")
    axes.title.set_fontsize("small")
    return image


def _shares(cells: Sequence[Cell]) -> dict[tuple[int, str], float]:
    """(layer, module's last name) -> the mean share over all runs."""
    found: dict[tuple[int, str], list[float]] = defaultdict(list)
    for run in (run for cell in cells for run in cell.runs):
        for path, steps in run["counts"].items():
            place = re.search(r"(?:^|\.)(\d+)(?:\.|$)", path)
            key = (int(place[1]) if place else 0, path.rpartition(".")[2])
            found[key].append(steps / run["settings"]["steps"])
    return {key: statistics.fmean(shares) for key, shares in found.items()}


def _styles() -> Iterator[dict[str, Any]]:
    return ({"color": c, "linestyle": d} for d in DASHES for c in COLOURS)


def _legend(axes: Any) -> tuple[list[Any], list[str]]:
    handles, labels = axes.get_legend_handles_labels()
    return handles, labels


FIGURES = [
    Figure("figure1", "Validation loss", _losses, "lora,random,forward,gradient"),
    Figure(
        "figure2", "Memory against quality", _memory, "lora,static,budget-0.40,forward@active=4"
    ),
    Figure(
        "figure3",
        "Allocators at k active modules",
        _by_option("active", "allocator", "active modules k"),
        "forward@allocator=topk,active=2,forward@allocator=random,active=2",
    ),
    Figure(
        "figure4",
        "Periods",
        _by_option("period", "", "steps between reallocations"),
        "forward@period=10,forward@period=50",
    ),
    Figure("figure5", "Who was active", _heatmaps, "random,forward,gradient"),
]
