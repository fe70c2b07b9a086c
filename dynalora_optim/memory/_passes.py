"""Which training forwards still hold what their backward needs, and what else of them is alive."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor

from dynalora_optim._base.forward_graph import ForwardGraph
from dynalora_optim._base.torch_private_autograd import backward_number
from dynalora_optim._base.trees import tensors
from dynalora_optim.allocation._costs import Costs


@dataclass(frozen=True)
class Around:
    """What is alive as a forward begins: the costs of forwards before it, and bytes.

    Attributes:
        before: The costs of the forwards whose graphs are alive, in their order.
        carried: The bytes that these hold.
        stale: The bytes of outputs whose backward is over.
        least: The bytes that the forwards before it hold once what they keep is released.
    """

    before: tuple[Costs, ...] = ()
    carried: int = 0
    stale: int = 0
    least: int = 0

    @property
    def alive(self) -> tuple[int, int, int]:
        """The three numbers of bytes."""
        return self.carried, self.stale, self.least

    @property
    def released(self) -> Around:
        """What is alive once that is released."""
        return replace(self, carried=self.least)


@dataclass(frozen=True)
class Left:
    """What a forward leaves alive for its backward.

    Attributes:
        held: The bytes that it leaves.
        least: The bytes that are left of these once what it keeps is released.
        flops: The FLOPs with which the backward then recomputes what was released.
    """

    held: int
    least: int
    flops: int = 0


class Graph(ForwardGraph):
    """The graph of one forward, with what it takes.

    Attributes:
        costs: The costs of the forward.
        left: What it leaves alive.
    """

    def __init__(self, costs: Costs, left: Left, passes: Passes) -> None:
        super().__init__()
        self.costs = costs
        self.left = left
        self._passes = weakref.ref(passes)

    def begin_backward(self) -> None:
        """Tell the passes, if they still exist."""
        if passes := self._passes():
            passes.begin_backward()


class Passes:
    """Follows the forwards of a model until their graphs are used or dropped.

    Args:
        at_backward: Called when a backward begins, with the costs of the forwards that are alive,
            in their order; whether an output of one of them is still alive (``keeps_output``), and
            whether they have waited for the end of another one's backward (``apart``).
    """

    def __init__(self, at_backward: Callable[..., None]) -> None:
        self._at_backward = at_backward
        self._number = -1  # of the backward that has begun last
        self._waiting: list[weakref.ref[Graph]] = []  # the graphs that were alive then
        self._graphs: list[weakref.ref[Graph]] = []
        self._outputs: list[tuple[weakref.ref[Any], weakref.ref[Graph], int]] = []

    def follow(self, output: Any, costs: Costs, left: Left) -> None:
        """Follow the forward that has returned ``output`` and has ``left`` this alive."""
        graph = Graph(costs, left, self)
        if not graph.follow(output):
            return
        alive = weakref.ref(graph)
        self._graphs = [other for other in self._graphs if other()] + [alive]
        self._outputs = [entry for entry in self._outputs if entry[0]() is not None]
        for holder in _holders(output):
            self._outputs.append((weakref.ref(holder), alive, costs.output))

    def alive(self) -> list[Graph]:
        """Return the graphs that a backward may still use, in the order of their forwards."""
        graphs = (alive() for alive in self._graphs)
        return [graph for graph in graphs if graph and not graph.is_used]

    def stale(self) -> int:
        """Return the bytes of outputs whose backward is over, but which are still alive."""
        sizes = {
            id(graph): size  # the same reference for all outputs of a forward
            for holder, graph, size in self._outputs
            if holder() is not None and not _is_waiting(graph())
        }
        return sum(sizes.values())

    def around(self) -> Around:
        """Return what is alive as a forward begins now."""
        graphs = self.alive()
        carried = sum(graph.left.held for graph in graphs)
        least = sum(graph.left.least for graph in graphs)
        return Around(tuple(graph.costs for graph in graphs), carried, self.stale(), least)

    def release(self) -> int:
        """Count what the forwards keep as released; return the FLOPs that recompute it."""
        graphs = self.alive()
        flops = sum(graph.left.flops for graph in graphs)
        for graph in graphs:
            graph.left = Left(graph.left.least, graph.left.least)
        return flops

    def begin_backward(self) -> None:
        """Tell the listener what is alive when a backward begins, at the first of its graphs."""
        if backward_number() == self._number:
            return
        self._number, alive = backward_number(), self.alive()
        keeps = any(h() is not None and _is_waiting(graph()) for h, graph, _ in self._outputs)
        waited = [graph() for graph in self._waiting]
        apart = any(_is_waiting(graph) for graph in waited) and not all(map(_is_waiting, waited))
        self._waiting = [weakref.ref(graph) for graph in alive]
        self._at_backward([graph.costs for graph in alive], keeps_output=keeps, apart=apart)

    def __getstate__(self) -> dict[str, Any]:
        return {"_at_backward": self._at_backward}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(state["_at_backward"])  # type: ignore[misc]


def _is_waiting(graph: Graph | None) -> bool:
    return graph is not None and not graph.is_used


def _holders(output: Any) -> list[Any]:
    """Return the objects that are alive as long as the user keeps the output."""
    try:
        weakref.ref(output)
    except TypeError:  # a tuple or dict: its tensors, except the loss
        return [tensor for tensor in tensors(output) if tensor.numel() > 1]
    if isinstance(output, Tensor) and output.numel() == 1:
        return []
    return [output]
