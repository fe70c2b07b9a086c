"""Make the tables of the sweep from its stored runs.

A run is one line of a `runs.jsonl` in ``results/quality``, with all predictions on the test rows.
The intervals also need the labels of these rows, which are downloaded and not stored here. So the
intervals are computed once, with ``tables.py --intervals``, and stored. The difference itself needs
no labels. It is computed again whenever a table is made, and must agree with the stored one.
"""

from __future__ import annotations

import math
import statistics
import sys
from collections.abc import Callable, Iterable, Sequence
from functools import cache, partial
from pathlib import Path
from typing import Any

from _measure import markdown
from _stored import read, write

sys.path.insert(0, str(Path(__file__).resolve().parent / "quality"))
from _compare import Cell, Difference, Result, Sweep, paired
from _figures import FIGURES, save
from _shared import STORED
from _store import finished
from report import interval, main_table, pairs_table, rates

FOLDER = STORED
INTERVALS = FOLDER / "intervals.jsonl"
METHODS = (
    *("full", "lora", "static", "random", "forward", "gradient"),
    *("budget-0.40", "budget-0.75", "vera", "dynavera"),
)
IN_README = ("full", "lora", "static", "random", "forward", "budget-0.40")
PAIRS = (
    *("forward:random", "gradient:random", "gradient:forward", "forward:static", "random:static"),
    *("budget-0.40:static", "budget-0.75:static", "budget-0.40:budget-0.75", "dynavera:vera"),
)
FEW = (
    *("lora", "random@active=2", "forward@active=2", "gradient@active=2"),
    *("decrease@active=2", "bandit@active=2", "static@top=1/6"),
)
FEW_PAIRS = (
    *("decrease@active=2:random@active=2", "bandit@active=2:random@active=2"),
    *("gradient@active=2:random@active=2", "forward@active=2:random@active=2"),
    *("decrease@active=2:static@top=1/6", "bandit@active=2:static@top=1/6"),
    "random@active=2:static@top=1/6",
)
SIXTH = (
    *("shuffled@active=2", "forward@active=2", "gradient@active=2", "grass@active=2"),
    *("magma@active=2", "static@top=1/6"),
)
SIXTH_PAIRS = (
    *(f"{name}:shuffled@active=2" for name in SIXTH[1:]),
    *(f"{name}:static@top=1/6" for name in SIXTH[1:-1]),
)
BLOCKS = ("lora", "full", "blocks-0.30", "top-blocks", "lisa", "badam")
ALL_LINEAR = "lora@targets=all-linear"
DRAWN = "budget-0.40@targets=all-linear"  # on 0.4 of its memory, some modules in each period
RECOMPUTED = f"{DRAWN},base=topk,compute=None"  # all modules in every step
ON_ALL_LINEAR = (ALL_LINEAR, RECOMPUTED, DRAWN)
ALL_LINEAR_PAIRS = (f"{RECOMPUTED}:{ALL_LINEAR}", f"{DRAWN}:{ALL_LINEAR}", f"{RECOMPUTED}:full")
BLOCK_PAIRS = (
    *("blocks-0.30:full", "top-blocks:full", "blocks-0.30:top-blocks"),
    *("blocks-0.30:lisa", "blocks-0.30:badam"),
    *ALL_LINEAR_PAIRS,
)
IN_MEMORY = "blocks-0.30@total=758889632,state=drop"  # of LoRA: see RESULTS.md
LANGUAGE_PAIRS = (
    f"{IN_MEMORY}:top-blocks@top=2/15",
    *ALL_LINEAR_PAIRS,
)
ADAMW_BYTES = 8  # of state for each float32 parameter


