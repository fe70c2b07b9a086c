"""The heatmap of the allocation; the only file that uses matplotlib, which it imports to draw."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path


def heatmap(counts: Mapping[str, int], path: Path) -> None:
    """Write the heatmap of active steps: one row per layer, one column per module."""
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError(
            'record.plot() draws with matplotlib: pip install "dynalora-optim[plot]".'
        ) from error
    keyed = by_layer(counts)
    layers = list(dict.fromkeys(layer for layer, _ in keyed))
    modules = list(dict.fromkeys(module for _, module in keyed))
    cells = [[keyed.get((layer, module), float("nan")) for module in modules] for layer in layers]

    figure = Figure(
        figsize=(2.6 + 0.9 * len(modules), 2.2 + 0.36 * len(layers)), layout="constrained"
    )
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    image = axes.imshow(cells, aspect="auto", cmap="viridis", vmin=0)
    axes.set_xticks(range(len(modules)), modules, rotation=30, ha="right", rotation_mode="anchor")
    axes.set_yticks(range(len(layers)), layers)
    axes.set_xlabel("module")
    axes.set_ylabel("layer")
    axes.set_title("Active steps")
    figure.colorbar(image, ax=axes, label="optimizer steps active")
    figure.savefig(path, dpi=150)


def by_layer(counts: Mapping[str, int]) -> dict[tuple[str, str], int]:
    """Key counts by (layer, module): the first number in a name, and the part after it."""
    keyed: dict[tuple[str, str], int] = {}
    for name, count in counts.items():
        match = re.search(r"(?:^|\.)(\d+)\.(.+)$", name)
        key = (match[1], match[2]) if match else ("-", name)
        keyed[key] = keyed.get(key, 0) + count
    return keyed
