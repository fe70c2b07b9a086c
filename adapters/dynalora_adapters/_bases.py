"""What counts as a linear layer: the modules that an adapter can be laid over."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn
from torch.nn.parameter import is_lazy


@dataclass(frozen=True)
class LinearShape:
    """The sizes of a linear map R^in -> R^out and how its weight is laid out.

    Attributes:
        in_features: Size of an input row.
        out_features: Size of an output row.
        transposed: True where the weight is (in, out), as in transformers' ``Conv1D``.
    """

    in_features: int
    out_features: int
    transposed: bool = False


def linear_shape(module: nn.Module) -> LinearShape | None:
    """Return the shape of a module with Linear semantics, None for every other module.

    Recognised by what they have, so that no library need be imported: ``nn.Linear`` and its
    subclasses; transformers' ``Conv1D``; any module with ``in_features``, ``out_features`` and a
    2-d ``weight``, which may be packed or not floating (quantised layers).
    """
    weight = getattr(module, "weight", None)
    if not isinstance(weight, torch.Tensor) or is_lazy(weight):
        return None
    if weight.dim() != 2:
        return None
    if is_conv1d(module):
        return LinearShape(weight.shape[0], weight.shape[1], transposed=True)
    sizes = getattr(module, "in_features", None), getattr(module, "out_features", None)
    match sizes:
        case (int(in_features), int(out_features)):
            return LinearShape(in_features, out_features)
    return None


def is_conv1d(module: nn.Module) -> bool:
    """Whether the module is transformers' ``Conv1D``, a Linear whose weight is (in, out)."""
    named = any(kind.__name__ == "Conv1D" for kind in type(module).__mro__)
    return named and isinstance(getattr(module, "nf", None), int)


def adapter_dtype(weight: torch.Tensor) -> torch.dtype:
    """Return the dtype of adapters over ``weight``: float64 over float64, else float32.

    Over half precision, and over weights that are not floating, float32 keeps small updates.
    """
    return torch.float64 if weight.dtype == torch.float64 else torch.float32
