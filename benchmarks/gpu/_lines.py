"""One JSON line per finished row: its numbers, and what is needed to measure it again."""

from __future__ import annotations

import importlib.util
import json
import os
import platform
import runpy
import shutil
import subprocess
import sys
from collections.abc import Iterator, Mapping
from datetime import datetime, timezone
from importlib import metadata
from pathlib import Path
from typing import Any

FACTS = "DYNALORA_GPU_FACTS"  # the environment variable that passes the facts to the parts
STATUSES = ("ok", "refused", "missing", "skipped", "out of memory", "failed")
PACKAGES = ("transformers", "peft", "accelerate", "triton", "liger-kernel", "badam")
# Every line has these fields.
FIELDS = (
    *("part", "row", "status", "reason", "seconds", "values", "dry_run", "command", "date"),
    *("card", "driver", "torch", "cuda", "packages", "python"),
)


def facts(command: str, *, dry_run: bool) -> dict[str, Any]:
    """Return the facts that all rows of a run share. This process does not start CUDA for it.

    Raises:
        LookupError: There is no GPU, and this is not a dry run.
    """
    torch_version, cuda = _torch()
    card, driver = f"no GPU: {platform.machine()}, {os.cpu_count()} CPU cores", ""
    if not dry_run:
        card, driver = _card()
        if not card:
            raise LookupError("no GPU was found; pass --dry-run to run the kit on the CPU.")
    return {
        "dry_run": dry_run,
        "command": command,
        "card": card,
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
    """Return the names of the GPU and its driver, from the driver's program or from torch."""
    program = shutil.which("nvidia-smi") or "/usr/local/nvidia/bin/nvidia-smi"
    named = _said([program, "--query-gpu=name,driver_version", "--format=csv,noheader"])
    if ", " in named:
        card, driver = named.split(", ")
        return card, driver
    return _said([sys.executable, "-c", "import torch; print(torch.cuda.get_device_name())"]), ""


def _said(command: list[str]) -> str:
    """Return the first line that a program prints, or an empty string."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=60)
    except (OSError, subprocess.SubprocessError):
        return ""
    return next(iter(done.stdout.splitlines()), "")


def given_facts() -> dict[str, Any]:
    """Return the facts that the kit passed on."""
    found: dict[str, Any] = json.loads(os.environ[FACTS])
    return found


class Lines:
    """The rows of one part. Each finished row is printed and appended to the file of the part."""

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
        """Write a row. ``seconds`` includes the start of its process."""
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
    """Yield all lines of a run, one file after the other."""
    for path in sorted(folder.glob("*.jsonl")):
        for line in path.read_text(encoding="utf-8").splitlines():
            yield json.loads(line)


def shown(line: Mapping[str, Any]) -> str:
    """Return a row as readable text."""
    values = ", ".join(f"{name} {_short(value)}" for name, value in line["values"].items())
    detail = line["reason"] or values
    return f"[{line['part']}] {line['row']}: {line['status']} ({line['seconds']:.1f} s) {detail}"


def _short(value: object) -> str:
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, int) and value >= 2**20:
        return f"{value:,}"
    return str(value)
