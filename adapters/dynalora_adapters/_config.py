"""Which modules to adapt, and how."""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import ClassVar, TypeVar

from torch import nn

from dynalora_adapters._bases import LinearShape, linear_shape
from dynalora_adapters._checks import (
    boolean,
    positive_int,
    positive_number,
    probability_below_one,
)
from dynalora_adapters._embedding import LoRAEmbedding
from dynalora_adapters._layers import AdapterLinear, LoRALinear, lora_scaling

Names = str | Sequence[str]
Number = TypeVar("Number", int, float)
BIASES = ("none", "adapted", "all")


@dataclass(frozen=True, kw_only=True)
class AdapterConfig(ABC):
    """The options of every kind of adapter: which modules it adapts, and what else is trained.

    A subclass adds the options of its kind, and makes the layers from them in ``build``.

    Args:
        targets: The modules to adapt. In a list, an entry matches the module with that dotted name,
            and every module whose dotted name ends with a dot and the entry. A string is a regular
            expression for the whole dotted name. ``"all-linear"`` means every ``nn.Linear`` and
            ``Conv1D`` that the model calls, except the output head. Embeddings can be named (LoRA).
        exclude: Modules to leave out of ``targets``: a list or a regular expression, as above.
        trainable: Modules of which all parameters stay trainable, such as a new classification
            head, by name or dotted suffix. They are never adapted, and ``save_adapter`` saves them.
        bias: Which biases of the model stay trainable, and are saved: ``"none"``, ``"adapted"``
            (those of the adapted layers) or ``"all"``.
    """

    layer_class: ClassVar[type[AdapterLinear]]
    lookup_class: ClassVar[type[AdapterLinear] | None] = None  # for embeddings, if there is one

    targets: Names
    exclude: Names = ()
    trainable: Names = ()
    bias: str = "none"

    def __post_init__(self) -> None:
        object.__setattr__(self, "targets", _names("targets", self.targets))
        object.__setattr__(self, "exclude", _names("exclude", self.exclude))
        trainable = (self.trainable,) if isinstance(self.trainable, str) else self.trainable
        object.__setattr__(self, "trainable", _names("trainable", trainable))
        if not self.targets:
            raise ValueError(
                f"targets must name at least one module, got {self.targets!r}; pass a list of "
                f'module names, a regular expression or "all-linear".'
            )
        if self.bias not in BIASES:
            raise ValueError(f"bias must be one of {BIASES}, got {self.bias!r}; pass one of them.")

    def class_for(self, base: nn.Module) -> type[AdapterLinear] | None:
        """Return the class of the layer over ``base``, or None if this kind has none for it."""
        shape = linear_shape(base)
        if shape is None:
            return None
        return self.lookup_class if shape.lookup else self.layer_class

    @abstractmethod
    def layer_options(self, name: str) -> dict[str, object]:
        """Return the attributes of the layer ``name`` that its forward pass depends on."""

    @abstractmethod
    def param_shapes(self, name: str, base: LinearShape) -> dict[str, tuple[int, ...]]:
        """Return the shapes of the parameters of the layer called ``name`` over ``base``."""

    @abstractmethod
    def build(self, bases: Mapping[str, nn.Module]) -> dict[str, AdapterLinear]:
        """Make one layer for each named base module, in their order.

        This gets all base modules at once, because the layers of a kind may share something.
        """


