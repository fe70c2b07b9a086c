"""How important each module is (section 3.1 of the paper).

A measure turns one forward pass of a module into a number. The `ImportanceTracker` collects these
numbers on their device while the model trains, and brings them to the host once a reallocation.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from dynalora_optim._groups import ModuleGroup
from dynalora_optim._measures import ImportanceMeasure, as_measure

logger = logging.getLogger(__name__)


class _Probe:
    """The forward hook of one module and the sum it collects.

    It holds nothing else, so that a copy of the model (an EMA, say) carries no optimizer with it.
    """

    def __init__(self, measure: ImportanceMeasure) -> None:
        self.measure = measure
        self.total: Tensor | None = None
        self._unrepeated = 0  # forward passes that a checkpoint may recompute in the backward

    def __call__(self, module: nn.Module, args: object, output: object) -> None:
        if not (module.training and torch.is_grad_enabled()) or self._is_recomputation():
            return
        with torch.no_grad():
            value = self.measure.score(module, _first_tensor(output))
            self.total = value if self.total is None else self.total.to(value.device) + value

    def _is_recomputation(self) -> bool:
        # Non-reentrant checkpoints run the forward again inside the backward, after a first pass
        # that counted. Reentrant ones make their first pass without gradients, which did not.
        if torch._C._current_graph_task_id() == -1:
            self._unrepeated += 1
            return False
        if self._unrepeated == 0:
            return False
        self._unrepeated -= 1
        return True

    def end_step(self) -> None:
        """Forget this step's forward passes; no later backward will recompute them."""
        self._unrepeated = 0


