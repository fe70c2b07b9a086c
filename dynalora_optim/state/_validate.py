"""Refusing a damaged state dict before anything is taken over from it."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from dynalora_optim.state._placeholders import MARK

_OPTIONAL = ("lr_history", "costs")  # in some groups only, and checked where they are used


@contextmanager
def damage_refused() -> Iterator[None]:
    """Raise ValueError for whatever a state dict that lacks something runs into."""
    try:
        yield
    except (
        json.JSONDecodeError,
        AttributeError,
        IndexError,
        KeyError,
        OverflowError,
        RecursionError,
        TypeError,
    ) as error:
        raise ValueError(
            f"state_dict is damaged, or of another kind of optimizer ({error!r}). Nothing was "
            "loaded; pass one that state_dict() returned."
        ) from error
    except ValueError as error:
        if "state_dict" in str(error):
            raise
        raise ValueError(f"state_dict does not fit this optimizer: {error}") from error


def check_keys(packed: Mapping[str, Any]) -> None:
    """Raise unless each parameter has a key of its own in torch's state dict ``packed``.

    Raises:
        ValueError: A key is neither a number nor a name, or is there twice.
    """
    keys = [key for group in packed["param_groups"] for key in group["params"]]
    if any(type(key) not in (int, str) for key in keys) or len(set(keys)) < len(keys):
        raise ValueError("state_dict does not have one key for each parameter in param_groups.")
    for key, state in packed["state"].items():
        if not isinstance(state, Mapping):
            raise ValueError(f"state_dict has a {type(state).__name__} as the state of {key!r}.")


def check_values(
    values: Sequence[Mapping[str, Any]], own: Sequence[Mapping[str, Any]], record: object
) -> None:
    """Raise unless ``values`` could have been saved by an optimizer that would save ``own`` now.

    Args:
        values: What was saved, one mapping per param group.
        own: What this optimizer would save, in the same order.
        record: The saved history.

    Raises:
        ValueError: A value is missing, of another kind, or out of range.
    """
    for position, (saved, template) in enumerate(zip(values, own, strict=True)):
        for key in (template.keys() | {MARK}) - set(_OPTIONAL):
            _check(f"param group {position}", saved, key)
        if "lr_history" in saved:
            _check(f"param group {position}", saved, "lr_history")
    if not isinstance(record, list):
        raise ValueError(f"state_dict has a record of kind {type(record).__name__}, not a list.")
    for position, entry in enumerate(record):
        for key in ("step", "steps", "scores", "chosen"):
            _check(f"record entry {position}", entry, key)
        if not entry["scores"].keys() >= set(entry["chosen"]):
            raise ValueError(f"state_dict: record entry {position} chose groups without a score.")


def _check(where: str, saved: Mapping[str, Any], key: str) -> None:
    if key not in saved:
        raise ValueError(f"state_dict lacks {key!r} in {where}.")
    if key in _KINDS and not _KINDS[key](saved[key]):
        raise ValueError(f"state_dict: {key}={saved[key]!r} in {where} is no value of its kind.")


def is_count(value: object) -> bool:
    """Return whether it is a whole number of 0 or more that other code can compute with."""
    return type(value) is int and 0 <= value < 2**63


def _is_number(value: object) -> bool:
    return type(value) is float or (type(value) is int and abs(value) < 2**63)


def _are_numbers(value: object) -> bool:
    return isinstance(value, list) and all(map(_is_number, value))


def _is_bool(value: object) -> bool:
    return isinstance(value, bool)


def _are_strings(value: object) -> bool:
    return isinstance(value, list) and all(isinstance(item, str) for item in value)


_KINDS: dict[str, Callable[[Any], bool]] = {
    "steps": is_count,
    "step": is_count,
    "reallocations": is_count,
    "updates": is_count,
    "idle": is_count,
    "count": is_count,
    "closed_count": is_count,
    "activated": lambda value: value == -1 or is_count(value),
    "is_due": _is_bool,
    "active": _is_bool,
    "probing": _is_bool,
    "compute": _is_number,
    "closed": _is_number,
    "window": _are_numbers,
    "lr_history": _are_numbers,
    "importance": lambda value: isinstance(value, str),
    MARK: lambda value: isinstance(value, dict) and all(map(_are_strings, value.values())),
    "scores": lambda value: isinstance(value, dict) and all(map(_is_number, value.values())),
    "chosen": _are_strings,
}
