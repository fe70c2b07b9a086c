"""Stored runs: a file of JSON lines. Each line is one row, and says how and where it was measured.

    {"part": "roberta", "row": "peft LoRA", "peak": 1400998212, ..., "run": {"command": ...,
     "date": ..., "commit": ..., "versions": {...}, "hardware": {...}}}

A *part* contains the rows of one table, which were measured together. If a script measures a part
again, it replaces the rows of this part and does not change the other parts of the file.
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
PACKAGES = ("torch", "transformers", "peft", "accelerate", "badam", "bitsandbytes")
ENVIRONMENT = ("OMP_NUM_THREADS",)  # variables that change the numbers


def run_of(script: str, arguments: Sequence[str] | None = None) -> dict[str, Any]:
    """Describe the current run. The description is stored with each of its rows.

    Args:
        script: The ``__file__`` of the script.
        arguments: Its command-line arguments; None: those of the process.
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
    """Return the current commit, marked "dirty" if files differ from it; None without git."""
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
    return found | {"torch": torch.__version__}  # with its build, such as +cpu


def hardware() -> dict[str, Any]:
    """Describe the machine, and how many threads the run uses."""
    card = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    return {
        "card": card,
        "processor": _processor(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
    }


def _processor() -> str:
    """Return the architecture and, on Linux, the model of the processor."""
    try:
        text = Path("/proc/cpuinfo").read_text("utf-8")
    except OSError:
        return platform.machine()
    models = [line.partition(":")[2].strip() for line in text.splitlines() if "model name" in line]
    return f"{platform.machine()} ({models[0]})" if models else platform.machine()


def described(rows: Sequence[Row], *packages: str) -> str:
    """Return the text above a table: the machine, the versions and the date of its rows.

    If rows were not stored when they were measured, but copied from an earlier text, it says so.

    Args:
        rows: The rows of one part.
        packages: Packages whose versions are named, in addition to torch.
    """
    run = rows[0]["run"]
    place, versions = run["hardware"], run["versions"]
    threads = f"{place['threads']} thread{'s' * (place['threads'] != 1)}"
    named = [place["card"] or place["processor"], f"{place['cores']} CPU cores ({threads})"]
    named += [f"{name} {versions[name]}" for name in ("torch", *packages)]
    line = f"{', '.join(named)}; {run['date']}."
    return f"{line}\n{run['recorded']}" if "recorded" in run else line


def read(path: Path, part: str | None = None) -> list[dict[str, Any]]:
    """Read the rows of a part, or of all parts if ``part`` is None.

    Raises:
        ValueError: The file or the part does not exist, or a line is not a row.
    """
    rows = []
    for number, line in enumerate(_lines(path), 1):
        try:
            row = json.loads(line)
            found = bool({"part", "row", "run"} <= row.keys())
        except (json.JSONDecodeError, AttributeError) as error:
            raise ValueError(f"{path}, line {number}, is not a row: {error}") from error
        if not found:
            raise ValueError(f"{path}, line {number}, is not a row: part, row or run is missing")
        rows.append(row)
    kept = [row for row in rows if part in (None, row["part"])]
    if not kept:
        parts = sorted({row["part"] for row in rows})
        raise ValueError(f"{path} has no rows of part {part!r}; it has {parts}")
    return kept


def _lines(path: Path) -> list[str]:
    if not path.is_file():
        raise ValueError(f"there are no stored runs at {path}; a script with --output writes them")
    return path.read_text("utf-8").splitlines()


def write(path: Path, part: str, rows: Iterable[Row], run: Row) -> list[dict[str, Any]]:
    """Replace the rows of a part, and return them as they are stored.

    A row that has a run keeps it; the others get this ``run``.

    The file is written under a temporary name and then renamed, so it is never incomplete.

    Raises:
        ValueError: The existing file is not a file of stored runs.
    """
    stored = [{"part": part, **row, "run": dict(row.get("run", run))} for row in rows]
    others = [row for row in read(path) if row["part"] != part] if path.exists() else []
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(f".{path.name}.{os.getpid()}")
    text = "".join(json.dumps(row) + "\n" for row in [*others, *stored])
    beside.write_text(text, "utf-8")
    beside.replace(path)
    return stored
