"""Put adapters into a model, and remove them again."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

from torch import nn

from dynalora_adapters._config import AdapterConfig
from dynalora_adapters._layers import AdapterLinear
from dynalora_adapters._models import replace_modules, require_adapters, unwrap
from dynalora_adapters._notices import notices
from dynalora_adapters._quantised import (
    check_not_repacked,
    forbid_repacking,
    restore_repacking,
)
from dynalora_adapters._sharded import check_here, check_not_fsdp1
from dynalora_adapters._targets import Plan, bias_tensors, make_plan
from dynalora_adapters._torch_private import plain_name

logger = logging.getLogger(__name__)

_RECORD = "_dynalora_injection"  # an attribute of the adapted model
_NESTED = "use_nested_tensor"  # an attribute of nn.TransformerEncoder


@dataclass(frozen=True)
class Injection:
    """What ``inject`` stores on the model, so that ``remove`` can undo it.

    Attributes:
        config: The configuration that the model was adapted with.
        required_grad: The former ``requires_grad`` of every base parameter, by name.
        nested_tensor: The former ``use_nested_tensor`` of the transformer encoders, by name.
        repacks: Which quantised layers may repack their weight for evaluation, by name.
        embeddings: Keys in the adapter's file of embeddings that a file has replaced. They must be
            saved again.
    """

    config: AdapterConfig
    required_grad: dict[str, bool]
    nested_tensor: dict[str, bool]
    repacks: dict[str, bool]
    embeddings: frozenset[str] = frozenset()


def inject(model: nn.Module, config: AdapterConfig) -> nn.Module:
    """Put adapters on the target modules of ``model``, in place.

    Everything else is frozen, except ``config.trainable``. Until the adapters are trained, the
    output is bit for bit what it was. A module that the model holds under several names is adapted
    once and replaced everywhere. Everything is checked before the model is changed.

    Args:
        model: The model to adapt.
        config: Which modules, and how.

    Returns:
        The same model.

    Raises:
        TypeError: If ``config`` is not a configuration of this package.
        ValueError: If the model is adapted already, or an entry of the configuration matches no
            module that can be adapted or trained.
    """
    if not isinstance(config, AdapterConfig):
        raise TypeError(
            f"config must be a LoRAConfig or a VeRAConfig of this package, got "
            f"{type(config).__name__}; build one with LoRAConfig(rank=..., alpha=..., targets=...)."
        )
    check_bare(model)
    plan = make_plan(model, config)
    for notice in notices(model, config, plan):
        logger.warning(notice)
    install(model, config, plan, config.build(plan.bases))
    return model


def remove(model: nn.Module) -> nn.Module:
    """Put the base modules back, in place.

    The delta of a merged adapter stays in the weights; call ``unmerge`` first to remove it. The
    ``requires_grad`` of every base parameter becomes what it was before ``inject``.

    Returns:
        The same model.

    Raises:
        ValueError: If the model holds no adapters.
    """
    bare = unwrap(model)
    layers = require_adapters(bare)
    replace_modules(bare, {layer: layer.base_layer for layer in layers.values()})
    record = bare.__dict__.pop(_RECORD, None)
    if record is not None:
        for name, param in bare.named_parameters():
            param.requires_grad_(record.required_grad.get(plain_name(name), param.requires_grad))
        for name, flag in record.nested_tensor.items():
            setattr(bare.get_submodule(name), _NESTED, flag)
        restore_repacking(bare, record.repacks)
    return model


def injection_of(model: nn.Module) -> Injection:
    """Return what ``inject`` stored on an adapted model."""
    record = getattr(model, _RECORD, None)
    if not isinstance(record, Injection):
        raise ValueError(
            f"model ({type(model).__name__}) was not itself passed to inject(model, config); "
            f"pass the module that was given to inject, not a part of it or a module around it."
        )
    return record


def note_embeddings(model: nn.Module, keys: frozenset[str]) -> None:
    """Store on an adapted model which embeddings a file has replaced."""
    record = injection_of(model)
    setattr(model, _RECORD, replace(record, embeddings=record.embeddings | keys))


def check_bare(model: nn.Module) -> None:
    """Raise if the model is wrapped, adapted already by any library, or not here as a whole."""
    check_not_fsdp1(model)
    if unwrap(model) is not model:
        raise ValueError(
            f"model is wrapped in {type(model).__name__}, which already holds its parameters; "
            f"adapt the model first, then wrap or compile it."
        )
    for name, module in model.named_modules():
        if isinstance(module, AdapterLinear):
            raise ValueError(f"model is adapted already (at {name}); call remove(model) first.")
        if hasattr(module, "adapter_layer_names"):
            raise ValueError(
                f"model is adapted already by peft (at {name}); unload() that adapter first."
            )
    check_not_repacked(model)
    check_here(model)


def install(
    model: nn.Module, config: AdapterConfig, plan: Plan, layers: Mapping[str, AdapterLinear]
) -> None:
    """Freeze the model and replace the planned modules. All checks were made before."""
    before = {name: param.requires_grad for name, param in model.named_parameters()}
    repacks = forbid_repacking(model)
    model.requires_grad_(False)
    for module in plan.trainable:
        for param in module.parameters():
            param.requires_grad_(param.is_floating_point())
    for bias in bias_tensors(model, config, plan.bases).values():
        bias.requires_grad_(bias.is_floating_point())
    replace_modules(model, {base: layers[name] for name, base in plan.bases.items()})
    setattr(model, _RECORD, Injection(config, before, _leave_fast_path(model), repacks))


def _leave_fast_path(model: nn.Module) -> dict[str, bool]:
    """Make torch's transformer layers call their adapters in eval mode too.

    The inference fast path of ``nn.TransformerEncoderLayer`` reads ``linear1.weight`` and
    ``linear2.weight`` directly, without the adapters, unless a submodule has a hook. So a hook is
    registered. Without the fast path, ``nn.TransformerEncoder`` must not pack padded batches into
    nested tensors, because attention cannot differentiate these (torch/nn/modules/transformer.py).
    Returns the former value of that flag, ``use_nested_tensor``, by name.
    """
    nested = {}
    for name, module in model.named_modules():
        if isinstance(module, nn.TransformerEncoderLayer):
            for layer in _adapters_in(module):
                layer.register_forward_pre_hook(_no_change)
        elif isinstance(module, nn.TransformerEncoder) and any(_adapters_in(module)):
            nested[name] = module.use_nested_tensor
            setattr(module, _NESTED, False)
    return nested


def _adapters_in(module: nn.Module) -> Iterator[AdapterLinear]:
    return (inner for inner in module.modules() if isinstance(inner, AdapterLinear))


def _no_change(module: nn.Module, args: Any) -> None:
    """A hook that does nothing but exist. It is a module-level function so that models pickle."""
