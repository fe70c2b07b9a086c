"""Telling whether a call still runs: an interrupt (Ctrl-C) ends it without torch's hooks."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from itertools import islice
from types import CodeType, FrameType
from typing import NamedTuple

_CALLERS = 8  # enough to reach the user's code from a hook of a module


class Call(NamedTuple):
    """A mark of a call: the frame itself leads to all that it uses, which must not live longer.

    A later call may have its frame at the same address. It counts as the same call only if the same
    instructions have led to it.
    """

    frame: int
    code: CodeType
    callers: tuple[tuple[int, int], ...]  # each with the instruction at which it waits


def call_around(functions: int) -> Call | None:
    """Return the call that is so many functions further out than the function that asks."""
    frame = next(islice(_outwards(inspect.currentframe()), functions + 1, None), None)
    return _mark(frame) if frame else None


def is_running(call: Call | None) -> bool:
    """Return whether ``call`` has not ended in this thread."""
    return call is not None and any(
        id(frame) == call.frame and _mark(frame) == call
        for frame in _outwards(inspect.currentframe())
    )


def _outwards(frame: FrameType | None) -> Iterator[FrameType]:
    while frame is not None:
        yield frame
        frame = frame.f_back


def _mark(frame: FrameType) -> Call:
    callers = islice(_outwards(frame.f_back), _CALLERS)
    return Call(id(frame), frame.f_code, tuple((id(f), f.f_lasti) for f in callers))
