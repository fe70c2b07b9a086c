"""Quantised base layers: what they need so that training through them stays right.

They are recognised by their attributes, so no library is imported.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

_REPACKS = "support_avx512bf16_for_cpu"  # an attribute of bitsandbytes' Linear4bit


def is_packed(weight: Tensor) -> bool:
    """Whether a weight only looks like a floating tensor, as those of torchao do."""
    if type(weight) in (Tensor, nn.Parameter) or hasattr(weight, "full_tensor"):  # a DTensor
        return False
    return type(weight).__torch_dispatch__ is not Tensor.__torch_dispatch__


def is_quantised(weight: Tensor) -> bool:
    """Whether a weight is packed, or consists of integers."""
    return is_packed(weight) or not weight.is_floating_point()


def check_not_repacked(model: nn.Module) -> None:
    """Raise if a layer has repacked its weight for evaluation, so that it has no gradient."""
    for name, module in model.named_modules():
        state: Any = getattr(getattr(module, "weight", None), "quant_state", None)
        if getattr(state, "packing_format_for_cpu", False):
            raise ValueError(
                f"{name} has repacked its 4-bit weight for evaluation on this CPU, and does not "
                "pass on gradients any more; load the model again, and adapt it before you "
                "evaluate it."
            )


def forbid_repacking(model: nn.Module) -> dict[str, bool]:
    """Keep bitsandbytes from repacking 4-bit weights; return the former flags by module name.

    On a CPU with AVX512-BF16 a 4-bit layer repacks its weight at its first forward in evaluation.
    After that it has no gradient, also in training, and mostly without an error.
    """
    flags = {n: getattr(m, _REPACKS) for n, m in model.named_modules() if hasattr(m, _REPACKS)}
    restore_repacking(model, dict.fromkeys(flags, False))
    return flags


def restore_repacking(model: nn.Module, flags: Mapping[str, bool]) -> None:
    """Set the flags that `forbid_repacking` has returned."""
    modules = dict(model.named_modules())
    for name, flag in flags.items():
        if name in modules:
            setattr(modules[name], _REPACKS, flag)
