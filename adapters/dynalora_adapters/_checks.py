"""The rules that the numbers of a configuration obey."""

from __future__ import annotations

import math


def positive_int(name: str, value: object) -> None:
    """Raise unless ``value`` is an int (not a bool) of at least 1."""
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name} must be an int, got {value!r}; pass a whole number of at least 1.")
    if value < 1:
        raise ValueError(f"{name} must be at least 1, got {value}; pass a positive whole number.")


def positive_number(name: str, value: object) -> None:
    """Raise unless ``value`` is a finite real number above 0."""
    if not 0.0 < _real(name, value) < math.inf:
        raise ValueError(f"{name} must be positive and finite, got {value}; pass a number above 0.")


def probability_below_one(name: str, value: object) -> None:
    """Raise unless ``value`` lies in [0, 1)."""
    if not 0.0 <= _real(name, value) < 1.0:
        raise ValueError(f"{name} must lie in [0, 1), got {value}; pass 0.0 to switch it off.")


def _real(name: str, value: object) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{name} must be a number, got {value!r}; pass an int or a float.")
    try:
        return float(value)
    except OverflowError:
        return math.inf
