"""Run the quickstart and store its results: with defaults, and with more steps and seeds.

OMP_NUM_THREADS=1 python benchmarks/quickstart_seeds.py [--output runs/quickstart.jsonl]
OMP_NUM_THREADS=1 python benchmarks/quickstart_seeds.py --seeds 0    # the defaults only
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

from _quickstart_tables import COLUMNS, DEFAULTS, OVER_SEEDS, methods_table, seeds_table
from _stored import ROOT, Row, run_of, write


def rows_of(settings: str, seed: int, more: Sequence[str] = ()) -> list[dict[str, Any]]:
    """Run the quickstart in a new process; return a row for each method."""
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
    options, more = parser.parse_known_args(arguments)  # other options are passed to the quickstart
    run = run_of(__file__, arguments)
    seeds = {DEFAULTS: 1} | dict.fromkeys(OVER_SEEDS, options.seeds)
    parts: list[list[Row]] = []
    for settings in (part for part, count in seeds.items() if count):
        rows = [row for seed in range(seeds[settings]) for row in rows_of(settings, seed, more)]
        parts.append([*write(options.output, settings, rows, run)])
    print(methods_table(parts[0]))
    if options.seeds:
        print(f"\n{seeds_table(parts[1:])}")


if __name__ == "__main__":
    main()
