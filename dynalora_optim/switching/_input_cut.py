"""Ending the graph before the blocks if nobody wants the gradient of their input.

transformers and peft call ``enable_input_require_grads`` for gradient checkpointing, and some
models (Wav2Vec2 and its relatives) set ``requires_grad`` on a tensor of their own. Both would make
the backward pass run through every block, whichever blocks are active.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import BackwardCFunction

from dynalora_optim._base.calls import Call, call_around, is_running
from dynalora_optim._base.past import Past
from dynalora_optim._base.torch_private_autograd import in_backward
from dynalora_optim._base.torch_private_fsdp import is_units_node
from dynalora_optim._base.torch_private_hooks import has_backward_hooks
from dynalora_optim._base.trees import hidden_states, leaves, nodes, replaced, tensors
from dynalora_optim.switching._holders import Holders, is_wanted
from dynalora_optim.switching._recompute import checkpoints_itself, is_reentrant

logger = logging.getLogger(__name__)


class CallersTensors:
    """Hooks of the model: know which leaves the arguments of the running forward reach."""

    def __init__(self) -> None:
        self._calls: list[tuple[Call | None, list[Tensor]]] = []

    def enter(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if not torch.compiler.is_compiling():
            needy = (tensor for tensor in tensors((args, kwargs)) if tensor.requires_grad)
            reached = [leaf for tensor in needy for leaf in leaves(tensor)]
            self._end_interrupted()
            self._calls.append((call_around(1), reached))

    def leave(self, model: nn.Module, args: Any, output: Any) -> None:
        if self._calls and not torch.compiler.is_compiling():
            self._calls.pop()

    def may_include(self, leaf: Tensor) -> bool:
        """Return whether the caller passed ``leaf``; also True if the model's forward is not seen.

        So a part of the model that is called by itself keeps its graph.
        """
        self._end_interrupted()
        return not self._calls or any(leaf is known for known in self._calls[-1][1])

    def __getstate__(self) -> dict[str, Any]:
        return {"_calls": []}  # a copy does not run

    def _end_interrupted(self) -> None:
        while self._calls and not is_running(self._calls[-1][0]):
            self._calls.pop()


class InputCut:
    """Hooks of the first block of a list: detach its input if nobody wants the gradient.

    Somebody may want it if it reaches a parameter, a tensor that the caller passed or that anything
    but the running forward holds, or a hook.

    Args:
        blocks: The blocks of the list.
        rest: The modules of the model that lie in no block of the list.
        callers: Knows the tensors of the caller.
    """

    def __init__(
        self,
        blocks: Sequence[nn.Module],
        rest: Sequence[nn.Module],
        callers: CallersTensors,
    ) -> None:
        self._blocks = blocks
        self._rest = rest
        self._callers = callers
        self._holders = Holders()
        self._cuts = Past(False)
        # Whether the blocks need an input that requires a gradient: known of transformers' layers;
        # of others, after their first forward.
        self._is_reentrant = False if hasattr(blocks[0], "gradient_checkpointing") else None
        self._told: set[str] = set()

    def enter(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[Any, dict[str, Any]] | None:
        if torch.compiler.is_compiling():
            return None
        x = hidden_states(args, kwargs)
        if x is None or not x.requires_grad:
            return None
        if not in_backward():  # a recomputation runs as its forward ran
            # Without gradients it is the first pass of a reentrant checkpoint.
            cuts = torch.is_grad_enabled() and not self._is_wanted(x) and self._may_cut()
            self._cuts.note(cuts)
        return replaced((args, kwargs), x, x.detach()) if self._cuts.value() else None

    def leave(self, module: nn.Module, args: Any, output: Any) -> None:
        """Look whether the block checkpoints itself in the reentrant way."""
        if self._is_reentrant is not None or torch.compiler.is_compiling() or in_backward():
            return
        grown = [y for y in tensors(output) if y.requires_grad] if torch.is_grad_enabled() else []
        if grown:
            self._is_reentrant = any(_hides_graph(node) for y in grown for node in nodes(y))

    def _is_wanted(self, x: Tensor) -> bool:
        if any(map(has_backward_hooks, (*self._rest, self._blocks[0]))):
            return True
        reached = leaves(x)
        if any(isinstance(leaf, nn.Parameter) or is_wanted(leaf) for leaf in reached):
            return True
        if is_wanted(x) or any(map(self._callers.may_include, reached)):
            return True
        if any(map(_hides_graph, nodes(x))) and self._trains_outside():
            return True  # the graph does not show what a reentrant checkpoint reaches
        return self._holders.hold(reached if x.is_leaf else [*reached, x])

    def _trains_outside(self) -> bool:
        own = (p for module in self._rest for p in module.parameters(recurse=False))
        return any(parameter.requires_grad for parameter in own)

    def _may_cut(self) -> bool:
        """Return whether the blocks can do without the gradient; tell the user."""
        reentrant = any(checkpoints_itself(b) and is_reentrant(b) for b in self._blocks)
        if self._is_reentrant is None and not reentrant:
            return False
        if reentrant or self._is_reentrant:
            self._tell(
                "which cannot be undone, because reentrant checkpoints need it: the backward pass "
                'runs through every block. Pass {"use_reentrant": False} to avoid this.'
            )
            return False
        self._tell(
            "which is undone: the backward pass would run through every block, whichever blocks "
            "are active. Non-reentrant checkpoints do not need it."
        )
        return True

    def _tell(self, outcome: str) -> None:
        if outcome not in self._told:
            logger.warning(
                "the first block's input requires a gradient that nothing uses "
                "(enable_input_require_grads(), or the model itself asks for it), %s",
                outcome,
            )
        self._told.add(outcome)


def _hides_graph(node: Any) -> bool:
    """Return whether ``node`` may reach more than the graph shows, as a reentrant checkpoint does.

    A function that is written in Python hides nothing if it gets parameters as inputs, or says so.
    """
    if not isinstance(node, BackwardCFunction) or getattr(node, "hides_nothing", False):
        return False
    if is_units_node(node):
        return False
    return not any(hasattr(parent, "variable") for parent, _ in node.next_functions)
