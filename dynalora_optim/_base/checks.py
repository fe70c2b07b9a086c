"""Checks of arguments that several parts share."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TypeVar, cast

T = TypeVar("T")


def whole_number(name: str, value: object, *, least: int, of: str = "optimizer steps") -> None:
    """Raise unless ``value`` is an int (not a bool, not a float) of at least ``least``.

    Raises:
        ValueError: ``value`` is anything else; the message names the option, the rule, the value
            and a remedy.
    """
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        kind = f" of {of}" if of else ""
        raise ValueError(
            f"{name}={value!r} must be a whole number{kind}, at least {least}; "
            f"pass an int such as {max(least, 10)}."
        )


def by_name(
    option: str,
    value: object,
    known: Mapping[str, Callable[[], T]],
    *,
    kinds: tuple[type, ...],
    noun: str,
    method: str,
) -> T:
    """Return ``value`` itself, or the default object behind its short name.

    Args:
        option: The name of the option, as the user writes it.
        value: A short name, or an object of one of the ``kinds``.
        known: For each short name, a function that makes its object.
        kinds: The types that an object may have.
        noun: What the error message calls such an object.
        method: The method that such an object must have, for the error message.

    Raises:
        ValueError: ``value`` is an unknown short name.
        TypeError: ``value`` is neither a name nor such an object (a class is not one).
    """
    remedy = f"pass one of {sorted(known)} or an object with {method}."
    if isinstance(value, str):
        if value not in known:
            raise ValueError(f"{option}={value!r} is not a known {noun}; {remedy}")
        return known[value]()
    if isinstance(value, kinds) and not isinstance(value, type):
        return cast(T, value)
    article = "an" if noun[0] in "aeiou" else "a"
    raise TypeError(f"{option}={value!r} is neither a short name nor {article} {noun}; {remedy}")
