"""The ways to train all parameters: what each can be told, and the optimizer that it comes to."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from _setup import TextSettings, positive, text_parser
from torch import nn
from torch.optim import AdamW, Optimizer

from dynalora_optim import Blocks, DynamicAllocationOptimizer, badam, lisa

PERIOD = 2
BY_BLOCKS = {"period", "outside", "idle_state", "checkpoint_idle", "fused_backward"}
TAKES = {
    "adamw": frozenset[str](),
    "badam": BY_BLOCKS | {"order"},
    "lisa": BY_BLOCKS | {"layers"},
    "blocks": BY_BLOCKS | {"layers"},
}
# Starting points, for the default model and text; --lr tries others.
RATES = {"adamw": 1e-4, "badam": 1e-3, "lisa": 3e-4, "blocks": 1e-3}


@dataclass(frozen=True)
class Settings(TextSettings):
    """The command line; None stands for what the method does by itself.

    Raises:
        ValueError: Options that do not go together.
    """

    method: str
    lr: float | None
    dtype: str
    rounding: str | None
    layers: int | None
    order: str | None
    period: int | None
    outside: str | None
    idle_state: str | None
    checkpoint_idle: bool | None
    fused_backward: bool | None

    def __post_init__(self) -> None:
        if self.steps < 2:
            raise ValueError(f"--steps {self.steps} must be 2 at least: one is timed, one weighed")
        if self.length < 2:
            raise ValueError(f"--length {self.length} must be 2 at least: a token to predict one")
        if refused := sorted(self._given().keys() - TAKES[self.method]):
            raise ValueError(f"--method {self.method} takes no --{refused[0].replace('_', '-')}")
        if self.rounding is not None and self.dtype != "bfloat16":
            raise ValueError("--rounding is of weights in bfloat16: pass --dtype bfloat16 as well")

    def _given(self) -> dict[str, Any]:
        named = sorted(BY_BLOCKS | {"order", "layers"})
        return {name: value for name in named if (value := getattr(self, name)) is not None}

    def options(self) -> dict[str, Any]:
        """Return what the method's optimizer is told."""
        given = self._given()
        if (outside := given.pop("outside", None)) is not None:
            given["groups"] = Blocks(outside=outside)
        if self.dtype == "bfloat16":
            given["master_weights"] = self.rounding or "nearest"
        return {"period": PERIOD, "seed": self.seed, **given}


def optimizer_for(model: nn.Module, settings: Settings) -> Optimizer:
    """Return the method's optimizer over all parameters of ``model``.

    AdamW alone would lose most updates of weights in bfloat16: it gets float32 copies there too.

    Raises:
        ValueError: They do not go together, such as more layers than there are.
    """
    rate = RATES[settings.method] if settings.lr is None else settings.lr
    adamw = AdamW(model.parameters(), lr=rate)
    options = settings.options()
    if settings.method == "badam":
        return badam(model, adamw, **options)
    if settings.method == "lisa":
        return lisa(model, adamw, **options)
    if settings.method == "blocks":
        options["active"] = options.pop("layers", 2)
        return DynamicAllocationOptimizer(
            adamw, model, **{"groups": Blocks(outside="frozen"), **options}
        )
    if settings.dtype == "float32":
        return adamw
    return DynamicAllocationOptimizer(adamw, model, groups="blocks", active=1.0, **options)


def parse(arguments: Sequence[str] | None, description: str) -> Settings:
    """Read the command line.

    Raises:
        ValueError: Options that do not go together.
    """
    parser = text_parser(description, "runs/full", steps=60)
    add = parser.add_argument
    add(
        "--method",
        choices=sorted(TAKES),
        default="badam",
        help="adamw: everything in every step; badam: one block at a time; lisa: blocks drawn "
        "at random, and what is outside of them; blocks: those of importance",
    )
    add("--lr", type=float, help="peak learning rate; None: by method")
    add("--dtype", choices=("float32", "bfloat16"), default="float32", help="of the weights")
    add("--rounding", choices=("nearest", "stochastic"), help="of bfloat16 weights that pause")
    add("--layers", type=positive, help="blocks at a time, of lisa and blocks; None: 2")
    add(
        "--order",
        choices=("ascending", "descending", "random"),
        help="of badam's blocks; None: descending",
    )
    add("--period", type=positive, help=f"steps between two choices of blocks; None: {PERIOD}")
    add(
        "--outside",
        choices=("frozen", "always_active", "allocated"),
        help="embeddings, head and the like; None: always_active for lisa, else frozen",
    )
    add(
        "--idle-state",
        choices=("keep", "offload", "drop"),
        help="the optimizer state of a block that pauses; None: drop for badam, else keep",
    )
    add("--checkpoint-idle", action="store_true", default=None, help="recompute idle blocks")
    add(
        "--fused-backward",
        action="store_true",
        default=None,
        help="update within the backward pass, a gradient at a time",
    )
    return Settings(**vars(parser.parse_args(arguments)))