class Stored(Sweep):
    """A sweep that uses the stored intervals.

    Args:
        part: The part of the stored intervals to use.
        lines: The runs.
    """

    def __init__(self, part: str, lines: Iterable[Result]) -> None:
        super().__init__(lines)
        self.part = part

    def difference(self, method: str, reference: str, *, seed: int = 0) -> Difference:
        """Return the difference with its stored interval.

        Raises:
            ValueError: No interval is stored, or it belongs to other runs.
        """
        rows = read(INTERVALS, self.part)
        found = [row for row in rows if (row["row"], row["less"]) == (method, reference)]
        remedy = "python benchmarks/results/tables.py --intervals computes it again"
        if not found:
            raise ValueError(f"{INTERVALS} has no interval of {method} minus {reference}; {remedy}")
        row, value = found[0], self.value(method, reference)
        if not math.isclose(row["value"], value, abs_tol=1e-12):
            raise ValueError(
                f"{INTERVALS} has {row['value']} for {method} minus {reference}, but the runs give "
                f"{value}; {remedy}"
            )
        return Difference(value, row["low"], row["high"], tuple(row["tasks"]))

    def value(self, method: str, reference: str) -> float:
        """Return the difference on the tasks and seeds that both methods have."""
        pairs = [
            paired(self.cells[method, task], self.cells[reference, task])
            for task in self.shared(method, reference)
        ]
        return statistics.fmean(Cell(mine).mean - Cell(theirs).mean for mine, theirs in pairs)


def _lines(folder: Path, methods: Sequence[str], tasks: Sequence[str] = ()) -> list[Result]:
    """Return the runs of these methods, in this order."""
    runs = finished(folder / "runs.jsonl")
    kept = [run for run in runs if not tasks or run["settings"]["task"] in tasks]
    return [run for name in methods for run in kept if run["settings"]["method"] == name]


def _full() -> list[Result]:
    return _lines(FOLDER, METHODS)


def _short() -> list[Result]:
    return _lines(FOLDER / "short", METHODS)


def _few() -> list[Result]:
    return _lines(FOLDER / "short", FEW, ["bbc"])


def _sixth() -> list[Result]:
    return [*_lines(FOLDER / "short", ["lora"]), *_lines(FOLDER / "few", SIXTH)]


def _blocks() -> list[Result]:
    """Return the runs in LoRA's memory, with the whole training memory of each."""
    runs = [*_lines(FOLDER, BLOCKS[:2]), *_lines(FOLDER / "blocks", BLOCKS[2:])]
    runs += _lines(FOLDER / "all-linear", ON_ALL_LINEAR)
    return [run | _whole(run) for run in runs]


def _whole(run: Result) -> dict[str, int]:
    """Return the peak of a step with the state of everything, and with that of what is active."""
    usual = ADAMW_BYTES * run["trainable_parameters"]  # of runs that trained all in every step
    # The largest peak and the most state together: they may be of two steps.
    apart = run["peak_bytes"] + run.get("active_state_bytes", usual)
    return {
        "whole": run["peak_bytes"] + run.get("state_bytes", usual),
        "whole_active": run.get("held_bytes", apart),
    }


def _equal() -> list[Result]:
    """Return the runs that end at the same compute; LoRA and random end there in any case."""
    return [*_lines(FOLDER, ["lora", "random"]), *finished(FOLDER / "equal" / "runs.jsonl")]


def language_runs(task: str) -> list[Result]:
    """Return the runs of a language model on a task, with the whole training memory of each."""
    runs = finished(FOLDER / "language" / "runs.jsonl")
    return [run | _whole(run) for run in runs if run["settings"]["task"] == task]


def _short_figures() -> list[Result]:
    """Return all runs except of methods that would hide the others, or are far from them."""
    left_out = {"full", "gradient", "vera", "dynavera"}
    runs = finished(FOLDER / "short" / "runs.jsonl")
    return [run for run in runs if run["settings"]["method"] not in left_out]


PARTS: dict[str, tuple[Callable[[], list[Result]], tuple[str, ...]]] = {
    "full": (_full, PAIRS),
    "short": (_short, ()),
    "few": (_few, FEW_PAIRS),
    "sixth": (_sixth, SIXTH_PAIRS),
    "blocks": (_blocks, BLOCK_PAIRS),
    "equal": (_equal, ()),
    "language": (partial(language_runs, "reuters_few"), ()),
    "language_2000": (partial(language_runs, "reuters_2000"), LANGUAGE_PAIRS),
    "answers": (partial(language_runs, "bbc_answers"), ()),
}


