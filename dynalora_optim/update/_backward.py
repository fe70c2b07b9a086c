"""How the backward pass is run."""

from __future__ import annotations

from dataclasses import dataclass, fields


@dataclass(frozen=True)
class Backward:
    """How the backward pass is run.

    Attributes:
        fused: Update each parameter within the backward pass and free its gradient at once. Not for
            loops that clip, scale or accumulate gradients; those are found out in the first step,
            which is an ordinary one.
        checkpoint_idle: Recompute the blocks that hold no active module, rather than keep what
            their gradients need. A `Budget` itself decides what to recompute.

    Raises:
        TypeError: Not a bool.
    """

    fused: bool = False
    checkpoint_idle: bool = False

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            if not isinstance(value, bool):
                raise TypeError(f"Backward({field.name}={value!r}): pass True or False.")


def as_backward(backward: object) -> Backward:
    """Return ``backward`` itself.

    Raises:
        TypeError: It is no `Backward`.
    """
    if not isinstance(backward, Backward):
        raise TypeError(
            f"backward={backward!r} is not a Backward; pass one such as Backward(fused=True)."
        )
    return backward
