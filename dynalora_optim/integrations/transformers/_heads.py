"""Finding the head of a causal language model, and what stands against a loss in chunks."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any

from torch import nn
from transformers import PreTrainedModel

from dynalora_optim._base.torch_private import (
    active_ddp,
    parameter_slots,
    set_parameter_slots,
    without_modes,
)
from dynalora_optim._base.torch_private_hooks import forward_hooks, has_backward_hooks
from dynalora_optim.importance._forward_hook import ForwardHook
from dynalora_optim.loss._head import WithoutHooks, is_plain
from dynalora_optim.switching._anchor import _Tied
from dynalora_optim.switching._detach import DetachedForward


def causal_model(model: nn.Module) -> PreTrainedModel:
    """Return the model within ``model`` that has the one head."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"model={model!r} is not a model; pass one of transformers or of peft.")
    found = [m for m in model.modules() if isinstance(m, PreTrainedModel) and _head_of(m)]
    heads = {id(_head_of(m)) for m in found}
    if len(heads) != 1:
        raise TypeError(
            f"{type(model).__name__} has {len(heads)} language-model heads, and chunk_loss needs "
            "one; pass a model such as LlamaForCausalLM, or the part that has the head."
        )
    causal: PreTrainedModel = found[0]
    head = _head_of(causal)
    if classes_of(head) is None:
        raise TypeError(
            f"the head of {type(causal).__name__}, {type(head).__name__}, is not linear, so that "
            "its loss cannot be computed in chunks; train without chunk_loss."
        )
    return causal


def _head_of(model: PreTrainedModel) -> nn.Module | None:
    head = model.get_output_embeddings()
    return head if isinstance(head, nn.Module) else None


def classes_of(head: Any) -> int | None:
    """Return the number of outputs of a linear layer, adapted or not; None for other modules."""
    classes = getattr(head, "out_features", None)
    # transformers before 5.17 does not set it anew when it resizes tied embeddings.
    if isinstance(head, nn.Linear) and head.weight.shape[1:] == (head.in_features,):
        classes = head.weight.shape[0]
    return classes if isinstance(classes, int) else None


def obstacle(head: Any) -> str | None:
    """Return why the loss over this head cannot be computed in chunks; None if it can."""
    if classes_of(head) is None:
        return f"the head, {type(head).__name__}, is not linear"
    if any(hasattr(p, "full_tensor") or hasattr(p, "ds_id") for p in head.parameters()):
        return "the head's weight is sharded"
    within = [child for child in head.modules() if child is not head]
    if any(forward_hooks(child) or has_backward_hooks(child) for child in within):
        return "modules within the head have hooks"
    # A hook of the backward pass would never run: the head returns no tensor.
    hooks = forward_hooks(head).values()
    if has_backward_hooks(head) or not all(_takes_lazy_logits(head, hook) for hook in hooks):
        return "the head has hooks"
    return None


def _takes_lazy_logits(head: nn.Module, hook: object) -> bool:
    """Whether a forward hook of the head works on `LazyLogits`: our own do."""
    if isinstance(getattr(hook, "__self__", None), DetachedForward):
        return type(head) is nn.Linear  # see `as_it_is`
    return isinstance(hook, ForwardHook) or (isinstance(hook, _Tied) and active_ddp() is None)


def as_it_is(head: nn.Module) -> nn.Module:
    """Return what maps rows to logits as ``head`` does now, also once its forward is over.

    While the forward of an inactive head runs, its parameters are detached; so are those of what is
    returned.
    """
    if is_plain(head):
        return head
    if type(head) is not nn.Linear or "forward" in vars(head):
        return WithoutHooks(head)
    with without_modes():  # a copy of the model without data is measured in a mode of its own
        plain = nn.Linear(1, 1, bias=False, device="meta")
    plain.in_features, plain.out_features = head.in_features, head.out_features
    set_parameter_slots(plain, dict(parameter_slots(head)))
    return plain


def has_labels(
    forward: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> bool:
    """Whether a forward is called with labels, by name or by position."""
    if "labels" in kwargs:
        return kwargs["labels"] is not None
    names = list(inspect.signature(forward).parameters)[: len(args)] if args else []
    return "labels" in names and args[names.index("labels")] is not None
