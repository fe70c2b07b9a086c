"""The file of finished runs, one line each, and the versions that they depend on."""

from __future__ import annotations

import json
import os
import platform
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

PACKAGES = ("dynalora-optim", "torch", "transformers", "datasets", "peft")


def append(path: Path, line: dict[str, Any]) -> None:
    """Add a finished run to a file of JSON lines. Afterwards a kill cannot lose it.

    If a kill has left an incomplete last line, it is removed first.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("ab+") as file:
        file.seek(0)
        whole = file.read().rfind(b"\n") + 1
        file.truncate(whole)
        file.write(json.dumps(line).encode() + b"\n")
        file.flush()
        os.fsync(file.fileno())


def finished(path: Path) -> list[dict[str, Any]]:
    """Read the finished runs. An incomplete last line, left by a kill, does not count."""
    if not path.exists():
        return []
    text = path.read_text("utf-8")
    return [json.loads(line) for line in text[: text.rfind("\n") + 1].splitlines()]


def versions() -> dict[str, str | int]:
    """Return the versions and other facts that the numbers depend on, besides the settings."""
    found: dict[str, str | int] = {"python": platform.python_version()}
    found |= {name: installed for name in PACKAGES if (installed := _version(name))}
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else platform.machine()
    return found | {"device": device, "threads": torch.get_num_threads()}


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None
