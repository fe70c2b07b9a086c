"""Stored runs: a file of JSON lines, a line a row, each with how and where it was measured.

    {"part": "roberta", "row": "peft LoRA", "peak": 1400998212, ..., "run": {"command": ...,
     "date": ..., "commit": ..., "versions": {...}, "hardware": {...}}}

A *part* is what one table is made of: all rows that were measured side by side. A script that
measures a part again replaces its rows and leaves the other parts of the file as they are.
"""

from __future__ import annotations

import json
import os
import platform
import shlex
import subprocess
import sys
from collections.abc import Iterable, Mapping, Sequence
from datetime import datetime, timezone
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

Row = Mapping[str, Any]
ROOT = Path(__file__).resolve().parents[1]
PACKAGES = ("torch", "transformers", "peft", "accelerate", "badam")
ENVIRONMENT = ("OMP_NUM_THREADS",)  # what a command line needs to give the same numbers


def run_of(script: str, arguments: Sequence[str] | None = None) -> dict[str, Any]:
    """Describe the run under way: what is stored with every row of it.

    Args:
        script: The ``__file__`` of the script.
        arguments: Its command line; None for that of the process.
    """
    place = Path(script).resolve().relative_to(ROOT).as_posix()
    words = ["python", place, *(sys.argv[1:] if arguments is None else arguments)]
    given = [f"{name}={os.environ[name]}" for name in ENVIRONMENT if name in os.environ]
    return {
        "command": " ".join([*given, shlex.join(words)]),
        "date": datetime.now(timezone.utc).strftime("%Y-%m-%d"),
        "commit": _commit(),
        "versions": {"python": platform.python_version(), **_installed()},
        "hardware": hardware(),
    }


def _commit() -> str | None:
    """The commit that is checked out, marked where files differ from it; None without git."""
    command = ["git", "describe", "--always", "--dirty", "--exclude=*"]
    try:
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return done.stdout.strip()


def _installed() -> dict[str, str]:
    found = {}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found | {"torch": torch.__version__}  # with what it was built for


def hardware() -> dict[str, Any]:
    """Name the machine, and what of it a run uses."""
    card = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    return {
        "card": card,
        "processor": _processor(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
    }


def _processor() -> str:
    """The architecture, and the model where Linux tells it."""
    try:
        text = Path("/proc/cpuinfo").read_text("utf-8")
    except OSError:
        return platform.machine()
    models = [line.partition(":")[2].strip() for line in text.splitlines() if "model name" in line]
    return f"{platform.machine()} ({models[0]})" if models else platform.machine()


def described(rows: Sequence[Row], *packages: str) -> str:
    """Return what stands above a table: the machine, the versions and the date of its rows.

    Of rows that were not measured but recorded from an earlier text, it says so.

    Args:
        rows: Of one part.
        packages: Whose versions to name beside torch's.
    """
    run = rows[0]["run"]
    place, versions = run["hardware"], run["versions"]
    threads = f"{place['threads']} thread{'s' * (place['threads'] != 1)}"
    named = [place["card"] or place["processor"], f"{place['cores']} CPU cores ({threads})"]
    named += [f"{name} {versions[name]}" for name in ("torch", *packages)]
    line = f"{', '.join(named)}; {run['date']}."
    return f"{line}\n{run['recorded']}" if "recorded" in run else line


def read(path: Path, part: str | None = None) -> list[dict[str, Any]]:
    """Read the rows of a part; None for those of all parts.

    Raises:
        ValueError: There is no such file, no such part in it, or a line that is no row.
    """
    rows = []
    for number, line in enumerate(_lines(path), 1):
        try:
            row = json.loads(line)
            found = bool({"part", "row", "run"} <= row.keys())
        except (json.JSONDecodeError, AttributeError) as error:
            raise ValueError(f"{path}, line {number}, is no row: {error}") from error
        if not found:
            raise ValueError(f"{path}, line {number}, is no row: it lacks part, row or run")
        rows.append(row)
    kept = [row for row in rows if part in (None, row["part"])]
    if not kept:
        parts = sorted({row["part"] for row in rows})
        raise ValueError(f"{path} has no rows of part {part!r}; it has {parts}")
    return kept


def _lines(path: Path) -> list[str]:
    if not path.is_file():
        raise ValueError(f"there are no stored runs at {path}; a script's --output makes them")
    return path.read_text("utf-8").splitlines()


def write(path: Path, part: str, rows: Iterable[Row], run: Row) -> list[dict[str, Any]]:
    """Replace the rows of a part, and return them as they are stored.

    The file is written beside its place and renamed: a killed process leaves no half of one.

    Raises:
        ValueError: What is there is no file of stored runs.
    """
    stored = [{"part": part, **row, "run": dict(run)} for row in rows]
    others = [row for row in read(path) if row["part"] != part] if path.exists() else []
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(f".{path.name}.{os.getpid()}")
    text = "".join(json.dumps(row) + "\n" for row in [*others, *stored])
    beside.write_text(text, "utf-8")
    beside.replace(path)
    return stored
