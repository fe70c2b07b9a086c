"""Which DynamicAllocationOptimizer drives which wrapped optimizer and which modules.

Each of them has at most one owner: two owners of one module would overwrite each other's choice
without an error.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Iterable

_owners: weakref.WeakKeyDictionary[object, weakref.ref[object]] = weakref.WeakKeyDictionary()
_lock = threading.RLock()  # reentrant: a finalizer can run, and call release(), inside these


def claim(owner: object, things: Iterable[object]) -> None:
    """Record that ``owner`` drives each of ``things``, for as long as ``owner`` exists."""
    with _lock:
        for thing in things:
            _owners[thing] = weakref.ref(owner)


def release(owner: object) -> None:
    """Delete all records of what ``owner`` drives."""
    with _lock:
        for thing in [thing for thing, ref in _owners.items() if ref() is owner]:
            del _owners[thing]


def owner_of(thing: object) -> object | None:
    """Return the owner that drives ``thing``; None if there is none, or it no longer exists."""
    ref = _owners.get(thing)
    return ref() if ref is not None else None


def is_claimed(thing: object) -> bool:
    """Return whether an owner that still exists drives ``thing``."""
    return owner_of(thing) is not None


def is_owner(thing: object) -> bool:
    """Return whether ``thing`` drives anything."""
    with _lock:
        return any(ref() is thing for ref in _owners.values())


def owners() -> list[object]:
    """Return all owners that drive something now, each once."""
    with _lock:
        found = (ref() for ref in _owners.values())
        return list({id(owner): owner for owner in found if owner is not None}.values())
