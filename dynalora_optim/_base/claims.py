"""Which DynamicAllocationOptimizers drive which wrapped optimizers and which modules.

A module can have several owners, of which each drives other parameters of it: two owners of one
parameter would overwrite each other's choice without an error.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Iterable

_owners: weakref.WeakKeyDictionary[object, list[weakref.ref[object]]] = weakref.WeakKeyDictionary()
_lock = threading.RLock()  # reentrant: a finalizer can run, and call release(), inside these


def claim(owner: object, things: Iterable[object]) -> None:
    """Record that ``owner`` drives each of ``things``, for as long as ``owner`` exists."""
    with _lock:
        for thing in things:
            if owner not in owners_of(thing):
                _owners.setdefault(thing, []).append(weakref.ref(owner))


def release(owner: object) -> None:
    """Delete all records of what ``owner`` drives."""
    with _lock:
        for thing, refs in list(_owners.items()):
            left = [ref for ref in refs if ref() not in (owner, None)]
            if left:
                _owners[thing] = left
            else:
                del _owners[thing]


def owners_of(thing: object) -> list[object]:
    """Return the owners that drive ``thing`` and still exist."""
    found = (ref() for ref in _owners.get(thing, ()))
    return [owner for owner in found if owner is not None]


def is_claimed(thing: object) -> bool:
    """Return whether an owner that still exists drives ``thing``."""
    return bool(owners_of(thing))


def is_owner(thing: object) -> bool:
    """Return whether ``thing`` drives anything."""
    return thing in owners()


def owners() -> list[object]:
    """Return all owners that drive something now, each once."""
    with _lock:
        found = (owner for thing in list(_owners) for owner in owners_of(thing))
        return list({id(owner): owner for owner in found}.values())
