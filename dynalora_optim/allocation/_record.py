"""The history of the allocation: when each module was active, and by which scores."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from dynalora_optim.allocation._plot import heatmap


@dataclass(frozen=True)
class Reallocation:
    """One selection.

    Attributes:
        step: The number of optimizer steps done before the selection.
        scores: The importance y of each group at the selection; 0 if there was no score yet.
        chosen: The groups that are active after the selection, in forward order.
    """

    step: int
    scores: Mapping[str, float]
    chosen: tuple[str, ...]


class AllocationRecord(Sequence[Reallocation]):
    """Every reallocation of a run, in order; `counts` sums the active steps per group."""

    def __init__(self) -> None:
        self._entries: list[Reallocation] = []
        self._steps: list[int] = []  # optimizer steps done under each entry

    def append(self, entry: Reallocation) -> None:
        """Add the selection that applies from now on."""
        self._entries.append(entry)
        self._steps.append(0)

    def advance(self) -> None:
        """Count one optimizer step under the newest entry."""
        self._steps[-1] += 1

    def __len__(self) -> int:
        return len(self._entries)

    def __iter__(self) -> Iterator[Reallocation]:
        return iter(self._entries)

    def __getitem__(self, index: Any) -> Any:
        return self._entries[index]

    def counts(self) -> dict[str, int]:
        """Return the number of optimizer steps during which each group was active."""
        names = dict.fromkeys(name for entry in self._entries for name in entry.scores)
        counts = dict.fromkeys(names, 0)
        for entry, steps in zip(self._entries, self._steps, strict=True):
            for name in entry.chosen:
                counts[name] += steps
        return counts

    def state_dict(self) -> list[dict[str, Any]]:
        """Return the entries as plain lists, dicts, strings and numbers."""
        return [
            {**asdict(entry), "chosen": list(entry.chosen), "steps": steps}
            for entry, steps in zip(self._entries, self._steps, strict=True)
        ]

    def load_state_dict(self, entries: Sequence[Mapping[str, Any]]) -> None:
        """Replace the record with what `state_dict` returned."""
        self._entries = [
            Reallocation(entry["step"], dict(entry["scores"]), tuple(entry["chosen"]))
            for entry in entries
        ]
        self._steps = [entry["steps"] for entry in entries]

    def to_json(self, path: str | os.PathLike[str]) -> None:
        """Write the record to ``path``: a list of {step, scores, chosen, steps}.

        A temporary file is written and then renamed, so that a killed run never leaves half a file.
        """
        target = Path(path)
        temporary = target.with_name(f".{target.name}.{os.getpid()}.tmp")
        try:
            temporary.write_text(json.dumps(self.state_dict(), indent=1), encoding="utf-8")
            temporary.replace(target)
        finally:
            temporary.unlink(missing_ok=True)

    def plot(self, path: str | os.PathLike[str]) -> None:
        """Draw the paper's Figure 5 to ``path``: layer x module, colour = active steps.

        Raises:
            ImportError: matplotlib is not installed (``pip install "dynalora-optim[plot]"``).
            ValueError: Nothing is recorded yet.
        """
        if not self._entries:
            raise ValueError("plot() found an empty record; draw it after the first selection.")
        heatmap(self.counts(), Path(path))
