"""Make tables and figures from the runs of `sweep.py`.

    python benchmarks/quality/report.py runs/quality
    python benchmarks/quality/report.py runs/quality --pairs forward:random budget-0.40:static

Every method is shown at the learning rate that is best for it on validation rows. Differences are
paired (the same test rows, the same seeds) and have a 95% interval by bootstrap.
"""

from __future__ import annotations

import argparse
import os
import shlex
import statistics
import sys
from collections.abc import Iterator, Sequence
from itertools import chain
from json import JSONDecodeError
from pathlib import Path
from typing import Any

from _compare import Difference, Result, Sweep
from _figures import FIGURES, save
from _shared import CLASSIFIER
from _store import finished
from _suite import DEFAULT_MODELS, recipe
from sweep import names


def main_table(sweep: Sweep, reference: str) -> str:
    """Return a table with one row per method: quality, cost, and difference to the reference."""
    head = [
        *("method", *sweep.tasks, "mean", "active parameters", "peak", "after forward"),
        f"difference to {reference}",
    ]
    return markdown(head, [_row(sweep, name, reference) for name in sweep.methods])


def _row(sweep: Sweep, name: str, reference: str) -> list[str]:
    shared = sweep.shared(name, reference)
    partial = "" if len(shared) == len(sweep.tasks) else "†"
    cells = [sweep.cells[name, task] for task in sweep.shared(name)]
    row = [name, *qualities(sweep, name)]
    row.append(f"{100 * sweep.average(name, shared):.1f}{partial}" if shared else "-")
    row.append(f"{statistics.fmean(cell.average('active_parameters') for cell in cells):,.0f}")
    for size in ("peak_bytes", "saved_bytes"):
        row.append(f"{sweep.ratio(name, reference, size, shared):.2f}" if shared else "-")
    compared = name != reference and shared
    row.append(interval(sweep.difference(name, reference)) + partial if compared else "-")
    return row


def qualities(sweep: Sweep, name: str) -> Iterator[str]:
    """Yield the mean over the seeds on each task, and the deviation, as text."""
    for task in sweep.tasks:
        cell = sweep.cells.get((name, task))
        spread = f" ± {100 * cell.deviation:.1f}" if cell and len(cell.runs) > 1 else ""
        yield f"{100 * cell.mean:.1f}{spread}" if cell else "-"


def interval(difference: Difference) -> str:
    """Return a difference and its interval as text, multiplied by 100."""
    value, low, high = (100 * x for x in (difference.value, difference.low, difference.high))
    return f"{value:+.1f} [{low:+.1f}, {high:+.1f}]"


def rates(sweep: Sweep) -> str:
    """Return a table of the best rate of each method."""
    rows = [
        [name, *(f"{c.lr:g}" if (c := sweep.cells.get((name, t))) else "-" for t in sweep.tasks)]
        for name in sweep.methods
    ]
    return markdown(["learning rate of the head", *sweep.tasks], rows)


def pairs_table(sweep: Sweep, pairs: Sequence[str]) -> str:
    """Return a table of paired differences; ``a:b`` means a minus b.

    Raises:
        ValueError: A method has no runs.
    """
    rows = []
    for pair in pairs:
        mine, _, theirs = pair.partition(":")
        found = sweep.difference(mine, theirs)
        rows.append([mine, theirs, interval(found), ", ".join(found.tasks)])
    return markdown(["method", "minus", "difference x 100", "tasks"], rows)


def markdown(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Return a Markdown table."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def report(
    sweep: Sweep, reference: str, pairs: Sequence[str], folder: Path, runs: Path
) -> tuple[str, str]:
    """Save the figures in ``folder``; return the report of ``runs``, and its main table."""
    metrics = {cell.metric for cell in sweep.cells.values()}
    seeds = max(len(cell.runs) for cell in sweep.cells.values())
    table = main_table(sweep, reference)
    parts = [
        f"# The sweep on the suite {sweep.suite}",
        f"Test metric x 100 ({', '.join(sorted(metrics))}), mean ± standard deviation over up to "
        f"{seeds} seeds. *Peak*: largest memory in a step, without what existed before it; *after "
        f"forward*: memory between forward and backward; both are ratios to {reference}. "
        "Differences are paired, on the seeds that both methods have, with 95% intervals over test "
        f"rows and seeds. †: only over the tasks that {reference} has as well.",
        table,
        rates(sweep),
    ]
    if pairs:
        parts.append(pairs_table(sweep, pairs))
    for figure in FIGURES:
        path = save(figure, sweep, reference, folder)
        if path:
            parts.append(f"![{figure.title}]({path.name})")
        else:
            wanted = command(sweep, figure.methods, runs)
            parts.append(f"{figure.title}: there are no runs; `{wanted}` makes them.")
    return "\n\n".join(parts) + "\n", table


