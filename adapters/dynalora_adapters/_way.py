"""Keeping to one way of computing a layer's output, from its forward to the recomputation of it."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable
from typing import Any

import torch

from dynalora_adapters._torch_private import next_node, node_in_backward

_KEPT = 64  # changes of the way; more than this lie between a forward and its backward in no loop


class Way:
    """Chooses between two ways of computing the same output, once for each forward pass.

    The two keep different tensors for the backward pass, so that a checkpoint must recompute a
    forward in the way in which it ran, whatever hooks and modes there are by then. autograd numbers
    its nodes in the order in which they are made. The node whose backward asks for a recomputation
    is younger than the beginning of its forward, and older than the beginning of the next one: its
    number tells which forward is recomputed.
    """

    def __init__(self) -> None:
        self._nodes: list[int] = []  # the number of the first node of each forward that changed it
        self._ways: list[bool] = []  # the way from then on

    def once(self, choose: Callable[[], bool]) -> bool:
        """Return ``choose()``; while a forward is recomputed, what it returned in that forward."""
        node = node_in_backward()
        if node is not None:
            place = bisect_right(self._nodes, node) - 1
            return self._ways[place] if place >= 0 else choose()
        way = choose()
        if not self._ways or self._ways[-1] != way:
            self._note(way)
        return way

    def _note(self, way: bool) -> None:
        # The first pass of a reentrant checkpoint runs without gradients, inside the node of that
        # checkpoint, which is the newest node.
        first = next_node() - (not torch.is_grad_enabled())
        while self._nodes and self._nodes[-1] >= first:  # nothing was recorded in between
            del self._nodes[-1], self._ways[-1]
        self._nodes.append(first)
        self._ways.append(way)
        del self._nodes[:-_KEPT], self._ways[:-_KEPT]

    def __getstate__(self) -> dict[str, Any]:
        return {}  # a copy has no graph that could be recomputed

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__()  # type: ignore[misc]
