"""The two files of an adapter on disk: written whole or not at all, read without executing."""

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
    """Write both files into ``folder``, which is created if need be.

    Both are complete on the same disk before either takes its place, so that an error such as a
    full disk leaves the old pair whole. Of processes that write at once, the last one's pair stays.

    Raises:
        OSError: If the disk does not take them.
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
    """Wait until the disk has the file; a network disk that is full says so only now."""
    with path.open("rb+") as file:
        os.fsync(file.fileno())


@contextmanager
def _locked(folder: Path, *, writing: bool) -> Iterator[None]:
    """Let no other process put its pair in place meanwhile, where the system can lock a folder."""
    with ExitStack() as stack:
        if sys.platform != "win32":
            import fcntl

            with suppress(OSError):  # a folder that may not be listed, a disk without locks
                handle = os.open(folder, os.O_RDONLY)
                stack.callback(os.close, handle)
                fcntl.flock(handle, fcntl.LOCK_EX if writing else fcntl.LOCK_SH)
        yield


def _put_in_place(scratch: Path, folder: Path) -> None:
    """Move both files from ``scratch``, taking the first back if the second cannot be moved."""
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
    """Read both files, which belong together even where another process replaces them.

    Raises:
        FileNotFoundError: If one is not there.
        ValueError: If the configuration is no JSON object, or the weights are truncated or not a
            safetensors file.
    """
    _existing(folder / CONFIG_NAME)
    with _locked(folder, writing=False):
        return _read_config(folder), _read_tensors(folder)


def _read_config(folder: Path) -> dict[str, Any]:
    path = _existing(folder / CONFIG_NAME)
    try:
        raw = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not JSON ({error}); save the adapter anew.") from error
    if not isinstance(raw, dict):
        raise ValueError(f"{path} must hold a JSON object, got {type(raw).__name__}.")
    return raw


def _read_tensors(folder: Path) -> dict[str, Tensor]:
    path = _existing(folder / WEIGHTS_NAME)
    try:
        tensors: dict[str, Tensor] = load_file(path)
    except (SafetensorError, KeyError, RuntimeError, TypeError, ValueError, OverflowError) as error:
        raise ValueError(
            f"{path} is truncated or not a safetensors file ({error}); save the adapter anew."
        ) from error
    return tensors


def _existing(path: Path) -> Path:
    if not path.is_file():
        raise FileNotFoundError(
            f"{path} does not exist; pass the folder that holds {CONFIG_NAME} and {WEIGHTS_NAME} "
            f"(files ending in .bin are pickles, and never read)."
        )
    return path
