"""Adapters for linear layers: small trainable deltas over a frozen model.

The pieces divide the work so that data flows one way::

    configuration  ->  targets -> plan  ->  layers  ->  the model
                                                        |  merge, unmerge, remove
                                                        |  save_adapter, load_adapter

* A *configuration* (``LoRAConfig``, ``VeRAConfig``) says which modules are adapted and how. It is
  frozen, checked when it is made, and builds the layers; a kind of adapter is one configuration and
  one layer.
* A *layer* (``LoRALinear``, ``VeRALinear``) holds its base module and adds its delta to the base's
  output. It knows whether it is ``active`` and whether it is ``merged``, and nothing of the model
  around it. VeRA's layers share one pair of frozen random matrices.
* ``inject`` resolves the configuration against a model into a plan. Everything that can be wrong is
  found there, before the first change; then the plan is carried out. ``remove`` undoes it.
* ``merge`` and ``unmerge`` move the deltas into the base weights and back.
* ``save_adapter`` and ``load_adapter`` speak peft's file format, and are the only ones who do.

An optimizer that switches adapters on and off recognises one by two things, without an import:
the method ``adapter_params() -> list[str]`` and the attribute ``active``.
"""

from dynalora_adapters._config import LoRAConfig
from dynalora_adapters._inject import inject, remove
from dynalora_adapters._layers import LoRALinear
from dynalora_adapters._merge import merge, unmerge
from dynalora_adapters._vera import VeRAConfig, VeRALinear
from dynalora_adapters.io._files import load_adapter, save_adapter

__all__ = [
    "LoRAConfig",
    "LoRALinear",
    "VeRAConfig",
    "VeRALinear",
    "inject",
    "load_adapter",
    "merge",
    "remove",
    "save_adapter",
    "unmerge",
]
