"""The tasks of the sweep: GLUE, an offline suite of real sentences, and one for language models.

Every task has training rows, validation rows to choose a learning rate, and test rows to report on.
If a public official test split exists, it is used. If not, a share of the rows is held out. It is
chosen by a hash of the text, so it is always the same.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from itertools import chain
from pathlib import Path
from typing import Literal

import numpy as np
from _corpora import GLUE_COLUMNS, bbc_news, load_glue, orange_texts, vader_ratings
from _shared import CAUSAL_LM, Row, read_csv, split_tenth

Metric = Callable[[np.ndarray, np.ndarray], float]  # labels, predictions


@dataclass(frozen=True)
class SuiteTask:
    """The training, validation and test rows of a task.

    Attributes:
        train: The training rows.
        validation: The rows by which a learning rate is chosen.
        test: The rows of the report.
        is_regression: The labels are ratings, not classes.
        asks: What the model is asked for: the label of a row; or, of a language model, the
            ``"next token"``, or the ``"answer"`` that stands for the label.
        answers: The answer of each class.
    """

    train: Sequence[Row]
    validation: Sequence[Row]
    test: Sequence[Row]
    is_regression: bool = False
    asks: Literal["label", "next token", "answer"] = "label"
    answers: tuple[str, ...] = ()

    @property
    def num_labels(self) -> int:
        """Return the number of outputs of the head: 1 for a rating, else one per class."""
        return 1 if self.is_regression else 1 + max(int(row.label) for row in self.train)


@dataclass(frozen=True)
class Recipe:
    """How a task is trained and evaluated. This is the same for all methods.

    Attributes:
        load: Returns its rows.
        metrics: Names in `METRICS`; the first is the main metric.
        steps: Optimizer steps, over which the rate falls to 0. They are few, so a CPU is enough.
        max_length: Tokens per row.
    """

    load: Callable[[], SuiteTask]
    metrics: tuple[str, ...]
    steps: int
    max_length: int


def _accuracy(labels: np.ndarray, predictions: np.ndarray) -> float:
    return float(np.mean(labels == predictions))


def _matthews(labels: np.ndarray, predictions: np.ndarray) -> float:
    from sklearn.metrics import matthews_corrcoef

    return float(matthews_corrcoef(labels, predictions))


def _f1(labels: np.ndarray, predictions: np.ndarray) -> float:
    from sklearn.metrics import f1_score

    return float(f1_score(labels, predictions))


def _spearman(labels: np.ndarray, predictions: np.ndarray) -> float:
    from scipy.stats import rankdata

    return _pearson(rankdata(labels), rankdata(predictions))


def _pearson(labels: np.ndarray, predictions: np.ndarray) -> float:
    """Return 0 if one of them is constant, as for a model that has learned nothing."""
    if np.ptp(labels) == 0 or np.ptp(predictions) == 0:
        return 0.0
    return float(np.corrcoef(labels, predictions)[0, 1])


def _minus_loss(labels: np.ndarray, predictions: np.ndarray) -> float:
    """Return the mean loss per token with a minus, so that more is better, as in all metrics."""
    return -float(predictions.mean())


METRICS: dict[str, Metric] = {
    "minus loss": _minus_loss,
    "accuracy": _accuracy,
    "Matthews correlation": _matthews,
    "F1": _f1,
    "Pearson": _pearson,
    "Spearman": _spearman,
}


def _rotten_tomatoes() -> SuiteTask:
    """Return its training split. Test rows are VADER's movie snippets that are not in it."""
    train, validation = split_tenth(read_csv(None))
    seen = {_letters(row.text) for row in (*train, *validation)}
    test = [
        Row(text, int(rating > 0))
        for text, rating in vader_ratings("movieReviewSnippets")
        if _letters(text) not in seen and rating
    ]
    return SuiteTask(train, validation, _distinct(test))


def _vader_tweets() -> SuiteTask:
    rows = _distinct(Row(text, rating) for text, rating in vader_ratings("tweets"))
    return SuiteTask(*split_by_hash(rows), is_regression=True)


def _bbc_news() -> SuiteTask:
    return SuiteTask(*split_by_hash(_distinct(_classes(bbc_news()))))


def _answers(load: Callable[[], SuiteTask], answers: Sequence[str]) -> SuiteTask:
    """Return a task of classes as questions to a language model. Its test has 300 rows."""
    task = load()
    return replace(
        task,
        validation=task.validation[:HELD_OUT],
        test=task.test[:HELD_OUT],
        asks="answer",
        answers=tuple(answers),
    )


def _plain_text(name: str, *, rows: int | None = None) -> SuiteTask:
    """Return the texts of a corpus, for a language model; ``rows`` limits those to train on."""
    task = _official(name)
    held_out = (task.validation[:HELD_OUT], task.test[:HELD_OUT])
    return SuiteTask(task.train[:rows], *held_out, asks="next token")


def _own(path: Path) -> SuiteTask:
    """Return the user's own texts: a tenth for validation, another tenth for the test."""
    rest, test = split_tenth(_distinct(read_csv(path)))
    return SuiteTask(*split_tenth(rest), test)


