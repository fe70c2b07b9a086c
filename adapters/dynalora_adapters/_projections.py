"""The two frozen random matrices that all VeRA layers of a model share."""

from __future__ import annotations

from collections.abc import Collection

import torch
from torch import Tensor, nn

from dynalora_adapters._bases import LinearShape

Home = tuple[torch.device, torch.dtype]


class Projections(nn.Module):
    """A and B of VeRA, large enough for every layer; a layer uses their first columns and rows.

    Every layer holds this one module as a child. So the matrices follow ``model.to(...)``, a deep
    copy and a pickle of the model as one pair, and are nobody's parameters. They are buffers that
    ``state_dict`` leaves out: it would list them once per layer, and the key gives them back.

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
        """Whether a layer of this rank over ``base`` can be cut out of both."""
        (rows, width), (height, columns) = self.A.shape, self.B.shape
        return rows == columns == rank and width >= base.in_features and height >= base.out_features

    def come_from(self, key: int) -> bool:
        """Whether ``key`` gives back these very numbers: not after rounding, or from elsewhere."""
        A, B = draw(self.A.shape, self.B.shape, key)
        return _equal(self.A, A) and _equal(self.B, B)

    def extra_repr(self) -> str:
        """Show the shapes."""
        return f"A={tuple(self.A.shape)}, B={tuple(self.B.shape)}"


def projection_shapes(
    rank: int, bases: Collection[LinearShape]
) -> tuple[tuple[int, int], tuple[int, int]]:
    """Return the shapes of A and B that cover all ``bases``."""
    width = max(base.in_features for base in bases)
    height = max(base.out_features for base in bases)
    return (rank, width), (height, rank)


def draw(shape_A: tuple[int, ...], shape_B: tuple[int, ...], key: int) -> tuple[Tensor, Tensor]:
    """Draw A, then B, on the CPU in float32 with Kaiming's uniform bound sqrt(6 / columns).

    With the same key and shapes peft draws the same numbers; the global generator is not used.
    """
    generator = torch.Generator("cpu").manual_seed(key)
    A = torch.empty(shape_A, dtype=torch.float32, device="cpu")
    B = torch.empty(shape_B, dtype=torch.float32, device="cpu")
    nn.init.kaiming_uniform_(A, generator=generator)
    nn.init.kaiming_uniform_(B, generator=generator)
    return A, B


def place(A: Tensor, B: Tensor, homes: Collection[Home]) -> list[Projections]:
    """Return projections for layers at these homes: the same pair wherever the home is the same."""
    pairs: dict[Home, Projections] = {}
    for home in homes:
        if home not in pairs:
            pairs[home] = Projections(A.to(*home), B.to(*home))
    return [pairs[home] for home in homes]


def _equal(one: Tensor, other: Tensor) -> bool:
    """Whether two tensors hold the same numbers, whatever their dtypes and devices."""
    return torch.equal(one.cpu().double(), other.cpu().double())
