"""Make the tables and figures of the texts from the stored runs.

    python benchmarks/results/tables.py              # print every table
    python benchmarks/results/tables.py --check      # print differences to the texts; 1 if any
    python benchmarks/results/tables.py --write      # put the tables into the texts
    python benchmarks/results/tables.py --figures    # draw the figures
    python benchmarks/results/tables.py --intervals  # compute the intervals; needs labels

In a text, a table is between ``<!-- table: NAME -->`` and ``<!-- end of table -->``. The function
with this name in `TABLES` makes it.
"""

from __future__ import annotations

import argparse
import difflib
import re
import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import _budget_tables as budget
import _full_tables as full
import _gpu_tables as gpu
import _memory_tables as memory
import _overhead_tables as overhead
import _quality_tables as quality
import _quickstart_tables as quickstart
from _planned_tables import planned_lora_table
from _recompute_tables import recompute_table
from _stored import Row, read, run_of

Table = Callable[[], str]
HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
RESULTS, README = ROOT / "benchmarks" / "RESULTS.md", ROOT / "README.md"
TEXTS = (RESULTS, README, *sorted((ROOT / "docs").rglob("*.md")))
END = "<!-- end of table -->"
MARKED = re.compile(rf"(<!-- table: (?P<name>\S+) -->\n).*?{END}", re.DOTALL)


def _of(file: str, part: str | None, make: Callable[[Sequence[Row]], str]) -> Table:
    """Return a function that makes a table from one part of a file, or from all if it is None."""
    return lambda: make(read(HERE / file, part))


def _seeds() -> str:
    parts = [read(HERE / "quickstart.jsonl", part) for part in quickstart.OVER_SEEDS]
    return quickstart.seeds_table(parts)


_memory = partial(_of, "memory.jsonl")
_full = partial(_of, "full_parameter.jsonl")
_smollm2 = partial(_full, "SmolLM2-135M")
_quickstart = partial(_of, "quickstart.jsonl", quickstart.DEFAULTS)

SHAPES = list(dict.fromkeys(row["part"] for row in read(HERE / "memory.jsonl")))

TABLES: dict[str, Table] = {
    "overhead_step": _of("overhead.jsonl", overhead.STEP, overhead.step_table),
    **{
        f"overhead_{groups}": _of("overhead.jsonl", f"{groups} groups", overhead.group_table)
        for groups in (24, 144, 512)
    },
    **{f"memory_{shape}": _memory(shape, memory.main_table) for shape in SHAPES},
    **{f"memory_{shape}_bars": _memory(shape, memory.bars_table) for shape in SHAPES},
    "measuring": _of("measuring.jsonl", "measuring", budget.measuring),
    "soak": _of("soak.jsonl", "soak", budget.soak),
    "recompute": _of("recompute.jsonl", None, recompute_table),
    "memory_readme": _memory("roberta", memory.readme_table),
    "planned_lora": _of("planned_lora.jsonl", "planned LoRA", planned_lora_table),
    "full_memory": _smollm2(full.memory_table),
    "full_everywhere": _smollm2(full.everywhere_table),
    "full_times": _smollm2(full.times_table),
    "full_bars": _smollm2(full.bars_table),
    "full_planned": _full("planned", full.planned_table),
    **{f"gpu_{shape}": partial(gpu.memory_table, shape) for shape in gpu.SHAPES},
    **gpu.TABLES,
    "quality": quality.quality,
    "quality_rates": quality.quality_rates,
    "quality_pairs": quality.quality_pairs,
    "quality_readme": quality.readme,
    "quality_half": quality.half,
    "quality_mpnet": quality.mpnet,
    "quality_few": quality.few,
    "quality_few_pairs": quality.few_pairs,
    "quality_sixth": quality.sixth,
    "quality_sixth_pairs": quality.sixth_pairs,
    "quality_blocks": budget.blocks,
    "quality_blocks_readme": budget.blocks_readme,
    "quality_blocks_rates": budget.blocks_rates,
    "quality_blocks_pairs": budget.blocks_pairs,
    "quality_costs": budget.costs,
    "quality_equal": budget.equal,
    "quality_equal_rates": budget.equal_rates,
    "quality_language": budget.language,
    "quality_language_2000": partial(budget.language, "language_2000"),
    "quality_answers": quality.answers,
    "quality_answers_rates": quality.answers_rates,
    "quality_language_2000_pairs": quality.language_pairs,
    "quality_language_costs": budget.language_costs,
    "quality_language_2000_costs": partial(budget.language_costs, "reuters_2000"),
    "quickstart": _quickstart(quickstart.described_methods_table),
    "quickstart_readme": _quickstart(quickstart.methods_table),
    "quickstart_seeds": _seeds,
}


def filled(text: str) -> str:
    """Return a text with its tables replaced by those of the stored runs.

    Raises:
        ValueError: A mark has an unknown name, or its end is missing.
    """
    names = [found["name"] for found in MARKED.finditer(text)]
    if len(names) != (opened := text.count("<!-- table: ")):
        raise ValueError(f"{opened} tables begin and {len(names)} end; each ends with {END}")
    for name in names:
        if name not in TABLES:
            raise ValueError(f"there is no table {name}; there are {', '.join(TABLES)}")
    return MARKED.sub(lambda m: f"{m[1]}{TABLES[m['name']]()}\n{END}", text)


def deviation(path: Path) -> str:
    """Return the differences between a text and the stored runs, as a diff; empty if none."""
    said = path.read_text("utf-8")
    ours, theirs = (text.splitlines(keepends=True) for text in (said, filled(said)))
    return "".join(difflib.unified_diff(ours, theirs, str(path), "the stored runs", n=0))


def check(texts: Sequence[Path]) -> int:
    """Print the differences between the texts and the stored runs; return 1 if there are any."""
    diffs = [deviation(path) for path in texts]
    print("".join(diffs), end="")
    return int(any(diffs))


def write(texts: Sequence[Path]) -> None:
    """Write the tables into the texts."""
    for path in texts:
        said = path.read_text("utf-8")
        if (text := filled(said)) != said:
            path.write_text(text, "utf-8")
            print(f"wrote {path}")


def figures(folder: Path = HERE) -> None:
    """Draw the figures, and save them in a folder."""
    folder.mkdir(parents=True, exist_ok=True)
    for shape in SHAPES:
        memory.draw(folder / f"memory_{shape}.png", read(HERE / "memory.jsonl", shape))
    quality.figures(folder / "quality")


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--check", action="store_true", help="compare the texts with the runs")
    what.add_argument("--write", action="store_true", help="write the tables into the texts")
    what.add_argument("--figures", action="store_true", help="draw the figures")
    what.add_argument("--intervals", action="store_true", help="compute the intervals again")
    parser.add_argument("texts", type=Path, nargs="*", default=TEXTS, help="the default: all")
    options = parser.parse_args(arguments)
    try:
        if options.check:
            return check(options.texts)
        if options.write:
            write(options.texts)
        elif options.figures:
            figures()
        elif options.intervals:
            quality.store_intervals(run_of(__file__, arguments))
        else:
            for name, make in TABLES.items():
                print(f"<!-- table: {name} -->\n{make()}\n{END}\n")
    except ValueError as error:
        sys.exit(f"tables: {error}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
