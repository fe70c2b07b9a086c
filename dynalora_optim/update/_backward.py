"""Options of the backward pass."""

from __future__ import annotations

from dataclasses import dataclass, fields


@dataclass(frozen=True)
class Backward:
    """How the backward pass is run.

    Attributes:
        fused: Update each parameter within the backward pass, and free its gradient at once. Not
            for loops that clip, scale or accumulate gradients, that delete gradients or set rates
            and other options between ``backward()`` and ``step()``, or that do not call
            ``zero_grad()`` after it: these get an error, in the first steps, of which one is not
            fused, as well as later.
        checkpoint_idle: Recompute the blocks that hold no active module in the backward pass,
            instead of keeping their activations. A `Budget` itself decides what to recompute.

    Raises:
        TypeError: An option is not a bool.
    """

    fused: bool = False
    checkpoint_idle: bool = False

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            if not isinstance(value, bool):
                raise TypeError(f"Backward({field.name}={value!r}): pass True or False.")


def as_backward(backward: object) -> Backward:
    """Return ``backward`` itself, after a check of its type.

    Raises:
        TypeError: ``backward`` is not a `Backward`.
    """
    if not isinstance(backward, Backward):
        raise TypeError(
            f"backward={backward!r} is not a Backward; pass one such as Backward(fused=True)."
        )
    return backward


def refusal(why: str) -> str:
    """Return the error message for a loop in which updates cannot be fused, with the reason."""
    return (
        f"Backward(fused=True) updates each parameter within the backward pass, but {why}. "
        "Change that, or leave out fused=True."
    )
