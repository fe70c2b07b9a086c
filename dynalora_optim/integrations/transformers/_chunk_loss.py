"""`chunk_loss`: a causal language model computes its loss in chunks.

The model's own forward stays, and so does its loss. During a forward in training with labels, the
head returns `LazyLogits`. What the model does with logits before the loss (a soft cap, a scale) is
put off, and ``cross_entropy`` computes it in chunks. If the model does anything else with them,
they are computed as without us.
"""

from __future__ import annotations

import inspect
import logging
from collections.abc import Callable
from types import MethodType, TracebackType
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from dynalora_optim._base.checks import whole_number
from dynalora_optim.integrations.transformers._cross_entropy import (
    ChunkedCrossEntropy,
    liger_kernel,
)
from dynalora_optim.integrations.transformers._heads import (
    as_it_is,
    causal_model,
    classes_of,
    has_labels,
    obstacle,
)
from dynalora_optim.loss import LazyLogits
from dynalora_optim.loss._head import mixing

logger = logging.getLogger(__name__)


def chunk_loss(
    model: nn.Module, *, chunk: int = 256, label_smoothing: float = 0.0, liger: bool = False
) -> ChunkedLossHandle:
    """Let a causal language model compute its loss in chunks of rows, in place.

    In training, with ``labels``, the logits of all rows then never exist together. ``loss`` and its
    gradients are those of the model's own loss, for any ``num_items_in_batch``. ``logits`` of the
    output is a `LazyLogits`. Evaluation, generation and passes without labels are unchanged. Where
    chunks are not possible, the model's own way is kept, and one line of the log says why.

    Args:
        model: A model of transformers with a linear head, or one that contains it, such as peft's.
            A head of your own class must map each row by itself; it is tried with three rows.
        chunk: Rows whose logits exist at one time.
        label_smoothing: As in `torch.nn.functional.cross_entropy`. The Trainer's own
            ``label_smoothing_factor`` takes the labels from the model, and so needs all logits.
        liger: Use the kernel of the package ``liger_kernel`` where it computes the same: a plain
            head, no transform of the logits, and hidden states that need a gradient.

    Returns:
        A handle: its ``close()``, or leaving it as a context, undoes the change.

    Raises:
        TypeError: There is no causal language model in ``model``, or more than one head.
        ValueError: An option is wrong, the model has this already, or ``liger`` is not on a GPU.
        ImportError: ``liger`` without the packages liger_kernel and triton.

    Example:
        >>> with chunk_loss(model):  # doctest: +SKIP
        ...     model(input_ids=ids, labels=ids).loss.backward()  # doctest: +SKIP
    """
    whole_number("chunk", chunk, least=1, of="rows")
    if not 0 <= label_smoothing <= 1:
        raise ValueError(f"label_smoothing={label_smoothing!r} must be in [0, 1]; pass 0 for none.")
    causal = causal_model(model)
    if isinstance(causal.forward, ChunkedLossHandle):
        kind = type(causal).__name__
        raise ValueError(f"{kind} has its loss in chunks already; close() the first handle.")
    loss = ChunkedCrossEntropy(chunk, label_smoothing, liger_kernel(wanted=liger))
    return ChunkedLossHandle(causal, loss)


class ChunkedLossHandle:
    """What `chunk_loss` has changed, and how to undo it.

    It takes the place of the model's ``forward``, and calls it. (Hooks would not do: some versions
    of peft call ``forward`` directly.) A copy of the model has a copy of it.
    """

    def __init__(self, model: PreTrainedModel, cross_entropy: ChunkedCrossEntropy) -> None:
        self._model = model
        self._inner = vars(model).get("forward")  # of Accelerate or TRL; else the class has it
        self._cross_entropy = cross_entropy
        self._said: set[str] = set()
        self._is_open = True
        model.forward = self

    def close(self) -> None:
        """Undo the change: the model computes its loss as before. A second call does nothing."""
        if self._is_open and vars(self._model).get("forward") is self:
            if self._inner is None:
                del self._model.forward
            else:
                self._model.forward = self._inner
        self._is_open = False  # if something else has wrapped it, it stays, and does nothing

    def __enter__(self) -> ChunkedLossHandle:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    @property
    def __signature__(self) -> inspect.Signature:
        # The Trainer and generate() read it.
        return inspect.signature(self._forward)

    @property
    def _forward(self) -> Callable[..., Any]:
        return self._inner or MethodType(type(self._model).forward, self._model)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Run the model's forward; in training with labels its head returns `LazyLogits`."""
        model, inner = self._model, self._inner
        if torch.compiler.is_compiling() or not (self._is_open and model.training):
            if inner is None:
                return type(model).forward(model, *args, **kwargs)
            return inner(*args, **kwargs)
        forward = self._forward
        head = model.get_output_embeddings()
        if isinstance(getattr(vars(head).get("forward"), "__self__", None), _Pass):
            return forward(*args, **kwargs)  # a newer handle around this one does it
        given = has_labels(forward, args, kwargs)
        reason = obstacle(head) if given else "a forward got no labels"
        if reason:
            self._say(reason)
            return forward(*args, **kwargs)
        self._cross_entropy.check(head)
        running = _Pass(head, self._cross_entropy, self._say)
        try:
            output = forward(*args, **kwargs)
        finally:
            called_head = running.end()
        if not called_head:
            self._say("the model's forward does not call its head")
        return output

    def _say(self, reason: str) -> None:
        if reason not in self._said:
            self._said.add(reason)
            logger.warning("chunk_loss keeps the model's own way, with all logits: %s.", reason)


class _Pass:
    """One forward of the model, in which its head returns `LazyLogits`."""

    def __init__(self, head: nn.Module, cross_entropy: ChunkedCrossEntropy, say: Any) -> None:
        self._head = head
        self._cross_entropy = cross_entropy
        self._say = say
        self._before = vars(head).get("forward")
        self._is_waiting = True
        self._is_running = True
        head.forward = self._lazily

    def _lazily(self, *args: Any, **kwargs: Any) -> Any:
        self._restore()
        head, hidden = self._head, args[0] if args else None
        if kwargs or len(args) > 1 or not isinstance(hidden, Tensor):
            self._say("the model passes more than hidden states to its head")
            return head.forward(*args, **kwargs)
        mapped = as_it_is(head)
        reason = mixing(mapped, hidden)
        if reason:
            self._say(f"the head, {type(head).__name__}, {reason}")
            return head.forward(hidden)
        return LazyLogits(
            hidden,
            mapped,
            classes=classes_of(head) or 0,
            cross_entropy=self._cross_entropy,
            told=self._told,
        )

    def _told(self, operation: str) -> None:
        if self._is_running:
            self._say(f"the model uses its logits in another way ({operation})")
        elif torch.is_grad_enabled():  # a loss; metrics are computed without gradients
            self._say("code outside the model uses them, and a Budget does not count that")

    def end(self) -> bool:
        """The model's forward is over; return whether it called its head."""
        self._is_running = False
        if not self._is_waiting:
            return True
        self._restore()
        return False

    def _restore(self) -> None:
        self._is_waiting = False
        if self._before is None:
            del self._head.forward
        else:
            self._head.forward = self._before
