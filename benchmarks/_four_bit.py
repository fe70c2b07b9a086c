"""Linear layers of bitsandbytes in 4 bits, without their values: on the meta device.

A weight takes half a byte. Each 64 weights share a scale of one byte, and each 256 scales a scale
of their own of four bytes ("double quantisation"). Two tables, of 16 and of 256 values, and an
offset belong to each layer. A test compares this with a real layer.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

BLOCK, BLOCK_OF_SCALES = 64, 256


def four_bit(model: nn.Module, *, but: str) -> nn.Module:
    """Replace all linear layers, except the one with the name ``but``, by layers in NF4."""
    for parent_name, parent in [*model.named_modules()]:
        for name, child in parent.named_children():
            full = f"{parent_name}.{name}".lstrip(".")
            if type(child) is nn.Linear and full != but:
                setattr(parent, name, _layer(child))
    return model


def _layer(linear: nn.Linear) -> Any:
    import bitsandbytes

    dtype = linear.weight.dtype
    layer: Any = bitsandbytes.nn.Linear4bit(
        linear.in_features, linear.out_features, bias=False, compute_dtype=dtype, device="meta"
    )
    options = {"blocksize": BLOCK, "compress_statistics": True, "quant_type": "nf4"}
    packed = _empty(-(-linear.weight.numel() // 2), 1, dtype=torch.uint8)
    layer.weight = bitsandbytes.nn.Params4bit(
        packed,
        requires_grad=False,
        quant_state=_scales(linear.weight.shape, dtype),
        bnb_quantized=True,
        module=layer,
        **options,
    )
    return layer


def _scales(shape: torch.Size, dtype: torch.dtype) -> Any:
    from bitsandbytes.functional import QuantState

    blocks = math.ceil(shape.numel() / BLOCK)
    of_scales = QuantState(
        absmax=_empty(math.ceil(blocks / BLOCK_OF_SCALES)),
        code=_empty(256),
        blocksize=BLOCK_OF_SCALES,
        dtype=torch.float32,
    )
    return QuantState(
        absmax=_empty(blocks, dtype=torch.uint8),
        shape=shape,
        code=_empty(16),
        blocksize=BLOCK,
        quant_type="nf4",
        dtype=dtype,
        offset=_empty(),
        state2=of_scales,
    )


def _empty(*sizes: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.empty(sizes, dtype=dtype, device="meta")
