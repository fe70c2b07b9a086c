"""The result of one selection, as one value."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Choice:
    """Which groups train, and which blocks are recomputed in the backward pass.

    The graph ends at the lowest block that trains: below it no tensor requires a gradient.

    Attributes:
        active: The names of the groups that get gradients.
        recomputed: The positions of the blocks that keep only their input.
    """

    active: frozenset[str]
    recomputed: frozenset[int] = frozenset()
