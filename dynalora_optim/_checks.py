"""Checks that belong to no single part."""

from __future__ import annotations

import torch


def whole_number(name: str, value: object, *, least: int, of: str = "optimizer steps") -> None:
    """Raise unless ``value`` is an int (no bool, no float) of at least ``least``.

    Raises:
        ValueError: It is not; the message names the option, the rule, the value and a way out.
    """
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise ValueError(
            f"{name}={value!r} must be a whole number of {of}, at least {least}; "
            f"pass an int such as {max(least, 10)}."
        )


def check_single_process() -> None:
    """Raise in a run of several processes.

    Raises:
        NotImplementedError: Each rank would choose by its own scores; they would part in silence.
    """
    distributed = torch.distributed
    together = distributed.is_available() and distributed.is_initialized()
    if together and (ranks := distributed.get_world_size()) > 1:
        raise NotImplementedError(
            f"DynamicAllocationOptimizer does not serve runs of several processes yet (world size "
            f"{ranks}): each rank would choose its own modules. Train in one process."
        )
