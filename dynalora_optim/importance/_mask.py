"""The attention mask of the batch that runs now."""

from __future__ import annotations

import weakref
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from dynalora_optim.importance._forward_hook import Watch


class _Masks:
    """The hooks of a model that set a tracker's mask for one forward pass; copies do nothing."""

    def __init__(self, watch: Watch | None = None) -> None:
        self._watch = weakref.ref(watch) if watch else None

    def set(self, model: nn.Module, args: object, kwargs: dict[str, Any]) -> None:
        watch = self._of_pass()
        if watch is not None and watch.mask is None:  # else the user has set one for this pass
            mask = _mask_in(model, kwargs)
            watch.mask = None if mask is not None and _keeps_all(mask) else mask

    def clear(self, model: nn.Module, args: object, output: object) -> None:
        watch = self._of_pass()
        if watch is not None:
            watch.mask = None

    def _of_pass(self) -> Watch | None:
        # Compiled code reads the mask after its last line: do not clear it there.
        if self._watch is None or torch.compiler.is_compiling() or not torch.is_grad_enabled():
            return None
        return self._watch()

    def __reduce__(self) -> tuple[type[_Masks], tuple[()]]:
        return _Masks, ()


def _mask_in(model: nn.Module, kwargs: dict[str, Any]) -> Tensor | None:
    """Return the (batch, tokens) mask of a call; None if the decoder has other tokens."""
    mask = kwargs.get("attention_mask")
    two = getattr(getattr(model, "config", None), "is_encoder_decoder", False) is True
    return mask if isinstance(mask, Tensor) and mask.ndim == 2 and not two else None


def _keeps_all(mask: Tensor) -> bool:
    """Return whether a mask is known to leave nothing out; a GPU would have to be waited for."""
    try:
        return mask.device.type == "cpu" and bool(mask.all())
    except RuntimeError:  # no values to read: under torch.vmap, or in a copy without data
        return False


def masks_of(model: nn.Module, watch: Watch) -> list[RemovableHandle]:
    """Set the hooks of ``model`` that set the mask of ``watch`` for each forward pass."""
    masks = _Masks(watch)
    return [
        model.register_forward_pre_hook(masks.set, with_kwargs=True),
        model.register_forward_hook(masks.clear, always_call=True),
    ]
