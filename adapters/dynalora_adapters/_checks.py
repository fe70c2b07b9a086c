"""Checks of the numbers in a configuration."""

from __future__ import annotations

import math

_TINY, _HUGE = 2.0**-126, 2.0**127  # normal numbers in float32, well below the largest


def positive_int(name: str, value: object) -> None:
    """Raise unless ``value`` is an int (not a bool) of at least 1."""
    if _int(name, value) < 1:
        raise ValueError(f"{name} must be at least 1, got {value}; pass a positive whole number.")


def positive_number(name: str, value: object) -> None:
    """Raise unless ``value`` is a finite real number above 0."""
    if not 0.0 < _real(name, value) < math.inf:
        raise ValueError(f"{name} must be positive and finite, got {value}; pass a number above 0.")


def nonzero_float32(name: str, value: object) -> None:
    """Raise unless ``value`` is a real number that is neither zero nor infinite in float32."""
    if not _TINY <= abs(_real(name, value)) <= _HUGE:
        raise ValueError(
            f"{name} must be finite and not 0 in float32, got {value}; pass a number such as 0.1."
        )


def generator_seed(name: str, value: object) -> None:
    """Raise unless ``value`` is an int that ``torch.Generator.manual_seed`` takes."""
    if not -(2**63) <= _int(name, value) < 2**64:
        raise ValueError(f"{name} must lie in [-2**63, 2**64), got {value}; pass a smaller number.")


def boolean(name: str, value: object) -> None:
    """Raise unless ``value`` is a bool."""
    if not isinstance(value, bool):
        raise TypeError(f"{name} must be a bool, got {value!r}; pass True or False.")


def probability_below_one(name: str, value: object) -> None:
    """Raise unless ``value`` lies in [0, 1)."""
    if not 0.0 <= _real(name, value) < 1.0:
        raise ValueError(f"{name} must lie in [0, 1), got {value}; pass 0.0 to turn it off.")


def _int(name: str, value: object) -> int:
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name} must be an int, got {value!r}; pass a whole number.")
    return value


def _real(name: str, value: object) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{name} must be a number, got {value!r}; pass an int or a float.")
    try:
        return float(value)
    except OverflowError:
        return math.inf
