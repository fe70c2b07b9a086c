"""One run of the sweep: train with a method on a task, evaluate, and measure memory and time."""

from __future__ import annotations

import hashlib
import json
import statistics
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from _batches import length_grouped_batches
from _kinds import Kind, kind_of
from _methods import adapt, build, method
from _models import locate
from _shared import Batch, batched, linear_schedule, pretrained, without_padding
from _store import versions
from _suite import METRICS, recipe
from torch import Tensor, nn
from torch.optim import Optimizer

from dynalora_optim import DynamicAllocationOptimizer, LiveBytes

EVALUATIONS = 4  # per run, on validation rows
QUICK = 128  # validation rows in all evaluations except the last
WEIGHED = 20  # the memory of every 20th step is counted


@dataclass(frozen=True)
class Settings:
    """Everything that a run depends on. Two runs with equal settings are the same run."""

    suite: str
    task: str
    method: str
    lr: float
    seed: int
    model: str
    steps: int
    batch_size: int
    max_length: int
    layers: int | None = None

    @property
    def key(self) -> str:
        """Return a short name for these settings."""
        return hashlib.sha256(json.dumps(asdict(self)).encode()).hexdigest()[:16]


@dataclass
class Work:
    """A task, tokenized for a model."""

    source: str
    kind: Kind
    train: list[Batch]
    validation: list[Batch]
    test: list[Batch]


@lru_cache(maxsize=4)
def prepare(suite: str, name: str, model: str, max_length: int) -> Work:
    """Load and tokenize a task."""
    source = locate(model)
    tokenizer = pretrained("AutoTokenizer", source)
    task = recipe(suite, name).load()
    kind = kind_of(task, tokenizer)

    def encoded(rows: Sequence[Any]) -> list[Batch]:
        return kind.encode(rows, max_length)

    return Work(
        source,
        kind,
        encoded(task.train),
        encoded(task.validation),
        encoded(task.test),
    )


def run(settings: Settings) -> dict[str, Any]:
    """Train and evaluate.

    Returns:
        ``key``, ``settings``, ``versions``; ``evaluations``: step, loss and metrics on validation
        rows, as a list; ``validation`` and ``test``: the metrics on all rows at the end;
        ``predictions``: for the test rows, in their order; ``peak_bytes`` and ``saved_bytes``: the
        largest of the counted steps; ``state_bytes``: the most that the optimizer's state took,
        and ``active_state_bytes``: the most that the state of what was active took, which is all
        that remains on the device if idle states are offloaded; ``held_bytes``: the most that a
        counted step and the state of what was active in it took together; ``active_parameters``:
        mean number of parameters with a gradient; ``trainable_parameters``; ``counts``: active
        steps by module; ``seconds``.
    """
    start = time.perf_counter()
    work = prepare(settings.suite, settings.task, settings.model, settings.max_length)
    loop = Loop(*started(settings, work), settings, work)
    loop.train()
    validation, test = loop.judge(work.validation), loop.judge(work.test)
    loop.close()
    return {
        "key": settings.key,
        "settings": asdict(settings),
        "versions": versions(),
        "processes": loop.accelerator.num_processes,
        "evaluations": loop.evaluations,
        "validation": validation.metrics,
        "validation_loss": validation.loss,
        "test": test.metrics,
        "predictions": test.predictions,
        **loop.used(),
        "seconds": time.perf_counter() - start,
    }


def started(settings: Settings, work: Work) -> tuple[nn.Module, Optimizer]:
    """Return model and optimizer. Head and adapters start with the same weights in all methods."""
    torch.manual_seed(settings.seed)
    model = work.kind.load(work.source, layers=settings.layers)
    chosen = method(settings.method)
    model = adapt(model, chosen)
    if work.kind.mixed_precision == "bf16":
        has_copies = "master_weights" in (chosen.allocation or {})  # in float32, of what trains
        for parameter in model.parameters():
            if has_copies or not parameter.requires_grad:
                parameter.data = parameter.data.bfloat16()
    return model, build(model, chosen, lr=settings.lr, seed=settings.seed)


@dataclass(frozen=True)
class Judged:
    """The evaluation of a model on some rows."""

    loss: float
    metrics: dict[str, float]
    predictions: list[float]


def state_bytes(states: Iterable[Mapping[str, Any]]) -> int:
    """Return the bytes of all tensors in the states of some parameters."""
    return sum(
        value.nbytes for state in states for value in state.values() if isinstance(value, Tensor)
    )


