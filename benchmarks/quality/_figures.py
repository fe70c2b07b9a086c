"""The figures of a sweep. Each is drawn if its runs exist, or says which runs it needs."""

from __future__ import annotations

import re
import statistics
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from _compare import Cell, Sweep
from _curves import Draw, by_option, legend, memory, panels, styles
from _methods import METHODS, method

HEATMAPS_ACROSS = 5


@dataclass(frozen=True)
class Figure:
    """One figure.

    Attributes:
        name: The name of its file, without the suffix.
        title: What it shows.
        draw: Draws it on a matplotlib figure. Returns False if there are no runs for it.
        methods: The value of `sweep.py --methods` that makes such runs.
    """

    name: str
    title: str
    draw: Draw
    methods: str


def save(figure: Figure, sweep: Sweep, reference: str, folder: Path) -> Path | None:
    """Draw and save a figure; return its path, or None if there are no runs for it."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure as Canvas

    canvas = Canvas(layout="constrained", dpi=150)
    FigureCanvasAgg(canvas)
    path, beside = folder / f"{figure.name}.png", folder / f".{figure.name}.tmp.png"
    if not figure.draw(sweep, reference, canvas):
        path.unlink(missing_ok=True)  # from an earlier report
        return None
    canvas.savefig(beside)
    return beside.replace(path)


def _losses(sweep: Sweep, reference: str, canvas: Any) -> bool:
    """Draw the validation loss over the steps, with one panel per task."""
    plain = [name for name in sweep.methods if name in METHODS]
    if not plain:
        return False
    look = dict(zip(plain, styles(), strict=False))
    tasks = [t for t in sweep.tasks if any((name, t) in sweep.cells for name in plain)]
    for axes, task in zip(panels(canvas, tasks, width=4.0, height=4.0), tasks, strict=True):
        for name in plain:
            if (name, task) in sweep.cells:
                axes.plot(*_curve(sweep.cells[name, task]), label=name, **look[name])
        axes.set(xlabel="step", ylabel="validation loss")
        axes.locator_params(axis="x", integer=True)
    legend(canvas)
    return True


def _curve(cell: Cell) -> tuple[list[int], list[float]]:
    """Return the steps and the losses, averaged over the seeds."""
    at: dict[int, list[float]] = defaultdict(list)
    for run in cell.runs:
        for evaluation in run["evaluations"]:
            at[evaluation["step"]].append(evaluation["loss"])
    return list(at), [statistics.fmean(losses) for losses in at.values()]


def _heatmaps(sweep: Sweep, reference: str, canvas: Any) -> bool:
    """Draw the share of steps in which each module was active, with one panel per method."""
    shown = {}
    for name in sweep.methods:
        cells = [sweep.cells[name, task] for task in sweep.shared(name)]
        has_own_layers = method(name).targets is not None
        if (name in METHODS or has_own_layers) and any(r["counts"] for c in cells for r in c.runs):
            shown[name] = _shares(cells)
    if not shown:
        return False
    layers, modules = (max(len({k[i] for k in s}) for s in shown.values()) for i in (0, 1))
    width, height = max(1.9, 0.5 + 0.5 * modules), 1.6 + 0.25 * layers
    every = panels(canvas, list(shown), width=width, height=height, across=HEATMAPS_ACROSS)
    for axes, shares in zip(every, shown.values(), strict=True):
        image = _heatmap(axes, shares)
    canvas.colorbar(image, ax=every, label="share of the steps, active")
    return True


def _heatmap(axes: Any, shares: Mapping[tuple[int, str], float]) -> Any:
    layers = sorted({layer for layer, _ in shares})
    modules = list(dict.fromkeys(module for _, module in shares))
    rows = [[shares.get((layer, module), float("nan")) for module in modules] for layer in layers]
    image = axes.imshow(rows, aspect="auto", cmap="viridis", vmin=0, vmax=1, origin="lower")
    axes.set_xticks(range(len(modules)), modules, rotation=40, ha="right", rotation_mode="anchor")
    axes.set_yticks(range(len(layers)), layers)
    axes.set_ylabel("layer" if axes.get_subplotspec().is_first_col() else "")
    axes.grid(False)
    return image


def _shares(cells: Sequence[Cell]) -> dict[tuple[int, str], float]:
    """Return the mean share over all runs, by (layer, kind of module)."""
    found: dict[tuple[int, str], list[float]] = defaultdict(list)
    for run in (run for cell in cells for run in cell.runs):
        for path, steps in run["counts"].items():
            found[_layer_and_kind(path)].append(steps / run["settings"]["steps"])
    shortened = _shortened({kind for _, kind in found})
    return {(layer, shortened[kind]): statistics.fmean(s) for (layer, kind), s in found.items()}


def _layer_and_kind(path: str) -> tuple[int, str]:
    """Return the layer number in a module's path, and the rest of the path, or "block"."""
    place = re.search(r"(?:^|\.)(\d+)(?:\.(.+))?$", path)
    return (int(place[1]), place[2] or "block") if place else (0, path)


def _shortened(kinds: set[str]) -> dict[str, str]:
    """Return for each kind its shortest ending that no other kind has."""
    return {kind: next(end for end in _ends(kind) if _is_own(end, kind, kinds)) for kind in kinds}


def _ends(kind: str) -> Iterator[str]:
    """Yield ``c``, ``b.c``, ``a.b.c`` for ``a.b.c``."""
    parts = kind.split(".")
    return (".".join(parts[-count:]) for count in range(1, 1 + len(parts)))


def _is_own(end: str, kind: str, kinds: set[str]) -> bool:
    """Whether no other kind has this ending, or it is the whole name."""
    return end == kind or not any(end in _ends(other) for other in kinds - {kind})


FIGURES = [
    Figure("figure1", "Validation loss", _losses, "lora,random,forward,gradient"),
    Figure("figure2", "Memory against quality", memory, "lora,static,budget-0.40,forward@active=4"),
    Figure(
        "figure3",
        "Allocators at k active modules",
        by_option("active", "active modules k"),
        "forward@allocator=topk,active=2,forward@allocator=random,active=2",
    ),
    Figure(
        "figure4",
        "Periods",
        by_option("period", "steps between reallocations"),
        "forward@period=10,forward@period=50",
    ),
    Figure("figure5", "Active modules", _heatmaps, "random,forward,forward@targets=all-linear"),
]
