"""Compare the methods of a sweep: the runs at the best rate, and paired differences."""

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
    """A method on a task: its runs at its best learning rate, one per seed, sorted by seed."""

    runs: tuple[Result, ...]

    @property
    def lr(self) -> float:
        return float(self.runs[0]["settings"]["lr"])

    @property
    def metric(self) -> str:
        """Return the name of the main metric."""
        return str(next(iter(self.runs[0]["test"])))

    @property
    def scores(self) -> list[float]:
        return [run["test"][self.metric] for run in self.runs]

    @property
    def mean(self) -> float:
        return statistics.fmean(self.scores)

    @property
    def deviation(self) -> float:
        """Return the standard deviation over the seeds; nan if there is only one."""
        return statistics.stdev(self.scores) if len(self.runs) > 1 else float("nan")

    def largest(self, what: str) -> float:
        """Return the largest value of a number over the runs."""
        return float(max(run[what] for run in self.runs))

    def average(self, what: str) -> float:
        """Return the mean of a number over the runs."""
        return statistics.fmean(run[what] for run in self.runs)


@dataclass(frozen=True)
class Difference:
    """The difference of the metric between two methods, with a 95% interval."""

    value: float
    low: float
    high: float
    tasks: tuple[str, ...]


class Sweep:
    """The finished runs of a sweep, by method and task.

    Raises:
        ValueError: There are no runs, or the runs of a task cannot be compared.
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
                    f"runs of {settings['task']} differ in more settings than method, rate and "
                    f"seed: {first} and {kind}; keep them in separate folders"
                )
            runs[settings["method"], settings["task"]].append(line)
        if not runs:
            raise ValueError("there are no finished runs; run python benchmarks/quality/sweep.py")
        suites = {kind["suite"] for kind in kinds.values()}
        if len(suites) > 1:
            raise ValueError(
                f"these are runs of several suites, {sorted(suites)}; keep each in its own folder"
            )
        (self.suite,) = suites
        self.tasks = list(kinds)
        self.kinds = kinds
        self.cells = {key: at_best_rate(found) for key, found in runs.items()}
        self.methods = list(dict.fromkeys(name for name, _ in self.cells))

    def shared(self, *methods: str) -> tuple[str, ...]:
        """Return the tasks for which all of ``methods`` have runs."""
        return tuple(t for t in self.tasks if all((m, t) in self.cells for m in methods))

    def average(self, method: str, tasks: Sequence[str]) -> float:
        """Return the mean over ``tasks`` of the mean over seeds."""
        return statistics.fmean(self.cells[method, task].mean for task in tasks)

    def ratio(self, method: str, reference: str, what: str, tasks: Sequence[str]) -> float:
        """Return the mean over ``tasks`` of the ratio of largest values, method to reference.

        It is nan if the reference has no value, because it had too few steps to measure memory.
        """
        pairs = [(self.cells[method, task], self.cells[reference, task]) for task in tasks]
        largest = [(mine.largest(what), theirs.largest(what)) for mine, theirs in pairs]
        return statistics.fmean(a / b if b else math.nan for a, b in largest)

    def difference(self, method: str, reference: str, *, seed: int = 0) -> Difference:
        """Compare two methods by a paired bootstrap, on the tasks and seeds that both have.

        Each draw draws seeds and test rows, which are the same for both methods.

        Raises:
            ValueError: They have no task or no seed in common.
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
    """Return the runs at the rate that is best on validation rows, in the mean over its seeds.

    Rates with fewer seeds than another rate were dropped in the tuning and are not considered. If a
    seed ran twice, the later run counts.
    """
    rates: dict[float, dict[int, Result]] = defaultdict(dict)
    for run in runs:
        rates[run["settings"]["lr"]][run["settings"]["seed"]] = run
    most = max(map(len, rates.values()))
    finalists = [found for found in rates.values() if len(found) == most]
    chosen = max(finalists, key=lambda found: worth(found.values()))
    return Cell(tuple(chosen[seed] for seed in sorted(chosen)))


def worth(runs: Iterable[Result]) -> tuple[float, float]:
    """Return the mean metric on validation rows and, for ties, the negated mean loss.

    Both are minus infinity if a run has diverged, which means that one of them is nan.
    """
    values = [(next(iter(run["validation"].values())), -run["validation_loss"]) for run in runs]
    metric, loss = (statistics.fmean(column) for column in zip(*values, strict=True))
    return (-math.inf, -math.inf) if math.isnan(metric) or math.isnan(loss) else (metric, loss)


def paired(mine: Cell, theirs: Cell) -> tuple[tuple[Result, ...], tuple[Result, ...]]:
    """Return the runs with the seeds that both have, in the same order.

    Raises:
        ValueError: They have no seed in common.
    """
    ours, others = ({run["settings"]["seed"]: run for run in c.runs} for c in (mine, theirs))
    if not (seeds := sorted(ours.keys() & others.keys())):
        raise ValueError("two methods have no seed in common; run both with the same --seeds")
    return tuple(ours[seed] for seed in seeds), tuple(others[seed] for seed in seeds)


def check_predictions(run: Result, truth: np.ndarray) -> None:
    """Check that the predictions of a run belong to the present test rows.

    Raises:
        ValueError: The metric on these rows is not the stored one, so the rows are different.
    """
    name, noted = next(iter(run["test"].items()))
    predictions = np.array(run["predictions"])
    same = len(predictions) == len(truth)
    if same:
        found = METRICS[name](truth, predictions)
        # Predictions are rounded to four decimals, which hardly changes a correlation.
        same = math.isclose(found, noted, abs_tol=1e-3) or math.isnan(found)
    if not same:
        raise ValueError(
            f"a run of {run['settings']['task']} has {len(predictions)} predictions with {name} "
            f"{noted:.4f}, which does not agree with the {len(truth)} test rows: the task has "
            "changed; run it again"
        )


@cache
def labels(suite: str, task: str) -> np.ndarray:
    """Return the labels of a task's test rows, in the order of the predictions."""
    return np.array([row.label for row in recipe(suite, task).load().test])
