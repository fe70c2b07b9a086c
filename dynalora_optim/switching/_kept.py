"""Blocks that keep what their backward needs until the memory is asked for: then it is recomputed.

A forward that other forwards of the same backward follow cannot know how large these will be. So
it keeps in full what the plan keeps, but under a checkpoint: each tensor that autograd saves is
held beside the checkpoint's own entry for it. While it is held, it is used, and nothing is
recomputed. Once `Kept.release` has dropped it, the checkpoint recomputes it like any other.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

from dynalora_optim._base.torch_private_autograd import (
    current_saved_tensors_hooks,
    version,
)


class _Saved:
    """A tensor that autograd saved, and the entry with which a checkpoint recomputes it."""

    __slots__ = ("__weakref__", "entry", "tensor", "version")

    def __init__(self, tensor: Tensor, entry: Any) -> None:
        # Detached: a node that saved its own output would be held by it, and both for ever.
        self.tensor: Tensor | None = tensor.detach()
        self.entry = entry
        self.version = version(tensor)


class Kept:
    """What the forwards under `keeping` have saved for their backward, until `release`."""

    def __init__(self) -> None:
        self._saved: weakref.WeakSet[_Saved] = weakref.WeakSet()

    def keeping(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """Return ``function`` to be run under a checkpoint, once for the forward.

        The first call is the forward; the later ones are recomputations.
        """
        has_run = False

        def run(*args: Any, **kwargs: Any) -> Any:
            nonlocal has_run
            hooks = None if has_run else current_saved_tensors_hooks()
            has_run = True
            if hooks is None:
                return function(*args, **kwargs)
            with self._beside(*hooks):
                return function(*args, **kwargs)

        return run

    def _beside(
        self, pack: Callable[[Tensor], Any], unpack: Callable[[Any], Tensor]
    ) -> saved_tensors_hooks:
        """Return a context that holds each saved tensor beside what ``pack`` makes of it."""

        def hold(tensor: Tensor) -> _Saved:
            saved = _Saved(tensor, pack(tensor))
            self._saved.add(saved)
            return saved

        def give(saved: _Saved) -> Tensor:
            if saved.tensor is None:
                return unpack(saved.entry)
            if (now := version(saved.tensor)) != saved.version:  # autograd checks it without hooks
                raise RuntimeError(
                    "one of the variables needed for gradient computation has been modified by an "
                    f"inplace operation: a tensor of shape {list(saved.tensor.shape)} is at "
                    f"version {now}; expected version {saved.version} instead."
                )
            return saved.tensor

        return saved_tensors_hooks(hold, give)

    def release(self) -> None:
        """Drop what is held; the backward recomputes it."""
        for saved in self._saved:
            saved.tensor = None

    def __deepcopy__(self, memo: dict[int, Any]) -> Kept:
        return Kept()  # a copy of a model has no graph

    def __reduce__(self) -> tuple[type[Kept], tuple[()]]:
        return Kept, ()
