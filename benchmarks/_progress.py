"""What a run has measured so far, so that it continues after a kill instead of beginning again.

Each count and each time is appended to a file as one JSON line when it is known. A run of the same
code, with the same versions and on the same machine, finds it there.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
CODE = ("benchmarks/*.py", "dynalora_optim/**/*.py", "adapters/**/*.py")


def code_hash() -> str:
    """Return a hash of the code that the numbers depend on."""
    digest = hashlib.sha256()
    for path in sorted(path for pattern in CODE for path in ROOT.glob(pattern)):
        digest.update(path.read_bytes())
    return digest.hexdigest()


class Progress:
    """The values that are known, each under a key of strings and numbers.

    Args:
        path: The file; None to keep nothing.
        run: The description of the run; see `run_of`. What other code, versions or machines have
            stored is dropped.
    """

    def __init__(self, path: Path | None = None, run: Mapping[str, Any] | None = None) -> None:
        self._path = path
        facts = {name: (run or {}).get(name) for name in ("versions", "hardware")}
        self._mark = {"code": code_hash(), **facts}
        self._known: dict[str, Any] = {}
        if path is not None and path.exists():
            mark, *lines = path.read_text("utf-8").splitlines(keepends=True) or ["null"]
            same = mark.endswith("\n") and json.loads(mark) == self._mark
            whole = [line for line in lines if line.endswith("\n")]  # a kill may cut the last
            path.write_text("".join([mark, *whole]) if same else "", "utf-8")
            found = [json.loads(line) for line in whole] if same else []
            self._known = {json.dumps(entry["key"]): entry["value"] for entry in found}

    def once(self, key: tuple[Any, ...], measure: Callable[[], Any]) -> Any:
        """Return the value under ``key``. If there is none, measure it and store it."""
        name = json.dumps(key)
        if name not in self._known:
            self._known[name] = json.loads(json.dumps(measure()))  # as it will be read
            self._append({"key": key, "value": self._known[name]})
        return self._known[name]

    def knows(self, key: tuple[Any, ...]) -> bool:
        """Whether there is a value under this key."""
        return json.dumps(key) in self._known

    def _append(self, entry: Mapping[str, Any]) -> None:
        if self._path is None:
            return
        self._path.parent.mkdir(parents=True, exist_ok=True)
        is_new = not self._path.exists() or not self._path.stat().st_size
        with self._path.open("a", encoding="utf-8") as file:
            if is_new:
                file.write(json.dumps(self._mark) + "\n")
            file.write(json.dumps(entry) + "\n")

    def forget(self) -> None:
        """Delete the file, because the results are stored."""
        if self._path is not None:
            self._path.unlink(missing_ok=True)
