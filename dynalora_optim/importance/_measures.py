"""Importance measures: each turns one pass over a module into one number.

A *forward measure* scores a module's forward pass, so it sees inactive modules too. A *gradient
measure* scores the gradients of a module's adapter, which only active modules have.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol, TypeAlias, runtime_checkable

import torch
from torch import Tensor, nn

from dynalora_optim._base.checks import by_name


@dataclass(frozen=True)
class ForwardPass:
    """One forward pass of one module, as a forward measure receives it.

    The measure is called with gradient recording off, but the tensors belong to the model's graph:
    call ``detach()`` on those that you keep after the call.

    Attributes:
        module: The module.
        inputs: Its positional inputs.
        output: Its output, (..., d); the first tensor if there are several.
        mask: (batch, tokens), nonzero where a token counts, or None.
        base_output: The output of the module's ``base_layer``, for measures with
            ``needs_base_output``; else None.
    """

    module: nn.Module
    inputs: tuple[object, ...]
    output: Tensor
    mask: Tensor | None = None
    base_output: Tensor | None = None


@runtime_checkable
class ForwardMeasure(Protocol):
    """Scores one forward pass of one module."""

    def score(self, forward: ForwardPass) -> Tensor:
        """Return a new scalar tensor on the output's device; it is summed over forward passes."""
        ...


@runtime_checkable
class GradientMeasure(Protocol):
    """Scores the gradients of one module's adapter."""

    def score_gradients(self, parameters: Sequence[Tensor]) -> Tensor:
        """Return a scalar tensor on the device of the ``parameters``; each has its ``grad``."""
        ...


ImportanceMeasure: TypeAlias = ForwardMeasure | GradientMeasure


@dataclass(frozen=True)
class ForwardNorm:
    """The summed p-norms of a module's output rows (equation 1).

    y = sum over samples x of ||(W + dW) x||_p, where a sample is one token: one row of the
    module's output. Summed in float32.

    Attributes:
        p: 1 or 2.
        part: ``"output"`` takes base and adapter together, as the paper does; ``"delta"`` takes
            only the adapter's part dW x, as LoRA-drop does (arXiv 2402.07721).

    Raises:
        ValueError: ``p`` or ``part`` has another value.
    """

    p: int = 2
    part: Literal["output", "delta"] = "output"

    def __post_init__(self) -> None:
        _check_norm("ForwardNorm", self.p)
        if self.part not in ("output", "delta"):
            raise ValueError(f"ForwardNorm(part={self.part!r}): pass 'output' or 'delta'.")

    @property
    def needs_base_output(self) -> bool:
        """Whether ``score`` reads ``base_output``."""
        return self.part == "delta"

    def score(self, forward: ForwardPass) -> Tensor:
        """Return the sum over the rows of the output, (..., d), of their p-norm."""
        rows = forward.output
        if forward.base_output is not None:
            rows = rows.float() - forward.base_output.float()
        return _kept(_norm(rows, self.p, dim=-1), forward.mask).sum()


@dataclass(frozen=True)
class GradientNorm:
    """The p-norm of an adapter's whole gradient, all its parameters together.

    For LoRA that is A and B: the gradient of A is exactly 0 while B = 0.

    Raises:
        ValueError: ``p`` is neither 1 nor 2.
    """

    p: int = 2

    def __post_init__(self) -> None:
        _check_norm("GradientNorm", self.p)

    def score_gradients(self, parameters: Sequence[Tensor]) -> Tensor:
        """Return ||(g_1, ..., g_n)||_p in float32."""
        gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
        norms = torch.stack([_norm(_values(gradient), self.p) for gradient in gradients])
        return _norm(norms, self.p)


@dataclass(frozen=True)
class Sensitivity:
    """The first-order change of the loss if a weight were set to zero: sum of ``|w * g|``.

    It is smoothed as in AdaLoRA (arXiv 2303.10512, equations 9 to 11), for each module:
    ``I <- beta1 I + (1 - beta1) s;  U <- beta2 U + (1 - beta2) |s - I|;  y = I * U``.

    Attributes:
        beta1: Decay of the sensitivity I.
        beta2: Decay of its uncertainty U.

    Raises:
        ValueError: A beta is not in [0, 1).
    """

    beta1: float = 0.85
    beta2: float = 0.85

    def __post_init__(self) -> None:
        for name, beta in (("beta1", self.beta1), ("beta2", self.beta2)):
            if not 0 <= beta < 1:
                raise ValueError(f"Sensitivity({name}={beta!r}): pass a decay in [0, 1).")

    @property
    def smoothing(self) -> tuple[float, float]:
        """The betas of the smoothing window that this measure uses by default."""
        return self.beta1, self.beta2

    def score_gradients(self, parameters: Sequence[Tensor]) -> Tensor:
        """Return s = the sum over the adapter's weights of ``|w * g|``, in float32."""
        products = [
            (_values(parameter.detach(), like=parameter.grad) * _values(parameter.grad))
            .abs()
            .sum(dtype=torch.float32)
            for parameter in parameters
            if parameter.grad is not None
        ]
        return torch.stack(products).sum()


MEASURES: dict[str, Callable[[], ImportanceMeasure]] = {
    "forward": ForwardNorm,
    "gradient": GradientNorm,
    "sensitivity": Sensitivity,
}


def as_measure(importance: str | ImportanceMeasure) -> ImportanceMeasure:
    """Return ``importance`` itself, or the default measure behind its short name.

    Raises:
        ValueError: ``importance`` is an unknown short name.
        TypeError: ``importance`` is neither a name nor a measure.
    """
    return by_name(
        "importance",
        importance,
        MEASURES,
        kinds=(ForwardMeasure, GradientMeasure),
        noun="measure",
        method="score(forward) or score_gradients(parameters)",
    )


def _check_norm(kind: str, p: object) -> None:
    if p not in (1, 2):
        raise ValueError(f"{kind}(p={p!r}): pass 1 or 2, the norms of the paper.")


def _values(tensor: Tensor, like: Tensor | None = None) -> Tensor:
    """Return the elements of a tensor that a gradient may have (``like``, or the tensor itself).

    A sparse gradient, such as of ``nn.Embedding(sparse=True)``, has few; the others are 0.
    """
    shape = tensor if like is None else like
    if shape.layout == torch.strided:
        return tensor
    if like is not None:
        tensor = tensor.sparse_mask(like.coalesce())
    return tensor.coalesce().values()


def _norm(tensor: Tensor, p: int, dim: int | None = None) -> Tensor:
    """Return the p-norm in float32; torch also accumulates in float32, unless given float64."""
    wide = tensor.dtype == torch.float64
    norm: Tensor = torch.linalg.vector_norm(tensor, p, dim, dtype=None if wide else torch.float32)
    return norm.float() if wide else norm


def _kept(norms: Tensor, mask: Tensor | None) -> Tensor:
    """Set the norms of the tokens that a (batch, tokens) mask leaves out to zero, in place.

    The mask is not used if the output has other rows (such as a pooled output). Zeros keep the
    shape, so that the host does not have to wait for the mask.
    """
    if mask is None or norms.shape[: mask.ndim] != mask.shape:
        return norms
    left_out = mask.to(norms.device) == 0
    if norms.ndim > mask.ndim:
        left_out = left_out.reshape(mask.shape + (1,) * (norms.ndim - mask.ndim))
    return norms.masked_fill_(left_out, 0.0)
