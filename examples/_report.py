"""What a script leaves behind: a table, a summary, a plot, and a check of the exported adapter."""

from __future__ import annotations

import json
import os
import platform
import warnings
from collections.abc import Iterable, Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from _monitor import Measurements
from torch import Tensor, nn

PACKAGES = ["dynalora-optim", "torch", "transformers", "datasets", "peft"]
COLOURS = ["tab:blue", "tab:orange", "tab:green"]


def table(runs: Mapping[str, Measurements]) -> str:
    """Lay the runs out side by side, a column each."""
    rows = {
        "": list(runs),
        "held-out accuracy before": [f"{run.accuracy[0]:.3f}" for run in runs.values()],
        "held-out accuracy after": [f"{run.final_accuracy:.3f}" for run in runs.values()],
        "active trainable parameters": [f"{run.mean_updated:,.0f}" for run in runs.values()],
        "seconds per step (median)": [f"{run.median_seconds:.3f}" for run in runs.values()],
        "peak memory of a step (MiB)": [f"{run.peak / 2**20:.1f}" for run in runs.values()],
    }
    return "\n".join(
        f"{label:<28}" + "".join(f"{cell:>12}" for cell in cells) for label, cells in rows.items()
    )


def summary(runs: Mapping[str, Measurements]) -> dict[str, float]:
    """Return the table's numbers by flat keys, such as ``accuracy_lora``."""
    numbers = {"accuracy_before": next(iter(runs.values())).accuracy[0]}
    for name, run in runs.items():
        key = name.lower()
        numbers[f"accuracy_{key}"] = run.final_accuracy
        numbers[f"active_parameters_{key}"] = run.mean_updated
        numbers[f"seconds_per_step_{key}"] = run.median_seconds
        numbers[f"peak_bytes_{key}"] = run.peak
    return numbers


def loss_numbers(before: float, after: float) -> dict[str, float]:
    """Return the held-out losses of a language model, and its perplexities, by flat keys."""
    # Of a loss beyond 709 math.exp would raise.
    perplexities = torch.tensor([before, after], dtype=torch.float64).exp().tolist()
    return {
        "loss_before": before,
        "loss_after": after,
        "perplexity_before": perplexities[0],
        "perplexity_after": perplexities[1],
    }


def loss_cells(numbers: Mapping[str, float]) -> dict[str, str]:
    """Return the rows of a table that show `loss_numbers`."""
    return {
        "held-out loss before": f"{numbers['loss_before']:.3f}",
        "held-out loss after": f"{numbers['loss_after']:.3f}",
        "held-out perplexity before": f"{numbers['perplexity_before']:.1f}",
        "held-out perplexity after": f"{numbers['perplexity_after']:.1f}",
    }


def column(cells: Mapping[str, str]) -> str:
    """Lay out the table of a single run, a line each."""
    return "\n".join(f"{label:<32}{cell:>14}" for label, cell in cells.items())


def versions() -> dict[str, str | int]:
    """Return what the numbers depend on besides the settings."""
    found: dict[str, str | int] = {"python": platform.python_version()}
    found |= {name: installed for name in PACKAGES if (installed := _version(name))}
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else platform.machine()
    return found | {"device": device, "threads": torch.get_num_threads()}


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Write beside ``path`` and rename: a killed run leaves no half of a file."""
    beside = path.with_name(f".{path.name}.{os.getpid()}")
    beside.write_text(json.dumps(content, indent=2, default=str) + "\n", "utf-8")
    beside.replace(path)


def plot_training(runs: Mapping[str, Measurements], path: Path) -> None:
    """Draw loss and held-out accuracy of all runs against steps."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 4), layout="constrained")
    FigureCanvasAgg(figure)
    losses, accuracies = figure.subplots(1, 2)
    for (name, run), colour in zip(runs.items(), COLOURS, strict=False):
        steps = range(1, len(run.loss) + 1)
        losses.plot(steps, run.loss, color=colour, alpha=0.2, linewidth=1)
        losses.plot(steps, _smoothed(run.loss), color=colour, label=name)
        accuracies.plot(
            list(run.accuracy), list(run.accuracy.values()), color=colour, marker="o", label=name
        )
    losses.set(title="Training loss (bold: running mean)", xlabel="step", ylabel="loss")
    accuracies.set(title="Held-out accuracy", xlabel="step", ylabel="accuracy")
    for axes in (losses, accuracies):
        axes.locator_params(axis="x", integer=True)
        axes.grid(alpha=0.3)
        axes.legend()
    figure.savefig(path, dpi=150)


def peft_disagreement(
    model: nn.Module, base: nn.Module, adapter: Path, batches: Iterable[Mapping[str, Tensor]]
) -> float | None:
    """Return how far the logits of peft, reading ``adapter`` onto ``base``, are from ``model``'s.

    Args:
        model: The trained model.
        base: The same pretrained weights, freshly loaded; its head is replaced by the saved one.
        adapter: The folder that `save_adapter` wrote.
        batches: The rows to compare on.

    Returns:
        The largest absolute difference, or None where peft is not installed.
    """
    if _version("peft") is None:
        return None
    from peft import PeftModel

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # peft may call old names of transformers
        theirs = PeftModel.from_pretrained(base, str(adapter)).eval()
    model.eval()
    largest = 0.0
    with torch.no_grad():
        for batch in batches:
            difference = model(**batch).logits - theirs(**batch).logits
            # A NaN must not pass as agreement, and max() would drop it.
            largest = max(largest, float(difference.abs().nan_to_num(torch.inf).max()))
    return largest


def _smoothed(values: Sequence[float], decay: float = 0.9) -> list[float]:
    """An exponential running mean without the pull towards a start at zero."""
    means, total, weight = [], 0.0, 0.0
    for value in values:
        total, weight = decay * total + value, decay * weight + 1
        means.append(total / weight)
    return means


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None
