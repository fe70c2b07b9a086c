"""The attention mask of the batch that runs now."""

from __future__ import annotations

import inspect
import logging
import weakref
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from dynalora_optim.importance._forward_hook import Watch

logger = logging.getLogger(__name__)

_NAME = "attention_mask"


class _Masks:
    """The hooks of a model that set a tracker's mask for one forward pass; copies do nothing."""

    def __init__(self, watch: Watch | None = None, position: int | None = None) -> None:
        self._watch = weakref.ref(watch) if watch else None
        self._position = position  # of the mask, if it is not passed by name
        self._has_told = False

    def set(self, model: nn.Module, args: tuple[object, ...], kwargs: dict[str, Any]) -> None:
        watch = self._of_pass()
        if watch is None or watch.mask is not None:  # the user has set one for this pass
            return
        given = kwargs.get(_NAME)
        if self._position is not None and len(args) > self._position:
            given = args[self._position]
        if given is not None:
            mask = self._usable(model, given)
            watch.mask = None if mask is not None and _keeps_all(mask) else mask

    def _usable(self, model: nn.Module, given: object) -> Tensor | None:
        """Return a (batch, tokens) mask; None for others, and if the decoder has other tokens."""
        if isinstance(given, Tensor) and given.ndim == 2:
            config = getattr(model, "config", None)
            return None if getattr(config, "is_encoder_decoder", False) is True else given
        if not self._has_told:
            self._has_told = True
            shape = f" of shape {tuple(given.shape)}" if isinstance(given, Tensor) else ""
            logger.warning(
                "attention_mask is a %s%s, not a tensor of (batch, tokens): the scores count all "
                "tokens. To leave padding out, set optimizer.tracker.attention_mask before each "
                "forward pass.",
                type(given).__name__,
                shape,
            )
        return None

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


def _position_of_mask(model: nn.Module) -> int | None:
    """Return the position of the mask among the arguments of the forward; None if it has none."""
    try:
        parameters = inspect.signature(model.forward).parameters.values()
    except (TypeError, ValueError):  # a forward that is not written in Python
        return None
    kinds = inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD
    names = [parameter.name for parameter in parameters if parameter.kind in kinds]
    return names.index(_NAME) if _NAME in names else None


def _keeps_all(mask: Tensor) -> bool:
    """Return whether a mask is known to leave nothing out; a GPU would have to be waited for."""
    try:
        return mask.device.type == "cpu" and bool(mask.all())
    except RuntimeError:  # no values to read: under torch.vmap, or in a copy without data
        return False


def masks_of(model: nn.Module, watch: Watch) -> list[RemovableHandle]:
    """Set the hooks of ``model`` that set the mask of ``watch`` for each forward pass."""
    masks = _Masks(watch, _position_of_mask(model))
    return [
        model.register_forward_pre_hook(masks.set, with_kwargs=True),
        model.register_forward_hook(masks.clear, always_call=True),
    ]
