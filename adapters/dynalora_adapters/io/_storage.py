"""The two files of an adapter on disk. They are written together, or not at all."""

from __future__ import annotations

import json
import os
import shutil
import sys
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

CONFIG_NAME = "adapter_config.json"
WEIGHTS_NAME = "adapter_model.safetensors"


def write_adapter(folder: Path, config: Mapping[str, Any], tensors: dict[str, Tensor]) -> None:
    """Write both files into ``folder``, which is created if it does not exist.

    Both are first written completely to a temporary folder on the same disk, then moved. So an
    error such as a full disk does not damage an older pair. If several processes write at the same
    time, the pair of the last one stays.

    Raises:
        OSError: If they cannot be written.
    """
    text = json.dumps(config, indent=2, sort_keys=True) + "\n"
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder, prefix=".saving-") as name:
        scratch = Path(name)
        try:
            save_file(tensors, scratch / WEIGHTS_NAME, metadata={"format": "pt"})
        except SafetensorError as error:
            raise OSError(f"{folder / WEIGHTS_NAME} could not be written: {error}") from error
        (scratch / CONFIG_NAME).write_text(text, encoding="utf-8")
        for path in (scratch / WEIGHTS_NAME, scratch / CONFIG_NAME):
            _flush(path)
        with _locked(folder, writing=True):
            _put_in_place(scratch, folder)


def _flush(path: Path) -> None:
    """Wait until the file is on the disk. A full network disk reports its error only here."""
    with path.open("rb+") as file:
        os.fsync(file.fileno())


@contextmanager
def _locked(folder: Path, *, writing: bool) -> Iterator[None]:
    """Keep other processes from replacing the files meanwhile, if the folder can be locked."""
    with ExitStack() as stack:
        if sys.platform != "win32":
            import fcntl

            with suppress(OSError):  # no permission to open the folder, or a disk without locks
                handle = os.open(folder, os.O_RDONLY)
                stack.callback(os.close, handle)
                fcntl.flock(handle, fcntl.LOCK_EX if writing else fcntl.LOCK_SH)
        yield


def _put_in_place(scratch: Path, folder: Path) -> None:
    """Move both files from ``scratch``. If the second move fails, undo the first."""
    config, old = folder / CONFIG_NAME, scratch / "old.json"
    if config.exists():
        shutil.copy2(config, old)
    (scratch / CONFIG_NAME).replace(config)
    try:
        (scratch / WEIGHTS_NAME).replace(folder / WEIGHTS_NAME)
    except BaseException:
        if old.exists():
            old.replace(config)
        else:
            config.unlink()
        raise


def read_adapter(folder: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Read both files. They belong together, even if another process replaces them meanwhile.

    Raises:
        FileNotFoundError: If a file is missing.
        ValueError: If the configuration is not a JSON object, or the weights are truncated or not
            a safetensors file.
    """
    _existing(folder / CONFIG_NAME)
    with _locked(folder, writing=False):
        return _read_config(folder), _read_tensors(folder)


def _read_config(folder: Path) -> dict[str, Any]:
    path = _existing(folder / CONFIG_NAME)
    try:
        raw = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not JSON ({error}); save the adapter again.") from error
    if not isinstance(raw, dict):
        raise ValueError(f"{path} must hold a JSON object, got {type(raw).__name__}.")
    return raw


def _read_tensors(folder: Path) -> dict[str, Tensor]:
    path = _existing(folder / WEIGHTS_NAME)
    try:
        tensors: dict[str, Tensor] = load_file(path)
    except (SafetensorError, KeyError, RuntimeError, TypeError, ValueError, OverflowError) as error:
        raise ValueError(
            f"{path} is truncated or not a safetensors file ({error}); save the adapter again."
        ) from error
    return tensors


def _existing(path: Path) -> Path:
    if not path.is_file():
        raise FileNotFoundError(
            f"{path} does not exist; pass the folder that holds {CONFIG_NAME} and {WEIGHTS_NAME} "
            f"(files that end in .bin are pickles, which are never read)."
        )
    return path
