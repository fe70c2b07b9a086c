"""Amounts of memory, as a user writes them: bytes, or a text such as "20GiB"."""

from __future__ import annotations

import math
import re
from fractions import Fraction
from numbers import Integral

_UNITS = {
    "GiB": 2**30,
    "MiB": 2**20,
    "KiB": 2**10,
    "GB": 10**9,
    "MB": 10**6,
    "kB": 10**3,
    "bytes": 1,
}
_NUMBER = r"[0-9]{1,18}(?:\.[0-9]{1,18})?"
_TEXT = re.compile(rf"\s*({_NUMBER})\s*({'|'.join(_UNITS)})\s*")

DEVICE = "device"  # the whole device


def check_amounts(memory: object, total: object) -> None:
    """Raise unless exactly one of ``memory`` and ``total`` is given.

    Raises:
        ValueError: Both are, or none is.
    """
    if (memory is None) == (total is None):
        raise ValueError(
            f"Budget(memory={memory!r}, total={total!r}): pass exactly one of them: memory= for "
            "the step alone, or total= for everything that the process holds for training."
        )


def memory_amount(memory: object) -> float:
    """Return the ``memory`` of a budget: a share as a float, or bytes as an int.

    Raises:
        TypeError: It is no number and no text.
        ValueError: It is out of range, or a text of another form.
    """
    remedy = 'a share (float) in (0, 1], or bytes (int, or a text such as "20GiB")'
    if isinstance(memory, float):
        if not 0 < memory <= 1:
            raise ValueError(
                f"Budget(memory={memory}) is not a share in (0, 1]; pass one, or a number of "
                'bytes (int, or a text such as "20GiB").'
            )
        return float(memory)  # not a number of numpy, which a saved state must not have
    return _bytes("memory", memory, remedy)


def total_amount(total: object) -> int | str:
    """Return the ``total`` of a budget: bytes as an int, or `DEVICE`.

    Raises:
        TypeError: It is no whole number and no text.
        ValueError: It is not positive, or a text of another form.
    """
    remedy = f'bytes (int, or a text such as "24GiB"), or "{DEVICE}"'
    return total if total == DEVICE else _bytes("total", total, remedy)


def in_words(amount: int) -> str:
    """Return a number of bytes in the largest unit of which it has at least one."""
    for unit in ("GiB", "MiB", "KiB"):
        if amount >= _UNITS[unit]:
            return f"{amount / _UNITS[unit]:,.2f} {unit}"
    return f"{amount} bytes"


def _bytes(name: str, amount: object, remedy: str) -> int:
    if isinstance(amount, str):
        found = _TEXT.fullmatch(amount)
        if not found:
            raise ValueError(
                f"Budget({name}={amount!r}) is not an amount of memory: a number and one of "
                f"{', '.join(_UNITS)}; pass {remedy}."
            )
        size = math.floor(Fraction(found[1]) * _UNITS[found[2]])
    elif isinstance(amount, bool) or not isinstance(amount, Integral):
        raise TypeError(f"Budget({name}={amount!r}) is not a number of bytes; pass {remedy}.")
    else:
        size = int(amount)
    if size <= 0:
        raise ValueError(f"Budget({name}={amount!r}) is not positive; pass a number of bytes.")
    return size