@cache
def stored(part: str) -> Stored:
    return Stored(part, PARTS[part][0]())


def compute_intervals(part: str) -> list[dict[str, Any]]:
    """Compute the intervals of a part: each method minus LoRA, and its pairs. Downloads labels."""
    lines, pairs = PARTS[part]
    sweep = Sweep(lines())
    wanted = [f"{name}:lora" for name in sweep.methods if name != "lora"]
    rows = []
    for pair in (*wanted, *pairs):
        method, _, reference = pair.partition(":")
        found = sweep.difference(method, reference)
        row = {"row": method, "less": reference, "value": found.value, "low": found.low}
        rows.append(row | {"high": found.high, "tasks": list(found.tasks)})
    return rows


def store_intervals(run: dict[str, Any]) -> None:
    """Compute and store the intervals of all parts."""
    for part in PARTS:
        write(INTERVALS, part, compute_intervals(part), run)


def quality() -> str:
    return main_table(stored("full"), "lora")


def answers() -> str:
    return main_table(stored("answers"), "lora")


def answers_rates() -> str:
    return rates(stored("answers"))


def quality_rates() -> str:
    return rates(stored("full"))


def quality_pairs() -> str:
    return pairs_table(stored("full"), PAIRS)


def few() -> str:
    return main_table(stored("few"), "lora")


def few_pairs() -> str:
    return pairs_table(stored("few"), FEW_PAIRS)


def sixth() -> str:
    return main_table(stored("sixth"), "lora")


def sixth_pairs() -> str:
    return pairs_table(stored("sixth"), SIXTH_PAIRS)


def language_pairs() -> str:
    return pairs_table(stored("language_2000"), LANGUAGE_PAIRS)


def readme() -> str:
    """Return the table of the README: the mean over the tasks, and the peak memory."""
    sweep = stored("full")
    lines = [[name, *mean_and_less(sweep, name, ""), _peak(sweep, name)] for name in IN_README]
    return markdown(["method", "mean metric x 100", "minus LoRA", "peak"], lines)


def _peak(sweep: Sweep, name: str) -> str:
    return f"{sweep.ratio(name, 'lora', 'peak_bytes', sweep.tasks):.2f}"


def half() -> str:
    """Return a table that compares runs with half the steps and with all steps."""
    lines = [
        [name, *mean_and_less(stored("short"), name), *mean_and_less(stored("full"), name)]
        for name in METHODS
    ]
    header = ["method", "half the steps: mean", "minus lora", "all steps: mean", "minus lora"]
    return markdown(header, lines)


def mean_and_less(sweep: Sweep, name: str, none: str = "-") -> list[str]:
    less = none if name == "lora" else interval(sweep.difference(name, "lora"))
    return [f"{100 * sweep.average(name, sweep.tasks):.1f}", less]


def mpnet() -> str:
    """Return the table of LoRA's accuracy on all-mpnet-base-v2 at each learning rate."""
    runs = {run["settings"]["lr"]: run for run in finished(FOLDER / "mpnet" / "runs.jsonl")}
    lines = [
        [what, *(f"{100 * next(iter(runs[lr][what].values())):.1f}" for lr in sorted(runs))]
        for what in ("validation", "test")
    ]
    return markdown(["BBC, accuracy x 100", *(f"{lr:g}" for lr in sorted(runs))], lines)


def figures(folder: Path) -> None:
    """Draw the figures of the results. Those with half the steps get a folder of their own."""
    for place, numbers in (("", "125"), ("short", "234")):
        lines = _short_figures() if place else _full()
        (folder / place).mkdir(parents=True, exist_ok=True)
        for figure in FIGURES:
            if figure.name.removeprefix("figure") in numbers:
                save(figure, Sweep(lines), "lora", folder / place)
