"""Fine-tune with many methods on many tasks and seeds, each at its own best learning rate.

    python benchmarks/quality/sweep.py --tasks bbc --methods lora,random --seeds 1 --steps 60
    python benchmarks/quality/sweep.py --suite offline --seeds 3 --jobs 2
    accelerate launch benchmarks/quality/sweep.py --suite glue --model roberta-base

The offline suite has real sentences, but is not GLUE. --suite glue is GLUE, from the hub or its
cache; --suite language asks a language model. A method is tuned on validation rows: first with one
seed over the rates of --lrs, then with every seed over the best two of them. Each finished run is
one line of runs.jsonl. If a sweep is killed, start it again: it continues, and no run is done
twice. `report.py` makes the tables.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import re
import sys
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from contextlib import contextmanager
from dataclasses import replace
from itertools import chain, product
from pathlib import Path

import torch
from _compare import Result, at_best_rate, worth
from _corpora import go_offline_unless_reachable
from _methods import METHODS, method
from _models import needs_hub
from _shared import CLASSIFIER, positive
from _store import append, finished
from _suite import DEFAULT_MODELS, SUITES, recipe
from _training import Settings, prepare, run
from tqdm import tqdm

LRS = (1e-3, 2e-3, 5e-3, 1e-2)  # of the head; adapters have a fixed multiple of it
DEFAULT_METHODS = (
    "full,bitfit,lora,static,random,forward,gradient,vera,dynavera,budget-0.40,budget-0.75,"
    "lisa,badam"
)


class Sweep:
    """Does the runs that are not finished yet.

    Args:
        path: The file of finished runs.
        jobs: Number of processes; 1: the runs are done in this process.
        threads: Number of threads of each process.
    """

    def __init__(self, path: Path, *, jobs: int, threads: int) -> None:
        self._path, self._jobs, self._threads = path, jobs, threads
        self._done: dict[str, Result] = {line["key"]: line for line in finished(path)}

    def results(self, wanted: Sequence[Settings], label: str) -> list[Result]:
        """Return the results of all runs, of which some may have been finished before."""
        left = [settings for settings in wanted if settings.key not in self._done]
        with tqdm(total=len(left), desc=label, unit="run", disable=not left) as bar:
            for line in self._run(left):
                if is_main():
                    append(self._path, line)
                self._done[line["key"]] = line
                bar.set_postfix_str(describe(line), refresh=False)
                bar.update()
        return [self._done[settings.key] for settings in wanted]

    def _run(self, left: Sequence[Settings]) -> Iterator[Result]:
        if self._jobs == 1 or len(left) < 2:
            torch.set_num_threads(self._threads)
            yield from map(run, left)
            return
        with (
            ProcessPoolExecutor(
                self._jobs,
                mp_context=multiprocessing.get_context("spawn"),
                initializer=torch.set_num_threads,
                initargs=(self._threads,),
            ) as pool,
            _cancelled(pool),
        ):
            for future in as_completed([pool.submit(run, settings) for settings in left]):
                yield future.result()


@contextmanager
def _cancelled(pool: ProcessPoolExecutor) -> Iterator[None]:
    """After an error or an interruption, start no more runs."""
    try:
        yield
    except BaseException:
        pool.shutdown(wait=False, cancel_futures=True)
        raise


def is_main() -> bool:
    """Whether this process writes files, if several processes train together."""
    return os.environ.get("RANK", "0") == "0"


def describe(line: Result) -> str:
    """Return a short text about the result of a run."""
    settings, (name, value) = line["settings"], next(iter(line["validation"].items()))
    return f"{settings['task']} {settings['method']} lr {settings['lr']:g}: {name} {value:.3f}"


def sweep(options: argparse.Namespace) -> list[Result]:
    """Tune every method on every task. Return its runs at its best rate, one per seed."""
    runner = Sweep(options.output / "runs.jsonl", jobs=options.jobs, threads=options.threads)
    grids = [
        [settings(options, task, name, lr) for lr in options.lrs]
        for task, name in product(options.tasks, options.methods)
    ]
    runner.results(list(chain(*grids)), "rates")
    finals = []
    for grid in grids:
        ranked = sorted(grid, key=lambda one: worth(runner.results([one], "")), reverse=True)
        finalists = ranked[: options.finalists]
        finals.append([replace(one, seed=s) for one in finalists for s in range(options.seeds)])
    runner.results(list(chain(*finals)), "seeds")
    return [run for final in finals for run in at_best_rate(runner.results(final, "")).runs]


def model_of(options: argparse.Namespace) -> str:
    """Return the model that is asked for, or else that of the suite."""
    return str(options.model or DEFAULT_MODELS.get(options.suite, CLASSIFIER))


def settings(options: argparse.Namespace, task: str, name: str, lr: float) -> Settings:
    """Return the settings of a run with the first seed."""
    usual = recipe(options.suite, task)
    return Settings(
        suite=options.suite,
        task=task,
        method=name,
        lr=lr,
        seed=0,
        model=model_of(options),
        steps=options.steps or usual.steps,
        batch_size=options.batch_size,
        max_length=options.max_length or usual.max_length,
        layers=options.layers,
    )


def table(results: Iterable[Result]) -> str:
    """Return a table with one line per run."""
    lines = [f"{'task':<16} {'method':<32} {'lr':>7} {'seed':>4}  on test rows"]
    for line in results:
        s = line["settings"]
        metrics = ", ".join(f"{name} {value:.4f}" for name, value in line["test"].items())
        lines.append(f"{s['task']:<16} {s['method']:<32} {s['lr']:>7g} {s['seed']:>4}  {metrics}")
    return "\n".join(lines)


def names(text: str) -> list[str]:
    """Split a text at commas, but not at commas between the options of a method."""
    found: list[str] = []
    for part in text.split(","):
        if found and re.match(r"\w+=", part):
            found[-1] += f",{part}"
        else:
            found.append(part)
    return found


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        description=(__doc__ or "").splitlines()[0],
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
        epilog=f"methods: {', '.join(METHODS)}; options after an @, as in forward@active=4",
    )
    add = parser.add_argument
    add("--suite", choices=SUITES, default="offline", help="offline: sentences; language: an LM")
    add("--tasks", type=names, help="names or CSV files, with commas; None: all of the suite")
    add("--methods", type=names, default=DEFAULT_METHODS, help="names, with commas")
    add("--seeds", type=positive, default=3, help="runs of a method on a task")
    add("--lrs", type=_rates, default=LRS, help="learning rates to choose from, with commas")
    add("--finalists", type=positive, default=2, help="number of rates that run with every seed")
    add("--model", help="hub id or local folder; None: the suite's")
    add("--steps", type=positive, help="optimizer steps; None: as in the task")
    add("--batch-size", type=positive, default=16, help="rows per step and process")
    add("--max-length", type=positive, help="tokens per row; None: as in the task")
    add("--layers", type=positive, help="use only this many blocks, for a quick try")
    add("--jobs", type=positive, default=1, help="number of runs at the same time")
    add("--threads", type=positive, default=1, help="threads of each run, on a CPU")
    add("--output", type=Path, default=Path("runs/quality"), help="folder for the finished runs")
    options = parser.parse_args(arguments)
    options.tasks = options.tasks or list(SUITES[options.suite])
    return options


def _rates(text: str) -> tuple[float, ...]:
    return tuple(map(float, text.split(",")))


def check(options: argparse.Namespace) -> None:
    """Check all options before the first run.

    Raises:
        OSError: A model or a data set cannot be loaded.
        ValueError: An option is wrong.
    """
    for name in options.methods:
        method(name)
    for task in options.tasks:
        recipe(options.suite, task)
    if int(os.environ.get("WORLD_SIZE", "1")) > 1 and options.jobs > 1:
        raise ValueError(f"--jobs {options.jobs} must be 1 if several processes train together")
    if options.suite == "glue" or needs_hub(model_of(options)):
        go_offline_unless_reachable()
    for task in options.tasks:  # downloaded once here, not in every job
        one = settings(options, task, options.methods[0], options.lrs[0])
        prepare(one.suite, one.task, one.model, one.max_length)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the sweep and print one line per run."""
    options = parse(arguments)
    try:
        check(options)
    except (OSError, ValueError) as error:
        sys.exit(f"sweep: {error}")
    results = sweep(options)
    if is_main():
        print(table(results))
        print(f"results in {options.output}/; next:")
        print(f"python benchmarks/quality/report.py {options.output}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
