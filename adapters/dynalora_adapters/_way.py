"""Keeping to one way of computing a layer's output, from its forward to the recomputation of it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Generic

import torch

from dynalora_adapters._timeline import Timeline, Value
from dynalora_adapters._torch_private import node_in_backward


class Way(Generic[Value]):
    """Chooses between ways of computing the same output, once for each forward pass.

    They keep different tensors for the backward pass, so that a checkpoint must recompute a
    forward in the way in which it ran, whatever hooks and modes there are by then.
    """

    def __init__(self) -> None:
        self._ways: Timeline[Value] = Timeline()

    def once(self, choose: Callable[..., Value], *args: Any) -> Value:
        """Return ``choose(*args)``; of a recomputation, what it returned in the forward."""
        node = node_in_backward()
        if node is not None:
            way = self._ways.at(node)
            return choose(*args) if way is None else way
        way = choose(*args)
        # The first pass of a reentrant checkpoint runs without gradients, inside the node of that
        # checkpoint, which is the newest node.
        self._ways.note(way, before=not torch.is_grad_enabled())
        return way
