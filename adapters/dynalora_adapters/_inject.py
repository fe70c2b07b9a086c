"""Put adapters into a model, and remove them again."""

from __future__ import annotations

import copy
import logging
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

from torch import nn

from dynalora_adapters._config import AdapterConfig
from dynalora_adapters._injection import (
    Adapter,
    Injection,
    begin_injection,
    end_injection,
    find_injection,
    name_of,
    place,
    placed,
)
from dynalora_adapters._layers import AdapterLinear
from dynalora_adapters._models import replace_modules, require_adapters, unwrap
from dynalora_adapters._notices import notices
from dynalora_adapters._quantised import (
    check_not_repacked,
    forbid_repacking,
    restore_repacking,
)
from dynalora_adapters._sharded import check_here, check_not_fsdp1
from dynalora_adapters._switching import check_not_merged, switch
from dynalora_adapters._targets import Plan, bias_tensors, make_plan
from dynalora_adapters._torch_private import plain_name

logger = logging.getLogger(__name__)

_NESTED = "use_nested_tensor"  # an attribute of nn.TransformerEncoder
_ONLY = "default"  # the name of an adapter that was given none


def inject(model: nn.Module, config: AdapterConfig, *, name: str | None = None) -> nn.Module:
    """Put adapters on the target modules of ``model``, in place.

    Everything else is frozen, except ``config.trainable``. Until the adapters are trained, the
    output is bit for bit what it was. A module that the model holds under several names is adapted
    once and replaced everywhere. Everything is checked before the model is changed.

    A model can have several adapters, each with a name of its own. The first one is active. Another
    one has no effect until ``set_adapter`` makes it the active one. An adapter with a name trains
    copies of its own of the modules in ``config.trainable``.

    Args:
        model: The model to adapt.
        config: Which modules, and how.
        name: The name of the adapter. Without a name, it is the only one of the model, and trains
            the modules in ``config.trainable`` themselves.

    Returns:
        The same model.

    Raises:
        TypeError: If ``config`` is not a configuration of this package.
        ValueError: If the model is adapted already and no other name is given, or an entry of the
            configuration matches no module that can be adapted or trained.
    """
    if not isinstance(config, AdapterConfig):
        raise TypeError(
            f"config must be a LoRAConfig or a VeRAConfig of this package, got "
            f"{type(config).__name__}; build one with LoRAConfig(rank=..., alpha=..., targets=...)."
        )
    check_room(model, name, config)
    with as_base(model):
        check_bare(model)
        plan = make_plan(model, config)
        for notice in notices(model, config, plan):
            logger.warning(notice)
        install(model, name, config, plan, config.build(plan.bases))
    return model


def remove(model: nn.Module, *, name: str | None = None) -> nn.Module:
    """Put the base modules back, in place.

    The delta of a merged adapter stays in the weights, as do its copies of trained modules; call
    ``unmerge`` first to remove it. The ``requires_grad`` of every base parameter becomes what it
    was before ``inject``.

    Args:
        model: An adapted model.
        name: The adapter to remove; None for all of them. If it is the active one and there are
            others, none is active until ``set_adapter`` is called.

    Returns:
        The same model.

    Raises:
        ValueError: If the model holds no adapters, or none of this name; or if the adapter is
            merged and there are others.
    """
    bare = unwrap(model)
    check_not_fsdp1(bare)
    record = find_injection(bare)
    if record is None:
        layers = require_adapters(bare)
        replace_modules(bare, {layer: layer.base_layer for layer in layers.values()})
    elif name is not None and len(record.adapters) > (name in record.adapters):
        _remove_one(bare, record, name_of(record, name))
    else:
        _remove_all(bare, record)
    return model


def _remove_one(model: nn.Module, record: Injection, name: str) -> None:
    if record.adapters[name].is_merged:
        check_not_merged(record, "the other adapters")
    if record.active == name:
        switch(model, None)
    del record.adapters[name]


def _remove_all(model: nn.Module, record: Injection) -> None:
    active = None if record.active is None else record.adapters[record.active]
    if active is not None and active.is_merged:
        replace_modules(model, {layer: layer.base_layer for layer in active.layers})
    else:
        place(model, None)
    end_injection(model)
    for handle in record.guards:
        handle.remove()
    for name, param in model.named_parameters():
        param.requires_grad_(record.required_grad.get(plain_name(name), param.requires_grad))
    for name, flag in record.nested_tensor.items():
        setattr(model.get_submodule(name), _NESTED, flag)
    restore_repacking(model, record.repacks)


