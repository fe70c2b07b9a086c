"""Measure a row in a separate process, so that a crash or its memory does not affect other rows.

The process is forked from one that has imported everything but has never used the GPU. So a row
needs no time for imports. If an import did use the GPU, the child starts Python again.
"""

from __future__ import annotations

import multiprocessing
import os
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from typing import Any

import torch

Values = dict[str, Any]
Work = Callable[[], Values]


class Refused(Exception):  # noqa: N818 - an answer, not a mistake
    """The measured code itself raised an error that says that it cannot do this."""


class Missing(Exception):  # noqa: N818
    """This machine does not have what the row needs."""


@dataclass(frozen=True)
class Row:
    """A row of a part.

    Attributes:
        work: A function that measures and returns the numbers.
        seconds: Its time limit.
    """

    name: str
    work: Work
    seconds: float = 60.0


@dataclass(frozen=True)
class Outcome:
    """The result of a row. `STATUSES` of `_lines` has the statuses."""

    status: str
    reason: str = ""
    values: Values = field(default_factory=dict)
    seconds: float = 0.0


def attempt(work: Work) -> tuple[str, str, Values]:
    """Do the work in this process; return its status, the reason, and its values."""
    try:
        return "ok", "", work()
    except Refused as why:
        return "refused", str(why), {}
    except Missing as why:
        return "missing", str(why), {}
    except torch.OutOfMemoryError as why:
        return "out of memory", _first_line(why), {}
    except Exception as why:
        traceback.print_exc()
        return "failed", f"{type(why).__name__}: {_first_line(why)}", {}


def _first_line(error: Exception) -> str:
    return next(iter(str(error).splitlines()), "")


def run_apart(row: Row, *, seconds: float, again: Sequence[str]) -> Outcome:
    """Do the work of a row in a child process, with a time limit.

    Args:
        row: The row.
        seconds: The seconds that the part has left.
        again: The arguments with which a new Python does the same work (see `answer`).
    """
    limit = min(seconds, row.seconds)
    start = time.monotonic()
    fork = multiprocessing.get_context("fork")
    ours, theirs = fork.Pipe(duplex=False)
    child = fork.Process(target=_in_child, args=(row.work, theirs, again))
    child.start()
    theirs.close()
    if ours.poll(limit):
        status, reason, values = _answer_of(ours)
        child.join(2.0)
    else:
        status, reason, values = "failed", f"stopped at its time limit, {limit:.0f} s", {}
    if child.is_alive():
        child.kill()
        child.join()
    if not status:
        status, reason = "failed", f"its process ended with exit code {child.exitcode}"
    return Outcome(status, reason, values, time.monotonic() - start)


def _answer_of(pipe: Connection) -> tuple[str, str, Values]:
    try:
        status, reason, values = pipe.recv()
    except EOFError:
        return "", "", {}
    return status, reason, values


def _in_child(work: Work, pipe: Connection, again: Sequence[str]) -> None:
    if torch.cuda._is_in_bad_fork():  # an import has started CUDA in the parent
        os.set_inheritable(pipe.fileno(), True)
        os.execv(sys.executable, [sys.executable, *again, "--answer-to", str(pipe.fileno())])
    _send(work, pipe)


def answer(work: Work, descriptor: int) -> None:
    """Do the work in a new Python process, and send the result to the process that waits."""
    _send(work, Connection(descriptor, readable=False))


def _send(work: Work, pipe: Connection) -> None:
    pipe.send(attempt(work))
    pipe.close()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)  # skips clean-up, which could hang, and the parent's atexit hooks
