"""Fine-tune on a fixed budget: an optimizer that decides every period which modules get gradients.

How the pieces divide the work. Data flows one way:

    model -> named groups -> scores -> selection -> freezing -> step -> record

* `DynamicAllocationOptimizer` wraps a torch optimizer and takes its place in the training loop.
* An `ImportanceTracker` scores the module groups with a measure (`ForwardNorm`, `GradientNorm`,
  `Sensitivity`, or your own `ForwardMeasure` or `GradientMeasure`) over a window (`Ema`).
* An allocator (`TopK`, `Threshold`, `Stochastic`, `DiscountedStochastic`, `UniformRandom`,
  `RoundRobin`) chooses from an `AllocationContext`: numbers only, no modules.
* A schedule (`Periodic`, `Once`) says after which optimizer steps to choose anew.
* A `Budget` is an allocator that also decides where the backward pass ends and what it recomputes,
  from measured costs: a `MemoryReport` of `MemoryUse`, counted by `LiveBytes`.
* `Blocks` makes whole transformer blocks the groups; `lisa` and `badam` are presets of that.
* `show_versions` prints what an issue report needs.
* `measure_step` counts what a training step takes; `estimate_memory` rehearses it without memory.
* `LocalLR` lets each module follow the learning-rate schedule at its own pace.
* The `AllocationRecord` keeps every `Reallocation`.

This package imports torch and the standard library only. It recognises adapters by what they have
(`AdapterModule`), whoever wrote them.
"""

from dynalora_optim._base.live_bytes import LiveBytes
from dynalora_optim._optimizer import DynamicAllocationOptimizer
from dynalora_optim._presets import badam, lisa
from dynalora_optim._versions import show_versions
from dynalora_optim.allocation._allocators import (
    AllocationContext,
    Allocator,
    DiscountedStochastic,
    RoundRobin,
    Stochastic,
    Threshold,
    TopK,
    UniformRandom,
)
from dynalora_optim.allocation._budget import Budget
from dynalora_optim.allocation._record import AllocationRecord, Reallocation
from dynalora_optim.allocation._schedules import Once, Periodic, Schedule
from dynalora_optim.groups._groups import AdapterModule, Blocks
from dynalora_optim.importance._measures import (
    ForwardMeasure,
    ForwardNorm,
    ForwardPass,
    GradientMeasure,
    GradientNorm,
    Sensitivity,
)
from dynalora_optim.importance._tracker import ImportanceTracker
from dynalora_optim.importance._windows import Ema
from dynalora_optim.memory._rehearsal import estimate_memory
from dynalora_optim.memory._report import MemoryReport, MemoryUse
from dynalora_optim.memory._step import StepMemory, measure_step
from dynalora_optim.update._rates import LocalLR

__all__ = [
    "AdapterModule",
    "AllocationContext",
    "AllocationRecord",
    "Allocator",
    "Blocks",
    "Budget",
    "DiscountedStochastic",
    "DynamicAllocationOptimizer",
    "Ema",
    "ForwardMeasure",
    "ForwardNorm",
    "ForwardPass",
    "GradientMeasure",
    "GradientNorm",
    "ImportanceTracker",
    "LiveBytes",
    "LocalLR",
    "MemoryReport",
    "MemoryUse",
    "Once",
    "Periodic",
    "Reallocation",
    "RoundRobin",
    "Schedule",
    "Sensitivity",
    "StepMemory",
    "Stochastic",
    "Threshold",
    "TopK",
    "UniformRandom",
    "badam",
    "estimate_memory",
    "lisa",
    "measure_step",
    "show_versions",
]
