"""A check that several options share."""

from __future__ import annotations


def whole_number(name: str, value: object, *, least: int, of: str = "optimizer steps") -> None:
    """Raise unless ``value`` is an int (no bool, no float) of at least ``least``.

    Raises:
        ValueError: It is not; the message names the option, the rule, the value and a way out.
    """
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise ValueError(
            f"{name}={value!r} must be a whole number of {of}, at least {least}; "
            f"pass an int such as {max(least, 10)}."
        )