def _official(name: str) -> SuiteTask:
    """Return a corpus with a public test split; a tenth of the rest is for validation."""
    train = _classes(orange_texts(name, "train"))
    test = _classes(orange_texts(name, "test"))
    seen = {row.text for row in test}
    return SuiteTask(*split_tenth([row for row in _distinct(train) if row.text not in seen]), test)


def _glue(name: str) -> SuiteTask:
    """Return a GLUE task. Its test rows are the official validation rows."""
    rows, test = load_glue(name)
    is_regression = name in REGRESSIONS
    split = split_by_hash if is_regression else split_tenth
    train, validation, *rest = split(rows)
    train = [*train, *chain(*rest)]
    return SuiteTask(train, validation[:1000], test, is_regression)


REGRESSIONS = {"stsb"}
_GLUE_METRICS = {
    "cola": ("Matthews correlation",),
    "mrpc": ("F1", "accuracy"),
    "stsb": ("Pearson", "Spearman"),
}

# Rows of plain text to train on. In 400 steps the few are seen five times and overfitted; the
# others are seen one and a half times, and LoRA's loss still falls.
FEW, SOME = 600, 2_000
HELD_OUT = 300  # rows of a language task in each evaluation at the end of a run
# In the order of the names of the classes; R8's are acq, crude, earn, grain, interest, money-fx,
# ship and trade.
R8_ANSWERS = ("mergers", "oil", "earnings", "grain", "interest", "currency", "shipping", "trade")
BBC_ANSWERS = ("business", "entertainment", "politics", "sport", "technology")

SUITES: dict[str, dict[str, Recipe]] = {
    "language": {
        "bbc_answers": Recipe(lambda: _answers(_bbc_news, BBC_ANSWERS), ("accuracy",), 120, 48),
        "r8_answers": Recipe(
            lambda: _answers(lambda: _official("reuters-r8"), R8_ANSWERS), ("accuracy",), 120, 48
        ),
        "reuters_text": Recipe(lambda: _plain_text("reuters-r8"), ("minus loss",), 120, 64),
        "reuters_few": Recipe(
            lambda: _plain_text("reuters-r8", rows=FEW), ("minus loss",), 400, 40
        ),
        "reuters_2000": Recipe(
            lambda: _plain_text("reuters-r8", rows=SOME), ("minus loss",), 400, 40
        ),
    },
    "offline": {
        "rotten_tomatoes": Recipe(_rotten_tomatoes, ("accuracy",), 200, 40),
        "vader_tweets": Recipe(_vader_tweets, ("Pearson",), 300, 32),
        "r8": Recipe(lambda: _official("reuters-r8"), ("accuracy",), 320, 32),
        "bbc": Recipe(_bbc_news, ("accuracy",), 160, 32),
        "20newsgroups": Recipe(lambda: _official("20newsgroups"), ("accuracy",), 300, 64),
    },
    "glue": {
        name: Recipe(
            lambda name=name: _glue(name),  # type: ignore[misc]
            _GLUE_METRICS.get(name, ("accuracy",)),
            steps,
            128,
        )
        for name, steps in zip(
            ("sst2", "cola", "mrpc", "qnli", "rte", "stsb"),
            (10_000, 5_000, 2_500, 10_000, 2_500, 4_000),
            strict=True,
        )
    },
}
assert SUITES["glue"].keys() == GLUE_COLUMNS.keys()
DEFAULT_MODELS = {"language": CAUSAL_LM}  # of other suites: CLASSIFIER


def recipe(suite: str, task: str) -> Recipe:
    """Return the recipe of a task: one of the suite, or a CSV file with the columns text,label.

    Raises:
        ValueError: The suite has no such task.
    """
    if task.endswith(".csv"):
        return Recipe(lambda: _own(Path(task)), ("accuracy",), 200, 64)
    if task not in SUITES[suite]:
        raise ValueError(
            f"the suite {suite} has no task {task!r}; it has {[*SUITES[suite]]}. A task may also "
            "be a file such as my-texts.csv"
        )
    return SUITES[suite][task]


def split_by_hash(rows: Sequence[Row]) -> tuple[list[Row], list[Row], list[Row]]:
    """Split into six tenths, one tenth and three tenths, by a hash of the text."""
    rows = sorted(rows, key=lambda row: hashlib.sha256(row.text.encode()).digest())
    first, second = round(0.6 * len(rows)), round(0.7 * len(rows))
    return list(rows[:first]), list(rows[first:second]), list(rows[second:])


def _classes(pairs: Iterable[tuple[str, str]]) -> list[Row]:
    """Replace the classes by numbers, in sorted order."""
    found = list(pairs)
    names = sorted({name for _, name in found})
    return [Row(text, names.index(name)) for text, name in found]


def _distinct(rows: Iterable[Row]) -> list[Row]:
    """Remove rows that have the same text as an earlier row."""
    return list({row.text: row for row in reversed(list(rows))}.values())[::-1]


def _letters(text: str) -> str:
    return re.sub(r"[^a-z0-9]", "", text.lower())
