"""VeRA (arXiv:2310.11454): layers share two frozen random matrices, and each trains two vectors."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812

from dynalora_adapters._bases import LinearShape, adapter_dtype, linear_shape
from dynalora_adapters._checks import (
    boolean,
    generator_seed,
    nonzero_float32,
    positive_int,
    probability_below_one,
)
from dynalora_adapters._config import AdapterConfig
from dynalora_adapters._layers import AdapterLinear
from dynalora_adapters._projections import Home, Projections, draw, place, projection_shapes


class VeRALinear(AdapterLinear):
    """A linear layer with the weight W + diag(b) B diag(d) A. Only b and d train (VeRA, eq. 2).

    b starts at zero, so until b is trained the output is that of the base module, bit for bit. b
    and d are on the device of the base weight, in float32 (in float64 if the base weight is).

    Args:
        base_layer: The linear layer to adapt.
        rank: Rows of A and columns of B.
        d_initial: Initial value of the elements of d.
        key: Seed of A and B.
        dropout: Probability of dropping an element of the adapter's input in training.
        projections: A and B, shared with other layers; None to draw a new pair from ``key``.

    Attributes:
        vera_lambda_b: (out,), zero.
        vera_lambda_d: (rank,), ``d_initial``.
        projections: A and B, frozen. The layer uses the views A[:, :in] and B[:out].

    Raises:
        TypeError: If ``base_layer`` is not a linear layer, or a number has the wrong type.
        ValueError: If a number is out of range, or ``projections`` do not fit the layer.
    """

    peft_names: ClassVar[dict[str, str]] = {
        "vera_lambda_b": "vera_lambda_b",
        "vera_lambda_d": "vera_lambda_d",
    }

    def __init__(
        self,
        base_layer: nn.Module,
        *,
        rank: int,
        d_initial: float = 0.1,
        key: int = 0,
        dropout: float = 0.0,
        projections: Projections | None = None,
    ) -> None:
        super().__init__(base_layer, dropout=dropout)
        positive_int("rank", rank)
        nonzero_float32("d_initial", d_initial)
        generator_seed("key", key)
        self.rank = rank
        self.key = key
        home = _home(base_layer)
        if projections is None:
            projections = Projections(*draw(*projection_shapes(rank, [self.shape]), key)).to(*home)
        elif not projections.fits(rank, self.shape):
            raise ValueError(
                f"projections ({projections.extra_repr()}) do not fit a layer of rank={rank} with "
                f"{self.in_features} inputs and {self.out_features} outputs; pass a pair that was "
                f"drawn for this rank and is large enough."
            )
        self.projections = projections
        self.vera_lambda_b = nn.Parameter(torch.zeros(self.out_features).to(*home))
        self.vera_lambda_d = nn.Parameter(torch.full((rank,), float(d_initial)).to(*home))

    def delta(self, x: Tensor) -> Tensor:
        """Return b * B (d * A dropout(x)), (..., out), computed in the same order as in peft."""
        b, d = self.adapter_param("vera_lambda_b"), self.adapter_param("vera_lambda_d")
        A, B = self._cut(d)
        return b * F.linear(d * F.linear(self.dropout(x.to(d.dtype)), A), B)

    @torch.no_grad()
    def delta_weight(self) -> Tensor:
        """Return diag(b) B diag(d) A, (out, in)."""
        A, B = self._cut(self.vera_lambda_d)
        return (self.vera_lambda_b[:, None] * B) @ (self.vera_lambda_d[:, None] * A)

    def _cut(self, like: Tensor) -> tuple[Tensor, Tensor]:
        """Return A, (rank, in), and B, (out, rank); as views, unless device or dtype differ."""
        A = self.projections.A[:, : self.in_features]
        B = self.projections.B[: self.out_features]
        return A.to(like.device, like.dtype), B.to(like.device, like.dtype)

    def extra_repr(self) -> str:
        """Return the options, which ``print(layer)`` shows beside the base module."""
        return f"rank={self.rank}, key={self.key}, active={self.active}, merged={self.merged}"


@dataclass(frozen=True, kw_only=True)
class VeRAConfig(AdapterConfig):
    """Options of VeRA (arXiv:2310.11454); keyword-only.

    All layers share two frozen random matrices. They are drawn from ``key``, as in peft, and exist
    once per device. A layer trains only rank + out numbers, so use a larger rank than for LoRA, and
    a larger learning rate.

    Example:
        >>> VeRAConfig(rank=256, targets=["query", "value"], trainable=["classifier"])

    Args:
        rank: Rank r of the change that is added to a weight.
        d_initial: Initial scale of each of the r rows of A. It must not be 0, because then neither
            d nor b would ever change.
        key: Seed of the shared matrices.
        save_projection: Whether ``save_adapter`` writes the shared matrices too. Without them the
            file is smaller, and loading draws them again from ``key``. Matrices that cannot be
            drawn from ``key`` (loaded from another file, or rounded by a cast) are always written.
        dropout: Probability of dropping an element of the adapter's input in training, in [0, 1).

    Raises:
        TypeError: If an option has the wrong type.
        ValueError: If an option is out of range, or a regular expression does not compile.
    """

    layer_class = VeRALinear

    rank: int
    d_initial: float = 0.1
    key: int = 0
    save_projection: bool = True
    dropout: float = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        positive_int("rank", self.rank)
        nonzero_float32("d_initial", self.d_initial)
        generator_seed("key", self.key)
        boolean("save_projection", self.save_projection)
        probability_below_one("dropout", self.dropout)

    def layer_options(self, name: str) -> dict[str, object]:
        """Return rank and key, which are the same for all layers."""
        return {"rank": self.rank, "key": self.key}

    def param_shapes(self, name: str, base: LinearShape) -> dict[str, tuple[int, ...]]:
        """Return the shapes (out,) of b and (rank,) of d."""
        return {"vera_lambda_b": (base.out_features,), "vera_lambda_d": (self.rank,)}

    def build(self, bases: Mapping[str, nn.Module]) -> dict[str, AdapterLinear]:
        """Make a ``VeRALinear`` over each base. All share the same projections."""
        shapes = [shape for base in bases.values() if (shape := linear_shape(base)) is not None]
        A, B = draw(*projection_shapes(self.rank, shapes), self.key)
        pairs = place(A, B, [_home(base) for base in bases.values()])
        return {
            name: VeRALinear(
                base,
                rank=self.rank,
                d_initial=self.d_initial,
                key=self.key,
                dropout=self.dropout,
                projections=pair,
            )
            for (name, base), pair in zip(bases.items(), pairs, strict=True)
        }


def _home(base: nn.Module) -> Home:
    """Return the device and the dtype of an adapter over ``base``."""
    weight = base.weight
    assert isinstance(weight, Tensor)
    return weight.device, adapter_dtype(weight)
