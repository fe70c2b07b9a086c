"""What counts as a linear layer: the modules that can get an adapter."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypeGuard

import torch
from torch import Tensor, nn
from torch.func import functional_call

from dynalora_adapters._torch_private import is_fake, is_lazy, is_watched, own_parameter

# The dtypes of weights that are numbers as they are, so that a delta can be added to them.
DENSE = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


@dataclass(frozen=True)
class LinearShape:
    """The sizes of a linear map R^in -> R^out and how its weight is laid out.

    Attributes:
        in_features: Size of an input row.
        out_features: Size of an output row.
        transposed: True if the weight is stored as (in, out), as in transformers' ``Conv1D``.
        lookup: True for an embedding, a linear map of one-hot rows: its input is their indices.
    """

    in_features: int
    out_features: int
    transposed: bool = False
    lookup: bool = False


def linear_shape(module: nn.Module) -> LinearShape | None:
    """Return the shape of a module that computes what ``nn.Linear`` does, None for any other.

    These are ``nn.Linear``, transformers' ``Conv1D``, and any other module with ``in_features``,
    ``out_features`` and a 2-d ``weight``. They are recognised by their attributes, so no library is
    imported. A weight may be packed or not floating (quantised layers). If it is an ordinary one
    and the module has a forward of its own, the module is called once to see what it computes:
    routers and grouped layers are often subclasses of ``nn.Linear``.
    """
    weight = getattr(module, "weight", None)
    if not isinstance(weight, torch.Tensor) or is_lazy(weight):
        return None
    if weight.dim() != 2:
        return None
    if isinstance(module, nn.Embedding):
        return _embedding_shape(module)
    if is_conv1d(module):
        return LinearShape(weight.shape[0], weight.shape[1], transposed=True)
    sizes = getattr(module, "in_features", None), getattr(module, "out_features", None)
    match sizes:
        case (int(in_features), int(out_features)):
            return _as_computed(module, LinearShape(in_features, out_features))
    return None


def _embedding_shape(module: nn.Embedding) -> LinearShape | None:
    """Return the shape of an embedding that looks its rows up and may scale them, None else."""
    shape = LinearShape(module.num_embeddings, module.embedding_dim, transposed=True, lookup=True)
    if module.max_norm is not None:
        return None
    weight = module.weight
    if _has_forward_of(nn.Embedding, module) or not _can_be_tried(weight):
        return shape
    return shape if _computes(module, weight, shape) else None


def embed_scale(module: nn.Module) -> Tensor | float:
    """Return the factor by which an embedding multiplies its rows, as those of Gemma do."""
    scale: Tensor | float | None = getattr(module, "embed_scale", None)
    return 1.0 if scale is None else scale


def _as_computed(module: nn.Module, shape: LinearShape) -> LinearShape | None:
    """Return the shape, transposed if the module multiplies by W; None if it does neither."""
    weight = own_parameter(module, "weight")
    if _has_forward_of(nn.Linear, module):
        return shape
    if weight is None or not _can_be_tried(weight):
        return shape
    turned = LinearShape(shape.in_features, shape.out_features, transposed=True)
    sizes = (shape.out_features, shape.in_features)
    fitting = [shape] if weight.shape == sizes else []
    fitting += [turned] if weight.shape == sizes[::-1] else []
    if not fitting and weight.numel() != shape.in_features * shape.out_features:
        return shape  # packed
    return next((one for one in fitting if _computes(module, weight, one)), None)


def _can_be_tried(weight: Tensor) -> bool:
    """Whether the weight can be replaced by numbers. What a quantised layer does, is its own."""
    return is_dense(weight) and not weight.is_meta and weight.dtype in DENSE


def _has_forward_of(kind: type[nn.Module], module: nn.Module) -> bool:
    """Whether the forward is that of ``kind``, perhaps with accelerate's moves around it."""
    replaced = "forward" in module.__dict__ and not hasattr(module, "_hf_hook")
    return type(module).forward is kind.forward and not replaced


@torch.no_grad()
def _computes(module: nn.Module, weight: Tensor, shape: LinearShape) -> bool:
    """Whether W + D instead of W adds x D^T to the output of the module (x D if transposed)."""
    generator = torch.Generator().manual_seed(0)
    home = weight.device, weight.dtype
    x = torch.randn(2, shape.in_features, generator=generator).to(*home)
    if shape.lookup:
        x = torch.eye(2, shape.in_features, device=weight.device, dtype=weight.dtype)
    rows, columns = (torch.randn(size, generator=generator) for size in weight.shape)
    change = torch.outer(rows, columns).to(*home)
    training = [inner for inner in module.modules() if inner.training]
    given = x.argmax(1) if shape.lookup else x
    state = {name: buffer.clone() for name, buffer in module.named_buffers()}
    try:
        module.eval()  # without dropout
        with torch.random.fork_rng(devices=[]):
            outs = [
                functional_call(module, {**state, "weight": w}, (given,))
                for w in (change, torch.zeros_like(change))
            ]
        seen = (outs[0] - outs[1]).double()
    except Exception:  # a forward of any kind: this one does not take rows alone
        return False
    finally:
        for inner in training:
            inner.training = True
    right = x.double() @ (change if shape.transposed else change.T).double()
    right = right * embed_scale(module) if shape.lookup else right
    close = 5e-2 if weight.dtype.itemsize == 2 else 1e-3
    return seen.shape == right.shape and bool((seen - right).norm() <= close * right.norm())


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
    kind = type(tensor)
    if kind is not nn.Parameter and kind is not Tensor and not is_fake(tensor):
        return False
    return tensor.layout is torch.strided and not tensor.is_nested  # type: ignore[attr-defined]


def _is_transformers_conv1d(module: nn.Module) -> bool:
    kind = type(module)
    return kind.__name__ == "Conv1D" and kind.__module__ == "transformers.pytorch_utils"


def adapter_dtype(weight: torch.Tensor) -> torch.dtype:
    """Return the dtype of adapters over ``weight``: float64 over float64, else float32.

    For weights in half precision, and for weights that are not floating, float32 is used because
    half precision would lose small updates.
    """
    return torch.float64 if weight.dtype == torch.float64 else torch.float32
