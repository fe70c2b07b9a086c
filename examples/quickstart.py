"""Fine-tune a small classifier with LoRA, with DynaLoRA, and on a budget, side by side.

    python examples/quickstart.py                        # all-MiniLM-L6-v2 on Rotten Tomatoes
    python examples/quickstart.py --model roberta-base --data my-texts.csv --length 128 --lr 5e-4

The methods differ in one line of the training loop; `plain_loop.py` has only that loop.

The three methods take turns, step by step, so other work on the machine slows all three equally.
Each has its own model, optimizer, batches and random numbers, so its result is the same as alone.
"""

from __future__ import annotations

import json
import statistics
import sys
import time
import warnings
from argparse import Namespace
from collections.abc import Callable, Mapping, Sequence
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from _assets import CLASSIFIER
from _common import (
    DEVICE,
    Batch,
    Sentences,
    accuracy,
    head_modules,
    linear_schedule,
    parser,
    placed,
    positive,
    share,
    training_batches,
)
from torch.nn import Module
from torch.optim import Optimizer
from tqdm.auto import tqdm

from dynalora_adapters import LoRAConfig, inject, save_adapter
from dynalora_optim import Budget, DynamicAllocationOptimizer, LiveBytes

EVALUATIONS = 2  # per run, on the held-out rows
WEIGHED = 10  # the memory of every 10th step is counted; the others are timed
TOLERANCE = 1e-5  # for the difference between peft's logits and ours


def adapted(sentences: Sentences, options: Namespace) -> Module:
    """Put a LoRA adapter on every target of the pretrained model. Each call gives equal weights."""
    model = sentences.classifier(options.seed, **blocks_kept(options))
    config = LoRAConfig(
        rank=options.rank,
        alpha=2 * options.rank,
        targets=options.targets,
        trainable=head_modules(model),
    )
    return inject(model, config)


def blocks_kept(options: Namespace) -> dict[str, int]:
    """Return the changes to the pretrained model's configuration that --layers asks for."""
    return {} if options.layers is None else {"num_hidden_layers": options.layers}


def methods(options: Namespace) -> dict[str, dict[str, Any] | None]:
    """Return the options of DynamicAllocationOptimizer by method; None: plain LoRA."""
    budget = Budget(memory=options.memory, compute=options.compute)
    return {"LoRA": None, "DynaLoRA": {"active": options.active}, "Budget": {"allocator": budget}}


class Run:
    """The training of one method, with what was measured in its steps."""

    def __init__(self, method: str, sentences: Sentences, options: Namespace) -> None:
        self.loss: list[float] = []
        self.accuracy: dict[int, float] = {}  # steps done -> accuracy on held-out rows
        self.seconds: list[float] = []  # of the timed steps
        self.peaks: list[int] = []  # most bytes alive, of the counted steps
        self.updated: list[int] = []  # parameters with a gradient, by step
        self.model = adapted(sentences, options).train()
        optimizer: Optimizer = torch.optim.AdamW(self.model.parameters(), lr=options.lr)
        if (chosen := methods(options)[method]) is not None:
            # The one line that differs. Nothing below depends on it.
            optimizer = DynamicAllocationOptimizer(
                optimizer, self.model, period=options.period, seed=options.seed, **chosen
            )
        self.optimizer = optimizer
        self.scheduler = linear_schedule(optimizer, options.steps)
        self._batches = training_batches(
            sentences.train, batch_size=options.batch_size, steps=options.steps, seed=options.seed
        )
        self._random = random_state()

    def step(self, batch: Batch) -> None:
        """Train on a batch, as in any training loop."""
        loss = self.model(**batch).loss
        loss.backward()
        self.updated.append(sum(p.numel() for p in self.model.parameters() if p.grad is not None))
        self.optimizer.step()
        self.scheduler.step()
        self.optimizer.zero_grad()
        self.loss.append(loss.item())

    def turn(self) -> None:
        """Take the next step, and measure it."""
        set_random_state(self._random)
        batch = placed(next(self._batches))
        if len(self.loss) % WEIGHED == 0:
            with LiveBytes() as memory:
                self.step(batch)
            self.peaks.append(memory.peak)
        else:
            start = clock()
            self.step(batch)
            self.seconds.append(clock() - start)
        self._random = random_state()


