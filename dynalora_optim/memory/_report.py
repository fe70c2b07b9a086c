"""A table of the memory of a step, for the current choice and for all modules active."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from dynalora_optim._base.live_bytes import tensor_bytes
from dynalora_optim.allocation._costs import Costs, Plan

_MIB = 2**20


@dataclass(frozen=True)
class MemoryUse:
    """The memory that a step with one choice of modules takes; in bytes, except the FLOPs.

    Attributes:
        gradients: Gradients of all parameters that train.
        optimizer_state: The state that the optimizer keeps. With all modules active it is estimated
            from the modules that have a state; 0 before the first step.
        saved: The tensors that autograd keeps at the end of the forward pass, by block; "head" is
            the part after the blocks.
        peak: The most bytes alive at any time of forward and backward, in addition to weights,
            optimizer state and batch.
        backward_flops: FLOPs of the backward pass, recomputation included.
        recomputed_flops: FLOPs of the recomputation.
        process: With ``Budget(total=...)``: everything that the process holds for training, by
            part, with the state at its largest; "step" is the peak. Empty otherwise.
    """

    gradients: int
    optimizer_state: int
    saved: Mapping[str, int]
    peak: int
    backward_flops: int
    recomputed_flops: int
    process: Mapping[str, int] = field(default_factory=dict)

    @property
    def whole(self) -> int:
        """The bytes of all parts of ``process``; 0 without ``Budget(total=...)``."""
        return sum(self.process.values())

    @property
    def recompute_share(self) -> float:
        """The share of the backward pass that is recomputation."""
        return self.recomputed_flops / max(self.backward_flops, 1)


@dataclass(frozen=True)
class MemoryReport:
    """The memory of a step. ``print(report)`` shows the table.

    Attributes:
        weights: Bytes of all parameters, adapters included.
        adapters: Bytes of the allocated modules' parameters.
        current: The memory with the modules that are active now.
        all_active: The memory with all modules active and nothing checkpointed.
        total: The bytes that ``Budget(total=...)`` allows for everything; None without it.
    """

    weights: int
    adapters: int
    current: MemoryUse
    all_active: MemoryUse
    total: int | None = None

    def __str__(self) -> str:
        uses = (self.current, self.all_active)
        rows = [
            ("weights", *[_mib(self.weights)] * 2),
            ("of which adapters", *[_mib(self.adapters)] * 2),
            ("gradients", *(_mib(use.gradients) for use in uses)),
            ("optimizer state", *(_mib(use.optimizer_state) for use in uses)),
            *(
                (f"saved by {name}", *(_mib(use.saved.get(name, 0)) for use in uses))
                for name in self.all_active.saved
            ),
            ("saved in total", *(_mib(sum(use.saved.values())) for use in uses)),
            ("peak of a step", *(_mib(use.peak) for use in uses)),
            ("backward GFLOPs", *(f"{use.backward_flops / 1e9:,.1f}" for use in uses)),
            ("of which recomputation", *(f"{use.recompute_share:.0%}" for use in uses)),
            *self._process_rows(),
        ]
        width = max(len(row[0]) for row in rows)
        lines = [("MiB", "current", "all active"), *rows]
        return "\n".join(f"{name:<{width}}{now:>14}{full:>14}" for name, now, full in lines)

    def _process_rows(self) -> list[tuple[str, str, str]]:
        if self.total is None:
            return []
        now, full = self.current, self.all_active
        parts = [
            (f"process: {name}", _mib(size), _mib(full.process[name]))
            for name, size in now.process.items()
            if size or full.process[name]
        ]
        everything = ("everything", _mib(now.whole), _mib(full.whole))
        return [*parts, everything, ("allowed (total)", _mib(self.total), "")]


def memory_report(
    measured: tuple[Costs, Plan, Sequence[str]],
    *,
    weights: Sequence[Tensor],
    adapters: Sequence[Tensor],
    trained: Sequence[Tensor],
    state: Mapping[Tensor, Mapping[str, Any]],
    total: int | None = None,
) -> MemoryReport:
    """Return the report for ``measured``: the costs, the current plan, and the blocks' names."""
    costs, plan, names = measured
    materialized = [parameter for parameter in trained if state.get(parameter)]
    held = sum(_state_bytes(state[parameter]) for parameter in materialized)
    share = held / sum(map(tensor_bytes, materialized)) if materialized else 0.0
    full = round(share * sum(map(tensor_bytes, trained)))
    return MemoryReport(
        weights=sum(map(tensor_bytes, weights)),
        adapters=sum(map(tensor_bytes, adapters)),
        current=_use(costs, plan, names, held),
        all_active=_use(costs, costs.all_active, names, full),
        total=total,
    )


def _use(costs: Costs, plan: Plan, names: Sequence[str], optimizer_state: int) -> MemoryUse:
    before = {"what comes before": costs.prefix.held} if costs.prefix else {}
    blocks = {names[block]: use.held for block, use in costs.uses(plan)}
    trained, resident = costs.gradients(plan), costs.loop.resident
    peak = costs.peak(plan) - resident.of_active(trained)
    return MemoryUse(
        gradients=costs.gradients(plan) + costs.outer_gradients,
        optimizer_state=optimizer_state,
        saved={**before, **blocks, "head": costs.head.held},
        peak=peak,
        backward_flops=costs.flops(plan),
        recomputed_flops=costs.flops(plan) - costs.flops(Plan(plan.active)),
        process={**resident.parts(trained), "step": peak} if resident.weights else {},
    )


def _state_bytes(state: Mapping[str, Any]) -> int:
    return sum(tensor_bytes(value) for value in state.values() if isinstance(value, Tensor))


def _mib(size: int) -> str:
    return f"{size / _MIB:,.1f}"