class ImportanceTracker:
    """Running importance scores of the module groups of one model.

    Forward passes count while the module is in training mode and gradients are enabled; evaluation
    does not, and the recomputation of a checkpointed block does not count again. No call between
    two reallocations waits for the device.

    Args:
        measure: ``"forward"`` (`ForwardNorm` with p=2) or any `ImportanceMeasure`.
        window: ``"run"`` sums over all samples so far (equation 1), ``"period"`` over those since
            the last reallocation.
    """

    def __init__(
        self,
        measure: str | ImportanceMeasure = "forward",
        *,
        window: Literal["run", "period"] = "run",
    ) -> None:
        if window not in ("run", "period"):
            raise ValueError(f"window={window!r} must be 'run' or 'period'.")
        self.measure = as_measure(measure)
        self.window = window
        self._probes: dict[str, list[_Probe]] = {}
        self._closed: dict[str, float] = {}
        self._handles: list[RemovableHandle] = []

    def attach(self, groups: Sequence[ModuleGroup]) -> None:
        """Watch the modules of ``groups``, in addition to those watched already."""
        for group in groups:
            self._probes[group.name] = [_Probe(self.measure) for _ in group.modules]
            self._closed[group.name] = 0.0
            for module, probe in zip(group.modules, self._probes[group.name], strict=True):
                self._handles.append(module.register_forward_hook(probe))

    def close(self) -> None:
        """Stop watching; the scores stay readable."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()

    def end_step(self) -> None:
        """Tell the tracker that an optimizer step is done."""
        for probe in self._all_probes():
            probe.end_step()

    def scores(self) -> dict[str, float]:
        """Return the score y of each group so far (equation 1); 0.0 before any.

        This copies the sums from their device, which waits for it.
        """
        open_sums = self._open_sums()
        if self.window == "period" and any(open_sums.values()):
            return open_sums
        return {name: closed + open_sums[name] for name, closed in self._closed.items()}

    def importance(self) -> dict[str, float]:
        """Return the scores normalised to sum to 1 (equation 2); uniform before any score.

        A score that is not finite counts as 0.
        """
        usable = usable_scores(self.scores())
        return dict(zip(usable, normalised(tuple(usable.values())), strict=True))

    def roll(self) -> dict[str, float]:
        """Close the window at a reallocation and return the scores it decides by."""
        scores = self.scores()
        for name, score in scores.items():
            if self.window == "run" and not math.isfinite(score):
                # One overflow must not silence a module for ever: its earlier sum stands.
                continue
            self._closed[name] = score
        for probe in self._all_probes():
            probe.total = None
        return scores

    def state_dict(self) -> dict[str, dict[str, Any]]:
        """Return, per group, the score of closed periods and the open sum of each module."""
        open_sums = self._read_probes()
        return {
            name: {"score": closed, "open_sums": open_sums[name]}
            for name, closed in self._closed.items()
        }

    def load_state_dict(self, state: Mapping[str, Mapping[str, Any]]) -> None:
        """Take over what `state_dict` returned; groups that it lacks start anew."""
        for name, probes in self._probes.items():
            saved = state.get(name, {"score": 0.0, "open_sums": []})
            self._closed[name] = float(saved["score"])
            for i, probe in enumerate(probes):
                total = saved["open_sums"][i] if i < len(saved["open_sums"]) else 0.0
                probe.total = torch.tensor(total, dtype=torch.float32) if total else None

    def _all_probes(self) -> list[_Probe]:
        return [probe for probes in self._probes.values() for probe in probes]

    def _open_sums(self) -> dict[str, float]:
        return {name: math.fsum(sums) for name, sums in self._read_probes().items()}

    def _read_probes(self) -> dict[str, list[float]]:
        values = iter(_to_host([probe.total for probe in self._all_probes()]))
        return {name: [next(values) for _ in probes] for name, probes in self._probes.items()}


def as_tracker(importance: str | ImportanceMeasure | ImportanceTracker) -> ImportanceTracker:
    """Return ``importance`` itself if it is a tracker, else a tracker of that measure.

    Raises:
        ValueError: An unknown short name, or a tracker that another optimizer uses.
        TypeError: Neither a name, nor a measure, nor a tracker.
    """
    if not isinstance(importance, ImportanceTracker):
        return ImportanceTracker(importance)
    if importance.scores():
        raise ValueError(
            "importance is an ImportanceTracker that watches another optimizer's modules; pass a "
            "new one."
        )
    return importance


def normalised(scores: Sequence[float]) -> tuple[float, ...]:
    """Divide finite scores >= 0 by their sum (equation 2); uniform where all are 0."""
    largest = max(scores)
    if largest == 0:
        return (1 / len(scores),) * len(scores)
    scaled = [score / largest for score in scores]  # the sum of huge scores would be inf
    total = math.fsum(scaled)
    return tuple(score / total for score in scaled)


def usable_scores(scores: Mapping[str, float]) -> dict[str, float]:
    """Replace scores that are not finite, or negative, by 0, and log their names."""
    bad = [name for name, score in scores.items() if not (math.isfinite(score) and score >= 0)]
    if bad:
        logger.warning(
            "Importance scores that are not finite and non-negative count as 0: %s",
            ", ".join(f"{name} = {scores[name]}" for name in bad),
        )
    return {name: 0.0 if name in bad else score for name, score in scores.items()}


def _first_tensor(output: object) -> Tensor:
    """The output of a module, or the first item of its tuple or dict (transformers' blocks)."""
    if isinstance(output, Tensor):
        return output
    items = output.values() if isinstance(output, Mapping) else output
    return _first_tensor(next(iter(items)))  # type: ignore[call-overload]


def _to_host(scalars: Sequence[Tensor | None]) -> list[float]:
    """Read scalars with one copy per device; None reads as 0."""
    values = [0.0] * len(scalars)
    by_device: dict[torch.device, list[tuple[int, Tensor]]] = {}
    for i, scalar in enumerate(scalars):
        if scalar is not None:
            by_device.setdefault(scalar.device, []).append((i, scalar))
    for entries in by_device.values():
        together = torch.stack([scalar for _, scalar in entries]).tolist()
        for (i, _), value in zip(entries, together, strict=True):
            values[i] = value
    return values
