"""What held in a forward, for the checkpoint that recomputes this forward later."""

from __future__ import annotations

from collections import deque
from typing import Generic, TypeVar

import torch

from dynalora_optim._base.torch_private_autograd import next_node, running_node

Value = TypeVar("Value")


class Past(Generic[Value]):
    """A value that each forward notes, and the recomputation of that forward asks for.

    Other forwards may lie between the two. Nodes of the graph are numbered in the order in which
    they are made, so the node whose backward recomputes lies after the note of its own forward and
    before those of later forwards.

    Args:
        first: The value before any note.
    """

    def __init__(self, first: Value) -> None:
        # Changes; no more than this many lie between a forward and its backward.
        self._changes = deque([(-1, first)], maxlen=64)

    def note(self, value: Value) -> None:
        """Note ``value`` for the forward that runs now."""
        if value is not self._changes[-1][1]:
            # The first pass of a reentrant checkpoint runs without gradients, and within the node
            # of that checkpoint, which is the newest node.
            self._changes.append((next_node() - (not torch.is_grad_enabled()), value))

    def value(self) -> Value:
        """Return what the forward has noted that is recomputed now; else what was noted last."""
        node = running_node()
        known = (value for since, value in reversed(self._changes) if node is None or since <= node)
        return next(known, self._changes[0][1])
