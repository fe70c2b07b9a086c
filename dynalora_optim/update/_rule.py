"""The wrapped optimizer as an update rule: it is given groups and state at each step."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

from torch import Tensor
from torch.optim import Optimizer

from dynalora_optim._base.torch_private import has_own_step, mark_stepped
from dynalora_optim.update._master_weights import MasterWeights
from dynalora_optim.update._param_groups import LINE, ParamGroup
from dynalora_optim.update._pieces import NOT_OPTIONS, is_same


class UpdateRule:
    """Runs a torch optimizer over the groups that it is given."""

    def __init__(self, optimizer: Optimizer, masters: MasterWeights) -> None:
        self.optimizer = optimizer
        self._masters = masters
        self._per_group = [name for name in vars(optimizer) if _is_per_group(optimizer, name)]

    def step(
        self, pieces: Iterable[ParamGroup], state: Any, closure: Callable[[], Any] | None = None
    ) -> list[ParamGroup]:
        """Update the parameters of ``pieces``, with their moments in ``state``.

        Args:
            pieces: Pieces of param groups.
            state: The state of all parameters.
            closure: Returns the loss, for rules that use its value; None if the loop passes none.

        Returns:
            What the rule has stored in the pieces, as schedule-free optimizers do: for each of
            these a mapping with its name, its line, and the changed values.
        """
        step = _unhooked_step(self.optimizer)
        changed = self._run(partial(step, closure) if closure else step, pieces, state)
        mark_stepped(self.optimizer)
        return changed

    def rehearse(self, pieces: Iterable[ParamGroup], state: Any) -> None:
        """Update the parameters of ``pieces``, which are copies; the optimizer stays as it is."""
        before = dict(vars(self.optimizer))
        try:
            self._run(_unhooked_step(self.optimizer), pieces, state)
        finally:
            vars(self.optimizer).clear()
            vars(self.optimizer).update(before)

    @property
    def rounds_at_random(self) -> bool:
        """Whether float32 copies of weights are rounded at random when their module pauses."""
        return self._masters.rounds_at_random

    def switch_mode(self, mode: str, pieces: Iterable[ParamGroup], state: Any) -> list[ParamGroup]:
        """Call ``train()`` or ``eval()`` of an optimizer that has them (schedule-free)."""
        if callable(method := getattr(self.optimizer, mode, None)):
            return self._run(method, pieces, state)
        return []

    def state_dict(self, groups: list[ParamGroup], state: Any) -> dict[str, Any]:
        """Return the state dict of the optimizer, which alone knows the form of its state."""
        with self.lent(groups, state):
            packed: dict[str, Any] = self.optimizer.state_dict()
        return packed

    def load(
        self, groups: list[ParamGroup], state: Any, packed: dict[str, Any]
    ) -> tuple[list[ParamGroup], Any]:
        """Return the groups and the state that the optimizer loads from ``packed``.

        Raises:
            ValueError: The optimizer cannot load it.
        """
        with self.lent(groups, state):
            try:
                self.optimizer.load_state_dict(packed)
            except Exception as error:
                raise ValueError(
                    f"state_dict: load_state_dict() of the wrapped {type(self.optimizer).__name__} "
                    f"raised {type(error).__name__}: {error}. Nothing was loaded."
                ) from error
            return self.optimizer.param_groups, self.optimizer.state

    @contextmanager
    def lent(self, groups: list[ParamGroup], state: Any) -> Iterator[None]:
        """Give the optimizer these groups and this state within the context."""
        optimizer = self.optimizer
        before = optimizer.param_groups, optimizer.state
        optimizer.param_groups, optimizer.state = groups, state
        try:
            yield
        finally:
            optimizer.param_groups, optimizer.state = before

    @contextmanager
    def _listed(self, lines: Sequence[int]) -> Iterator[None]:
        """Give the lists of one value per param group the values of the groups ``lines``."""
        kept = {name: getattr(self.optimizer, name) for name in self._per_group}
        for name, values in kept.items():
            setattr(self.optimizer, name, [values[line] for line in lines if line < len(values)])
        try:
            yield
        finally:
            for name, values in kept.items():
                setattr(self.optimizer, name, values)

    def _run(
        self, method: Callable[[], Any], pieces: Iterable[ParamGroup], state: Any
    ) -> list[ParamGroup]:
        merged = _coalesce(pieces, state)
        groups = [one for one, _ in merged]
        before = [dict(one) for one in groups]
        lines = [sources[0][LINE] for _, sources in merged]
        with self._masters.in_place(groups, state) as copies, self.lent(groups, copies):
            with self._listed(lines):
                method()
            groups = self.optimizer.param_groups
        changed = []
        for one, (_, sources), old in zip(groups, merged, before, strict=True):
            # Some rules store numbers in the group (schedule-free's k, Prodigy's d).
            values = {
                key: value
                for key, value in one.items()
                if key not in NOT_OPTIONS and not (key in old and is_same(value, old[key]))
            }
            if values:
                changed += [{**values, "name": s["name"], LINE: s[LINE]} for s in sources]
        return changed


def _is_per_group(optimizer: Optimizer, name: str) -> bool:
    """Return whether an attribute is a list of an option of all param groups, such as AdaBound's.

    AdaBound reads ``base_lrs[i]`` for group i, also if it is given other groups for an update.
    """
    value, groups = getattr(optimizer, name), optimizer.param_groups
    if name == "param_groups" or not isinstance(value, list) or len(value) != len(groups):
        return False
    return any(
        all(option is group.get(key) for option, group in zip(value, groups, strict=True))
        for key, own in groups[0].items()
        if isinstance(own, (float, Tensor))
    )


def _unhooked_step(optimizer: Optimizer) -> Callable[..., Any]:
    """Return the optimizer's ``step`` without torch's hooks.

    The wrapper's own step already calls the hooks, so that the process-wide ones would run twice.
    """
    step = type(optimizer).step
    if has_own_step(optimizer) or not getattr(step, "hooked", False):
        return optimizer.step
    inner = getattr(step, "__wrapped__", step)
    return partial(inner, optimizer)


def _coalesce(
    pieces: Iterable[ParamGroup], state: Mapping[Tensor, Any]
) -> list[tuple[ParamGroup, list[ParamGroup]]]:
    """Join the pieces of a user's group that have equal options; return each with its sources.

    So one fused or foreach call updates them all. With all modules active, the result is the user's
    group, with its parameters in their order.

    Pieces at their first update are not joined with others: torch's fused SGD refuses a mix of
    parameters with and without a momentum buffer. Groups that are sharded in different ways are not
    joined either: no foreach call accepts both.
    """
    alike: dict[Hashable, list[ParamGroup]] = {}
    known: dict[tuple[int, ...], Hashable] = {}  # most pieces have the same objects as options
    for piece in pieces:
        has_state = any(state.get(parameter) for parameter in piece["params"])
        meshes = frozenset([getattr(p, "device_mesh", None) for p in piece["params"]])
        same = tuple([id(value) for key, value in piece.items() if key not in NOT_OPTIONS])
        if same not in known:
            known[same] = _options_key(piece)
        alike.setdefault((piece[LINE], known[same], has_state, meshes), []).append(piece)
    return [(_joined(sources), sources) for sources in alike.values()]


def _joined(sources: Sequence[ParamGroup]) -> ParamGroup:
    first = sources[0]
    options = {key: value for key, value in first.items() if key not in NOT_OPTIONS}
    if "user_name" in first:
        options["name"] = first["user_name"]
    placed = [
        (position, parameter)
        for source in sources
        for position, parameter in zip(source["positions"], source["params"], strict=False)
    ]
    return {**options, "params": [p for _, p in sorted(placed, key=lambda pair: pair[0])]}


def _options_key(piece: ParamGroup) -> Hashable:
    return tuple((key, _hashable(value)) for key, value in piece.items() if key not in NOT_OPTIONS)


def _hashable(value: object) -> Hashable:
    if isinstance(value, list):
        return tuple(map(_hashable, value))
    # True == 1 == 1.0 as keys, but not as options.
    return (type(value), value) if isinstance(value, Hashable) else id(value)
