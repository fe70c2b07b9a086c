"""Tiny models under VeRA, for the tests of the layers and those of the files."""

from __future__ import annotations

from typing import Any

from tiny_models import TinyModel, build, randomize_trainable
from torch import nn

from dynalora_adapters import VeRAConfig, VeRALinear, inject


def adapted(name: str = "stack", seed: int = 1, **options: Any) -> TinyModel:
    tiny = build(name)
    options = {"rank": 4, "targets": tiny.targets, **options}
    inject(tiny.model, VeRAConfig(**{"trainable": tiny.trainable, **options}))
    randomize_trainable(tiny.model, seed, scale=0.5)
    return tiny


def layers_of(model: nn.Module) -> list[VeRALinear]:
    return [m for m in model.modules() if isinstance(m, VeRALinear)]
