"""Sharing windows between ranks, so that all have the same scores.

The batches of two ranks may reach different modules (experts of a mixture). A rank that did not
reach a module in a step takes over what the others have measured of it.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from dynalora_optim._base.collectives import total, world_size
from dynalora_optim.importance._windows import Window


def share_with_ranks(windows: Sequence[Window], device: torch.device) -> None:
    """Replace the values of each window by their mean over the ranks that have added to it.

    All ranks must call this. It does not wait for the device: so a rank does not know whether the
    others have added to a window, and keeps the shared number of passes on the device.
    """
    if world_size() == 1 or not windows:
        return
    empty = torch.zeros(())
    rows = [_row(window, empty) for window in windows]
    before = torch.stack([s.to(device, torch.float32) for row in rows for s in row])
    before = before.view(len(windows), -1)
    seen = torch.tensor([float(w.unshared > 0) for w in windows], device=device).unsqueeze(1)
    # Not seen * before: a rank may hold an inf from before, and inf * 0 is nan.
    found = total(torch.cat([torch.where(seen > 0, before, 0.0), seen], dim=1))
    ranks = found[:, -1:]
    after = torch.where(ranks > 0, found[:, :-1] / ranks, before)
    for window, row in zip(windows, after, strict=True):
        window.shared_count, *tensors = row.unbind()
        window.tensors = tensors[: window.width]
        window.unshared = 0


def _row(window: Window, empty: Tensor) -> list[Tensor]:
    """Return the number of passes and the tensors of a window."""
    known = empty + (window.count - window.unshared)
    count = (window.shared_count if window.shared_count is not None else known) + window.unshared
    return [count, *(window.tensors or [empty] * window.width)]


def counts(windows: Sequence[Window]) -> list[Tensor]:
    """Return the shared numbers of passes, which are on a device; `take_counts` reads them."""
    return [w.shared_count for w in windows if w.shared_count is not None]


def take_counts(windows: Sequence[Window], values: Sequence[float]) -> None:
    """Set the numbers of passes of the windows that have shared theirs."""
    shared = (w for w in windows if w.shared_count is not None)
    for window, value in zip(shared, values, strict=True):
        window.count = max(round(value), int(value > 0)) + window.unshared
        if not window.count:
            window.tensors = []
