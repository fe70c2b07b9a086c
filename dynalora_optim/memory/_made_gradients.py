"""Counting what a backward takes with its gradients, and without them."""

from __future__ import annotations

from collections.abc import Sequence
from types import TracebackType

import torch
from torch import Tensor

from dynalora_optim._base.live_bytes import LiveBytes, tensor_bytes, uncounted


class MadeGradients:
    """A context for a measured backward; it frees each gradient of a leaf as soon as it is made.

    So the measurement does not hold them, and counts both: what the backward takes if they stay,
    and if each is added to one that was alive before.

    Args:
        memory: Counts the bytes; this restarts it.
        leaves: Those whose gradients the backward makes.

    Attributes:
        made: The bytes of the gradients.
        kept: The most bytes alive if they stay.
        spent: The most bytes alive if each is added to one that was alive before, and freed. An
            addition that is not in place takes as much as a gradient for a moment.
    """

    def __init__(self, memory: LiveBytes, leaves: Sequence[Tensor]) -> None:
        self._memory = memory
        self._leaves = leaves
        self.made = self.kept = self.spent = 0

    def __enter__(self) -> MadeGradients:
        self._memory.restart()
        leaves = {id(leaf): leaf for leaf in self._leaves if leaf.is_leaf}
        self._handles = [leaf.register_hook(self._free) for leaf in leaves.values()]  # type: ignore[no-untyped-call]
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        for handle in self._handles:
            handle.remove()
        self._note()

    def _note(self) -> None:
        self.kept = max(self.kept, self._memory.peak + self.made)
        self.spent = max(self.spent, self._memory.peak)

    def _free(self, gradient: Tensor) -> Tensor | None:
        self._note()
        if gradient.layout != torch.strided:
            return None
        size = tensor_bytes(gradient)
        self.spent = max(self.spent, self._memory.live + size)
        self.made += size
        self._memory.peak = 0  # not the bytes alive now: this gradient will be freed
        with uncounted():
            return gradient.new_zeros(()).expand(gradient.shape)
