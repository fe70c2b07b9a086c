"""The layers: each has a frozen base module and adds a small trainable delta."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import replace
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812

from dynalora_adapters._bases import adapter_dtype, is_dense, is_plain_and_frozen, linear_shape
from dynalora_adapters._checks import positive_int, positive_number, probability_below_one
from dynalora_adapters._gate import gated, needs_gate, new_gate, set_gate
from dynalora_adapters._lora_function import add_lora, lora_linear, product_dtype
from dynalora_adapters._quantised import is_quantised
from dynalora_adapters._state_names import names_in_base, with_base, without_base
from dynalora_adapters._torch_private import runs_eagerly
from dynalora_adapters._way import Way


class AdapterLinear(nn.Module, ABC):
    """What all kinds of adapter share: a base module, and the flags ``active`` and ``merged``.

    A subclass adds its parameters, names them in ``peft_names``, and defines ``delta`` and
    ``delta_weight``. An optimizer recognises an adapter by ``adapter_params`` and ``active``.

    Attributes:
        base_layer: The adapted module, unchanged.
        dropout: Applied to the adapter's input, never to the base's input.
        active: If False, ``forward`` uses detached adapter parameters: same output, no gradient.
            ``requires_grad`` stays True: optimizers and distributed wrappers read it when built.
        gated: How compiled code treats ``active``. True: it reads the value in every backward pass,
            and the gradient of an inactive adapter is zero. False: the value is part of the
            compiled code, so torch.compile compiles once for each value, and an inactive adapter
            costs no time.
        merged: True while the base weight contains the delta; set by ``merge`` and ``unmerge``.
        peft_names: The names of the adapter's parameters, and their names in peft's files.
    """

    peft_names: ClassVar[dict[str, str]]
    lookup: ClassVar[bool] = False  # whether the base is an embedding

    def __init__(self, base_layer: nn.Module, *, dropout: float = 0.0) -> None:
        super().__init__()
        shape = linear_shape(base_layer)
        if shape is None or shape.lookup is not self.lookup:
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
        self.register_state_dict_post_hook(without_base)  # type: ignore[no-untyped-call]
        self.register_load_state_dict_pre_hook(with_base)  # type: ignore[no-untyped-call]
        self.train(base_layer.training)

    def _fqn_modifiers(self) -> dict[str, str]:
        return names_in_base(self, self.base_layer)

    def register_parameter(self, name: str, param: nn.Parameter | None) -> None:
        """Register a parameter. A new weight or bias goes to the base: so weights are tied."""
        if name not in ("weight", "bias"):
            super().register_parameter(name, param)
            return
        old = getattr(self, name)
        if param is not None and old is not None and param.shape != old.shape:
            raise ValueError(
                f"{name} of an adapted layer must keep its shape {tuple(old.shape)}, got "
                f"{tuple(param.shape)}; call remove(model), resize the embeddings, then adapt "
                f"the model again."
            )
        self.base_layer.register_parameter(name, param)

    @abstractmethod
    def delta(self, x: Tensor) -> Tensor:
        """Return what the adapter adds to the output, (..., out), for its input x, (..., in)."""

    @abstractmethod
    def delta_weight(self) -> Tensor:
        """Return what the adapter adds to the weight, (out, in), in the adapter's dtype."""

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Return the output of the base module plus the delta.

        Args:
            x: Input, (..., in).
            *args: Passed on to the base module.
            **kwargs: Passed on to the base module.

        Returns:
            (..., out), in the dtype of the base's output.
        """
        result: Tensor = self.base_layer(x, *args, **kwargs)
        if self.merged:
            return result
        return (result + self.delta(x)).to(result.dtype)

    def follow_base(self) -> None:
        """Move the adapter to the device of its base module, which may have moved without it."""
        if self.weight.is_meta:
            return
        own = nn.ParameterList(getattr(self, name) for name in self.adapter_params())
        others = [child for child in self.children() if child is not self.base_layer]
        for part in (own, *others):
            part.to(self.weight.device)

    def adapter_params(self) -> list[str]:
        """Return the names of the adapter's parameters, without those of the base module."""
        return list(self.peft_names)

    def adapter_param(self, name: str) -> Tensor:
        """Return a parameter of the adapter as ``forward`` uses it: detached while inactive."""
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
        """The weight of the base module. It contains the delta only while ``merged``."""
        weight: Tensor = self.base_layer.weight  # type: ignore[assignment]
        return weight

    @property
    def bias(self) -> Tensor | None:
        """The bias of the base module."""
        bias: Tensor | None = getattr(self.base_layer, "bias", None)
        return bias

    @property
    def in_features(self) -> int:
        """Size of an input row."""
        return self.shape.in_features

    @property
    def out_features(self) -> int:
        """Size of an output row. transformers sets it when it has resized a tied head."""
        return self.shape.out_features

    @out_features.setter
    def out_features(self, size: int) -> None:
        if size != self.out_features:
            self.resize_outputs(size)
            self.shape = replace(self.shape, out_features=size)
        if hasattr(self.base_layer, "out_features"):
            setattr(self.base_layer, "out_features", size)  # noqa: B010

    def resize_outputs(self, size: int) -> None:
        """Give the adapter ``size`` outputs. A kind of adapter that can do this overrides it."""
        raise ValueError(
            f"out_features of a {type(self).__name__} cannot change from {self.out_features} to "
            f"{size}; call remove(model), resize the embeddings, then adapt the model again."
        )