def command(sweep: Sweep, methods: str, folder: Path) -> str:
    """Return the command that adds runs of ``methods`` to the sweep, with its settings."""
    given: dict[str, Any] = {"suite": sweep.suite, "tasks": ",".join(sweep.tasks)}
    given |= {"methods": methods, "output": folder}
    kinds = sweep.kinds
    first = next(iter(kinds.values()))
    usual = {"model": DEFAULT_MODELS.get(sweep.suite, CLASSIFIER), "batch_size": 16, "layers": None}
    given |= {key: first[key] for key, value in usual.items() if first[key] != value}
    for key in ("steps", "max_length"):
        if any(kinds[t][key] != getattr(recipe(sweep.suite, t), key) for t in kinds):
            given[key] = first[key]
    words = (f"--{key.replace('_', '-')} {shlex.quote(str(value))}" for key, value in given.items())
    return f"python benchmarks/quality/sweep.py {' '.join(words)}"


def read(folder: Path, methods: Sequence[str] = ()) -> Sweep:
    """Read the runs that `sweep.py` wrote.

    Args:
        folder: The folder of the finished runs.
        methods: The methods to keep, in this order; empty for all.

    Raises:
        ValueError: The folder does not exist, or has no finished runs.
    """
    path = folder / "runs.jsonl"
    if not folder.is_dir():
        raise ValueError(f"there is no folder {folder}; sweep.py --output {folder} makes it")
    try:
        lines = finished(path)
        if methods:
            of = {name: [line for line in lines if _is_of(line, name)] for name in methods}
            if missing := [name for name, found in of.items() if not found]:
                raise ValueError(f"there are no runs of {', '.join(missing)} in {folder}")
            lines = list(chain(*of.values()))
        if lines:
            return Sweep(lines)
    except (JSONDecodeError, KeyError, TypeError) as error:
        raise ValueError(f"{path} has a line that is not a run of sweep.py: {error!r}") from error
    raise ValueError(
        f"there are no finished runs in {folder}; sweep.py --output {folder} makes some"
    )


def _is_of(line: Result, method: str) -> bool:
    return bool(line["settings"]["method"] == method)


def check(sweep: Sweep, reference: str, pairs: Sequence[str]) -> None:
    """Check that the methods on the command line have runs.

    Raises:
        ValueError: A method has no runs.
    """
    names = [reference]
    for pair in pairs:
        names += pair.split(":")
        if pair.count(":") != 1:
            raise ValueError(f"--pairs {pair} is not two methods such as forward:random")
    for name in names:
        if name not in sweep.methods:
            raise ValueError(f"there are no runs of {name}; there are runs of {sweep.methods}")


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        description=(__doc__ or "").splitlines()[0],
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("folder", type=Path, help="the folder that sweep.py wrote to")
    parser.add_argument("--output", type=Path, help="folder of the report; None: the same folder")
    parser.add_argument("--methods", type=names, default=[], help="only these; default: all")
    parser.add_argument("--reference", default="lora", help="the method to compare with")
    parser.add_argument("--pairs", nargs="+", default=[], metavar="A:B", help="more pairs")
    options = parser.parse_args(arguments)
    options.pairs = [pair for given in options.pairs for pair in names(given)]
    options.output = options.output or options.folder
    return options


def main(arguments: Sequence[str] | None = None) -> int:
    """Write report.md and the figures; print the main table."""
    options = parse(arguments)
    folder = options.output
    try:
        sweep = read(options.folder, options.methods)
        check(sweep, options.reference, options.pairs)
        folder.mkdir(parents=True, exist_ok=True)
        text, table = report(sweep, options.reference, options.pairs, folder, options.folder)
        beside = folder / f".report.md.{os.getpid()}"
        beside.write_text(text, "utf-8")
        beside.replace(folder / "report.md")
    except (ImportError, OSError, ValueError) as error:
        sys.exit(f"report: {error}")
    print(table)
    print(f"report and figures in {folder}/")
    return 0


if __name__ == "__main__":
    sys.exit(main())
