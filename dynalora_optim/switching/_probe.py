"""Refreshing the gradient scores of inactive modules without training them.

In the first backward pass of a period every module gets a gradient. The gradient of an inactive
module is removed from its parameters as it arrives, and deleted as soon as the module has all of it
and is scored. So the gradient of one such module is held at a time, and no clipping, no other rank
and no update uses it.

If several forwards are alive when that backward begins, the modules stay active until each of these
has had its own: their graphs, and what checkpoints recompute of them, have all modules active.
"""

from __future__ import annotations

import weakref
from collections.abc import Collection
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from dynalora_optim._base.forward_graph import ForwardGraph
from dynalora_optim.allocation._choice import Choice
from dynalora_optim.groups._module_group import ModuleGroup
from dynalora_optim.importance._tracker import ImportanceTracker
from dynalora_optim.switching._gradients import set_aside, temporary_gradients
from dynalora_optim.switching._module_switch import ModuleSwitch


class GradientProbe:
    """Makes all modules active for one backward pass, and then applies the choice."""

    def __init__(self, model: nn.Module, switch: ModuleSwitch, tracker: ImportanceTracker) -> None:
        self._model = model
        self._switch = switch
        self._tracker = tracker
        self._handles: list[RemovableHandle] = []
        self._groups: Collection[ModuleGroup] = ()
        self._choice = Choice(frozenset())
        self._waiting: dict[str, set[int]] = {}
        self._aside: dict[Tensor, Tensor] = {}  # gradients of inactive modules not scored yet
        self._seen = False
        self._graphs: list[weakref.ref[ForwardGraph]] = []

    @property
    def is_waiting(self) -> bool:
        """Whether backward passes with all modules active are still to come in this period."""
        return bool(self._handles) and not self._is_over()

    def _is_over(self) -> bool:
        graphs = (graph() for graph in self._graphs)
        return self._seen and all(graph is None or graph.is_used for graph in graphs)

    def __getstate__(self) -> dict[str, Any]:
        # The hook of a copied model finds no groups to make inactive; an optimizer copied with it
        # applies its choice itself.
        return {**self.__dict__, "_groups": (), "_graphs": []}

    def open(self, groups: Collection[ModuleGroup], everyone: Choice, choice: Choice) -> None:
        """Apply ``everyone``, with all groups active, for one backward pass, then ``choice``."""
        self.close()
        self._groups, self._choice, self._seen, self._waiting = groups, choice, False, {}
        for group in groups:
            parameters = [p for p in group.parameters() if p.requires_grad]
            self._waiting[group.name] = {id(p) for p in parameters}
            hook = partial(self._take, group)
            for parameter in parameters:
                handle = parameter.register_post_accumulate_grad_hook(hook)  # type: ignore[no-untyped-call]
                self._handles.append(handle)
        self._handles.append(self._model.register_forward_pre_hook(self._close_if_over))
        self._handles.append(self._model.register_forward_hook(self._follow))
        self._switch.apply(groups, everyone)

    def close(self) -> None:
        """Apply the choice, if all modules are still active for a backward pass."""
        if self._handles:
            for handle in self._handles:
                handle.remove()
            self._handles = []
            self._aside.clear()
            self._graphs.clear()
            self._switch.apply(self._groups, self._choice)

    def _take(self, group: ModuleGroup, parameter: Tensor) -> None:
        """Score a group as soon as all its parameters have a gradient; once per period."""
        self._seen = True
        gradient = None if group.name in self._choice.active else set_aside(parameter)
        waiting = self._waiting[group.name]
        if not waiting:
            return
        if gradient is not None:
            self._aside[parameter] = gradient
        waiting.discard(id(parameter))
        if waiting:
            return
        own: dict[Tensor, Tensor] = {
            p: self._aside.pop(p) for p in group.parameters() if p in self._aside
        }
        with torch.no_grad(), temporary_gradients(own):
            self._tracker.observe(group)

    def _close_if_over(self, module: nn.Module, args: Any) -> None:
        """Apply the choice before the forward of the next micro-batch."""
        if self._is_over():
            self.close()

    def _follow(self, module: nn.Module, args: Any, output: Any) -> None:
        """Note the graph of a forward."""
        if torch.compiler.is_compiling() or not self._groups:
            return
        graph = ForwardGraph()
        if graph.follow(output):
            self._graphs.append(weakref.ref(graph))