# The ways of a LoRALinear: ordinary operations; base and delta as one node of autograd; the delta
# as one node, beside a base that differentiates itself.
_ORDINARY, _TOGETHER, _BESIDE = range(3)


class LoRALinear(AdapterLinear):
    """A linear layer with the weight W + scaling B A, W frozen (LoRA, arXiv:2106.09685, eq. 3).

    B starts at zero, so until B is trained the output is that of the base module, bit for bit. A
    and B are on the device of the base weight, in float32 (in float64 if the base weight is).

    Args:
        base_layer: The linear layer to adapt.
        rank: Rows of A and columns of B.
        alpha: Numerator of the scaling.
        dropout: Probability of dropping an element of the adapter's input in training.
        rslora: Scale by alpha / sqrt(rank) (rsLoRA, arXiv:2312.03732) instead of alpha / rank.

    Attributes:
        lora_A: (rank, in), drawn uniformly with Kaiming's bound for a = sqrt(5).
        lora_B: (out, rank), zero.
        scaling: The factor of B A.

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
        A, B = self.draw()
        weight = self.weight
        self.lora_A = nn.Parameter(A.to(weight.device, adapter_dtype(weight)))
        self.lora_B = nn.Parameter(B.to(weight.device, adapter_dtype(weight)))
        self._way: Way[int] = Way()

    def draw(self) -> tuple[Tensor, Tensor]:
        """Draw A, and return a B of zeros. The generator is used exactly as peft uses it.

        peft builds two ``nn.Linear``, which initialise themselves, and then draws A again. So with
        the same seed and the same order of modules, both start from the same weights.
        """
        down = nn.Linear(self.in_features, self.rank, bias=False)
        up = nn.Linear(self.rank, self.out_features, bias=False)
        nn.init.kaiming_uniform_(down.weight, a=math.sqrt(5))
        nn.init.zeros_(up.weight)
        return down.weight.detach(), up.weight.detach()

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Return the output of the base module plus the delta, as one autograd node if possible."""
        if args or kwargs or self.merged or torch.compiler.is_compiling():
            return super().forward(x, *args, **kwargs)
        base, A, B = self.base_layer, self.lora_A, self.lora_B
        weight: Tensor = base.weight  # type: ignore[assignment]
        way = self._way.once(self._way_for, x, A, B, weight)
        if way == _ORDINARY:
            return super().forward(x)
        if not self._active:
            A, B = A.detach(), B.detach()  # type: ignore[assignment]
        if way == _BESIDE:
            return add_lora(base(x), x, A, B, scaling=self.scaling)
        W = weight.t() if self.shape.transposed else weight
        # Its forward alone: such a base has no hooks.
        return lora_linear(base.forward, W, x, A, B, scaling=self.scaling)

    def _way_for(self, x: Tensor, A: Tensor, B: Tensor, weight: Tensor) -> int:
        """Return how to compute base plus ``delta``."""
        if not (
            runs_eagerly()
            and getattr(self.delta, "__func__", None) is LoRALinear.delta  # not overridden
            and _keeps_all(self.dropout)
            and (is_dense(x) and is_dense(A) and is_dense(B))
            and (A.requires_grad or not B.requires_grad)
            # The sum must have the base's dtype, not the adapter's.
            and A.dtype in (weight.dtype, adapter_dtype(weight))
        ):
            return _ORDINARY
        if is_plain_and_frozen(self.base_layer):
            return _TOGETHER
        return _BESIDE if is_quantised(weight) else _ORDINARY

    def delta(self, x: Tensor) -> Tensor:
        """Return scaling B A dropout(x), (..., out), computed in the same order as in peft."""
        A, B = self.adapter_param("lora_A"), self.adapter_param("lora_B")
        low = product_dtype(x, A)
        return F.linear(F.linear(self.dropout(x.to(low)), A.to(low)), B.to(low)) * self.scaling

    def resize_outputs(self, size: int) -> None:
        """Cut rows of B, or add rows of zeros: new outputs are those of the base."""
        rows = self.lora_B.data[:size]
        self.lora_B.data = F.pad(rows, (0, 0, 0, size - len(rows)))

    @torch.no_grad()
    def delta_weight(self) -> Tensor:
        """Return scaling B A, (out, in)."""
        return (self.lora_B @ self.lora_A) * self.scaling

    def extra_repr(self) -> str:
        """Return the options, which ``print(layer)`` shows beside the base module."""
        return f"rank={self.rank}, alpha={self.alpha}, active={self.active}, merged={self.merged}"


def _keeps_all(dropout: nn.Module) -> bool:
    return type(dropout) is nn.Identity or (type(dropout) is nn.Dropout and not dropout.training)


def lora_scaling(rank: int, alpha: float, *, rslora: bool) -> float:
    """Return alpha / rank, or alpha / sqrt(rank) for rsLoRA (arXiv:2312.03732)."""
    return alpha / (math.sqrt(rank) if rslora else rank)
