"""The two files of an adapter on disk: written whole or not at all, read without executing."""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Mapping
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
    full disk leaves the old pair whole.

    Raises:
        OSError: If the disk does not take them.
    """
    text = json.dumps(config, indent=2, sort_keys=True) + "\n"
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder, prefix=".saving-") as name:
        scratch = Path(name)
        save_file(tensors, scratch / WEIGHTS_NAME, metadata={"format": "pt"})
        (scratch / CONFIG_NAME).write_text(text, encoding="utf-8")
        _put_in_place(scratch, folder)


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


def read_config(folder: Path) -> dict[str, Any]:
    """Read ``adapter_config.json``.

    Raises:
        FileNotFoundError: If it is not there.
        ValueError: If it does not hold a JSON object.
    """
    path = _existing(folder / CONFIG_NAME)
    try:
        raw = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not JSON ({error}); save the adapter anew.") from error
    if not isinstance(raw, dict):
        raise ValueError(f"{path} must hold a JSON object, got {type(raw).__name__}.")
    return raw


def read_tensors(folder: Path) -> dict[str, Tensor]:
    """Read ``adapter_model.safetensors``.

    Raises:
        FileNotFoundError: If it is not there.
        ValueError: If it is truncated or not a safetensors file.
    """
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