@dataclass(frozen=True, kw_only=True)
class LoRAConfig(AdapterConfig):
    """Options of LoRA (arXiv:2106.09685); keyword-only.

    Example:
        >>> LoRAConfig(rank=8, alpha=16, targets=["query", "value"], trainable=["classifier"])

    Args:
        rank: Rank r of the change that is added to a weight.
        alpha: Numerator of the scaling.
        dropout: Probability of dropping an element of the adapter's input in training, in [0, 1).
        rslora: Scale by alpha / sqrt(rank) (arXiv:2312.03732) instead of alpha / rank.
        rank_pattern: Other ranks for some modules. A key is a regular expression. It must match the
            whole dotted name, or the part of it after some dot. The first key that matches is used.
        alpha_pattern: Other alphas for some modules, by the same rule.

    Raises:
        TypeError: If an option has the wrong type.
        ValueError: If an option is out of range, or a regular expression does not compile.
    """

    layer_class = LoRALinear
    lookup_class = LoRAEmbedding

    rank: int
    alpha: float
    dropout: float = 0.0
    rslora: bool = False
    rank_pattern: Mapping[str, int] = field(default_factory=dict, hash=False)
    alpha_pattern: Mapping[str, float] = field(default_factory=dict, hash=False)

    def __post_init__(self) -> None:
        super().__post_init__()
        positive_int("rank", self.rank)
        positive_number("alpha", self.alpha)
        probability_below_one("dropout", self.dropout)
        boolean("rslora", self.rslora)
        for option in ("rank_pattern", "alpha_pattern"):
            object.__setattr__(self, option, _pattern(option, getattr(self, option)))
        for key, rank in self.rank_pattern.items():
            positive_int(f"rank_pattern[{key!r}]", rank)
        for key, alpha in self.alpha_pattern.items():
            positive_number(f"alpha_pattern[{key!r}]", alpha)

    @property
    def scaling(self) -> float:
        """The factor of B A in the layers that match no pattern."""
        return lora_scaling(self.rank, self.alpha, rslora=self.rslora)

    def layer_options(self, name: str) -> dict[str, object]:
        """Return rank, alpha and scaling of the layer called ``name``."""
        rank, alpha = self._rank_and_alpha(name)
        scaling = lora_scaling(rank, alpha, rslora=self.rslora)
        return {"rank": rank, "alpha": alpha, "scaling": scaling}

    def param_shapes(self, name: str, base: LinearShape) -> dict[str, tuple[int, ...]]:
        """Return the shapes (rank, in) of A and (out, rank) of B."""
        rank, _ = self._rank_and_alpha(name)
        return {"lora_A": (rank, base.in_features), "lora_B": (base.out_features, rank)}

    def build(self, bases: Mapping[str, nn.Module]) -> dict[str, AdapterLinear]:
        """Make a ``LoRALinear`` over each base, a ``LoRAEmbedding`` over an embedding."""
        layers: dict[str, AdapterLinear] = {}
        for name, base in bases.items():
            rank, alpha = self._rank_and_alpha(name)
            kind = LoRAEmbedding if self.class_for(base) is LoRAEmbedding else LoRALinear
            layers[name] = kind(
                base, rank=rank, alpha=alpha, dropout=self.dropout, rslora=self.rslora
            )
        return layers

    def _rank_and_alpha(self, name: str) -> tuple[int, float]:
        return (
            _first_match(self.rank_pattern, name, self.rank),
            _first_match(self.alpha_pattern, name, self.alpha),
        )


def compile_pattern(option: str, pattern: str) -> re.Pattern[str]:
    """Compile the regular expression that a user or a file gives for ``option``."""
    try:
        return re.compile(pattern)
    except (re.error, OverflowError, RecursionError) as error:
        raise ValueError(
            f"{option} holds {pattern!r}, which is not a regular expression ({error}); correct it, "
            f"or pass a list of module names."
        ) from error


def _names(option: str, value: object) -> Names:
    """Check a list of names or a regular expression; return a list as a tuple."""
    if isinstance(value, str):
        compile_pattern(option, value)
        return value
    if not isinstance(value, (Sequence, set, frozenset)):
        raise TypeError(
            f"{option} must be a list of module names or a string, got {value!r}; "
            f'pass for example ["query", "value"].'
        )
    entries = sorted(value, key=str) if isinstance(value, (set, frozenset)) else value
    for entry in entries:
        if not isinstance(entry, str) or not entry:
            raise TypeError(f"{option} must hold non-empty strings, got {entry!r}; remove it.")
    return tuple(entries)


def _pattern(option: str, value: object) -> dict[str, object]:
    """Check a mapping whose keys are regular expressions, and copy it."""
    if not isinstance(value, Mapping):
        raise TypeError(f"{option} must be a dict, got {value!r}; pass {{regex: number}}.")
    for key in value:
        if not isinstance(key, str):
            raise TypeError(f"{option} must have strings as keys, got {key!r}; pass a regex.")
        compile_pattern(option, key)
    return dict(value)


def _first_match(pattern: Mapping[str, Number], name: str, default: Number) -> Number:
    for key, value in pattern.items():
        if re.fullmatch(rf"(.*\.)?({key})", name):
            return value
    return default
