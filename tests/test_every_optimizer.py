"""No optimizer of torch, pytorch_optimizer, bitsandbytes or torchao differs in silence.

The table in docs/optimizers.md is what this test finds. To write it anew, set DYNALORA_WRITE=1.
"""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
from every_optimizer import Kind, kinds, verdict

PAGE = Path(__file__).parent.parent / "docs" / "optimizers.md"
COLUMNS = ("all active", "resume", "plain in", "plain out", "idle")
pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]
ALL = {kind.label: kind for kind in kinds()}


@pytest.mark.parametrize("label", ALL)
def test_it_works_or_is_refused(label):
    kind: Kind = ALL[label]
    with torch.compiler.set_stance("force_eager"):  # Kron compiles itself anew for each model
        answers = verdict(kind)
    if "plain" in answers:
        pytest.skip(f"does not run alone like this: {answers['plain']}")
    row = _row(label, answers)
    if os.environ.get("DYNALORA_WRITE"):
        _write(label, row)
    wrong = {question: answer for question, answer in answers.items() if not _is_right(answer)}
    assert not wrong or "wrapped" in answers, wrong
    assert row in PAGE.read_text(encoding="utf-8").splitlines(), "docs/optimizers.md differs"


def _is_right(answer: str) -> bool:
    """Whether an answer is yes, or the plain optimizer itself cannot do it, or it is refused."""
    return answer == "yes" or answer.startswith(("plain: ", "ValueError: your param group"))


def _row(label: str, answers: dict[str, str]) -> str:
    if "wrapped" in answers:
        return f"| `{label}` | refused: {answers['wrapped'].split(', so ')[0]} | | | | |"
    cells = ["yes" if answers[c] == "yes" else _short(answers[c]) for c in COLUMNS]
    return f"| `{label}` | {' | '.join(cells)} |"


def _short(answer: str) -> str:
    return "not alone either" if answer.startswith("plain: ") else answer.split(",", maxsplit=1)[0]


def _write(label: str, row: str) -> None:
    lines = PAGE.read_text(encoding="utf-8").splitlines()
    start = next(i for i, line in enumerate(lines) if line.startswith("|---")) + 1
    stop = next((i for i in range(start, len(lines)) if not lines[i].startswith("|")), len(lines))
    rows = {line.split("`")[1]: line for line in lines[start:stop]} | {label: row}
    lines[start:stop] = [rows[key] for key in sorted(rows, key=str.lower)]
    PAGE.write_text("\n".join(lines) + "\n", encoding="utf-8")


def test_the_table_has_at_least_sixty_optimizers():
    rows = [line for line in PAGE.read_text(encoding="utf-8").splitlines() if line[:3] == "| `"]
    assert len([row for row in rows if "refused" not in row]) >= 60
