"""The private names of torch that have to do with hooks; see ``torch_private.py``."""

from __future__ import annotations

from collections.abc import Callable, MutableMapping
from typing import Any

from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

# What clip_grad_norm_ and zero_grad call with many tensors at once. If torch renames one: clipping
# that changes nothing is then refused like any other after a fused update.
FOREACH_NORM, FOREACH_SCALING, FOREACH_DELETION = "_foreach_norm", "_foreach_mul_", "_foreach_zero_"


def forward_hooks(module: nn.Module) -> MutableMapping[int, Callable[..., Any]]:
    """Return the mapping of the forward hooks of ``module``; hooks may be removed from it.

    If torch lacks it: an empty one. Hooks of other code are then not found, and a copy of a model
    keeps the hooks of the original.
    """
    return getattr(module, "_forward_hooks", {})


def forward_pre_hooks(module: nn.Module) -> MutableMapping[int, Callable[..., Any]]:
    """Return the mapping of the forward pre-hooks of ``module``, as `forward_hooks` does."""
    return getattr(module, "_forward_pre_hooks", {})


def prepend_forward_hook(
    module: nn.Module, hook: Callable[..., Any], *, always_call: bool = False
) -> RemovableHandle:
    """Register a forward hook that runs before the existing ones of ``module``.

    The mapping is then filled again in this order: torch.compile finds hooks by insertion order,
    which ``prepend=True`` does not change, so torch 2.11 and older confuse one hook with another.
    """
    handle = module.register_forward_hook(hook, prepend=True, always_call=always_call)
    hooks = forward_hooks(module)
    in_order = list(hooks.items())
    hooks.clear()
    hooks.update(in_order)
    return handle


def has_backward_hooks(item: nn.Module | Tensor) -> bool:
    """Return whether a hook gets gradients of this module or tensor.

    If torch lacks one of the names: hooks of that kind are not found.
    """
    names = "_backward_hooks", "_backward_pre_hooks", "_post_accumulate_grad_hooks"
    return any(getattr(item, name, None) for name in names)
