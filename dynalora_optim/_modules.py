"""All that the optimizer does to the modules of its model: watch them, and open and close them."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence

from torch import nn

from dynalora_optim._freezing import Freezer
from dynalora_optim._gradient_probe import GradientProbe
from dynalora_optim._groups import ModuleGroup
from dynalora_optim._importance import ImportanceTracker


class ModuleDriver:
    """Keeps the chosen groups active and the tracker informed."""

    def __init__(
        self, model: nn.Module, groups: Sequence[ModuleGroup], tracker: ImportanceTracker
    ) -> None:
        self.is_closed = False
        self._groups: dict[str, ModuleGroup] = {}
        self._tracker = tracker
        self._freezer = Freezer()
        self._probe = GradientProbe(model, self._freezer, tracker)
        self.add(groups)

    def add(self, groups: Sequence[ModuleGroup]) -> None:
        """Take ``groups`` into care; they stay active until `apply` says otherwise."""
        self._groups.update((group.name, group) for group in groups)
        self._tracker.attach(groups)

    def modules(self) -> Iterator[nn.Module]:
        """Yield the modules in care."""
        return (module for group in self._groups.values() for module in group.modules)

    @property
    def is_probing(self) -> bool:
        """Whether the next backward pass gives all modules a gradient."""
        return self._probe.is_waiting

    def apply(self, chosen: Collection[str], *, probe: bool = False) -> None:
        """Make the ``chosen`` groups active and the rest inactive, after one probe if asked."""
        self._probe.close()
        groups = list(self._groups.values())
        self._freezer.set_active(groups, chosen)
        if probe:
            self._probe.open(groups, chosen)

    def before_update(self, chosen: Collection[str]) -> None:
        """Read what the backward passes left, before an optimizer step uses it."""
        self._probe.close()
        self._tracker.observe_step(g for name, g in self._groups.items() if name in chosen)

    def close(self) -> None:
        """Make every module active again and remove all hooks; once, for others may follow."""
        if self.is_closed:
            return
        self.is_closed = True
        self._probe.close()
        self._freezer.set_active(self._groups.values(), self._groups)
        self._tracker.close()
