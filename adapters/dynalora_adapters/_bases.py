"""What counts as a linear layer: the modules that can get an adapter."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypeGuard

import torch
from torch import Tensor, nn

from dynalora_adapters._torch_private import is_lazy, is_watched


@dataclass(frozen=True)
class LinearShape:
    """The sizes of a linear map R^in -> R^out and how its weight is laid out.

    Attributes:
        in_features: Size of an input row.
        out_features: Size of an output row.
        transposed: True if the weight is stored as (in, out), as in transformers' ``Conv1D``.
    """

    in_features: int
    out_features: int
    transposed: bool = False


def linear_shape(module: nn.Module) -> LinearShape | None:
    """Return the shape of a module that computes what ``nn.Linear`` does, None for any other.

    These are ``nn.Linear`` and its subclasses; transformers' ``Conv1D``; and any module with
    ``in_features``, ``out_features`` and a 2-d ``weight``, which may be packed or not floating
    (quantised layers). They are recognised by their attributes, so no library is imported.
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


def is_plain_and_frozen(module: nn.Module) -> bool:
    """Whether a module computes x W^T + b with W and b frozen, and surely nothing else.

    So not subclasses, parametrized and quantised layers, modules with a replaced forward, and
    modules with a hook.
    """
    if type(module) is not nn.Linear and not _is_transformers_conv1d(module):
        return False
    if is_watched(module) or "forward" in module.__dict__:
        return False
    weight, bias = module.weight, module.bias
    if not (is_dense(weight) and weight.is_floating_point()) or weight.requires_grad:
        return False
    return bias is None or (is_dense(bias) and not bias.requires_grad)


def is_dense(tensor: object) -> TypeGuard[Tensor]:
    """Whether this is an ordinary tensor: not of a subclass, strided, and not nested."""
    if type(tensor) is not Tensor and type(tensor) is not nn.Parameter:
        return False
    return tensor.layout is torch.strided and not tensor.is_nested


def _is_transformers_conv1d(module: nn.Module) -> bool:
    kind = type(module)
    return kind.__name__ == "Conv1D" and kind.__module__ == "transformers.pytorch_utils"


def adapter_dtype(weight: torch.Tensor) -> torch.dtype:
    """Return the dtype of adapters over ``weight``: float64 over float64, else float32.

    For weights in half precision, and for weights that are not floating, float32 is used because
    half precision would lose small updates.
    """
    return torch.float64 if weight.dtype == torch.float64 else torch.float32
