"""Refreshing the gradient scores of inactive modules without training them.

In the first backward pass of a period every module gets a gradient. As soon as a module has its
whole gradient it is scored, and an inactive module's is dropped on the spot, so that no more than
one such gradient is held at a time.
"""

from __future__ import annotations

from collections.abc import Collection
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from dynalora_optim._freezing import Freezer, drop_gradients
from dynalora_optim._groups import ModuleGroup
from dynalora_optim._importance import ImportanceTracker


class GradientProbe:
    """Opens all modules for one backward pass and closes the inactive ones after it."""

    def __init__(self, model: nn.Module, freezer: Freezer, tracker: ImportanceTracker) -> None:
        self._model = model
        self._freezer = freezer
        self._tracker = tracker
        self._handles: list[RemovableHandle] = []
        self._groups: Collection[ModuleGroup] = ()
        self._chosen: Collection[str] = ()
        self._waiting: dict[str, set[int]] = {}
        self._seen = False

    @property
    def is_waiting(self) -> bool:
        """Whether the backward pass of this period is still to come."""
        return bool(self._handles) and not self._seen

    def open(self, groups: Collection[ModuleGroup], chosen: Collection[str]) -> None:
        """Let all ``groups`` get a gradient once; then only the ``chosen`` ones."""
        self.close()
        self._groups, self._chosen, self._seen, self._waiting = groups, chosen, False, {}
        for group in groups:
            parameters = [p for p in group.parameters() if p.requires_grad]
            self._waiting[group.name] = {id(p) for p in parameters}
            hook = partial(self._take, group)
            for parameter in parameters:
                handle = parameter.register_post_accumulate_grad_hook(hook)  # type: ignore[no-untyped-call]
                self._handles.append(handle)
        self._handles.append(self._model.register_forward_pre_hook(self._close_if_seen))
        self._freezer.set_active(groups, self._waiting)

    def close(self) -> None:
        """Close the inactive modules, if open."""
        if self._handles:
            for handle in self._handles:
                handle.remove()
            self._handles = []
            self._freezer.set_active(self._groups, self._chosen)

    def _take(self, group: ModuleGroup, parameter: Tensor) -> None:
        """Score a group once all its parameters have a gradient."""
        self._seen = True
        waiting = self._waiting[group.name]
        waiting.discard(id(parameter))
        if waiting:
            return
        with torch.no_grad():
            self._tracker.observe(group)
        if group.name not in self._chosen:
            drop_gradients(group.parameters())

    def _close_if_seen(self, module: nn.Module, args: Any) -> None:
        """Close before the next micro-batch runs forward."""
        if self._seen:
            self.close()
