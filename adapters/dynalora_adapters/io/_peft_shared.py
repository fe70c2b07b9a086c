"""What all layers of a kind share, in peft's files: VeRA's projections, which are stored once."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import replace

from torch import Tensor, nn

from dynalora_adapters._bases import linear_shape
from dynalora_adapters._config import AdapterConfig
from dynalora_adapters._layers import AdapterLinear
from dynalora_adapters._projections import Projections, draw, place, projection_shapes
from dynalora_adapters._vera import VeRAConfig, VeRALinear

KEY_A, KEY_B = "base_model.vera_A", "base_model.vera_B"  # other keys have ".model." in them


def as_saved(config: AdapterConfig, layers: Mapping[str, AdapterLinear]) -> AdapterConfig:
    """Return the configuration to write. Matrices that cannot be drawn again must be saved."""
    if not isinstance(config, VeRAConfig) or config.save_projection:
        return config
    return replace(config, save_projection=not _projections(layers).come_from(config.key))


def shared_tensors(config: AdapterConfig, layers: Mapping[str, AdapterLinear]) -> dict[str, Tensor]:
    """Return the shared tensors that must be in the file, by key."""
    if not isinstance(config, VeRAConfig) or not config.save_projection:
        return {}
    projections = _projections(layers)
    return {KEY_A: projections.A, KEY_B: projections.B}


def shared_shapes(
    tree: Mapping[str, nn.Module],
    names: Collection[str],
    config: AdapterConfig,
    tensors: Mapping[str, Tensor],
) -> dict[str, tuple[int, ...]]:
    """Return the shapes of the shared tensors that must be in the file, by key.

    Raises:
        ValueError: If the configuration says that they are in the file, and they are not.
    """
    if not isinstance(config, VeRAConfig):
        return {}
    missing = sorted({KEY_A, KEY_B} - tensors.keys())
    if config.save_projection and missing:
        raise ValueError(
            f"{' and '.join(missing)} missing, although save_projection is true; save the adapter "
            f"again, or set save_projection to false to draw both from projection_prng_key."
        )
    if len(missing) == 2:
        return {}
    bases = [shape for name in names if (shape := linear_shape(tree[name])) is not None]
    return dict(zip((KEY_A, KEY_B), projection_shapes(config.rank, bases), strict=True))


def share(
    config: AdapterConfig, layers: Mapping[str, AdapterLinear], tensors: Mapping[str, Tensor]
) -> None:
    """Give the layers the shared tensors of the checked file, or draw them from its key."""
    if not isinstance(config, VeRAConfig):
        return
    vera = [layer for layer in layers.values() if isinstance(layer, VeRALinear)]
    if KEY_A in tensors:
        A, B = tensors[KEY_A].clone(), tensors[KEY_B].clone()  # may be a memory map of the file
    else:
        A, B = draw(*projection_shapes(config.rank, [layer.shape for layer in vera]), config.key)
    homes = [(layer.vera_lambda_d.device, layer.vera_lambda_d.dtype) for layer in vera]
    for layer, projections in zip(vera, place(A, B, homes), strict=True):
        layer.projections = projections


def _projections(layers: Mapping[str, AdapterLinear]) -> Projections:
    """Return the projections of the first layer. Those on other devices are copies of these."""
    return next(layer.projections for layer in layers.values() if isinstance(layer, VeRALinear))
