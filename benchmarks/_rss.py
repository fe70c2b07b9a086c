"""The resident memory of one row, measured in a separate process."""

from __future__ import annotations

import ctypes
import re
import subprocess
import sys
from pathlib import Path

from _chunked_rows import rows
from _shapes import Shape

STEPS = 2


def measured_here(shape: Shape, name: str) -> int:
    """Return by how much two steps raise the peak of resident bytes above weights and torch."""
    run = rows(shape)[name](shape, shape.bare())
    _return_freed()
    Path("/proc/self/clear_refs").write_text("5")  # reset the peak that building the model has left
    before = _status("VmRSS")
    for _ in range(STEPS):
        run.step()
    return _status("VmHWM") - before


def _return_freed() -> None:
    """Return to the system what was freed so far, where the C library can: else steps reuse it."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)


def measured_apart(name: str, *arguments: str) -> int | None:
    """Return what a new process measures for the row; None if there is no /proc."""
    if not Path("/proc/self/clear_refs").exists():
        return None
    script = Path(__file__).with_name("memory.py")
    command = [sys.executable, str(script), "--rss-of", name, *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        print(f"peak RSS of {name}: {done.stderr.strip().splitlines()[-1]}", file=sys.stderr)
        return None
    return int(done.stdout.split()[-1])


def _status(key: str) -> int:
    text = Path("/proc/self/status").read_text()
    match = re.search(rf"^{key}:\s+(\d+) kB$", text, flags=re.M)
    assert match
    return int(match[1]) * 1024
