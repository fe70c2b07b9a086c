"""Reading a sweep: each method's runs at its best rate, and paired differences between methods."""

from __future__ import annotations

import math
import statistics
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
from _bootstrap import bootstrap
from _suite import METRICS, recipe

Result = dict[str, Any]
SHARED = ("suite", "model", "steps", "batch_size", "max_length", "layers")


@dataclass(frozen=True)
class Cell:
    """A method on a task: its runs at the rate that suits it best, one a seed, in their order."""

    runs: tuple[Result, ...]

    @property
    def lr(self) -> float:
        return float(self.runs[0]["settings"]["lr"])

    @property
    def metric(self) -> str:
        """The name of the metric that decides."""
        return str(next(iter(self.runs[0]["test"])))

    @property
    def scores(self) -> list[float]:
        return [run["test"][self.metric] for run in self.runs]

    @property
    def mean(self) -> float:
        return statistics.fmean(self.scores)

    @property
    def deviation(self) -> float:
        """Over the seeds; nan of a single one."""
        return statistics.stdev(self.scores) if len(self.runs) > 1 else float("nan")

    def largest(self, what: str) -> float:
        """The most of a number over the runs."""
        return float(max(run[what] for run in self.runs))

    def average(self, what: str) -> float:
        """The mean of a number over the runs."""
        return statistics.fmean(run[what] for run in self.runs)


@dataclass(frozen=True)
class Difference:
    """How far one method is above another, with a 95% interval; in the metric's units."""

    value: float
    low: float
    high: float
    tasks: tuple[str, ...]


class Sweep:
    """The finished runs of a sweep, by method and task.

    Raises:
        ValueError: There are none, or those of a task are not comparable.
    """

    def __init__(self, lines: Iterable[Result]) -> None:
        runs: dict[tuple[str, str], list[Result]] = defaultdict(list)
        kinds: dict[str, dict[str, Any]] = {}
        for line in lines:
            settings = line["settings"]
            kind = {name: settings[name] for name in SHARED}
            first = kinds.setdefault(settings["task"], kind)
            if kind != first:
                raise ValueError(
                    f"runs of {settings['task']} differ in more than method, rate and seed: "
                    f"{first} and {kind}; keep them in folders of their own"
                )
            runs[settings["method"], settings["task"]].append(line)
        if not runs:
            raise ValueError(
                "there are no finished runs; python benchmarks/quality/sweep.py makes some"
            )
        suites = {kind["suite"] for kind in kinds.values()}
        if len(suites) > 1:
            raise ValueError(
                f"runs of several suites, {sorted(suites)}; keep each in its own folder"
            )
        (self.suite,) = suites
        self.tasks = list(kinds)
        self.kinds = kinds
        self.cells = {key: at_best_rate(found) for key, found in runs.items()}
        self.methods = list(dict.fromkeys(name for name, _ in self.cells))

    def shared(self, *methods: str) -> tuple[str, ...]:
        """The tasks that all of ``methods`` have runs of."""
        return tuple(t for t in self.tasks if all((m, t) in self.cells for m in methods))

    def average(self, method: str, tasks: Sequence[str]) -> float:
        """The mean over ``tasks`` of the mean over seeds."""
        return statistics.fmean(self.cells[method, task].mean for task in tasks)

    def ratio(self, method: str, reference: str, what: str, tasks: Sequence[str]) -> float:
        """The mean over ``tasks`` of the most of a number, in units of the reference's.

        Where the reference has none, as of steps too few to be weighed, it is nan.
        """
        pairs = [(self.cells[method, task], self.cells[reference, task]) for task in tasks]
        largest = [(mine.largest(what), theirs.largest(what)) for mine, theirs in pairs]
        return statistics.fmean(a / b if b else math.nan for a, b in largest)

    def difference(self, method: str, reference: str, *, seed: int = 0) -> Difference:
        """Compare two methods by a paired bootstrap, on the tasks and seeds that both have.

        In each draw the seeds are drawn anew, and the test rows, the same for both methods.

        Raises:
            ValueError: They share none.
        """
        tasks = self.shared(method, reference)
        if not tasks:
            raise ValueError(f"{method} and {reference} have no task in common")
        generator = np.random.default_rng(seed)
        values, draws = [], []
        for task in tasks:
            mine, theirs = paired(self.cells[method, task], self.cells[reference, task])
            values.append(Cell(mine).mean - Cell(theirs).mean)
            truth = labels(self.suite, task)
            for run in (*mine, *theirs):
                check_predictions(run, truth)
            draws.append(bootstrap(truth, mine, theirs, generator))
        low, high = np.percentile(np.mean(draws, axis=0), [2.5, 97.5])
        return Difference(statistics.fmean(values), float(low), float(high), tasks)


def at_best_rate(runs: Iterable[Result]) -> Cell:
    """Return the runs at the rate that did best on validation rows, in the mean over its seeds.

    A rate with fewer seeds than another has lost before. Of a seed that ran twice, the later run.
    """
    rates: dict[float, dict[int, Result]] = defaultdict(dict)
    for run in runs:
        rates[run["settings"]["lr"]][run["settings"]["seed"]] = run
    most = max(map(len, rates.values()))
    finalists = [found for found in rates.values() if len(found) == most]
    chosen = max(finalists, key=lambda found: worth(found.values()))
    return Cell(tuple(chosen[seed] for seed in sorted(chosen)))


def worth(runs: Iterable[Result]) -> tuple[float, float]:
    """Return the metric on validation rows and, for ties, their loss negated; means over ``runs``.

    The least of all where a run has diverged, with nan for either.
    """
    values = [(next(iter(run["validation"].values())), -run["validation_loss"]) for run in runs]
    metric, loss = (statistics.fmean(column) for column in zip(*values, strict=True))
    return (-math.inf, -math.inf) if math.isnan(metric) or math.isnan(loss) else (metric, loss)


def paired(mine: Cell, theirs: Cell) -> tuple[tuple[Result, ...], tuple[Result, ...]]:
    """Return the runs with the seeds that both have, in one order.

    Raises:
        ValueError: They share no seed.
    """
    ours, others = ({run["settings"]["seed"]: run for run in c.runs} for c in (mine, theirs))
    if not (seeds := sorted(ours.keys() & others.keys())):
        raise ValueError("two methods share no seed; run both with the same --seeds")
    return tuple(ours[seed] for seed in seeds), tuple(others[seed] for seed in seeds)


def check_predictions(run: Result, truth: np.ndarray) -> None:
    """Compare what a run predicted with the test rows as they are now.

    Raises:
        ValueError: They are other rows: the metric is not the one that was noted.
    """
    name, noted = next(iter(run["test"].items()))
    predictions = np.array(run["predictions"])
    same = len(predictions) == len(truth)
    if same:
        found = METRICS[name](truth, predictions)
        # Predictions are rounded to four decimals, which a correlation hardly feels.
        same = math.isclose(found, noted, abs_tol=1e-3) or math.isnan(found)
    if not same:
        raise ValueError(
            f"a run of {run['settings']['task']} predicts {len(predictions)} test rows with {name} "
            f"{noted:.4f}, which is not so on the {len(truth)} there are: the task has changed "
            "since; run it again"
        )


@cache
def labels(suite: str, task: str) -> np.ndarray:
    """The labels of a task's test rows, in the order of a run's predictions."""
    return np.array([row.label for row in recipe(suite, task).load().test])
