"""A run of `full_finetune.py`: what trains, what it has come to, and its checkpoint."""

from __future__ import annotations

import math
import pickle
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from _full_methods import Settings
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

from dynalora_optim import DynamicAllocationOptimizer

NO_MATTER = ("output", "save_every")  # to what a run comes to


@dataclass
class Progress:
    """What the steps so far were like; part of a checkpoint, since the table is on all of them."""

    loss_before: float = math.nan
    losses: list[float] = field(default_factory=list)  # in training
    trained: list[int] = field(default_factory=list)  # parameters that the step could move
    weighed: list[tuple[int, ...]] = field(default_factory=list)  # one StepMemory a period
    seconds: list[float] = field(default_factory=list)  # of the other steps

    def loss(self, output: Any) -> Tensor:
        """Return the loss in what the model returned, and take note of it."""
        loss: Tensor = output.loss
        self.losses.append(loss.item())
        return loss


@dataclass
class Run:
    """What trains, and what it has come to."""

    model: nn.Module
    optimizer: Optimizer
    scheduler: LambdaLR
    progress: Progress = field(default_factory=Progress)

    @property
    def trained_parameters(self) -> int:
        """How many parameters the next step can move."""
        if isinstance(self.optimizer, DynamicAllocationOptimizer):
            return sum(parameter.numel() for parameter in self.optimizer.active_parameters())
        return sum(parameter.numel() for parameter in self.model.parameters())


def checkpoint_of(settings: Settings) -> Path:
    return settings.output / "checkpoint.pt"


def identity(settings: Settings) -> dict[str, str]:
    """Return what the two halves of a run must share."""
    return {k: str(v) for k, v in asdict(settings).items() if k not in NO_MATTER}


def save(run: Run, settings: Settings) -> None:
    """Write the checkpoint beside and rename it, so that a killed run leaves no half of one."""
    state = {
        "settings": identity(settings),
        "model": run.model.state_dict(),
        "optimizer": run.optimizer.state_dict(),
        "scheduler": run.scheduler.state_dict(),
        "random": torch.get_rng_state(),
        "random_cuda": torch.cuda.get_rng_state_all(),
        "progress": asdict(run.progress),
    }
    beside = settings.output / ".checkpoint.tmp"
    torch.save(state, beside)
    beside.replace(checkpoint_of(settings))


def resume(run: Run, settings: Settings) -> None:
    """Put ``run`` where its checkpoint is.

    Raises:
        ValueError: The file is no checkpoint, or that of a run with other settings.
    """
    path = checkpoint_of(settings)
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
        saved = state["settings"]
    except (EOFError, KeyError, RuntimeError, pickle.UnpicklingError) as error:
        raise ValueError(f"{path} is no checkpoint of this script; remove it") from error
    for name, value in identity(settings).items():
        if saved.get(name) != value:
            found = f"{path} is of a run with {name}={saved.get(name)}, not {value}"
            raise ValueError(f"{found}; remove it, or pass another --output")
    run.model.load_state_dict(state["model"])
    run.optimizer.load_state_dict(state["optimizer"])
    run.scheduler.load_state_dict(state["scheduler"])
    torch.set_rng_state(state["random"])
    torch.cuda.set_rng_state_all(state["random_cuda"])
    run.progress = Progress(**state["progress"])
