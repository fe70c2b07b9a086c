"""Ending the graph before the blocks if the embeddings' output requires an unneeded gradient."""

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
    """Pre-hook of the first block: detaches its input if the embeddings do not train.

    transformers and peft call ``enable_input_require_grads`` for gradient checkpointing. It would
    make the backward pass run through every block, whichever blocks are active.
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
                "cannot be undone, because reentrant checkpoints need it: the backward pass runs "
                'through every block. Pass {"use_reentrant": False} to avoid this.'
            )
            return None
        self._warn(
            "is undone: it would run the backward pass through every block, whichever blocks are "
            "active. Non-reentrant checkpoints do not need it."
        )
        return replaced((args, kwargs), x, x.detach())  # type: ignore[no-any-return]

    def _is_forced(self) -> bool:
        hooks = (hook for module in self._rest for hook in forward_hooks(module).values())
        return any(getattr(hook, "__name__", "") in _ASKS_FOR_GRADIENTS for hook in hooks)

    def _warn(self, outcome: str) -> None:
        if not self._has_warned:
            logger.warning("enable_input_require_grads() of the model %s", outcome)
        self._has_warned = True
