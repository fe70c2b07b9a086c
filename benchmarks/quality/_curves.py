"""Figures: memory against quality, and quality against an option of a method."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import cycle
from typing import Any

from _compare import Cell, Sweep
from _methods import METHODS, method

# Okabe and Ito's colours, safe for colour-blind readers; then again with other dashes and markers.
COLOURS = ["#000000", "#E69F00", "#56B4E9", "#009E73", "#D55E00", "#0072B2", "#CC79A7"]
LINES = [("-", "o"), ("--", "s"), (":", "D"), ("-.", "^")]
ACROSS = 3  # panels in a row
GAP = 5  # points between a point and its label


@dataclass(frozen=True)
class Point:
    """A labelled point."""

    x: float
    y: float
    label: str


Draw = Callable[[Sweep, str, Any], bool]
Curves = dict[str, dict[int, Cell]]


def styles() -> Iterator[dict[str, Any]]:
    """Yield styles endlessly; the first 28 are different."""
    return cycle(
        {"color": colour, "linestyle": dash, "marker": marker, "markersize": 4}
        for dash, marker in LINES
        for colour in COLOURS
    )


def panels(
    canvas: Any, titles: Sequence[str], *, width: float, height: float, across: int = ACROSS
) -> list[Any]:
    """Make one panel per title, a few in a row, and leave room for a legend outside."""
    across = min(across, len(titles))
    down = -(-len(titles) // across)
    canvas.set_size_inches(width * across + 2.2, height * down)
    every = list(canvas.subplots(down, across, squeeze=False).flat)
    for axes, title in zip(every, titles, strict=False):
        axes.set_title(title, fontsize="medium")
        axes.grid(alpha=0.3)
    for axes in every[len(titles) :]:
        axes.set_visible(False)
    return every[: len(titles)]


def legend(canvas: Any) -> None:
    """Draw one legend for all panels, beside them."""
    found: dict[str, Any] = {}
    for axes in canvas.axes:
        for handle, label in zip(*axes.get_legend_handles_labels(), strict=True):
            found.setdefault(label, handle)
    if found:
        canvas.legend(
            found.values(),
            found,
            loc="outside right upper",
            fontsize="small",
            handlelength=3.5,  # long enough to show the dashes
            ncols=1 + len(found) // 24,
        )


def family(name: str, option: str) -> tuple[str, int] | None:
    """Remove a whole-number option from a method's name. None if it has no such option.

    For ``"active"``, ``forward@active=4,period=9`` gives ``("forward@period=9", 4)``.
    """
    base, _, text = name.partition("@")
    options = dict(one.partition("=")[::2] for one in text.split(",") if one)
    value = options.pop(option, "")
    if not value.isdigit():
        return None
    rest = ",".join(f"{key}={given}" for key, given in options.items())
    return (f"{base}@{rest}" if rest else base), int(value)


def curves(sweep: Sweep, option: str, task: str) -> Curves:
    """Return the cells of a task by family, then by the option's value."""
    found: Curves = defaultdict(dict)
    for name in sweep.methods:
        if (split := family(name, option)) and (name, task) in sweep.cells:
            found[split[0]][split[1]] = sweep.cells[name, task]
    for label, points in found.items():
        if (label, task) in sweep.cells:  # the method with its default is one more point
            cell = sweep.cells[label, task]
            usual = (method(label).allocation or {}).get(option)
            if isinstance(usual, float):  # a share of the modules
                usual = round(usual * len(cell.runs[0]["counts"]))
            if usual:
                points.setdefault(usual, cell)
    return found


def by_option(option: str, xlabel: str) -> Draw:
    """Return a function that draws the quality against an option: a panel per task."""

    def draw(sweep: Sweep, reference: str, canvas: Any) -> bool:
        tasks = {t: found for t in sweep.tasks if (found := curves(sweep, option, t))}
        labels = dict.fromkeys(label for found in tasks.values() for label in found)
        look = dict(zip(labels, styles(), strict=False))
        if not tasks:
            return False
        shown = panels(canvas, list(tasks), width=3.7, height=3.6)
        for axes, (task, found) in zip(shown, tasks.items(), strict=True):
            values = [x for points in found.values() for x in points]
            apart = 0.012 * (max(values) - min(values))  # so that error bars do not overlap
            for place, (label, points) in enumerate(found.items()):
                aside = apart * (place - (len(found) - 1) / 2)
                _with_deviations(axes, points, aside, {**look[label], "label": label})
            if (reference, task) in sweep.cells:
                level = 100 * sweep.cells[reference, task].mean
                axes.axhline(level, color="grey", linewidth=1, label=f"{reference} (reference)")
            metric = next(iter(next(iter(found.values())).values())).metric
            axes.set(xlabel=xlabel, ylabel=f"test {metric} x 100")
            axes.locator_params(axis="x", integer=True)
        legend(canvas)
        return True

    return draw


