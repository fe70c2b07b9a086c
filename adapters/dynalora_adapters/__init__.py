"""Adapters for linear layers: small trainable deltas over a frozen model.

The pieces divide the work so that data flows one way::

    configuration  ->  targets -> plan  ->  layers  ->  the model
                                                        |  merge, unmerge, remove
                                                        |  save_adapter, load_adapter

* A *configuration* (``LoRAConfig``, ``VeRAConfig``) says which modules are adapted and how. It is
  frozen, it is checked when it is made, and it builds the layers. A kind of adapter consists of one
  configuration class and one layer class.
* A *layer* (``LoRALinear``, ``VeRALinear``) holds its base module and adds its delta to the base's
  output. It knows whether it is ``active`` and whether it is ``merged``. It knows nothing about the
  model around it. VeRA's layers share one pair of frozen random matrices.
* ``inject`` makes a plan from the configuration and the model. All mistakes are found in this step,
  before the model is changed. Then the plan is carried out. ``remove`` undoes this.
* A model can have several adapters, over the same base. Only the active one is in the model, so all
  other parts see a model with one adapter. ``set_adapter`` puts another one in its place.
* ``merge`` and ``unmerge`` move the deltas into the base weights and back.
* ``save_adapter`` and ``load_adapter`` write and read peft's file format. No other part does.

An optimizer that switches adapters on and off recognises an adapter by two things: the method
``adapter_params() -> list[str]`` and the attribute ``active``. It does not import this package.
"""

from dynalora_adapters._config import LoRAConfig
from dynalora_adapters._inject import inject, remove
from dynalora_adapters._layers import LoRALinear
from dynalora_adapters._merge import merge, unmerge
from dynalora_adapters._switching import active_adapter, adapter_names, set_adapter
from dynalora_adapters._vera import VeRAConfig, VeRALinear
from dynalora_adapters.io._files import load_adapter, save_adapter

__all__ = [
    "LoRAConfig",
    "LoRALinear",
    "VeRAConfig",
    "VeRALinear",
    "active_adapter",
    "adapter_names",
    "inject",
    "load_adapter",
    "merge",
    "remove",
    "save_adapter",
    "set_adapter",
    "unmerge",
]
