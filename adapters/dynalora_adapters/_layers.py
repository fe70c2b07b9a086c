"""The layers: a frozen base module and a small trainable delta beside it."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812

from dynalora_adapters._bases import adapter_dtype, frozen_weight, is_dense, linear_shape
from dynalora_adapters._checks import positive_int, positive_number, probability_below_one
from dynalora_adapters._gate import gated, needs_gate, new_gate, set_gate
from dynalora_adapters._lora_function import lora_linear
from dynalora_adapters._torch_private import runs_eagerly


class AdapterLinear(nn.Module, ABC):
    """What every kind of adapter shares: it holds its base, and can be active, idle or merged.

    A kind adds its parameters, names them in ``peft_names``, and defines ``delta`` and
    ``delta_weight``. An optimizer recognises an adapter by ``adapter_params`` and by ``active``.

    Attributes:
        base_layer: The adapted module, unchanged.
        dropout: Applied to the adapter's input, never to the base's.
        active: False makes ``forward`` use detached adapter parameters: the output is the same, and
            no gradient reaches them. ``requires_grad`` stays True, so that neither an optimizer
            nor a distributed wrapper built earlier loses sight of them.
        gated: How compiled code treats ``active``. True: it reads it anew in every backward pass,
            and an idle adapter's gradient is zero. False: ``active`` is part of the code, which
            torch.compile makes anew for each value, and an idle adapter costs nothing.
        merged: True while the base weight holds the delta; set by ``merge`` and ``unmerge``.
        peft_names: The adapter's parameters and what peft calls them in its files.
    """

    peft_names: ClassVar[dict[str, str]]

    def __init__(self, base_layer: nn.Module, *, dropout: float = 0.0) -> None:
        super().__init__()
        shape = linear_shape(base_layer)
        if shape is None:
            raise TypeError(
                f"base_layer must be a linear layer with a 2-d weight, got "
                f"{type(base_layer).__name__}; pass nn.Linear, Conv1D or a module with "
                f"in_features, out_features and weight."
            )
        probability_below_one("dropout", dropout)
        self.shape = shape
        self.base_layer = base_layer
        self.dropout = nn.Dropout(dropout) if dropout else nn.Identity()
        self.gated = True
        self._active = True
        self._gate = new_gate()
        self.merged = False
        self.train(base_layer.training)

    @abstractmethod
    def delta(self, x: Tensor) -> Tensor:
        """Map the adapter's input (..., in) to what it adds to the output, (..., out)."""

    @abstractmethod
    def delta_weight(self) -> Tensor:
        """Return what the adapter adds to the weight, (out, in), in its own dtype."""

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Return the base's output plus the delta's.

        Args:
            x: Input, (..., in).
            *args: Passed on to the base.
            **kwargs: Passed on to the base.

        Returns:
            (..., out), in the dtype of the base's output.
        """
        result: Tensor = self.base_layer(x, *args, **kwargs)
        if self.merged:
            return result
        return (result + self.delta(x)).to(result.dtype)

    def adapter_params(self) -> list[str]:
        """Return the names of the adapter's own parameters."""
        return list(self.peft_names)

    def adapter_param(self, name: str) -> Tensor:
        """Return one of the adapter's parameters as ``forward`` uses it: detached while idle."""
        param: Tensor = getattr(self, name)
        if self.gated and needs_gate():
            return gated(param, self._gate)
        return param if self._active else param.detach()

    @property
    def active(self) -> bool:
        """Whether gradients reach the adapter's parameters."""
        return self._active

    @active.setter
    def active(self, active: bool) -> None:
        self._active = active
        set_gate(self._gate, active)

    @property
    def weight(self) -> Tensor:
        """The base's weight. It lacks the delta unless ``merged``."""
        weight: Tensor = self.base_layer.weight  # type: ignore[assignment]
        return weight

    @property
    def bias(self) -> Tensor | None:
        """The base's bias."""
        bias: Tensor | None = getattr(self.base_layer, "bias", None)
        return bias

    @property
    def in_features(self) -> int:
        """Size of an input row."""
        return self.shape.in_features

    @property
    def out_features(self) -> int:
        """Size of an output row."""
        return self.shape.out_features


