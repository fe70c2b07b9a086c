"""One file from which a loop goes on after a kill, bit for bit."""

from __future__ import annotations

import pickle
from argparse import Namespace
from typing import Any

import torch


def identity(options: Namespace) -> dict[str, str]:
    """Return the options that must be the same when a run continues."""
    return {k: str(v) for k, v in vars(options).items() if k not in ("output", "save_every")}


def save(options: Namespace, **state: Any) -> None:
    """Write a checkpoint to a temporary file, then rename it, so that it is never incomplete."""
    whole = {
        **state,
        "options": identity(options),
        "random": torch.get_rng_state(),
        "random_cuda": torch.cuda.get_rng_state_all(),
    }
    beside = options.output / ".checkpoint.tmp"
    torch.save(whole, beside)
    beside.replace(options.output / "checkpoint.pt")


def resume(options: Namespace) -> dict[str, Any] | None:
    """Return what `save` got, and set the random numbers as they were; None: no checkpoint.

    Raises:
        ValueError: The file is not a checkpoint, or is that of a run with other options.
    """
    path = options.output / "checkpoint.pt"
    if not (options.save_every and path.is_file()):
        return None
    try:
        state: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
        saved = state["options"]
    except (EOFError, KeyError, RuntimeError, pickle.UnpicklingError) as error:
        raise ValueError(f"{path} is not a checkpoint of this script; remove it") from error
    for name, value in identity(options).items():
        if saved.get(name) != value:
            found = f"{path} belongs to a run with {name}={saved.get(name)}, not {value}"
            raise ValueError(f"{found}; remove it, or pass another --output")
    torch.set_rng_state(state["random"])
    torch.cuda.set_rng_state_all(state["random_cuda"])
    return state
