"""The GPU kit: it runs parts in order, each with a time limit, then prints a summary.

    bash benchmarks/gpu/run.sh [--dry-run] OUTDIR

If a part or a row fails, the reason is written as a row, and the other rows still run. Every
finished row is printed and appended to OUTDIR/<part>.jsonl immediately.
"""

from __future__ import annotations

import argparse
import json
import os
import re
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
PATIENCE = 4  # factor for the time limits of a dry run, which may run on a busy machine
FOR_GPUS = re.compile(r"pytest\.mark\.cuda|\bdevice\):")  # a mark, or a fixture that has it
GRACE = 5.0  # seconds between the end that a part plans and its time limit


@dataclass(frozen=True)
class Part:
    """A part of the kit.

    Attributes:
        seconds: Its time limit. Time that earlier parts did not use is added.
    """

    name: str
    seconds: float


# 8 minutes in total. `MODULES` of part.py names the module of each part that measures.
PARTS = (
    Part("tests", 100),
    Part("workspaces", 25),
    Part("memory_and_speed", 240),
    Part("full_parameters", 40),
    Part("overhead", 75),
)


def command_of(part: Part, folder: Path, seconds: float, passed_on: Sequence[str]) -> list[str]:
    """Return the command that runs a part."""
    if part.name == "tests":
        return tests_command()
    until = time.monotonic() + seconds - GRACE  # all processes of a machine have the same clock
    arguments = [part.name, str(folder), "--until", f"{until:.1f}", *passed_on]
    return [sys.executable, "-m", "gpu.part", *arguments]


def tests_command() -> list[str]:
    """Return the command that runs the tests for GPUs, with only our pytest plugin."""
    found = [path for path in ROOT.glob("tests/test_*.py") if FOR_GPUS.search(path.read_text())]
    files = sorted((str(path.relative_to(ROOT)) for path in found), reverse=True)
    files.sort(key=lambda name: "compile" in name)  # last
    plugins = ["-p", "gpu.pytest_rows", "-p", "no:cacheprovider"]
    return [sys.executable, "-m", "pytest", "-q", "--no-header", "-m", "cuda", *plugins, *files]


def run_part(
    part: Part, folder: Path, *, seconds: float, passed_on: Sequence[str], lines: Lines
) -> subprocess.Popen[bytes] | None:
    """Run a part with a time limit. If the part as a whole fails, a row says why."""
    print(f"\n== {part.name}: at most {seconds:.0f} s", flush=True)
    if seconds < GRACE:
        lines.add("the part", "skipped", reason="no time is left")
        return None
    environment = {**os.environ, "DYNALORA_GPU_FOLDER": str(folder)}
    if part.name == "tests":
        environment["PYTEST_DISABLE_PLUGIN_AUTOLOAD"] = "1"
    command = command_of(part, folder, seconds, passed_on)
    start = time.monotonic()
    process = subprocess.Popen(command, cwd=ROOT, env=environment, start_new_session=True)
    try:
        code = process.wait(timeout=seconds)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, 9)  # also kills the row that it has forked
        process.wait()
        lines.add("the part", "failed", reason=f"stopped at its time limit, {seconds:.0f} s")
        return process
    if code and not (part.name == "tests" and code == 1):  # 1: a failed test, which has a row
        spent = time.monotonic() - start
        lines.add("the part", "failed", reason=f"exit code {code}", seconds=spent)
    return process


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the kit."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path, metavar="OUTDIR")
    parser.add_argument("--dry-run", action="store_true", help="tiny shapes, on the CPU")
    parser.add_argument(
        "--parts", nargs="*", default=[part.name for part in PARTS], help="run only these parts"
    )
    parser.add_argument("--rows", default="", help="run only rows with this in their names (regex)")
    options = parser.parse_args(arguments)
    folder = options.folder.resolve()
    folder.mkdir(parents=True, exist_ok=True)
    if old := sorted(path.name for path in folder.glob("*.jsonl")):
        parser.error(f"{folder} has rows of another run ({', '.join(old)}); pass a new folder.")
    command = shlex.join(["bash", "benchmarks/gpu/run.sh", *sys.argv[1:]])
    try:
        known = facts(command, dry_run=options.dry_run)
    except LookupError as problem:
        parser.error(str(problem))
    os.environ[FACTS] = json.dumps(known)
    if options.dry_run:
        os.environ |= {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    print(json.dumps(known, indent=1), flush=True)
    passed_on = ["--rows", options.rows, *["--dry-run"] * options.dry_run]
    end = time.monotonic()
    for part in PARTS:
        end += part.seconds * (PATIENCE if options.dry_run else 1)
        if part.name in options.parts:
            lines = Lines(folder, part.name, known)
            left = end - time.monotonic()
            run_part(part, folder, seconds=left, passed_on=passed_on, lines=lines)
    write(folder)


if __name__ == "__main__":
    main()
