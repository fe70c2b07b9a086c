"""Measuring a training loop from outside, so that the loop itself stays plain PyTorch."""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from tqdm.auto import tqdm

from dynalora_optim import LiveBytes

EVALUATIONS = 5  # on the held-out rows, over a run
WEIGHED = 10  # one step in so many is weighed


@torch.no_grad()
def accuracy(model: nn.Module, batches: Iterable[Mapping[str, Tensor]]) -> float:
    """Return the share of rows whose largest logit is the label's; the mode is put back after."""
    training = model.training
    model.eval()
    right = total = 0
    for batch in batches:
        right += int((model(**batch).logits.argmax(-1) == batch["labels"]).sum())
        total += len(batch["labels"])
    model.train(training)
    return right / total


@dataclass
class Measurements:
    """What a run was like, step by step."""

    loss: list[float] = field(default_factory=list)
    accuracy: dict[int, float] = field(default_factory=dict)  # steps done -> on the held-out rows
    seconds: list[float] = field(default_factory=list)  # of the steps that were only timed
    updated: list[int] = field(default_factory=list)  # parameters that the step had a gradient for
    peaks: list[int] = field(default_factory=list)  # most bytes alive, of the steps weighed

    @property
    def final_accuracy(self) -> float:
        return self.accuracy[max(self.accuracy)]

    @property
    def median_seconds(self) -> float:
        return statistics.median(self.seconds)

    @property
    def mean_updated(self) -> float:
        return statistics.fmean(self.updated)

    @property
    def peak(self) -> int:
        return max(self.peaks)


class Monitor:
    """Watches a training loop through the batches it draws and through hooks.

    What the loop does with a batch is one step. Every tenth step is weighed (the bytes alive in it
    are counted) and not timed; every other step is timed and not weighed.

    Args:
        model: Its forward returns ``loss`` and ``logits``.
        optimizer: Any torch optimizer; ``active_groups`` is read where it exists.
        evaluate: Returns the held-out accuracy; called outside the timed steps.
        steps: How many steps the loop will take.
    """

    def __init__(
        self, model: nn.Module, optimizer: Optimizer, evaluate: Callable[[], float], *, steps: int
    ) -> None:
        self.measured = Measurements()
        self._model, self._optimizer = model, optimizer
        self._evaluate, self._steps = evaluate, steps
        self._modules = sum(hasattr(module, "adapter_params") for module in model.modules())
        self._right: list[float] = []  # training accuracy per step

    def watch(
        self, batches: Iterable[Mapping[str, Tensor]], label: str
    ) -> Iterator[Mapping[str, Tensor]]:
        """Yield the batches, measure what is done with each, and show it beside ``label``."""
        self.measured.accuracy[0] = self._evaluate()
        every = max(1, self._steps // EVALUATIONS)
        seconds = 0.1 if sys.stderr.isatty() else 10  # a log file wants few lines
        progress = tqdm(batches, total=self._steps, desc=label, mininterval=seconds)
        with self._hooks(), progress as bar:
            for step, batch in enumerate(bar, start=1):
                yield from self._one_step(batch, weigh=step % WEIGHED == 1)
                bar.set_postfix(self._postfix(), refresh=False)
                if step % every == 0 or step == self._steps:
                    self.measured.accuracy[step] = self._evaluate()

    def _one_step(
        self, batch: Mapping[str, Tensor], *, weigh: bool
    ) -> Iterator[Mapping[str, Tensor]]:
        if weigh:
            with LiveBytes() as memory:
                yield batch
            self.measured.peaks.append(memory.peak)
        else:
            start = time.perf_counter()
            yield batch
            self.measured.seconds.append(time.perf_counter() - start)

    @contextmanager
    def _hooks(self) -> Iterator[None]:
        with (
            self._model.register_forward_hook(self._after_forward, with_kwargs=True),
            self._optimizer.register_step_pre_hook(self._before_step),
        ):
            yield

    def _after_forward(
        self, module: nn.Module, args: object, batch: Mapping[str, Tensor], output: Any
    ) -> None:
        if module.training:
            self.measured.loss.append(output.loss.item())
            right = output.logits.detach().argmax(-1) == batch["labels"]
            self._right.append(right.float().mean().item())

    def _before_step(self, optimizer: Optimizer, args: object, kwargs: object) -> None:
        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        self.measured.updated.append(sum(p.numel() for p in parameters if p.grad is not None))

    def _active(self) -> tuple[str, ...]:
        return tuple(getattr(self._optimizer, "active_groups", ()))

    def _postfix(self) -> dict[str, str]:
        return {
            "loss": f"{_recent(self.measured.loss):.3f}",
            "accuracy": f"{_recent(self._right):.3f}",
            "active": f"{len(self._active()) or self._modules}/{self._modules}",
        }


def _recent(values: Sequence[float], count: int = 20) -> float:
    return statistics.fmean(values[-count:])
