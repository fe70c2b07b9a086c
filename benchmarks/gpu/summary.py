"""Summarise a run: how its rows ended, and whether the targets are met."""

from __future__ import annotations

import json
import operator
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gpu._lines import STATUSES, read

Line = Mapping[str, Any]


@dataclass(frozen=True)
class Bar:
    """A target: the ratio of a value of two rows must be at most or at least a limit."""

    name: str
    row: str
    of: str
    value: str
    limit: float
    holds: Callable[[float, float], bool] = operator.le

    def line(self, rows: Mapping[str, Line]) -> list[str]:
        """Return name, ratio, limit and verdict. It is "not measured" if a row is missing."""
        ours, theirs = (rows.get(name, {}).get("values", {}) for name in (self.row, self.of))
        sign = "<=" if self.holds is operator.le else ">="
        bound = f"{sign} {self.limit:.2f}"
        if not ours.get(self.value) or not theirs.get(self.value):
            return [self.name, "-", bound, "not measured"]
        ratio = ours[self.value] / theirs[self.value]
        verdict = "ok" if self.holds(ratio, self.limit) else "MISSED"
        return [self.name, f"{ratio:.3f}", bound, verdict]


_SHAPE = "Llama-3.2-1B, 2 x 2048: "
_PEFT, _OURS = f"{_SHAPE}peft LoRA", f"{_SHAPE}ours, all active"
_BUDGET = f"{_SHAPE}ours, Budget(0.5, 0.6)"
_LOOSER = f"{_SHAPE}ours, Budget(0.3, 0.6), chunked loss"
_CHUNKED = f"{_SHAPE}ours, Budget(0.15, 0.6), chunked loss"
_PLAIN = f"{_SHAPE}our LoRA, plain AdamW"
BARS = (
    Bar("all active: peak / peft LoRA", _OURS, _PEFT, "peak_above", 1.00),
    Bar("all active: tokens/s / peft LoRA", _OURS, _PEFT, "tokens_per_s", 1.05, operator.ge),
    Bar("Budget(0.5, 0.6): peak / peft LoRA", _BUDGET, _PEFT, "peak_above", 0.50),
    Bar(
        "Budget(0.5, 0.6): tokens/s / peft LoRA",
        *(_BUDGET, _PEFT, "tokens_per_s_mean", 1.25, operator.ge),
    ),
    Bar("Budget(0.3, 0.6), chunked loss: peak / peft LoRA", _LOOSER, _PEFT, "peak_above", 0.30),
    Bar(
        "Budget(0.3, 0.6), chunked loss: tokens/s / peft LoRA",
        *(_LOOSER, _PEFT, "tokens_per_s_mean", 1.25, operator.ge),
    ),
    Bar("Budget(0.15, 0.6), chunked loss: peak / peft LoRA", _CHUNKED, _PEFT, "peak_above", 0.15),
    Bar(
        "Budget(0.15, 0.6), chunked loss: tokens/s / peft LoRA",
        *(_CHUNKED, _PEFT, "tokens_per_s_mean", 1.30, operator.ge),
    ),
    Bar("all active: time of a step / plain AdamW", _OURS, _PLAIN, "step_s", 1.02),
)


def counts(lines: Sequence[Line]) -> dict[str, dict[str, int]]:
    """Return, for each part, how many rows have which status."""
    found: dict[str, Counter[str]] = {}
    for line in lines:
        found.setdefault(line["part"], Counter())[line["status"]] += 1
    return {part: dict(counter) for part, counter in found.items()}


def promises(lines: Sequence[Line]) -> list[list[str]]:
    """Return the lines of all targets, including those about budgets and waiting."""
    rows = {line["row"]: line for line in lines}
    found = [bar.line(rows) for bar in BARS]
    for name, value in (
        ("steps beyond their budget", "steps_beyond_allocated"),
        ("waits that the wrapper adds to a step", "added_waits"),
    ):
        values = [line["values"][value] for line in lines if value in line["values"]]
        if values:
            found.append([name, f"{max(values):g}", "<= 0", "MISSED" if max(values) > 0 else "ok"])
        else:
            found.append([name, "-", "<= 0", "not measured"])
    return found


def write(folder: Path) -> None:
    """Print the summary and write it to summary.json."""
    lines = list(read(folder))
    by_part, bars = counts(lines), promises(lines)
    if any(line["dry_run"] for line in lines):  # the targets hold only for a GPU
        bars = [[*bar[:-1], "a dry run"] for bar in bars]
    found = {"counts": by_part, "bars": bars}
    (folder / "summary.json").write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    print("\n== summary")
    for part, by_status in by_part.items():
        told = ", ".join(f"{by_status[s]} {s}" for s in STATUSES if s in by_status)
        print(f"{part}: {told}")
    for bar in bars:
        print(" | ".join(bar))
