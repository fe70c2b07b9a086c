"""Dividing the graph of a forward by age: a backward pass runs its youngest part first."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge

from dynalora_optim._base.live_bytes import LiveBytes
from dynalora_optim._base.torch_private_autograd import age
from dynalora_optim._base.trees import nodes_below
from dynalora_optim.allocation._costs import Use
from dynalora_optim.memory._made_gradients import MadeGradients
from dynalora_optim.memory._stand_ins import leave, no_autocast


def now() -> int:
    """Return the age that divides the nodes made so far from those made from now on."""
    with torch.enable_grad():
        return age(torch.zeros((), requires_grad=True).view(()).grad_fn)


def try_backward(memory: LiveBytes, made: Sequence[Tensor], ends: Sequence[Tensor]) -> Use:
    """Run the backward of ``made`` and keep its graph; return what it adds, held already is all."""
    start = memory.live
    with torch.enable_grad(), no_autocast(), MadeGradients(memory, ends) as gradients:
        losses = [leave(tensor) for tensor in made]
        torch.autograd.grad(losses, list(ends), retain_graph=True, allow_unused=True)
    return Use(0, 0, gradients.kept - start, gradients.spent - start, memory.flops)


class GraphParts:
    """The graph of ``loss``: its part of nodes made since ``moment``, and the older part.

    Attributes:
        edges: Where the younger part ends at the older one.
        late: The leaves that only the younger part reaches.
        early: The leaves that the older part reaches.
    """

    def __init__(self, loss: Tensor, moment: int) -> None:
        self._loss = loss
        edges: dict[tuple[object, int], GradientEdge] = {}
        late: list[Tensor] = []
        seen: set[object] = set()
        waiting: list[Any] = [loss.grad_fn]
        while waiting:
            node = waiting.pop()
            if node is None or node in seen:
                continue
            seen.add(node)
            for parent, number in node.next_functions:
                if hasattr(parent, "variable"):
                    late.append(parent.variable)
                elif parent is not None and age(parent) < moment:
                    edges[parent, number] = GradientEdge(parent, number)
                else:
                    waiting.append(parent)
        older = list(nodes_below([edge.node for edge in edges.values()]))
        self.edges = list(edges.values())
        self._ages = [age(node) for node in older if not hasattr(node, "variable")]
        self.early = [node.variable for node in older if hasattr(node, "variable")]
        self.late = [leaf for leaf in late if not any(leaf is other for other in self.early)]

    def is_older_than(self, moment: int) -> bool:
        """Return whether the older part began before ``moment``."""
        return any(found < moment for found in self._ages)

    def run_late(
        self, memory: LiveBytes, wanted: Sequence[Tensor]
    ) -> tuple[list[Tensor | None], Use]:
        """Run the backward of the younger part.

        Return the gradients that wait at its ``edges``, and the most bytes that are alive.
        """
        leaves = [leaf for leaf in wanted if any(leaf is late for late in self.late)]
        if not self._loss.requires_grad or not leaves + self.edges:
            return [], Use(0, 0, memory.live, memory.live, 0)
        ends: list[Any] = [*leaves, *self.edges]
        with no_autocast(), MadeGradients(memory, leaves) as gradients:
            found = torch.autograd.grad(
                self._loss, ends, torch.ones_like(self._loss), allow_unused=True
            )
        most = Use(0, 0, gradients.kept, gradients.spent, memory.flops)
        return list(found[len(leaves) :]), most

    def run_early(
        self, memory: LiveBytes, wanted: Sequence[Tensor], gradients: list[Tensor | None]
    ) -> Use:
        """Run the backward of the older part; return its most bytes alive, and its FLOPs."""
        leaves = [leaf for leaf in wanted if any(leaf is early for early in self.early)]
        pairs = [
            (edge, gradient)
            for edge, gradient in zip(self.edges, gradients, strict=False)
            if gradient is not None
        ]
        gradients.clear()
        with no_autocast(), MadeGradients(memory, leaves) as made:
            if leaves and pairs:
                edges, given = zip(*pairs, strict=True)
                del pairs
                torch.autograd.grad(edges, leaves, given, allow_unused=True)
        return Use(0, 0, made.kept, made.spent, memory.flops)
