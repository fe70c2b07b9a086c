"""Refusing a damaged state dict before anything is taken over from it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from dynalora_optim.state._placeholders import MARK

_OPTIONAL = ("lr_history", "costs")  # in some groups only, and checked where they are used


def damaged(why: str) -> ValueError:
    """Return the error for a state dict in which something is not what it must be."""
    return ValueError(
        f"state_dict is damaged, or of another kind of optimizer ({why}). Nothing was loaded; pass "
        "one that state_dict() returned."
    )


@contextmanager
def misfit_named() -> Iterator[None]:
    """Say of an error about a saved value that it comes from the state dict."""
    try:
        yield
    except ValueError as error:
        if "state_dict" in str(error):
            raise
        raise ValueError(f"state_dict does not fit this optimizer: {error}") from error


def check_structure(packed: object) -> None:
    """Raise unless ``packed`` is built as the state dict of a torch optimizer.

    Raises:
        ValueError: A part is missing or of another kind, or a parameter has no key of its own.
    """
    if not isinstance(packed, Mapping):
        raise damaged(f"it is a {type(packed).__name__}")
    for key, kind in (("state", Mapping), ("param_groups", list)):
        if not isinstance(packed.get(key), kind):
            raise damaged(f"it has no {kind.__name__.lower()} {key!r}")
    for position, group in enumerate(packed["param_groups"]):
        if not isinstance(group, Mapping) or not isinstance(group.get("params"), list):
            raise damaged(f"param group {position} has no list 'params'")
        if not _are_strings(group.get("param_names", [])):
            raise damaged(f"param group {position} has 'param_names' that are no names")
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
            check_value(f"param group {position}", saved, key)
        if "lr_history" in saved:
            check_value(f"param group {position}", saved, "lr_history")
    if not isinstance(record, list):
        raise ValueError(f"state_dict has a record of kind {type(record).__name__}, not a list.")
    for position, entry in enumerate(record):
        if not isinstance(entry, Mapping):
            raise damaged(f"record entry {position} is a {type(entry).__name__}")
        for key in ("step", "steps", "scores", "chosen"):
            check_value(f"record entry {position}", entry, key)
        if not entry["scores"].keys() >= set(entry["chosen"]):
            raise ValueError(f"state_dict: record entry {position} chose groups without a score.")


def check_value(where: str, saved: Mapping[str, Any], key: str) -> None:
    """Raise unless the value of ``key`` is there and of its kind.

    Raises:
        ValueError: It is not.
    """
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
    "active_setting": _is_number,
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
