"""The names under which ``state_dict`` of an adapted model holds the base modules.

They are those of the model without adapters: ``lm_head.weight``, not ``lm_head.base_layer.weight``.
So the model's own ``save_pretrained`` writes a checkpoint that the plain model reads, transformers
recognises tied weights, and a checkpoint of the plain model can be loaded into the adapted one.
"""

from __future__ import annotations

from typing import Any

from torch import nn

BASE = "base_layer."


def names_in_base(module: nn.Module, base: nn.Module) -> dict[str, str]:
    """Return the base module's name for each name of the adapter's that ``state_dict`` moves there.

    torch.distributed.checkpoint asks a module for this in ``_fqn_modifiers``.
    """
    names = [name for name, _ in base.named_parameters(recurse=False)]
    names += [name for name, _ in base.named_buffers(recurse=False)]
    names += [name for name, _ in base.named_children()]
    return dict.fromkeys(names, BASE.rstrip("."))


def without_base(module: nn.Module, state: dict[str, Any], prefix: str, _: Any) -> None:
    """Rename what ``state_dict`` of an adapter has collected; a hook of that method."""
    own = [key for key in state if key.startswith(prefix)]
    for key in own:  # all are put in again, so that the order stays
        value = state.pop(key)
        state[prefix + key.removeprefix(prefix).removeprefix(BASE)] = value


def with_base(module: nn.Module, state: dict[str, Any], prefix: str, *_: Any) -> None:
    """Rename what ``load_state_dict`` of an adapter gets; a hook of that method."""
    own = {name for name, _ in module.named_parameters(recurse=False)}
    own |= {name for name, _ in module.named_children()}
    for key in [key for key in state if key.startswith(prefix)]:
        rest = key.removeprefix(prefix)
        if rest.partition(".")[0] not in own:
            state[prefix + BASE + rest] = state.pop(key)
