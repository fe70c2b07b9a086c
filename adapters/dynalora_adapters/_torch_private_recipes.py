"""Inputs that need not be kept, because autograd keeps the tensors that they were computed from.

The input of an MLP's last layer is ``act(gate) * up`` or ``gelu(h)``. autograd keeps the operands
of these operations for their own backward, which runs after that of the layer. So the layer can
compute its input once more, by one elementwise operation, which gives the same bits.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812

from dynalora_adapters._bases import is_dense
from dynalora_adapters._torch_private import saving_is_watched


class Recipe(NamedTuple):
    """A tensor as ``function(*operands)``."""

    function: Callable[..., Tensor]
    operands: tuple[Tensor, ...]


def recipe_of(x: Tensor) -> Recipe | None:
    """Return how x was computed from tensors that autograd keeps; None if x itself must be kept.

    Hooks on saved tensors move them, count them, or compute them again (a checkpoint). Then x is
    kept: asking autograd for an operand would run these hooks.
    """
    node: Any = x.grad_fn
    kind = type(node).__name__
    if kind not in _OPERANDS or x._version or saving_is_watched():
        return None
    names = _OPERANDS[kind]
    found = [getattr(node, name, None) for name in names]
    operands = tuple(filter(is_dense, found))
    if len(operands) < len(names):
        return None
    # An operand that was saved under hooks is another tensor each time.
    if any(one is not getattr(node, name) for name, one in zip(names, operands, strict=True)):
        return None
    return Recipe(_function(kind, node), operands)


_OPERANDS = {
    "MulBackward0": ("_saved_self", "_saved_other"),
    "GeluBackward0": ("_saved_self",),
    "SiluBackward0": ("_saved_self",),
}


def _function(kind: str, node: Any) -> Callable[..., Tensor]:
    if kind == "GeluBackward0":
        return partial(F.gelu, approximate=node._saved_approximate)
    return torch.mul if kind == "MulBackward0" else F.silu
