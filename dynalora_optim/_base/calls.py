"""Telling whether a call still runs: an interrupt (Ctrl-C) ends it without torch's hooks."""

from __future__ import annotations

import inspect
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
    frame = inspect.currentframe()
    for _ in range(functions + 1):  # a variable must not keep its own frame: a cycle
        frame = frame and frame.f_back
    return _mark(frame) if frame else None


def is_running(call: Call | None) -> bool:
    """Return whether ``call`` has not ended in this thread."""
    frame = inspect.currentframe()
    while frame is not None and call is not None:
        if id(frame) == call.frame and _mark(frame) == call:
            return True
        frame = frame.f_back
    return False


def _mark(frame: FrameType) -> Call:
    callers: list[tuple[int, int]] = []
    caller = frame.f_back
    while caller is not None and len(callers) < _CALLERS:
        callers.append((id(caller), caller.f_lasti))
        caller = caller.f_back
    return Call(id(frame), frame.f_code, tuple(callers))