def _with_deviations(
    axes: Any, points: dict[int, Cell], aside: float, style: dict[str, Any]
) -> None:
    xs = sorted(points)
    means = [100 * points[x].mean for x in xs]
    deviations = [100 * points[x].deviation for x in xs]  # nan for one seed: no error bar
    axes.errorbar([x + aside for x in xs], means, deviations, capsize=2, elinewidth=0.8, **style)


def memory(sweep: Sweep, reference: str, canvas: Any) -> bool:
    """Draw the peak against the quality: a point per method, a line per family over k."""
    wanted = [name for name in sweep.methods if name in METHODS or family(name, "active")]
    tasks = _common(sweep, reference, [name for name in wanted if name not in METHODS])
    names = [name for name in wanted if set(tasks) <= set(sweep.shared(name))]
    if len(names) < 2:
        return False
    canvas.set_size_inches(10, 6)
    axes = canvas.subplots()
    lines: dict[str, list[Point]] = defaultdict(list)
    for name in names:
        label, k = family(name, "active") or ("", name)
        lines[label].append(Point(*_place(sweep, name, reference, tasks), str(k)))
    for (label, points), style in zip(sorted(lines.items()), styles(), strict=False):
        points.sort(key=lambda point: point.x)
        named = {"label": f"{label}, k active"} if label else {"linestyle": "none", "color": "k"}
        axes.plot([p.x for p in points], [p.y for p in points], **{**style, **named})
    left = [name for name in wanted if name not in names]
    axes.set(
        xlabel=f"largest peak of a step, in units of {reference}'s",
        ylabel=f"test metric x 100, mean over {', '.join(tasks)}",
        title="Memory against quality" + (f" (lacking a task: {', '.join(left)})" if left else ""),
    )
    axes.title.set_fontsize("medium")
    axes.title.set_wrap(True)
    axes.set_xlim(left=0)
    axes.grid(alpha=0.3)
    legend(canvas)
    label_points(canvas, axes, [point for points in lines.values() for point in points])
    return True


def _common(sweep: Sweep, reference: str, names: Sequence[str]) -> tuple[str, ...]:
    """Return the tasks of the reference that all of ``names`` have; if none, all of its tasks."""
    return sweep.shared(reference, *names) or sweep.shared(reference)


def _place(sweep: Sweep, name: str, reference: str, tasks: Sequence[str]) -> tuple[float, float]:
    peak = sweep.ratio(name, reference, "peak_bytes", tasks)
    return peak, 100 * sweep.average(name, tasks)


def label_points(canvas: Any, axes: Any, points: Sequence[Point]) -> None:
    """Write the label of each point near it, where it covers no point and no other label."""
    from matplotlib.transforms import Bbox

    canvas.draw_without_rendering()
    canvas.set_layout_engine("none")  # keeps the positions that are found below
    pixels = axes.transData.transform([(point.x, point.y) for point in points])
    taken = [Bbox.from_bounds(x - 6, y - 6, 12, 12) for x, y in pixels]
    for point in sorted(points, key=lambda point: -len(point.label)):
        for place in _around():
            label = _annotated(axes, point, *place)
            box = _text_box(canvas, label)
            if _within(axes.bbox, box.padded(4)) and not any(
                box.overlaps(other) for other in taken
            ):
                taken.append(box)
                break
            label.remove()
        else:
            _annotated(axes, point, GAP, GAP)  # no room: the label may cover others


def _annotated(axes: Any, point: Point, dx: float, dy: float) -> Any:
    return axes.annotate(
        point.label,
        (point.x, point.y),
        (dx, dy),
        textcoords="offset points",
        fontsize="small",
        ha="left" if dx > 0 else "right" if dx < 0 else "center",
        va="bottom" if dy > 0 else "top" if dy < 0 else "center",
        arrowprops={"arrowstyle": "-", "color": "grey", "linewidth": 0.5, "shrinkB": 2},
    )


def _text_box(canvas: Any, label: Any) -> Any:
    """Return the box of a label's text in pixels, without its arrow."""
    from matplotlib.text import Text

    label.update_positions(canvas.canvas.get_renderer())
    return Text.get_window_extent(label)


def _within(outer: Any, inner: Any) -> bool:
    return bool(
        outer.x0 <= inner.x0
        and inner.x1 <= outer.x1
        and outer.y0 <= inner.y0
        and inner.y1 <= outer.y1
    )


def _around() -> Iterator[tuple[float, float]]:
    """Yield offsets around a point, in points, with growing distance."""
    for ring in range(1, 12):
        r = GAP * ring
        yield from ((r, 0), (-r, 0), (0, r), (0, -r), (r, r), (-r, r), (r, -r), (-r, -r))
