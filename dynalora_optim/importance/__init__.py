"""How important each module is (section 3.1 of the paper).

How the pieces divide the work. A measure turns one pass over a module into a number: a
`ForwardMeasure` is given a `ForwardPass`, a `GradientMeasure` the parameters with their gradients.
A window decides which passes a score covers (`Ema`, the run, the period). The `ImportanceTracker`
collects the numbers on their device while the model trains, and copies them to the host once per
reallocation.
"""

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

__all__ = [
    "Ema",
    "ForwardMeasure",
    "ForwardNorm",
    "ForwardPass",
    "GradientMeasure",
    "GradientNorm",
    "ImportanceTracker",
    "Sensitivity",
]
