"""A row in a process of its own: neither a crash nor its memory reaches the next one.

The process is forked from one that has imported everything and has never touched the GPU, so that
a row costs no import. Where some import did touch it, the child starts Python anew.
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
    """What is measured says by itself that it cannot be done."""


class Missing(Exception):  # noqa: N818
    """This machine lacks what the row needs."""


@dataclass(frozen=True)
class Row:
    """A row of a part.

    Attributes:
        work: Measures, and returns the numbers.
        seconds: The most that it may take.
    """

    name: str
    work: Work
    seconds: float = 60.0


@dataclass(frozen=True)
class Outcome:
    """What became of a row; see `STATUSES` of `_lines`."""

    status: str
    reason: str = ""
    values: Values = field(default_factory=dict)
    seconds: float = 0.0


def attempt(work: Work) -> tuple[str, str, Values]:
    """Do the work here; return its status, the reason, and its values."""
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
    """Do a row's work in a child process, for at most so many seconds.

    Args:
        row: The row.
        seconds: Those left to the part.
        again: The arguments by which a new Python does the same (see `answer`).
    """
    limit = min(seconds, row.seconds)
    start = time.monotonic()
    fork = multiprocessing.get_context("fork")
    ours, theirs = fork.Pipe(duplex=False)
    child = fork.Process(target=_in_child, args=(row.work, theirs, again))
    child.start()
    theirs.close()
    status, reason, values = _answer_of(ours, limit)
    child.join(2.0)
    if child.is_alive():
        child.kill()
        child.join()
    if not status:
        status, reason = "failed", f"its process ended with exit code {child.exitcode}"
    return Outcome(status, reason, values, time.monotonic() - start)


def _answer_of(pipe: Connection, limit: float) -> tuple[str, str, Values]:
    if not pipe.poll(limit):
        return "failed", f"stopped after {limit:.0f} s, its limit", {}
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
    """Do the work in a Python started anew, and answer to the process that waits for it."""
    _send(work, Connection(descriptor, readable=False))


def _send(work: Work, pipe: Connection) -> None:
    pipe.send(attempt(work))
    pipe.close()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)  # no clean-up can hang, and no atexit hook of the parent's runs twice
