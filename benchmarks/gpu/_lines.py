"""One JSON line for each finished row: what it measured, and what is needed to measure it again."""

from __future__ import annotations

import importlib.util
import json
import os
import platform
import runpy
import subprocess
from collections.abc import Iterator, Mapping
from datetime import datetime, timezone
from importlib import metadata
from pathlib import Path
from typing import Any

FACTS = "DYNALORA_GPU_FACTS"  # the environment variable by which the parts learn the facts
STATUSES = ("ok", "refused", "missing", "skipped", "out of memory", "failed")
PACKAGES = ("transformers", "peft", "accelerate", "triton", "liger-kernel", "badam")
# Every line has these, whatever its part.
FIELDS = (
    *("part", "row", "status", "reason", "seconds", "values", "dry_run", "command", "date"),
    *("card", "driver", "torch", "cuda", "packages", "python"),
)


def facts(command: str, *, dry_run: bool) -> dict[str, Any]:
    """Return what holds for all rows of a run; neither torch nor CUDA is started for it."""
    torch_version, cuda = _torch()
    card, driver = ("", "") if dry_run else _card()
    cpu = f"no GPU: {platform.machine()}, {os.cpu_count()} CPU cores"
    return {
        "dry_run": dry_run,
        "command": command,
        "card": card or cpu,
        "driver": driver,
        "torch": torch_version,
        "cuda": cuda,
        "packages": {name: version for name in PACKAGES if (version := _version(name))},
        "python": platform.python_version(),
    }


def _torch() -> tuple[str, str]:
    found = importlib.util.find_spec("torch")
    if found is None or found.origin is None:
        return "", ""
    values = runpy.run_path(str(Path(found.origin).with_name("version.py")))
    return str(values["__version__"]), str(values["cuda"] or "")


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return ""


def _card() -> tuple[str, str]:
    """Name the first GPU and its driver; a program of the driver's own says it."""
    command = ["nvidia-smi", "--query-gpu=name,driver_version", "--format=csv,noheader"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=20)
        name, driver = done.stdout.splitlines()[0].split(", ")
    except (OSError, subprocess.SubprocessError, ValueError, IndexError):
        return "", ""
    return name, driver


def given_facts() -> dict[str, Any]:
    """Return the facts that the kit passed on."""
    found: dict[str, Any] = json.loads(os.environ[FACTS])
    return found


class Lines:
    """The rows of one part: each is printed, and appended to the part's file, when it is done."""

    def __init__(self, folder: Path, part: str, known: Mapping[str, Any]) -> None:
        self._path = folder / f"{part}.jsonl"
        self._part = part
        self._known = known

    def add(
        self,
        row: str,
        status: str,
        *,
        reason: str = "",
        seconds: float = 0.0,
        values: Mapping[str, Any] | None = None,
    ) -> None:
        """Write a row that took so many seconds, the start of its process included."""
        line = {
            "part": self._part,
            "row": row,
            "status": status,
            "reason": reason,
            "seconds": round(seconds, 3),
            "values": dict(values or {}),
            "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
            **self._known,
        }
        with self._path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")
        print(shown(line), flush=True)


def read(folder: Path) -> Iterator[dict[str, Any]]:
    """Yield every line of a run, file by file."""
    for path in sorted(folder.glob("*.jsonl")):
        for line in path.read_text(encoding="utf-8").splitlines():
            yield json.loads(line)


def shown(line: Mapping[str, Any]) -> str:
    """Return a row as a person reads it."""
    values = ", ".join(f"{name} {_short(value)}" for name, value in line["values"].items())
    detail = line["reason"] or values
    return f"[{line['part']}] {line['row']}: {line['status']} ({line['seconds']:.1f} s) {detail}"


def _short(value: object) -> str:
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, int) and value >= 2**20:
        return f"{value:,}"
    return str(value)
