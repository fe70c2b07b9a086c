"""The cross entropy that `chunk_loss` computes: in chunks of our own, or by Liger's kernel."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from dynalora_optim.loss import linear_cross_entropy
from dynalora_optim.loss._head import is_plain


class ChunkedCrossEntropy:
    """The cross entropy of a `LazyLogits`.

    Args:
        chunk: Rows whose logits exist at one time.
        label_smoothing: That of calls that have none of their own.
        kernel: What `liger_kernel` returns.
    """

    def __init__(self, chunk: int, label_smoothing: float, kernel: Any) -> None:
        self._chunk = chunk
        self._label_smoothing = label_smoothing
        self._kernel = kernel

    def check(self, head: nn.Module) -> None:
        """Raise if the kernel cannot run where this head is.

        Raises:
            ValueError: The head is on the CPU.
        """
        if self._kernel is not None and is_plain(head) and _device(head) == "cpu":
            raise ValueError(
                "chunk_loss(liger=True) runs Liger's kernel on a GPU, but the head of the model is "
                'on the CPU; move the model first, such as model.to("cuda"), or leave liger out.'
            )

    def __call__(
        self, hidden: Tensor, head: nn.Module, labels: Tensor, *, transform: Any, **options: Any
    ) -> Tensor:
        """Return the loss; a call with its own ``label_smoothing`` keeps it."""
        options["label_smoothing"] = options.get("label_smoothing") or self._label_smoothing
        # Liger forms no gradient of the head if the hidden states need none. The meta device, on
        # which memory is estimated, has no kernels.
        by_kernel = self._kernel is not None and hidden.requires_grad and not hidden.is_meta
        if by_kernel and is_plain(head) and not transform:
            return self._by_kernel(hidden, head, labels, **options)
        return linear_cross_entropy(
            hidden, head, labels, transform=transform, chunk=self._chunk, **options
        )

    def _by_kernel(
        self,
        hidden: Tensor,
        head: nn.Module,
        labels: Tensor,
        *,
        label_smoothing: float,
        ignore_index: int = -100,
        reduction: str = "mean",
    ) -> Tensor:
        loss: Tensor = self._kernel(
            hidden,
            head.weight,
            labels,
            bias=head.bias,
            ignore_index=ignore_index,
            label_smoothing=label_smoothing,
            reduction="sum" if reduction == "mean" else reduction,
            accum_dtype=torch.float32,
        )
        if reduction != "mean":
            return loss
        return loss / (labels != ignore_index).sum().clamp(min=1)


def _device(head: Any) -> str:
    kind: str = head.weight.device.type
    return kind


def liger_kernel(*, wanted: bool) -> Any:
    """Return the function of the package ``liger_kernel``; None if it is not ``wanted``.

    Raises:
        ImportError: It cannot be imported.
        ValueError: There is no GPU that it could run on.
    """
    if not wanted:
        return None
    try:
        from liger_kernel.transformers.functional import liger_fused_linear_cross_entropy
    except ImportError as error:
        missing = "triton" if (error.name or "").partition(".")[0] == "triton" else "liger_kernel"
        raise ImportError(
            f"chunk_loss(liger=True) needs the package {missing}, but importing it failed: "
            f"{error}; install {missing.replace('_', '-')}, or leave liger out: the loss is then "
            "computed in chunks without it."
        ) from error
    if not torch.accelerator.is_available():
        raise ValueError(
            "chunk_loss(liger=True) runs Liger's kernel on a GPU, and torch finds none; leave "
            "liger out: the loss is then computed in chunks without it."
        )
    return liger_fused_linear_cross_entropy
