"""The private names of torch that have to do with autograd; see ``torch_private.py``."""

from __future__ import annotations

import inspect
import weakref
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import BackwardCFunction
from torch.utils import checkpoint as checkpoints

from dynalora_optim._base.torch_private import _missing, _private

_SCORING = "scoring a forward pass"


def in_backward() -> bool:
    """Return whether this thread runs a backward pass; recomputation by a checkpoint counts."""
    return backward_number() != -1


def backward_number() -> int:
    """Return the number of the backward pass that this thread runs; -1 if it runs none."""
    try:
        return torch._C._current_graph_task_id()
    except AttributeError:
        raise _missing(_SCORING, "torch._C._current_graph_task_id") from None


def repeats_pass() -> bool:
    """Return whether a checkpoint recomputes a pass now that has run with gradients before.

    A non-reentrant checkpoint recomputes its first pass, which had them. A reentrant one does not,
    unless its node has run in an earlier backward pass over the same graph.

    If torch renames ``recompute_fn``: False for non-reentrant checkpoints.
    """
    task = backward_number()
    if task == -1:
        return False
    node = _private(torch._C, "_current_autograd_node", feature=_SCORING)()
    if isinstance(node, BackwardCFunction) and _first_tasks.setdefault(node, task) != task:
        return True
    frame = inspect.currentframe()
    while frame and not (
        frame.f_code.co_name == "recompute_fn" and frame.f_globals is vars(checkpoints)
    ):
        frame = frame.f_back
    return frame is not None


# The backward pass in which a node written in Python ran first.
_first_tasks: weakref.WeakKeyDictionary[BackwardCFunction, int] = weakref.WeakKeyDictionary()


def keeps_graph() -> bool:
    """Return whether the backward pass that runs now keeps its graph; False if torch lacks this."""
    ask = getattr(torch._C, "_autograd", None)
    ask = getattr(ask, "_get_current_graph_task_keep_graph", None)
    return bool(ask and ask())


def current_saved_tensors_hooks() -> tuple[Any, Any] | None:
    """Return the hooks that get what autograd saves now; None if there are none.

    If torch lacks the name: None. A budget then recomputes more where forwards share a backward.
    """
    ask = getattr(torch._C._autograd, "_top_saved_tensors_default_hooks", None)
    hooks: tuple[Any, Any] | None = ask(False) if ask else None
    return hooks


def version(tensor: Tensor) -> int:
    """Return how often ``tensor`` was changed in place; 0 if torch lacks this."""
    return int(getattr(tensor, "_version", 0))


def next_node() -> int:
    """Return the `age` of the next node that this thread makes; 0 if torch cannot tell."""
    ask = getattr(torch._C._autograd, "_get_sequence_nr", None)
    return int(ask()) if ask else 0


def running_node() -> int | None:
    """Return the `age` of the node whose backward runs now.

    None outside a backward pass, and if torch lacks one of the names.
    """
    ask = getattr(torch._C, "_current_autograd_node", None)
    node = ask() if ask and hasattr(torch._C._autograd, "_get_sequence_nr") else None
    number = getattr(node, "_sequence_nr", None)
    return int(number()) if number else None


def age(node: Any) -> int:
    """Return a number that is greater for a younger node of a graph; such nodes run first.

    If torch lacks ``_sequence_nr``: the same number for all nodes, which then all count as young.
    """
    ask = getattr(node, "_sequence_nr", None)
    return int(ask()) if ask else 1