def check_room(model: nn.Module, name: str | None, config: AdapterConfig) -> None:
    """Raise unless the model can get this adapter of this name, beside those that it has.

    Raises:
        TypeError: If the name is no string, or empty.
        ValueError: If the name is taken, or the base is not as it was before the first adapter.
    """
    if name is not None and not (isinstance(name, str) and name):
        raise TypeError(f"name must be a string that is not empty, got {name!r}.")
    record = find_injection(unwrap(model))
    if record is None:
        return
    known = ", ".join(map(repr, record.adapters))
    if name is None or name in record.adapters:
        raise ValueError(
            f"model is adapted already (by {known}); call remove(model) first, or give the new "
            f"adapter another name=...."
        )
    check_not_merged(record, "a new adapter")
    if config.bias != "none":
        raise ValueError(
            f"bias={config.bias!r} trains biases of the base model, which {known} use too; pass "
            f"bias='none', or call remove(model) first."
        )
    for other, adapter in record.adapters.items():
        if adapter.trains_base:
            raise ValueError(
                f"the adapter {other!r} trains modules of the base model itself (or biases, or its "
                f"file has replaced embeddings there), so that a new adapter would not be over the "
                f"base model; give the first adapter a name too: inject(model, config, name=...)."
            )


def as_base(model: nn.Module) -> AbstractContextManager[None]:
    """Return a context in which the model has no adapters in place."""
    return nullcontext() if find_injection(model) is None else placed(model, None)


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
    model: nn.Module,
    name: str | None,
    config: AdapterConfig,
    plan: Plan,
    layers: Mapping[str, AdapterLinear],
) -> str:
    """Add an adapter to a model in its base state; return its name. All checks were made before.

    It is active if it is the first one. Then the rest of the model is frozen.
    """
    record = find_injection(model)
    is_first = record is None
    if record is None:
        required = {key: param.requires_grad for key, param in model.named_parameters()}
        record = Injection(required, forbid_repacking(model))
        model.requires_grad_(False)
        begin_injection(model, record)
    copies = () if name is None else _own_copies(plan.trainable)
    for module in plan.trainable if name is None else [own for _, own in copies]:
        for param in module.parameters():
            param.requires_grad_(param.is_floating_point())
    for bias in bias_tensors(model, config, plan.bases).values():
        bias.requires_grad_(bias.is_floating_point())
    _leave_fast_path(model, record, {base: layers[key] for key, base in plan.bases.items()})
    name = _ONLY if name is None else name
    record.adapters[name] = Adapter(config, tuple(layers.values()), copies)
    if is_first:
        place(model, name)
        record.timeline.note_all(repr(name))
    return name


def _own_copies(modules: Sequence[nn.Module]) -> tuple[tuple[nn.Module, nn.Module], ...]:
    """Return those modules that are not inside another one, and a copy of each."""
    inner = {part for module in modules for part in module.modules() if part is not module}
    memo: dict[int, Any] = {}  # so that tied weights stay tied
    return tuple((m, copy.deepcopy(m, memo)) for m in modules if m not in inner)


def _leave_fast_path(
    model: nn.Module, record: Injection, layers: Mapping[nn.Module, AdapterLinear]
) -> None:
    """Make torch's transformer layers call their adapters in eval mode too.

    The inference fast path of ``nn.TransformerEncoderLayer`` reads ``linear1.weight`` and
    ``linear2.weight`` directly, without the adapters, unless a submodule has a hook. So a hook is
    registered. Without the fast path, ``nn.TransformerEncoder`` must not pack padded batches into
    nested tensors, because attention cannot differentiate these (torch/nn/modules/transformer.py).
    """
    for name, module in model.named_modules():
        adapted = [layers[base] for base in module.modules() if base in layers]
        if isinstance(module, nn.TransformerEncoderLayer):
            for layer in adapted:
                layer.register_forward_pre_hook(_no_change)
        elif isinstance(module, nn.TransformerEncoder) and adapted:
            record.nested_tensor.setdefault(name, module.use_nested_tensor)
            setattr(module, _NESTED, False)


def _no_change(module: nn.Module, args: Any) -> None:
    """A hook that does nothing but exist. It is a module-level function so that models pickle."""