def random_state() -> tuple[torch.Tensor, list[torch.Tensor]]:
    """Return the state of PyTorch's random generators, which dropout uses."""
    return torch.get_rng_state(), torch.cuda.get_rng_state_all()


def set_random_state(state: tuple[torch.Tensor, list[torch.Tensor]]) -> None:
    torch.set_rng_state(state[0])
    torch.cuda.set_rng_state_all(state[1])


def clock() -> float:
    """Return the CPU time of this process, or the wall-clock time on a GPU."""
    if DEVICE == "cpu":
        return time.process_time()
    torch.cuda.synchronize()
    return time.perf_counter()


def compare(sentences: Sentences, options: Namespace) -> dict[str, Run]:
    """Train with all methods. They take turns, step by step."""
    held_out = [placed(batch) for batch in sentences.held_out]
    runs = {method: Run(method, sentences, options) for method in methods(options)}
    before = accuracy(next(iter(runs.values())).model, held_out)  # all start from the same weights
    for run in runs.values():
        run.accuracy[0] = before
    every = max(1, options.steps // EVALUATIONS)
    seconds = 0.1 if sys.stderr.isatty() else 10  # few lines in a log file
    with tqdm(range(1, options.steps + 1), mininterval=seconds, unit="step") as bar:
        for step in bar:
            for run in runs.values():
                run.turn()
            if step % every == 0 or step == options.steps:
                for run in runs.values():
                    run.accuracy[step] = accuracy(run.model, held_out)
            recent = {name: f"{statistics.fmean(run.loss[-20:]):.3f}" for name, run in runs.items()}
            bar.set_postfix(recent, refresh=False)
    return runs


def numbers(run: Run) -> dict[str, float]:
    """Return the results of a run, by name."""
    return {
        "accuracy": run.accuracy[len(run.loss)],
        "active_parameters": statistics.fmean(run.updated),
        "seconds_per_step": statistics.median(run.seconds),
        "peak_bytes": max(run.peaks),
    }


def table(runs: Mapping[str, Run]) -> str:
    """Return a table with one column per run."""
    unit = "CPU seconds" if DEVICE == "cpu" else "seconds"
    columns = {name: (run.accuracy[0], *numbers(run).values()) for name, run in runs.items()}
    rows: dict[str, Callable[[float], str]] = {
        "held-out accuracy before": lambda x: f"{x:.3f}",
        "held-out accuracy after": lambda x: f"{x:.3f}",
        "active trainable parameters": lambda x: f"{x:,.0f}",
        f"{unit} per step (median)": lambda x: f"{x:.3f}",
        "peak memory of a step (MiB)": lambda x: f"{x / 2**20:.1f}",
    }
    lines = [f"{'':<32}" + "".join(f"{name:>12}" for name in columns)]
    for i, (label, shown) in enumerate(rows.items()):
        cells = (f"{shown(column[i]):>12}" for column in columns.values())
        lines.append(f"{label:<32}" + "".join(cells))
    return "\n".join(lines)


def plot(runs: Mapping[str, Run], path: Path) -> None:
    """Plot loss and held-out accuracy of all runs over the steps."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 4), layout="constrained")
    FigureCanvasAgg(figure)
    losses, accuracies = figure.subplots(1, 2)
    for name, run in runs.items():
        means = [statistics.fmean(run.loss[max(0, i - 19) : i + 1]) for i in range(len(run.loss))]
        losses.plot(range(1, len(means) + 1), means, label=name)
        accuracies.plot([*run.accuracy], [*run.accuracy.values()], marker="o", label=name)
    losses.set(title="Training loss (mean of 20 steps)", xlabel="step")
    accuracies.set(title="Held-out accuracy", xlabel="step")
    losses.legend()
    figure.savefig(path, dpi=150)


def peft_difference(model: Module, base: Module, adapter: Path, held_out: list[Batch]) -> float:
    """Return the largest difference of logits: peft with ``adapter`` on ``base``, and ``model``."""
    from peft import PeftModel

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # peft may call old names of transformers
        theirs = PeftModel.from_pretrained(base, str(adapter)).eval()
    model.eval()
    largest = 0.0
    with torch.no_grad():
        for batch in map(placed, held_out):
            difference = model(**batch).logits - theirs(**batch).logits
            # NaN must not count as agreement; max() would ignore it.
            largest = max(largest, float(difference.abs().nan_to_num(torch.inf).max()))
    return largest


def export(model: Module, sentences: Sentences, options: Namespace) -> float | None:
    """Save the adapter. Print and return how much the logits differ when peft loads it."""
    adapter = options.output / "adapter"
    save_adapter(model, adapter)
    if find_spec("peft") is None:
        print("peft check: skipped, peft is not installed")
        return None
    # Another seed gives another head, so the trained head must come from the file.
    base = sentences.classifier(options.seed + 1, **blocks_kept(options))
    found = peft_difference(model, base, adapter, sentences.held_out)
    verdict = "agree with" if found <= TOLERANCE else "DIFFER from"
    print(f"peft check: its logits {verdict} ours on the held-out rows (at most {found:.1e})")
    return found


def parse(arguments: Sequence[str] | None) -> Namespace:
    """Read the command line: the options of all examples, and those of this one."""
    reader = parser(
        __doc__,
        model=CLASSIFIER,
        steps=150,
        batch_size=16,
        length=40,
        lr=4e-3,
        period=10,
        output=Path("runs/quickstart"),
    )
    add = reader.add_argument
    add("--targets", nargs="+", default=["query", "value"], metavar="NAME", help="layers to adapt")
    add("--layers", type=positive, help="use only this many blocks, for a quick try")
    add("--rank", type=positive, default=8, help="rank of each adapter; alpha is twice that")
    add("--active", type=share, default=2 / 3, help="active modules: a number or a share, 2/3")
    add("--memory", type=float, default=0.40, help="the Budget's share of LoRA's peak")
    add("--compute", type=float, default=0.6, help="the Budget's share of LoRA's backward pass")
    return reader.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the comparison. Return 1 if peft's logits differ from ours, else 0."""
    start, cpu = time.perf_counter(), time.process_time()
    options = parse(arguments)
    output: Path = options.output
    torch.set_num_threads(min(4, torch.get_num_threads()))  # more do not help small batches
    try:
        sentences = Sentences.load(options)
        runs = compare(sentences, options)
        output.mkdir(parents=True, exist_ok=True)
    except (OSError, ValueError) as error:
        sys.exit(f"quickstart: {error}")

    for name, run in runs.items():
        if isinstance(run.optimizer, DynamicAllocationOptimizer):
            run.optimizer.record.plot(output / f"allocation-{name.lower()}.png")
            run.optimizer.close()
    plot(runs, output / "training.png")
    print(table(runs))
    difference = export(runs["Budget"].model, sentences, options)
    found: dict[str, Any] = {
        "accuracy_before": runs["LoRA"].accuracy[0],
        **{f"{key}_{name.lower()}": n for name, r in runs.items() for key, n in numbers(r).items()},
        "peft_difference": difference,
        "seconds": time.perf_counter() - start,
        "cpu_seconds": time.process_time() - cpu,
        "settings": vars(options),
        "versions": {name: version(name) for name in ("torch", "transformers")},
    }
    (output / "summary.json").write_text(json.dumps(found, indent=2, default=str), "utf-8")
    print(f"{found['seconds']:.0f} seconds ({found['cpu_seconds']:.0f} of CPU time); ", end="")
    print(f"results in {output}/")
    return int(difference is not None and difference > TOLERANCE)


if __name__ == "__main__":
    sys.exit(main())
