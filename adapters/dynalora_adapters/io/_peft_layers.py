"""peft's options that say more about the model than names: layers of a stack, and tied weights."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from dataclasses import replace
from typing import Any

from torch import nn

from dynalora_adapters._config import AdapterConfig, compile_pattern
from dynalora_adapters._models import parameter_owners
from dynalora_adapters._targets import matches

MODEL_OPTIONS = ("layers_to_transform", "layers_pattern", "ensure_weight_tying")


def in_layers(
    config: AdapterConfig, raw: Mapping[str, Any], names: Collection[str]
) -> AdapterConfig:
    """Return the configuration with only those targets that lie in the layers of the file.

    Raises:
        ValueError: If the targets are not a list of names, or none of them lies in the layers.
    """
    layers, patterns = _layers(raw), _patterns(raw)
    if not layers:
        return config
    if isinstance(config.targets, str):
        raise ValueError(
            f"layers_to_transform needs a list of names in target_modules, got "
            f"{config.targets!r}; put the layers into the regular expression instead."
        )
    chosen = [
        name
        for name in names
        if matches(config.targets, name)
        and (_index(name, patterns) in layers or name in config.targets)  # a full name is exempt
    ]
    if not chosen:
        raise ValueError(
            f"target_modules={list(config.targets)} match no module in the layers "
            f"{sorted(layers)}; correct layers_to_transform or layers_pattern."
        )
    return replace(config, targets=tuple(chosen))


def with_tied(config: AdapterConfig, raw: Mapping[str, Any], model: nn.Module) -> AdapterConfig:
    """Return the configuration with ``ensure_weight_tying``: what is tied to ``trainable`` trains.

    peft does the same, and writes both into the file.
    """
    if not raw.get("ensure_weight_tying"):
        return config
    tied: list[str] = []
    for names in parameter_owners(model).values():
        owners = {name.rpartition(".")[0] for name in names}
        others = {owner for owner in owners if not matches(config.trainable, owner)}
        tied += sorted(others) if owners - others else []
    return replace(config, trainable=(*config.trainable, *tied))


def check_layer_options(raw: Mapping[str, Any]) -> None:
    """Raise TypeError or ValueError if an option has a wrong type, or stands without the other."""
    layers, patterns = _layers(raw), _patterns(raw)
    if patterns and not layers:
        raise ValueError("layers_pattern needs layers_to_transform; add it, or remove both.")


def _layers(raw: Mapping[str, Any]) -> set[int]:
    value = raw.get("layers_to_transform")
    layers = [] if value is None else value if isinstance(value, list) else [value]
    if not all(isinstance(layer, int) and not isinstance(layer, bool) for layer in layers):
        raise TypeError(f"layers_to_transform must hold whole numbers, got {value!r}.")
    return set(layers)


def _patterns(raw: Mapping[str, Any]) -> list[str]:
    value = raw.get("layers_pattern") or []
    patterns = [value] if isinstance(value, str) else value
    if not isinstance(patterns, list) or not all(isinstance(p, str) for p in patterns):
        raise TypeError(f"layers_pattern must hold names of lists of layers, got {value!r}.")
    for pattern in patterns:
        compile_pattern("layers_pattern", pattern)
    return patterns


def _index(name: str, patterns: list[str]) -> int | None:
    """Return the index of the layer that holds a module, found by peft's rule; None if none does.

    That is the first number in the name, or the first one behind one of the patterns.
    """
    rules = [rf"(?:^|.*?\.){pattern}\.(?P<index>\d+)\." for pattern in patterns]
    for rule in rules or [r".*?\.[^.]*\.(?P<index>\d+)\."]:
        if found := re.match(rule, name):
            return int(found["index"])
    return None
