"""The graph of a forward, and whether a backward has used it."""

from __future__ import annotations

from typing import Any

from dynalora_optim._base.torch_private_autograd import keeps_graph
from dynalora_optim._base.trees import tensors


class ForwardGraph:
    """The graph of one forward; it exists as long as nodes of the graph refer to it.

    Attributes:
        is_used: Whether its backward has run, so that nothing is held any more.
    """

    def __init__(self) -> None:
        self.is_used = False

    def follow(self, output: Any) -> bool:
        """Let the nodes of this ``output`` refer to the graph; return whether there are any."""
        nodes = {id(node): node for t in tensors(output) if (node := t.grad_fn) is not None}
        for node in nodes.values():
            node.register_prehook(self)
        return bool(nodes)

    def __call__(self, gradients: Any) -> None:
        """A backward begins at one of the nodes."""
        if not self.is_used:
            self.begin_backward()
        self.is_used = self.is_used or not keeps_graph()

    def begin_backward(self) -> None:
        """A backward begins in this graph, for the first time unless it is kept."""
