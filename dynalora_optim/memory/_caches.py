"""Caches of functions, which may keep a tensor without data for calls that need the data."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from typing import Any

from dynalora_optim._base.torch_private_fsdp import is_fake

_Cache: Any = type(lru_cache(maxsize=1)(len))  # has no public name
_DEPTH = 6  # from a cache through its entries and their containers to a tensor


@contextmanager
def no_fakes_cached() -> Iterator[None]:
    """Enter a context after which no `functools.lru_cache` holds a fake tensor made in it.

    Models cache what depends on sizes only, such as grids of positions. A real forward would be
    given what the copy has made. After `gc.freeze` older caches are not found.
    """
    before = {id(cache): cache.cache_info().misses for cache in _caches()}
    try:
        yield
    finally:
        for cache in _caches():
            is_used = cache.cache_info().misses != before.get(id(cache), 0)
            if is_used and _holds_fake(cache, _DEPTH):
                cache.cache_clear()


def _caches() -> list[Any]:
    return [found for found in gc.get_objects() if type(found) is _Cache]


def _holds_fake(thing: object, depth: int) -> bool:
    if is_fake(thing):
        return True
    # Not through the function of the cache, from which everything else can be reached.
    is_inside = isinstance(thing, (tuple, list, dict)) or type(thing).__module__ == "functools"
    inner = gc.get_referents(thing) if depth and is_inside else []
    return any(_holds_fake(part, depth - 1) for part in inner)
