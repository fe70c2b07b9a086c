"""An optimizer that can be saved and loaded, together with its allocation."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

from dynalora_optim._allocated import AllocatedOptimizer
from dynalora_optim._base.torch_private import state_hooks
from dynalora_optim._run_state import RunState
from dynalora_optim.importance._tracker import ImportanceTracker
from dynalora_optim.state._pack import pack, unpack
from dynalora_optim.state._placeholders import add_placeholders
from dynalora_optim.state._validate import check_structure, misfit_named
from dynalora_optim.update._master_weights import restore_dtypes
from dynalora_optim.update._plain import from_plain, is_plain


class SavedOptimizer(AllocatedOptimizer):
    """Saves and loads the wrapped optimizer's own state, with the allocation."""

    tracker: ImportanceTracker
    _run: RunState

    def state_dict(self) -> dict[str, Any]:
        """Return the torch state dict, with everything that a resumed run needs of the allocation.

        It is the wrapped optimizer's own, and loads with ``torch.load(weights_only=True)`` if that
        does. The allocation is a string in each of the ``param_groups``, which
        ``torch.distributed.checkpoint`` keeps; ``"record"`` is the history.
        """
        self._follow()
        self._updater.wait()
        for hook in state_hooks(self, "state_dict_pre"):
            hook(self)
        packed = self._rule.state_dict(self.param_groups, self.state)
        names = self._pieces.names(self.param_groups)
        marks = add_placeholders(packed, self.param_groups, names, provisional=self._is_provisional)
        values = self._run.values(self.param_groups, is_probing=self._driver.is_probing)
        pack(packed, [{**value, **mark} for value, mark in zip(values, marks, strict=True)])
        packed["record"] = self.record.state_dict()
        saved: dict[str, Any] = self._through(state_hooks(self, "state_dict_post"), packed)
        return saved

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue where `state_dict` was taken, bitwise the same, also in the middle of a period.

        The state is loaded by the wrapped optimizer itself. If the weights are not float32, some
        optimizers of torch (NAdam, ASGD) round a few of their numbers then, with or without this
        class.

        The settings that this optimizer was built with count from now on. If one differs from that
        of the saved run, a line of the log says so; scores of another ``importance`` start anew.

        A plain optimizer's state dict can be loaded too, if it has the same parameters in the same
        groups as the wrapped optimizer. Its state and options are loaded, and the allocation starts
        from the beginning.

        Raises:
            ValueError: The state dict is for other module groups, parameters or settings. Then
                nothing is changed.
        """
        state_dict = self._through(state_hooks(self, "load_state_dict_pre"), state_dict)
        check_structure(state_dict)
        if is_plain(state_dict):
            self._load_plain(state_dict)
        else:
            self._load_run(state_dict)
        for hook in state_hooks(self, "load_state_dict_post"):
            hook(self)

    def _through(self, hooks: Iterable[Callable[..., Any]], packed: dict[str, Any]) -> Any:
        """Return the state dict after the user's ``hooks``, which may return another one."""
        for hook in hooks:
            found = hook(self, packed)
            packed = packed if found is None else found
        return packed

    def _load_run(self, state_dict: dict[str, Any]) -> None:
        self._relink()
        record = state_dict.get("record", [])
        with misfit_named():
            lean, values = unpack(state_dict, self._pieces.names(self.param_groups))
            joined = {name for value in values for name in value["modules"]}
            found = self._held_of(g for g in self._waiting if g.name in joined)
            joining = self._joining(found) if found else None
            names = self._allocation.names
            if joining:
                names = self._allocation.names_with(joining.names, joining.order)
            self._run.check(values, self.param_groups, record, names)
        self._load_state(lean)
        if joining:
            self._adopt(joining)
        self._run.load(values, self.param_groups, record)
        self._apply_allocation(probe=values[0]["probing"])

    def _load_plain(self, state_dict: dict[str, Any]) -> None:
        names = self._pieces.names(self.param_groups)
        with misfit_named():
            packed = from_plain(state_dict, self.param_groups, names, self._rule.optimizer)
        self._load_state(packed)
        self._run.restart(self.param_groups)
        self._apply_allocation(probe=self.tracker.probe)

    def _load_state(self, packed: dict[str, Any]) -> None:
        self.param_groups, self.state = self._rule.load(self.param_groups, self.state, packed)
        self._link()
        restore_dtypes(self.state, self.param_groups, packed)
        self._is_provisional = False
