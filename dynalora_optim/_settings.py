"""The settings of a run as texts, to compare a resumed run with the one that was saved."""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping
from dataclasses import is_dataclass

logger = logging.getLogger(__name__)

# What a changed setting means, where it is not only that the new one counts from now on.
_CONSEQUENCES = {"importance": "; the scores start anew"}
_ADDRESS = re.compile(r" at 0x[0-9a-fA-F]+")
_OPTIONS_OF_MEASURE = re.compile(r"\(.*\)(?=, window=)")


def described(**settings: object) -> dict[str, str]:
    """Return each setting as a text that is the same in every process."""
    return {name: text_of(value) for name, value in settings.items()}


def text_of(value: object) -> str:
    """Return the options of ``value`` as a text; without a repr of its own, only its name."""
    plain = value is None or isinstance(value, (str, int, float)) or is_dataclass(value)
    if plain or type(value).__repr__ is not object.__repr__:
        return _ADDRESS.sub("", repr(value))
    return getattr(value, "__qualname__", type(value).__qualname__)


def changed(saved: Mapping[str, str], own: Mapping[str, str]) -> set[str]:
    """Return the names of the settings that differ."""
    # Files of older versions have only the class of the measure, in quotes.
    older = {name: repr(_OPTIONS_OF_MEASURE.sub("", text)) for name, text in own.items()}
    return {name for name in own if saved.get(name, own[name]) not in (own[name], older[name])}


def log_changes(saved: Mapping[str, str], own: Mapping[str, str]) -> None:
    """Log one line for each setting that differs; the new one counts from now on."""
    for name in sorted(changed(saved, own)):
        logger.warning(
            "the state dict was saved with %s=%s, but this optimizer was built with %s=%s, which "
            "counts from now on%s.",
            name,
            saved[name],
            name,
            own[name],
            _CONSEQUENCES.get(name, ""),
        )
