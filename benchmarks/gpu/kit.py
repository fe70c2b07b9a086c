"""The GPU kit: its parts in order, each with a time limit; a summary at the end.

    bash benchmarks/gpu/run.sh [--dry-run] OUTDIR

A part, or a row, that fails is a row with its reason, and the rest goes on. Every finished row is
printed and appended to OUTDIR/<part>.jsonl at once.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from gpu._lines import FACTS, Lines, facts
from gpu.summary import write

ROOT = Path(__file__).parents[2]
PATIENCE = 4  # so many times as long may a dry run take: a busy machine spoils nothing in it
GRACE = 5.0  # seconds between a part's own end and the one that it is given


@dataclass(frozen=True)
class Part:
    """A part of the kit.

    Attributes:
        seconds: Its time limit; what earlier parts have left of theirs comes on top.
    """

    name: str
    seconds: float


# 8 minutes in all. A part that measures lives in the module that `MODULES` of part.py names.
PARTS = (
    Part("tests", 110),
    Part("workspaces", 40),
    Part("memory_and_speed", 215),
    Part("full_parameters", 60),
    Part("overhead", 50),
)


def command_of(part: Part, folder: Path, seconds: float, *, dry_run: bool) -> list[str]:
    """Return the command that runs a part."""
    if part.name == "tests":
        return tests_command()
    arguments = [part.name, str(folder), "--seconds", f"{seconds - GRACE:.0f}"]
    return [sys.executable, "-m", "gpu.part", *arguments, *["--dry-run"] * dry_run]


def tests_command() -> list[str]:
    """Run the tests that need a GPU, with no plugin but ours; without a GPU each is skipped."""
    found = ROOT.glob("tests/test_cuda_*.py")
    files = sorted((str(path.relative_to(ROOT)) for path in found), reverse=True)  # compiling last
    plugins = ["-p", "gpu.pytest_rows", "-p", "no:cacheprovider"]
    return [sys.executable, "-m", "pytest", "-q", "--no-header", "-m", "cuda", *plugins, *files]


def run_part(
    part: Part, folder: Path, *, seconds: float, dry_run: bool, lines: Lines
) -> subprocess.Popen[bytes] | None:
    """Run a part for at most so many seconds; what went wrong with it as a whole is a row."""
    print(f"\n== {part.name}: {seconds:.0f} s at most", flush=True)
    if seconds < GRACE:
        lines.add("the part", "skipped", reason="the time of the kit is over")
        return None
    environment = {**os.environ, "DYNALORA_GPU_FOLDER": str(folder)}
    if part.name == "tests":
        environment["PYTEST_DISABLE_PLUGIN_AUTOLOAD"] = "1"
    command = command_of(part, folder, seconds, dry_run=dry_run)
    start = time.monotonic()
    process = subprocess.Popen(command, cwd=ROOT, env=environment, start_new_session=True)
    try:
        code = process.wait(timeout=seconds)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, 9)  # with the row that it has forked
        process.wait()
        lines.add("the part", "failed", reason=f"stopped after {seconds:.0f} s, its limit")
        return process
    if code and not (part.name == "tests" and code == 1):  # 1: some test failed, and has its row
        spent = time.monotonic() - start
        lines.add("the part", "failed", reason=f"exit code {code}", seconds=spent)
    return process


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the kit."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path, metavar="OUTDIR")
    parser.add_argument("--dry-run", action="store_true", help="tiny shapes, on the CPU")
    parser.add_argument(
        "--parts", nargs="*", default=[part.name for part in PARTS], help="these parts only"
    )
    options = parser.parse_args(arguments)
    folder = options.folder.resolve()
    folder.mkdir(parents=True, exist_ok=True)
    if old := sorted(path.name for path in folder.glob("*.jsonl")):
        parser.error(f"{folder} holds the rows of another run ({', '.join(old)}); name a new one.")
    command = shlex.join(["bash", "benchmarks/gpu/run.sh", *sys.argv[1:]])
    try:
        known = facts(command, dry_run=options.dry_run)
    except LookupError as problem:
        parser.error(str(problem))
    os.environ[FACTS] = json.dumps(known)
    if options.dry_run:
        os.environ |= {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    print(json.dumps(known, indent=1), flush=True)
    end = time.monotonic()
    for part in PARTS:
        end += part.seconds * (PATIENCE if options.dry_run else 1)
        if part.name in options.parts:
            lines = Lines(folder, part.name, known)
            left = end - time.monotonic()
            run_part(part, folder, seconds=left, dry_run=options.dry_run, lines=lines)
    write(folder)


if __name__ == "__main__":
    main()
