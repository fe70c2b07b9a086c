"""What stands in for a gradient that a fused update has used, so that nobody reads nothing.

Without it the gradient would be None: clipping that begins in mid-run would have no effect, without
an error. The norm is kept, so that clipping which changes nothing (the Trainer always clips, to a
norm of inf if it is not asked to) works and returns the norm.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from dynalora_optim._base.torch_private_hooks import (
    FOREACH_DELETION,
    FOREACH_NORM,
    FOREACH_SCALING,
)
from dynalora_optim.update._backward import refusal

# What needs no value. Attributes, such as shape, do not either.
_HARMLESS = (
    *("size", "stride", "dim", "numel", "element_size", "untyped_storage"),
    *("is_floating_point", "is_complex", "requires_grad_"),
)
_NORMS = ("norm", "vector_norm", "linalg_vector_norm", FOREACH_NORM)
_SCALINGS = ("mul_", "__imul__", FOREACH_SCALING)
_DELETIONS = ("zero_", FOREACH_DELETION)


class SpentGradient(Tensor):
    """A gradient of which only the norm is left; it takes the memory of one number.

    Attributes:
        left: The norm.
        place: The address of the number.
        is_zeroed: Whether the loop has set it to zero, as ``zero_grad(set_to_none=False)`` does.
    """

    left: Tensor
    place: int
    is_zeroed = False

    @classmethod
    def of(cls, gradient: Tensor) -> SpentGradient:
        """Return the stand-in for ``gradient``."""
        values = gradient.coalesce().values() if gradient.is_sparse else gradient
        left = torch.linalg.vector_norm(values.detach())
        spent: SpentGradient = left.to(gradient.dtype).expand(gradient.shape).as_subclass(cls)
        spent.left, spent.place = left, spent.untyped_storage().data_ptr()
        return spent

    def is_whole(self) -> bool:
        """Return whether the loop has put nothing in the place of the gradient's values."""
        return not self.is_zeroed and self.untyped_storage().data_ptr() == self.place

    def __repr__(self) -> str:  # type: ignore[override]
        return f"SpentGradient(norm={self.left.item()})"

    @classmethod
    def __torch_function__(
        cls,
        func: Callable[..., Any],
        types: Iterable[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        name, kwargs = getattr(func, "__name__", ""), kwargs or {}
        if name in _DELETIONS:
            for spent in args[0] if isinstance(args[0], list) else args[:1]:
                spent.is_zeroed = True
            return args[0]
        if name in _SCALINGS and _is_one(args[1]):
            return args[0]
        if name in _NORMS and all(map(_is_euclidean, [*args[1:], *kwargs.values()])):
            return [s.left for s in args[0]] if isinstance(args[0], list) else args[0].left
        if name in _HARMLESS or name == "__get__":
            found = super().__torch_function__(func, types, args, kwargs)  # type: ignore[no-untyped-call]
            if isinstance(found, SpentGradient):  # p.grad.data
                found.__dict__ = args[0].__dict__
            return found
        what = "changed" if name.endswith("_") else "read"
        raise RuntimeError(
            refusal(
                f"gradients were {what} between backward() and step(), as clip_grad_norm_ and "
                f"GradScaler do (here: {name})"
            )
        )


def is_alive(gradient: Tensor) -> bool:
    """Return whether a gradient is not used already."""
    return not isinstance(gradient, SpentGradient)


def _is_one(factor: Any) -> bool:
    return bool((torch.as_tensor(factor) == 1).all())


def _is_euclidean(option: Any) -> bool:
    return option is None or option is False or option in (2, "fro")
