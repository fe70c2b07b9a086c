"""Refusing a damaged state dict before anything is loaded from it."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from dynalora_optim.state._placeholders import MARK

_OPTIONAL = ("costs", "loop")  # in one group only; checked when they are used
_LATER = ("reached",)  # of modules; older files do not have it


def damaged(why: str) -> ValueError:
    """Return the error for a state dict with a part that is not valid, with the reason."""
    return ValueError(
        f"state_dict is damaged, or from another kind of optimizer ({why}). Nothing was loaded; "
        "pass one that state_dict() returned."
    )


@contextmanager
def misfit_named() -> Iterator[None]:
    """Name the state dict in each error about a saved value."""
    try:
        yield
    except ValueError as error:
        if "state_dict" in str(error):
            raise
        raise ValueError(f"state_dict does not fit this optimizer: {error}") from error


def check_structure(packed: object) -> None:
    """Raise unless ``packed`` has the form of a torch optimizer's state dict.

    Raises:
        ValueError: A part is missing or of another type, or parameters share a key.
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
            raise damaged(f"param group {position} has 'param_names' that are not a list of names")
    keys = [key for group in packed["param_groups"] for key in group["params"]]
    if any(type(key) not in (int, str) for key in keys) or len(set(keys)) < len(keys):
        raise ValueError("state_dict does not have one key for each parameter in param_groups.")
    for key in packed["state"].keys() & set(keys):  # other keys: state of no parameter (MADGRAD)
        state = packed["state"][key]
        if not isinstance(state, Mapping):
            raise ValueError(f"state_dict has a {type(state).__name__} as the state of {key!r}.")


def check_values(
    values: Sequence[Mapping[str, Any]], own: Sequence[Mapping[str, Any]], record: object
) -> None:
    """Raise unless ``values`` has the keys of ``own`` with valid values, and ``record`` is valid.

    The values of modules are checked by `check_modules`.

    Args:
        values: The saved values, one mapping per param group.
        own: The values that this optimizer would save now, in the same order.
        record: The saved history.

    Raises:
        ValueError: A value is missing, of another type, or out of range.
    """
    for position, (saved, template) in enumerate(zip(values, own, strict=True)):
        for key in template.keys() - set(_OPTIONAL):
            check_value(f"param group {position}", saved, key)
    if not isinstance(record, list):
        raise ValueError(f"state_dict has a record of kind {type(record).__name__}, not a list.")
    for position, entry in enumerate(record):
        if not isinstance(entry, Mapping):
            raise damaged(f"record entry {position} is a {type(entry).__name__}")
        for key in ("step", "steps", "scores", "chosen"):
            check_value(f"record entry {position}", entry, key)
        if not entry["scores"].keys() >= set(entry["chosen"]):
            raise ValueError(f"state_dict: record entry {position} has no score of a chosen group.")


def check_modules(
    saved: Mapping[str, Mapping[str, Any]], names: Collection[str], own: Mapping[str, Any]
) -> None:
    """Raise unless ``saved`` has valid values of exactly the modules of these ``names``.

    Args:
        saved: The saved values of each module.
        names: The names of all modules.
        own: The values that a module would have now.

    Raises:
        ValueError: It has other modules, or a value is missing or not valid.
    """
    if saved.keys() != set(names):
        lists = [sorted(set(names) - saved.keys()), sorted(saved.keys() - set(names))]
        missing, unexpected = (", ".join(found[:5]) or "none" for found in lists)
        raise ValueError(
            f"state_dict holds other module groups than this optimizer; missing: {missing}; "
            f"unexpected: {unexpected}. Build the model and the optimizer with the settings that "
            "they were saved with: the same groups=, the same always_active=."
        )
    for name in names:
        for key in own:
            if key in saved[name] or key not in _LATER:
                check_value(f"module group {name}", saved[name], key)


def check_value(where: str, saved: Mapping[str, Any], key: str) -> None:
    """Raise unless ``saved`` has a valid value of ``key``.

    Raises:
        ValueError: The value is missing or not valid.
    """
    if key not in saved:
        raise ValueError(f"state_dict lacks {key!r} in {where}.")
    if key in _KINDS and not _KINDS[key](saved[key]):
        raise ValueError(f"state_dict: {key}={saved[key]!r} in {where} is not a valid value.")


def is_count(value: object) -> bool:
    """Return whether ``value`` is an int of at least 0 that fits into 64 bits."""
    return type(value) is int and 0 <= value < 2**63


def _is_number(value: object) -> bool:
    return type(value) is float or (type(value) is int and abs(value) < 2**63)


def _are_numbers(value: object) -> bool:
    return isinstance(value, list) and all(map(_is_number, value))


def _is_bool(value: object) -> bool:
    return isinstance(value, bool)


def _are_strings(value: object) -> bool:
    return isinstance(value, list) and all(isinstance(item, str) for item in value)


def _are_mappings(value: object) -> bool:
    return isinstance(value, dict) and all(isinstance(item, dict) for item in value.values())


_KINDS: dict[str, Callable[[Any], bool]] = {
    "steps": is_count,
    "step": is_count,
    "reallocations": is_count,
    "updates": is_count,
    "idle": is_count,
    "count": is_count,
    "closed_count": is_count,
    "activated": lambda value: value == -1 or is_count(value),
    "reached": is_count,
    "active_setting": _is_number,
    "is_due": _is_bool,
    "is_held": _is_bool,
    "active": _is_bool,
    "probing": _is_bool,
    "compute": _is_number,
    "step_flops": lambda value: _are_numbers(value) and len(value) == 2,
    "closed": _is_number,
    "window": _are_numbers,
    "lr_history": _are_numbers,
    "settings": lambda value: isinstance(value, dict) and _are_strings([*value.values()]),
    "param_names": _are_strings,
    "modules": _are_mappings,
    "numbers": _are_mappings,
    MARK: lambda value: isinstance(value, dict) and all(map(_are_strings, value.values())),
    "scores": lambda value: isinstance(value, dict) and all(map(_is_number, value.values())),
    "chosen": _are_strings,
}
