"""Add the deltas of adapters to the base weights, and subtract them again."""

from __future__ import annotations

from contextlib import ExitStack

import torch
from torch import Tensor, nn

from dynalora_adapters._bases import DENSE
from dynalora_adapters._checks import boolean
from dynalora_adapters._inject import remove as remove_adapters
from dynalora_adapters._injection import active_layers
from dynalora_adapters._layers import AdapterLinear
from dynalora_adapters._models import parameter_owners, unwrap
from dynalora_adapters._quantised import is_packed
from dynalora_adapters._sharded import is_sharded
from dynalora_adapters._switching import adapter_names, set_adapter
from dynalora_adapters._torch_private import own_parameter


def merge(model: nn.Module, *, remove: bool = False, name: str | None = None) -> nn.Module:
    """Add the deltas of the active adapter to its base weights, in place.

    A merged layer costs no more than its base module. The sum is computed in float32 (in float64 if
    the weight is in float64) and rounded to the weight's dtype. Layers that are merged already do
    not change.

    Args:
        model: An adapted model.
        remove: Whether to put the base modules back afterwards. Then ``model`` is a plain model
            with new weights, and there is nothing left to unmerge.
        name: The adapter to make active first; None for the one that is.

    Returns:
        The same model.

    Raises:
        ValueError: If the model has no adapters, or a delta cannot be added to a weight: the weight
            is packed, not floating, computed by a parametrization or shared with another module,
            or would become infinite or nan; or if ``remove`` is True and there are other adapters.
            Then nothing has changed.
    """
    boolean("remove", remove)
    _check_alone(model, remove=remove)
    with ExitStack() as on_failure:
        if name is not None:
            on_failure.push(set_adapter(model, name))
        _fold(model, merged=True)
        on_failure.pop_all()
    return remove_adapters(model) if remove else model


def _check_alone(model: nn.Module, *, remove: bool) -> None:
    others = adapter_names(model)
    if remove and len(others) > 1:
        raise ValueError(
            f"remove=True would leave the other adapters over a base that they do not know, or "
            f"drop them: the model has {', '.join(others)}; call remove(model, name=...) for those "
            f"that you no longer need, after saving them."
        )


def unmerge(model: nn.Module) -> nn.Module:
    """Subtract the deltas that ``merge`` added, in place.

    The weights are the former ones up to rounding: one unit in the last place of their dtype. If
    you need exactly the former weights, keep a copy or load the model again; this matters most in
    half precision. Layers that are not merged do not change.

    Returns:
        The same model.

    Raises:
        ValueError: If the model has no adapters, or a weight would become infinite or nan. Then
            nothing has changed.
    """
    return _fold(model, merged=False)


def _fold(model: nn.Module, *, merged: bool) -> nn.Module:
    layers = active_layers(unwrap(model))
    pending = {name: layer for name, layer in layers.items() if layer.merged is not merged}
    owners = parameter_owners(unwrap(model))
    for name, layer in pending.items():
        _check(name, layer, owners)
    for layer in pending.values():
        with torch.no_grad():
            layer.weight.copy_(_folded(layer))
        layer.merged = merged
    return model


@torch.no_grad()
def _folded(layer: AdapterLinear) -> Tensor:
    """Return the base weight plus the delta or, if the layer is merged, minus the delta."""
    delta = layer.delta_weight()
    if layer.shape.transposed:
        delta = delta.T
    weight = layer.weight.to(delta.dtype)
    folded = weight - delta if layer.merged else weight + delta
    return folded.to(layer.weight.dtype)


def _check(name: str, layer: AdapterLinear, owners: dict[int, list[str]]) -> None:
    """Raise unless the delta can be added to the layer's weight. This computes the sum."""
    weight = layer.weight
    if own_parameter(layer.base_layer, "weight") is None:
        reason = "is not a parameter of its own (a buffer or a parametrization)"
    elif weight.is_meta:
        reason = "is on the meta device, without numbers (the model was offloaded)"
    elif is_sharded(weight):
        reason = "is sharded over processes (save the adapter and merge it into a whole model)"
    elif weight.dtype not in DENSE:
        reason = f"is {weight.dtype}, which cannot hold the delta"
    elif is_packed(weight):
        reason = f"is quantised ({type(weight).__name__}), so that it cannot hold the delta"
    elif sorted(weight.shape) != sorted((layer.in_features, layer.out_features)):
        reason = f"is packed in the shape {tuple(weight.shape)}"
    elif len(others := owners[id(weight)]) > 1:
        reason = f"is shared ({', '.join(others)}), so that the delta would reach other modules"
    elif not all(torch.isfinite(getattr(layer, p)).all() for p in layer.adapter_params()):
        reason = "would get a delta from adapter weights that hold inf or nan"
    elif not torch.isfinite(_folded(layer)).all():
        reason = f"would hold inf or nan in {weight.dtype}"
    else:
        return
    raise ValueError(f"the weight of {name} {reason}; keep the adapter unmerged, or remove it.")
