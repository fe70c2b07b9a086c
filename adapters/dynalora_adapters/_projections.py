"""The two frozen random matrices that all VeRA layers of a model share."""

from __future__ import annotations

from collections.abc import Collection

import torch
from torch import Tensor, nn

from dynalora_adapters._bases import LinearShape

Home = tuple[torch.device, torch.dtype]


class Projections(nn.Module):
    """A and B of VeRA, large enough for every layer. A layer uses their first columns and rows.

    Every layer has this same module as a child. So ``model.to(...)`` moves the matrices, and a deep
    copy or a pickle of the model contains them once. They are buffers, not parameters.
    ``state_dict`` leaves them out, because it would list them once per layer, and they can be drawn
    again from the key.

    Attributes:
        A: (rank, widest input).
        B: (widest output, rank).
    """

    A: Tensor
    B: Tensor

    def __init__(self, A: Tensor, B: Tensor) -> None:
        super().__init__()
        self.register_buffer("A", A, persistent=False)
        self.register_buffer("B", B, persistent=False)

    def fits(self, rank: int, base: LinearShape) -> bool:
        """Whether both are large enough for a layer of this rank over ``base``."""
        (rows, width), (height, columns) = self.A.shape, self.B.shape
        return rows == columns == rank and width >= base.in_features and height >= base.out_features

    def come_from(self, key: int) -> bool:
        """Whether drawing from ``key`` gives exactly these numbers. Rounded ones differ."""
        A, B = draw(self.A.shape, self.B.shape, key)
        return _equal(self.A, A) and _equal(self.B, B)

    def extra_repr(self) -> str:
        """Return the shapes, which ``print(model)`` shows."""
        return f"A={tuple(self.A.shape)}, B={tuple(self.B.shape)}"


def projection_shapes(
    rank: int, bases: Collection[LinearShape]
) -> tuple[tuple[int, int], tuple[int, int]]:
    """Return the shapes of A and B that are large enough for all ``bases``."""
    width = max(base.in_features for base in bases)
    height = max(base.out_features for base in bases)
    return (rank, width), (height, rank)


def draw(shape_A: tuple[int, ...], shape_B: tuple[int, ...], key: int) -> tuple[Tensor, Tensor]:
    """Draw A, then B, on the CPU in float32 with Kaiming's uniform bound sqrt(6 / columns).

    With the same key and shapes, peft draws the same numbers. The global generator is not used.
    """
    generator = torch.Generator("cpu").manual_seed(key)
    A = torch.empty(shape_A, dtype=torch.float32, device="cpu")
    B = torch.empty(shape_B, dtype=torch.float32, device="cpu")
    nn.init.kaiming_uniform_(A, generator=generator)
    nn.init.kaiming_uniform_(B, generator=generator)
    return A, B


def place(A: Tensor, B: Tensor, homes: Collection[Home]) -> list[Projections]:
    """Return projections for layers at these homes: one pair per device and dtype."""
    pairs: dict[Home, Projections] = {}
    for home in homes:
        if home not in pairs:
            pairs[home] = Projections(A.to(*home), B.to(*home))
    return [pairs[home] for home in homes]


def _equal(one: Tensor, other: Tensor) -> bool:
    """Whether two tensors have equal numbers; their dtypes and devices may differ."""
    return torch.equal(one.cpu().double(), other.cpu().double())
