"""What held when a forward ran, which is asked for when a checkpoint recomputes that forward."""

from __future__ import annotations

from bisect import bisect_right
from typing import Any, Generic, TypeVar

from dynalora_adapters._torch_private import next_node

_KEPT = 64  # changes; more than this lie between a forward and its backward in no loop

Value = TypeVar("Value")


class Timeline(Generic[Value]):
    """The values that something has had, by the time of the forwards.

    autograd numbers its nodes in the order in which they are made. The node whose backward asks for
    a recomputation is younger than the beginning of its forward, and older than the beginning of
    the next one: its number tells which forward is recomputed.
    """

    def __init__(self) -> None:
        self._nodes: list[int] = []  # the number of the first node after each change
        self._values: list[Value] = []  # the value from then on

    def note(self, value: Value, *, before: int = 0) -> None:
        """Note that ``value`` holds from now on, or from the last ``before`` nodes on."""
        if self._values and self._values[-1] == value:
            return
        first = next_node() - before
        while self._nodes and self._nodes[-1] >= first:  # nothing was recorded in between
            del self._nodes[-1], self._values[-1]
        self._nodes.append(first)
        self._values.append(value)
        del self._nodes[:-_KEPT], self._values[:-_KEPT]

    def note_all(self, value: Value) -> None:
        """Note that ``value`` has always held."""
        self._nodes, self._values = [0], [value]

    def at(self, node: int) -> Value | None:
        """Return the value that held when this node was made, None if that was before all notes."""
        place = bisect_right(self._nodes, node) - 1
        return self._values[place] if place >= 0 else None

    def __getstate__(self) -> dict[str, Any]:
        return {}  # a copy has no graph that could be recomputed

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__()  # type: ignore[misc]
