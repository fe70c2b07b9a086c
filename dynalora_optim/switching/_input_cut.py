"""Ending the graph before the blocks, where something asks for gradients that nothing needs."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from dynalora_optim._base.torch_private import forward_hooks
from dynalora_optim._base.trees import hidden_states, replaced, trainable_leaves
from dynalora_optim.switching._recompute import checkpoints_itself, is_reentrant

logger = logging.getLogger(__name__)

_ASKS_FOR_GRADIENTS = ("make_inputs_require_grads", "make_inputs_require_grad")


class InputCut:
    """Pre-hook of the first block: takes no gradient to embeddings that do not train.

    ``enable_input_require_grads``, which transformers and peft call for gradient checkpointing,
    would run the backward pass through every block, whichever are active.
    """

    def __init__(self, blocks: Sequence[nn.Module], rest: Sequence[nn.Module]) -> None:
        self._blocks = blocks
        self._rest = rest
        self._has_warned = False

    def __call__(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[Any, dict[str, Any]] | None:
        if torch.compiler.is_compiling():
            return None
        x = hidden_states(args, kwargs)
        if x is None or not x.requires_grad:
            return None
        if trainable_leaves(x) or not self._is_forced():
            return None
        if any(checkpoints_itself(b) and is_reentrant(b) for b in self._blocks):
            self._warn(
                "cannot be undone, because reentrant checkpoints need it: the backward pass "
                'goes through every block. Pass {"use_reentrant": False} to save it.'
            )
            return None
        self._warn(
            "is undone: it would take the backward pass through every block, whichever are "
            "active. Non-reentrant checkpoints do without it."
        )
        return replaced((args, kwargs), x, x.detach())  # type: ignore[no-any-return]

    def _is_forced(self) -> bool:
        hooks = (hook for module in self._rest for hook in forward_hooks(module).values())
        return any(getattr(hook, "__name__", "") in _ASKS_FOR_GRADIENTS for hook in hooks)

    def _warn(self, outcome: str) -> None:
        if not self._has_warned:
            logger.warning("enable_input_require_grads() of the model %s", outcome)
        self._has_warned = True