class LoRALinear(AdapterLinear):
    """A linear layer with the weight W + scaling B A, W frozen (LoRA, arXiv:2106.09685, eq. 3).

    B starts at zero, so the output is that of the base, bit for bit, until B is trained. A and B
    lie on the base weight's device, in float32 (float64 over a float64 base).

    Args:
        base_layer: The linear layer to adapt.
        rank: Rows of A and columns of B.
        alpha: Numerator of the scaling.
        dropout: Probability of dropping an element of the adapter's input in training.
        rslora: Scale by alpha / sqrt(rank) (rsLoRA, arXiv:2312.03732) instead of alpha / rank.

    Attributes:
        lora_A: (rank, in), drawn uniformly with Kaiming's bound for a = sqrt(5).
        lora_B: (out, rank), zero.
        scaling: What B A is multiplied by.

    Raises:
        TypeError: If ``base_layer`` is not a linear layer, or a number has the wrong type.
        ValueError: If ``rank``, ``alpha`` or ``dropout`` is out of range.
    """

    peft_names: ClassVar[dict[str, str]] = {"lora_A": "lora_A.weight", "lora_B": "lora_B.weight"}

    def __init__(
        self,
        base_layer: nn.Module,
        *,
        rank: int,
        alpha: float,
        dropout: float = 0.0,
        rslora: bool = False,
    ) -> None:
        super().__init__(base_layer, dropout=dropout)
        positive_int("rank", rank)
        positive_number("alpha", alpha)
        self.rank = rank
        self.alpha = alpha
        self.scaling = lora_scaling(rank, alpha, rslora=rslora)
        A, B = _draw(self.in_features, self.out_features, rank)
        weight = self.weight
        self.lora_A = nn.Parameter(A.to(weight.device, adapter_dtype(weight)))
        self.lora_B = nn.Parameter(B.to(weight.device, adapter_dtype(weight)))

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Return the base's output plus the delta's, in one step of autograd where that serves.

        Args:
            x: Input, (..., in).
            *args: Passed on to the base.
            **kwargs: Passed on to the base.

        Returns:
            (..., out), in the dtype of the base's output.
        """
        A, B = self.adapter_param("lora_A"), self.adapter_param("lora_B")
        weight = None if args or kwargs or self.merged else self._weight_for_one_step(x, A, B)
        if weight is None:
            return super().forward(x, *args, **kwargs)
        return lora_linear(self.base_layer, weight, x, A, B, scaling=self.scaling)

    def _weight_for_one_step(self, x: Tensor, A: Tensor, B: Tensor) -> Tensor | None:
        """Return the base's weight if ``lora_linear`` may stand in for base plus ``delta``."""
        serves = (
            runs_eagerly()
            and getattr(self.delta, "__func__", None) is LoRALinear.delta  # not overridden
            and _keeps_all(self.dropout)
            and is_dense(x)
            and is_dense(A)
            and is_dense(B)
            and (A.requires_grad or not B.requires_grad)
        )
        weight = frozen_weight(self.base_layer) if serves else None
        if weight is None or A.dtype not in (weight.dtype, adapter_dtype(weight)):
            return None  # the sum is to be rounded to the base's dtype, not to the adapter's
        return weight

    def delta(self, x: Tensor) -> Tensor:
        """Map (..., in) to scaling B A dropout(x), (..., out), in the order peft computes it."""
        A, B = self.adapter_param("lora_A"), self.adapter_param("lora_B")
        return F.linear(F.linear(self.dropout(x.to(A.dtype)), A), B) * self.scaling

    @torch.no_grad()
    def delta_weight(self) -> Tensor:
        """Return scaling B A, (out, in)."""
        return (self.lora_B @ self.lora_A) * self.scaling

    def extra_repr(self) -> str:
        """Show the options beside the base."""
        return f"rank={self.rank}, alpha={self.alpha}, active={self.active}, merged={self.merged}"


def _keeps_all(dropout: nn.Module) -> bool:
    return type(dropout) is nn.Identity or (type(dropout) is nn.Dropout and not dropout.training)


def lora_scaling(rank: int, alpha: float, *, rslora: bool) -> float:
    """Return alpha / rank, or alpha / sqrt(rank) for rsLoRA (arXiv:2312.03732)."""
    return alpha / (math.sqrt(rank) if rslora else rank)


def _draw(in_features: int, out_features: int, rank: int) -> tuple[Tensor, Tensor]:
    """Draw A and a zero B, consuming the generator as peft does.

    peft builds two ``nn.Linear``, each of which initialises itself, and then draws A anew: with
    the same seed and order of modules both libraries start from the same weights.
    """
    down = nn.Linear(in_features, rank, bias=False)
    up = nn.Linear(rank, out_features, bias=False)
    nn.init.kaiming_uniform_(down.weight, a=math.sqrt(5))
    nn.init.zeros_(up.weight)
    return down.weight.detach(), up.weight.detach()
