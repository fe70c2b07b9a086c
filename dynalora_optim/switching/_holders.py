"""Finding out whether anyone could ask for the gradient of a tensor of a running forward."""

from __future__ import annotations

import gc
import sys
from collections.abc import Sequence
from types import CellType, FrameType, FunctionType, GeneratorType
from typing import Any

from torch import Tensor

from dynalora_optim._base.torch_private_hooks import has_backward_hooks

_RUNNING = (FrameType, GeneratorType)
_CONTAINERS = (tuple, list, dict, CellType, FunctionType)
_LEVELS = 8  # of containers within containers; deeper ones count as held


def is_wanted(tensor: Tensor) -> bool:
    """Return whether the gradient of ``tensor`` is kept, or given to a hook."""
    kept = tensor.retains_grad or (tensor.is_leaf and tensor.grad is not None)
    return kept or has_backward_hooks(tensor)


class Holders:
    """Tells whether an object holds a tensor, beyond the functions that run now and the graph.

    Nothing simpler tells a tensor that a hook has stored, or a list of prompts, from embeddings
    that a model has told to require a gradient. The graph and the type of the tensor are the
    same, and the number of references alone depends on the model's own functions, which hold the
    tensor while they run. So the first time all objects of the process are looked through, which
    takes up to a second in a large one; after that only if the numbers of references are not
    those of the last time. Most models never come here: only those whose first block gets a
    tensor that requires a gradient, but reaches neither a parameter nor a tensor of the caller
    (see `InputCut`).
    """

    def __init__(self) -> None:
        self._free: list[int] = []  # the numbers of references without a holder

    def hold(self, tensors: Sequence[Tensor]) -> bool:
        """Return whether one of ``tensors`` is held."""
        counts = [sys.getrefcount(tensor) for tensor in tensors]
        if counts == self._free:
            return False
        if _is_held(tensors):
            return True
        self._free = counts
        return False


def _is_held(tensors: Sequence[Tensor]) -> bool:
    """Return whether an object refers to one of ``tensors``, directly or through containers.

    A container that leads to no object is a variable, or holds the arguments, of a function that
    runs now.
    """
    found: list[Any] = list(tensors)
    own: list[Any] = [tensors, found]  # kept, so that no new object gets one of their ids
    holders: list[Any] = []
    try:
        for _ in range(_LEVELS):
            holders = gc.get_referrers(*found)
            seen = {id(own), *map(id, own)}
            found = [h for h in holders if id(h) not in seen and not isinstance(h, _RUNNING)]
            if not found:
                return False
            if not all(isinstance(holder, _CONTAINERS) for holder in found):
                return True
            own += [holders, found, *found]
        return True
    finally:
        # They have the frames of the functions that run now, this one among them: a cycle, which
        # would keep what these functions refer to until the next garbage collection.
        own.clear()
        holders.clear()
