"""How much memory a training step takes: counted, measured by blocks, or estimated.

How the pieces divide the work. `LiveBytes` counts the bytes and FLOPs of any PyTorch code.
`measure_step` runs one training step and counts its bytes by category. `estimate_memory` runs the
same step on the meta device, which needs no memory. For an allocator that decides by costs, the
blocks of a model are run one by one in each of their roles. A `MemoryReport` compares the memory of
the current choice with that of all modules active.
"""

from dynalora_optim._base.live_bytes import LiveBytes
from dynalora_optim.memory._rehearsal import estimate_memory
from dynalora_optim.memory._report import MemoryReport, MemoryUse
from dynalora_optim.memory._step import StepMemory, measure_step

__all__ = [
    "LiveBytes",
    "MemoryReport",
    "MemoryUse",
    "StepMemory",
    "estimate_memory",
    "measure_step",
]
