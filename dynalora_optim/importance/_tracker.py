"""How important each module is (section 3.1 of the paper).

A measure turns one pass over a module into a number. The `ImportanceTracker` collects these numbers
on their device while the model trains, and copies them to the host once per reallocation.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from dynalora_optim._base.checks import whole_number
from dynalora_optim._base.collectives import whole
from dynalora_optim._base.torch_private import has_child
from dynalora_optim.groups._module_group import ModuleGroup
from dynalora_optim.importance._forward_hook import ForwardHook, Watch
from dynalora_optim.importance._mask import masks_of
from dynalora_optim.importance._measures import (
    ForwardMeasure,
    GradientMeasure,
    ImportanceMeasure,
    as_measure,
)
from dynalora_optim.importance._normalise import normalised, usable_scores
from dynalora_optim.importance._sharing import counts, share_with_ranks, take_counts
from dynalora_optim.importance._unscored import warn_of_evaluation
from dynalora_optim.importance._windows import (
    Window,
    WindowSpec,
    to_host,
    window_maker,
)


class ImportanceTracker:
    """Running importance scores of the module groups of one model.

    Forward passes count while the module is in training mode and gradients are enabled. Evaluation
    does not count, and the recomputation of a checkpointed block is not counted again. Gradients
    are read in ``optimizer.step()``, after unscaling and reduction, before the update. No call
    between two reallocations waits for the device.

    Args:
        measure: ``"forward"`` (`ForwardNorm`), ``"gradient"`` (`GradientNorm`), ``"sensitivity"``
            (`Sensitivity`), or any object with the method of one of these.
        window: ``"run"`` takes all passes so far (equation 1), ``"period"`` those since the last
            reallocation, `Ema` an exponential mean. A forward measure is summed over passes; a
            gradient measure is averaged over the steps in which the module had a gradient.
            Default: the run, or for `Sensitivity` its own smoothing.
        every: Measure only one optimizer step out of this many.
        probe: For a gradient measure: in the first backward pass of each period all modules get a
            gradient. It is scored as soon as it exists (under a ``GradScaler`` it contains the
            scale), and then deleted if the module is inactive. No other pass is measured. Without
            a probe, an inactive module keeps its last score.

    Attributes:
        attention_mask: (batch, tokens), nonzero where a token counts, to leave padding out. It is
            taken from the ``attention_mask`` with which the model is called, by name or by
            position. If you set it, it is used in the next forward pass of the model only.

    Raises:
        TypeError: ``measure`` is neither a name nor a measure.
        ValueError: An unknown name or window, or options that cannot be combined.
    """

    def __init__(
        self,
        measure: str | ImportanceMeasure = "forward",
        *,
        window: WindowSpec | None = None,
        every: int = 1,
        probe: bool = False,
    ) -> None:
        self.measure = as_measure(measure)
        smoothing = getattr(self.measure, "smoothing", None)
        by_gradient = isinstance(self.measure, GradientMeasure)
        self._new_window = window_maker(window, mean=by_gradient, smoothing=smoothing)
        whole_number("every", every, least=1)
        if probe and not by_gradient:
            raise ValueError(
                f"probe=True is for gradient measures; {self.measure!r} scores inactive modules "
                "without it. Leave probe out."
            )
        self.every = every
        self.probe = probe
        self.window = window
        self._windows: dict[str, Window] = {}
        self._handles: list[RemovableHandle] = []
        self._watch = Watch()
        self._has_warned = False

    @property
    def attention_mask(self) -> Tensor | None:
        """The mask of the current batch."""
        return self._watch.mask

    @attention_mask.setter
    def attention_mask(self, mask: Tensor | None) -> None:
        if mask is not None and mask.ndim != 2:
            raise ValueError(
                f"attention_mask of shape {tuple(mask.shape)} must be (batch, tokens); pass the "
                "tokenizer's mask, not an attention bias."
            )
        self._watch.mask = mask

    def follow(self, model: nn.Module) -> None:
        """Take the attention mask of each batch from the call of ``model``."""
        if isinstance(self.measure, ForwardMeasure):
            self._handles += masks_of(model, self._watch)

    def attach(self, groups: Sequence[ModuleGroup]) -> None:
        """Measure the modules of ``groups`` too, in addition to those measured already."""
        for group in groups:
            self._windows[group.name] = self._new_window()
            if isinstance(self.measure, ForwardMeasure):
                for module in group.modules:
                    self._hook(module, group, self.measure)

    def _hook(self, module: nn.Module, group: ModuleGroup, measure: ForwardMeasure) -> None:
        hook = ForwardHook(module, group.slots, measure, self._windows[group.name], self._watch)
        self._handles.append(module.register_forward_hook(hook))
        if getattr(measure, "needs_base_output", False):
            base = cast(nn.Module, module.base_layer)
            self._handles.append(base.register_forward_hook(hook.keep_base_output))

    def check(self, groups: Iterable[ModuleGroup]) -> None:
        """Raise if the measure cannot score one of the modules.

        Raises:
            ValueError: The measure needs the output of a base layer, and a module has none.
        """
        if not getattr(self.measure, "needs_base_output", False):
            return
        for group in groups:
            if not all(has_child(module, "base_layer") for module in group.modules):
                raise ValueError(
                    f"{self.measure!r} subtracts the output of a module's base_layer, which "
                    f"{group.name} lacks; pass part='output'."
                )

    def close(self) -> None:
        """Stop measuring; the scores can still be read."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Measure nothing within this context."""
        enabled, self._watch.enabled = self._watch.enabled, False
        try:
            yield
        finally:
            self._watch.enabled = enabled

    def observe(self, group: ModuleGroup) -> None:
        """Score the gradients that ``group`` has now, if the measure is a gradient measure."""
        if isinstance(self.measure, GradientMeasure):
            parameters = [p for p in group.parameters() if p.grad is not None]
            if parameters:
                score = whole(self.measure.score_gradients(parameters))
                self._watch.passes.add(self._windows[group.name], score)

    def observe_step(self, groups: Iterable[ModuleGroup]) -> None:
        """Score the gradients of the active groups before an update, unless a probe does it."""
        if self._watch.enabled and not self.probe and isinstance(self.measure, GradientMeasure):
            for group in groups:
                self.observe(group)

    def share(self, device: torch.device) -> None:
        """Add this step's scores to the windows, and share the windows with all ranks.

        A window has then the mean over the ranks that have added to it.

        This is done at each step, so that all ranks save the same checkpoint, also within a period.
        """
        self._watch.passes.settle()
        if self._watch.enabled:
            share_with_ranks(list(self._windows.values()), device)

    def end_step(self, step: int) -> None:
        """Tell the tracker that optimizer step number ``step`` (counted from 1) is done."""
        self._watch.enabled = step % self.every == 0
        self._watch.end_step()

    def scores(self) -> dict[str, float]:
        """Return the score y of each group so far (equation 1); 0.0 before the first pass.

        A group that a gradient measure has never scored gets the mean of the groups that it has
        scored, because nothing is known of it. This copies the numbers from their device, and so
        waits for the device.
        """
        return self._scores(self._read())

    def _scores(self, values: Mapping[str, Sequence[float]]) -> dict[str, float]:
        scores = {name: window.score(values[name]) for name, window in self._windows.items()}
        if isinstance(self.measure, GradientMeasure):
            seen = [scores[n] for n, w in self._windows.items() if not w.is_empty]
            usual = math.fsum(seen) / len(seen) if seen else 0.0
            for name, window in self._windows.items():
                if window.is_empty:
                    scores[name] = usual if math.isfinite(usual) else 0.0
        return scores

    def importance(self) -> dict[str, float]:
        """Return the scores normalised to sum to 1 (equation 2); uniform before the first score.

        A score that is not finite counts as 0.
        """
        usable = usable_scores(self.scores())
        return dict(zip(usable, normalised(tuple(usable.values())), strict=True))

    def roll(self) -> dict[str, float]:
        """Begin a new period; return the scores that the reallocation uses."""
        values = self._read()
        scores = self._scores(values)
        self._has_warned = self._has_warned or warn_of_evaluation(self._windows)
        for name, window in self._windows.items():
            window.roll(values[name])
        return scores

    def state_dict(self) -> dict[str, dict[str, Any]]:
        """Return the content of each group's window, as plain values."""
        values = self._read()
        return {name: window.state(values[name]) for name, window in self._windows.items()}

    def new_state(self) -> dict[str, Any]:
        """Return the content of a window that has scored nothing."""
        return self._new_window().state([])

    def check_state(self, state: Mapping[str, Mapping[str, Any]]) -> None:
        """Raise unless each window can load the values that are saved for it.

        Raises:
            ValueError: A window holds another number of values.
        """
        width = self._new_window().width
        for name, values in state.items():
            if len(values["window"]) not in (0, width):
                raise ValueError(
                    f"state_dict has {len(values['window'])} values for the score of {name}, "
                    f"but its window holds {width}."
                )

    def load_state_dict(self, state: Mapping[str, Mapping[str, Any]], *, step: int) -> None:
        """Load what `state_dict` returned after optimizer step ``step``."""
        self._watch.passes.forget()
        for name, window in self._windows.items():
            window.load(state[name])
        self.end_step(step)

    def restart(self) -> None:
        """Forget all scores."""
        self.load_state_dict(dict.fromkeys(self._windows, self.new_state()), step=0)

    def _read(self) -> dict[str, list[float]]:
        self._watch.passes.settle()
        windows = list(self._windows.values())
        passes = counts(windows)
        tensors = [tensor for window in windows for tensor in window.tensors]
        values = to_host([*passes, *tensors])
        rest = iter(values[len(passes) :])
        read = {n: [next(rest) for _ in w.tensors] for n, w in self._windows.items()}
        take_counts(windows, values[: len(passes)])
        return {n: values if self._windows[n].tensors else [] for n, values in read.items()}


def as_tracker(importance: str | ImportanceMeasure | ImportanceTracker) -> ImportanceTracker:
    """Return ``importance`` itself if it is a tracker, else a tracker of that measure.

    Raises:
        ValueError: ``importance`` is an unknown name, or a tracker that another optimizer uses.
        TypeError: ``importance`` is neither a name, nor a measure, nor a tracker.
    """
    if not isinstance(importance, ImportanceTracker):
        return ImportanceTracker(importance)
    if importance.scores():
        raise ValueError(
            "importance is an ImportanceTracker that another optimizer uses for its modules; pass "
            "a new one."
        )
    return importance
