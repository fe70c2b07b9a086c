"""Adapters whose names peft changes while it reads a file, so that they are lost.

From transformers 5 on, peft applies the tables by which transformers converts old checkpoints to
adapters too, although their names are those of the new models. This package does not import
transformers; but the tables of a transformers that is in use can be asked.
"""

from __future__ import annotations

import sys
from collections.abc import Collection, Mapping
from typing import Any

from torch import nn

from dynalora_adapters._models import first_names
from dynalora_adapters._notices import fused_experts
from dynalora_adapters._targets import ends

# Names that peft takes for those of experts, in models that transformers converts by one of these
# patterns: it leaves out layers with these names, and adapts the experts instead
# (peft/utils/transformers_weight_conversion.py).
_EXPERT_NAMES = {
    "mixtral": {"gate", "w1", "w2", "w3"},
    "qwen2_moe": {"gate", "gate_proj", "up_proj", "down_proj"},
}


def taken_for_experts(
    kind: str | None, tree: Mapping[str, nn.Module], names: Collection[str]
) -> list[str]:
    """Return those layers of a model of this type that peft takes for experts.

    If transformers has no table of patterns, any model with fused experts may be meant.
    """
    patterns = getattr(_tables(), "_MODEL_TO_CONVERSION_PATTERN", None)
    if isinstance(patterns, Mapping):
        taken = _EXPERT_NAMES.get({**patterns, "mixtral": "mixtral"}.get(kind, ""), set())
    elif fused_experts(first_names(tree)):
        taken = set().union(*_EXPERT_NAMES.values())
    else:
        taken = set()
    return [name for name in names if ends([name])[0] in taken]


def renamed(model: nn.Module, names: Collection[str]) -> list[str]:
    """Return those layers that get the name of no layer of the model.

    Empty if transformers has changed its tables, which are not made for others.
    """
    try:
        rules = [rule for rule in _rules(model) if "WeightRenaming" in _ancestors(rule)]
        new = {name: _new_name(name, rules) for name in names}
    except (AttributeError, TypeError, ValueError):
        return []
    return [name for name in names if new[name] not in names and not name.endswith(new[name])]


def _new_name(name: str, rules: list[Any]) -> str:
    key = f"{name}.lora_A.weight"
    for rule in rules:
        key, _ = rule.rename_source_key(key)
    return key.removesuffix(".lora_A.weight")


def _rules(model: nn.Module) -> list[Any]:
    ask = getattr(_tables(), "get_model_conversion_mapping", None)
    known = hasattr(getattr(model, "config", None), "model_type")
    return list(ask(model)) if known and callable(ask) else []


def _ancestors(rule: object) -> set[str]:
    return {kind.__name__ for kind in type(rule).__mro__}


def _tables() -> object:
    return sys.modules.get("transformers.conversion_mapping")
