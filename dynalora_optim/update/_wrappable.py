"""Which optimizers can be wrapped."""

from __future__ import annotations

import torch
from torch.optim import Optimizer

from dynalora_optim._base.claims import is_owner


def check_wrappable(optimizer: object) -> None:
    """Raise unless ``optimizer`` can be wrapped.

    Raises:
        TypeError: It is not a torch optimizer.
        ValueError: It wraps another optimizer, or has one state for all parameters together.
    """
    if not isinstance(optimizer, Optimizer):
        raise TypeError(
            f"optimizer={optimizer!r} is not a torch.optim.Optimizer; pass an instance such as "
            "torch.optim.AdamW(model.parameters(), lr=4e-4)."
        )
    kind = type(optimizer).__name__
    if is_owner(optimizer):
        raise ValueError(
            f"optimizer={kind} already wraps another optimizer; pass that one instead, or use "
            "this one as it is."
        )
    if isinstance(optimizer, torch.optim.LBFGS):
        raise ValueError(
            "optimizer=LBFGS keeps one state over all parameters together, so modules cannot be "
            "active one by one; pass a per-parameter optimizer such as AdamW."
        )