class Loop:
    """A training loop with Accelerate, in one or several processes."""

    def __init__(
        self, model: nn.Module, optimizer: Optimizer, settings: Settings, work: Work
    ) -> None:
        from accelerate import Accelerator

        self.accelerator = Accelerator(mixed_precision=work.kind.mixed_precision)
        self._settings, self._work = settings, work
        self._bare, self._inner = model, optimizer
        processes = self.accelerator.num_processes
        self._steps = round(settings.steps * method(settings.method).longer)
        # Accelerate steps the scheduler once per process in each step.
        scheduler = linear_schedule(optimizer, self._steps * processes)
        self._model, self._optimizer, self._scheduler = self.accelerator.prepare(
            model, optimizer, scheduler
        )
        self._model.train()
        self.evaluations: list[dict[str, float]] = []
        self._updated: list[int] = []
        self._peaks = [0]
        self._held = [0]
        self._saved = [0]
        self._state = [0]
        self._active_state = [0]
        self._seconds: list[float] = []

    def train(self) -> None:
        """Take all steps, with some evaluations."""
        every = max(1, self._steps // EVALUATIONS)
        quick = self._work.validation[:QUICK]
        is_due = False
        for step, batch in enumerate(self.batches(), start=1):
            is_due |= step % WEIGHED == 2
            if is_due:
                before = state_bytes(self._inner.state.values())
                with LiveBytes() as memory:
                    self.step(batch, memory)
                if state_bytes(self._inner.state.values()) == before:  # state is counted apart
                    self._peaks.append(memory.peak)
                    self._held.append(memory.peak + self._active_state[-1])
                    is_due = False
            else:
                start = time.perf_counter()
                self.step(batch)
                self._seconds.append(time.perf_counter() - start)
            if step % every == 0:
                judged = self.judge(quick)
                self.evaluations.append({"step": step, "loss": judged.loss, **judged.metrics})

    def batches(self) -> Iterator[Batch]:
        """Yield the batches of this process, which are the same for every method."""
        processes, place = self.accelerator.num_processes, self.accelerator.process_index
        size = self._settings.batch_size
        whole = length_grouped_batches(
            self._work.train,
            batch_size=size * processes,
            steps=self._steps,
            seed=self._settings.seed,
        )
        for batch in whole:
            mine = {name: field[place * size : (place + 1) * size] for name, field in batch.items()}
            inputs = {name: mine[name] for name in mine if name != "answer"}
            yield self._placed(without_padding(inputs))

    def _placed(self, batch: Batch) -> Batch:
        return {name: field.to(self.accelerator.device) for name, field in batch.items()}

    def step(self, batch: Batch, memory: LiveBytes | None = None) -> None:
        """Take a step. If its memory is being counted, note what it holds."""
        if isinstance(self._inner, DynamicAllocationOptimizer):
            self._inner.tracker.attention_mask = batch["attention_mask"]
        with self.accelerator.autocast():
            loss = self._model(**batch).loss
        if memory is not None:
            self._saved.append(memory.live)
        self.accelerator.backward(loss)
        parameters = [p for group in self._inner.param_groups for p in group["params"]]
        active = [p for p in parameters if p.grad is not None]
        self._updated.append(sum(p.numel() for p in active))
        self._optimizer.step()
        if memory is not None:
            state = self._inner.state
            self._active_state.append(state_bytes(state[p] for p in active))
            self._state.append(state_bytes(state.values()))
        self._scheduler.step()
        self._optimizer.zero_grad()

    @torch.no_grad()
    def judge(self, rows: list[Batch]) -> Judged:
        """Evaluate on the rows, divided among the processes."""
        from accelerate.utils import gather_object

        self._bare.eval()
        places = range(self.accelerator.process_index, len(rows), self.accelerator.num_processes)
        numbered = [{**rows[i], "place": torch.tensor(i)} for i in places]
        found: list[tuple[int, float, float]] = []  # place, prediction, loss
        for batch in batched(numbered):
            place = batch.pop("place").tolist()
            predicted, losses = self._work.kind.predict(self._bare, self._placed(batch))
            found += zip(place, predicted.tolist(), losses.tolist(), strict=True)
        self._bare.train()
        in_order = sorted(gather_object(found))
        labels = np.array([self._work.kind.truth(row) for row in rows])
        predictions = np.array([prediction for _, prediction, _ in in_order])
        names = recipe(self._settings.suite, self._settings.task).metrics
        return Judged(
            statistics.fmean(loss for *_, loss in in_order),
            {name: METRICS[name](labels, predictions) for name in names},
            np.round(predictions, 4).tolist(),
        )

    def close(self) -> None:
        """Release the model, because Accelerate keeps references to what it has prepared."""
        if isinstance(self._inner, DynamicAllocationOptimizer):
            self._inner.close()
        self.accelerator.free_memory()

    def used(self) -> dict[str, Any]:
        """Return the memory, parameters and time of the run."""
        parameters = [p for p in self._bare.parameters() if p.requires_grad]
        dynamic = isinstance(self._inner, DynamicAllocationOptimizer)
        return {
            "peak_bytes": max(self._peaks),
            "saved_bytes": max(self._saved),
            "state_bytes": max(self._state),
            "active_state_bytes": max(self._active_state),
            "held_bytes": max(self._held),
            "active_parameters": statistics.fmean(self._updated),
            "trainable_parameters": sum(p.numel() for p in parameters),
            "seconds_per_step": statistics.median(self._seconds),
            "counts": self._inner.record.counts() if dynamic else {},  # type: ignore[attr-defined]
        }
