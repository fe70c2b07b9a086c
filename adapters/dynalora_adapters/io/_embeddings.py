"""The embeddings that peft writes into the file of an adapter, without being asked.

It does so if the vocabulary was resized, or if an embedding or the output head is adapted: then the
file holds the weight of the base, and loading replaces the base's weight by it.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from dynalora_adapters._layers import AdapterLinear
from dynalora_adapters._models import module_tree
from dynalora_adapters._sharded import whole
from dynalora_adapters._tasks import input_embeddings, output_embeddings
from dynalora_adapters.io._peft_kinds import WITH_PEFT

_BASE = "base_layer."


def embedding_tensors(model: nn.Module, prefix: str) -> dict[str, Tensor]:
    """Return the weights of the embeddings and of the output head, by each key they can have."""
    modules = {id(module) for module in (input_embeddings(model), output_embeddings(model))}
    found: dict[str, Tensor] = {}
    for name, module in module_tree(model).items():
        base = module.base_layer if isinstance(module, AdapterLinear) else module
        if id(module) in modules or id(base) in modules:
            for key, value in base.named_parameters(recurse=False):
                found[f"{prefix}{name}.{key}"] = value
                found[f"{prefix}{name}.{_BASE}{key}"] = value
    return found


def check_tied(tensors: Mapping[str, Tensor], into: Mapping[str, Tensor], path: Path) -> None:
    """Raise if the file has two different values for what is one parameter of the model."""
    first: dict[int, str] = {}
    for key, target in into.items():
        other = first.setdefault(id(target), key)
        if other != key and not torch.equal(tensors[key], tensors[other]):
            raise ValueError(
                f"{path}: {other} and {key} differ, but they are one parameter of this model (its "
                f"weights are tied), so that the last one would win; load the base model with "
                f"tie_word_embeddings=False, or {WITH_PEFT}."
            )


def changed(tensors: Mapping[str, Tensor], found: Mapping[str, Tensor]) -> frozenset[str]:
    """Return the keys of those embeddings for which the file has other values than the model."""
    return frozenset(
        key
        for key, old in found.items()
        if not torch.equal(tensors[key].to(old.dtype), whole(old.detach()).cpu())
    )
