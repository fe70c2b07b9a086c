"""Store what the quickstart prints: with its defaults and with another rate, over several seeds.

    python benchmarks/quickstart_seeds.py [--output runs/quickstart.jsonl]

Times are seconds of the clock on the wall: run it on an idle machine.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from _quickstart_tables import COLUMNS, DEFAULTS, SLOWER, methods_table, seeds_table
from _stored import ROOT, Row, run_of, write


def rows_of(settings: str, seed: int, more: Sequence[str] = ()) -> list[dict[str, Any]]:
    """Run the quickstart in a process of its own; return a row for each method."""
    script = ROOT / "examples" / "quickstart.py"
    with TemporaryDirectory() as folder:
        given = [*settings.split(), "--seed", str(seed), *more, "--output", folder]
        subprocess.run([sys.executable, str(script), *given], check=True, stdout=sys.stderr)
        numbers = json.loads((Path(folder) / "summary.json").read_text("utf-8"))
    return [
        {
            "row": name,
            "seed": seed,
            "accuracy_before": numbers["accuracy_before"],
            "accuracy": numbers[f"accuracy_{name.lower()}"],
            "active_parameters": numbers[f"active_parameters_{name.lower()}"],
            "seconds_per_step": numbers[f"seconds_per_step_{name.lower()}"],
            "peak_bytes": numbers[f"peak_bytes_{name.lower()}"],
        }
        for name in COLUMNS
    ]


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--seeds", type=int, default=4)
    parser.add_argument("--output", type=Path, default=Path("runs/quickstart.jsonl"))
    options, more = parser.parse_known_args(arguments)  # what it does not know, the quickstart does
    run = run_of(__file__, arguments)
    parts: dict[str, list[Row]] = {}
    for settings in (DEFAULTS, SLOWER):
        rows = [row for seed in range(options.seeds) for row in rows_of(settings, seed, more)]
        parts[settings] = [*write(options.output, settings, rows, run)]
    print(f"{methods_table(parts[DEFAULTS])}\n\n{seeds_table(parts)}")


if __name__ == "__main__":
    main()
