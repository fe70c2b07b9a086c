"""transformers' ``Trainer``: how it builds the optimizer, and a callback that reports on it.

The Trainer builds an optimizer late: on its device, from its arguments, after ``model_init``, and
with FSDP from the model that it has prepared, where it refuses a finished one. So it is given a
factory, which it hands the model.
"""

from __future__ import annotations

import inspect
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import nn
from torch.optim import Optimizer
from transformers import Trainer, TrainerCallback, TrainingArguments

from dynalora_optim import DynamicAllocationOptimizer
from dynalora_optim.groups._rules import GroupRule, find_groups

__all__ = ["AllocationCallback", "OptimizerFactory", "dynalora_optimizer"]

logger = logging.getLogger(__name__)

_ALLOCATION_OPTIONS = tuple(inspect.signature(DynamicAllocationOptimizer).parameters)[2:]


def dynalora_optimizer(
    args: TrainingArguments,
    *,
    optimizer_cls: type[Optimizer] | None = None,
    optimizer_kwargs: Mapping[str, Any] | None = None,
    **allocation: Any,
) -> tuple[type[OptimizerFactory], dict[str, Any]]:
    """Return what a ``Trainer`` takes as ``optimizer_cls_and_kwargs``.

    Args:
        args: The Trainer's own. Its ``optim``, ``learning_rate``, ``weight_decay`` and so on mean
            what they always do, and are read when the optimizer is built.
        optimizer_cls: The optimizer to wrap, in place of ``args.optim``. It gets the
            ``learning_rate`` and the ``weight_decay`` of ``args``.
        optimizer_kwargs: More of the wrapped optimizer's options; they win over those of ``args``.
        **allocation: Options of `DynamicAllocationOptimizer`, such as ``active`` and ``period``.

    Raises:
        TypeError: ``args`` or ``optimizer_cls`` is of another kind, or an option is unknown.
        ValueError: ``optimizer_kwargs`` holds what the Trainer decides.

    Example:
        >>> pair = dynalora_optimizer(args, active=2 / 3, period=50)  # doctest: +SKIP
        >>> trainer = Trainer(model, args, optimizer_cls_and_kwargs=pair)  # doctest: +SKIP
    """
    _check_options(args, optimizer_cls, optimizer_kwargs or {}, allocation)
    chosen = {
        "args": args,
        "optimizer_cls": optimizer_cls,
        "optimizer_kwargs": dict(optimizer_kwargs or {}),
    }
    return OptimizerFactory, {**chosen, **allocation}


def _check_options(
    args: object,
    optimizer_cls: object,
    optimizer_kwargs: Mapping[str, Any],
    allocation: Mapping[str, Any],
) -> None:
    if not isinstance(args, TrainingArguments):
        raise TypeError(f"args={args!r} is not a TrainingArguments; pass the Trainer's own.")
    unknown = sorted(allocation.keys() - set(_ALLOCATION_OPTIONS))
    if unknown:
        raise TypeError(
            f"dynalora_optimizer() has no option {unknown[0]!r}; pass some of "
            f"{', '.join(_ALLOCATION_OPTIONS)}, and those of the wrapped optimizer in "
            "optimizer_kwargs."
        )
    if optimizer_cls is not None and not _is_optimizer_class(optimizer_cls):
        raise TypeError(
            f"optimizer_cls={optimizer_cls!r} is not a class of torch optimizers; pass one such as "
            "torch.optim.AdamW, and its options in optimizer_kwargs."
        )
    if "weight_decay" in optimizer_kwargs:
        raise ValueError(
            "optimizer_kwargs holds 'weight_decay', which the Trainer sets per group: set "
            "TrainingArguments(weight_decay=...)."
        )


class OptimizerFactory:
    """Builds a `DynamicAllocationOptimizer` from the model that the Trainer hands it.

    The Trainer creates it without arguments and calls it. `dynalora_optimizer` makes the options.

    Raises:
        NotImplementedError: This version of transformers knows optimizer classes only.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        if args or kwargs:
            raise NotImplementedError(
                "this version of transformers does not hand the model to what builds its "
                "optimizer. Upgrade it, or build the optimizer yourself and pass "
                "optimizers=(optimizer, None) to the Trainer."
            )

    def __call__(
        self,
        model: nn.Module,
        *,
        args: TrainingArguments,
        optimizer_cls: type[Optimizer] | None = None,
        optimizer_kwargs: Mapping[str, Any] | None = None,
        **allocation: Any,
    ) -> DynamicAllocationOptimizer:
        """Return the optimizer of ``model``; the arguments are those of `dynalora_optimizer`.

        Raises:
            ValueError: The optimizer that ``args.optim`` names cannot be wrapped; or as
                `DynamicAllocationOptimizer` does.
        """
        rule = allocation.get("groups", "auto")
        groups = _weight_decay_groups(model, args.weight_decay, rule)
        kind, options = _wrapped_optimizer(args, model, optimizer_cls)
        inner = kind(groups, **{**options, **(optimizer_kwargs or {})})
        return DynamicAllocationOptimizer(inner, model, **allocation)


class AllocationCallback(TrainerCallback):  # type: ignore[misc]  # untyped here
    """Reports on the allocation while a ``Trainer`` trains, and leaves it in ``output_dir``.

    Each training log gets ``active_groups``, how many module groups are active; with a `Budget`
    also ``predicted_peak_bytes``, the most that a step holds, and ``backward_share``, its backward
    FLOPs as a share of those with all active, both with the present choice. They go into the
    ``log_history``, and to the callbacks that come after this one.

    At the end ``output_dir`` has ``allocation.json``, the whole record, and where matplotlib is
    installed ``allocation.png``, the heatmap.
    """

    def on_train_begin(
        self, args: TrainingArguments, state: Any, control: Any, **kwargs: Any
    ) -> None:
        """Raise TypeError if the Trainer's optimizer is another one."""
        _unwrapped(kwargs.get("optimizer"))

    def on_log(
        self,
        args: TrainingArguments,
        state: Any,
        control: Any,
        logs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        """Add to the training logs; those of evaluations are a user's metrics and stay."""
        if not logs or "loss" not in logs:
            return
        numbers = _numbers(_unwrapped(kwargs.get("optimizer")))
        logs.update(numbers)
        if state.log_history and state.log_history[-1].get("step") == state.global_step:
            state.log_history[-1].update(numbers)

    def on_train_end(
        self, args: TrainingArguments, state: Any, control: Any, **kwargs: Any
    ) -> None:
        """Write the record and the heatmap, in the main process."""
        if not state.is_world_process_zero:
            return
        record = _unwrapped(kwargs.get("optimizer")).record
        folder = Path(args.output_dir)
        folder.mkdir(parents=True, exist_ok=True)
        record.to_json(folder / "allocation.json")
        try:
            record.plot(folder / "allocation.png")
        except ImportError as error:
            logger.info("no heatmap of the allocation: %s", error)


def _weight_decay_groups(
    model: nn.Module, weight_decay: float, rule: GroupRule
) -> list[dict[str, Any]]:
    """The Trainer's two groups: what decays, then biases and norms; one that is empty is left out.

    All adapters are held, whatever ``requires_grad`` says of them at the moment.
    """
    adapters = find_groups(model) if rule == "auto" else []
    held = {id(parameter) for group in adapters for parameter in group.parameters()}
    # A method, but of the model alone.
    decaying = set(Trainer.get_decay_parameter_names(None, model))
    named = [(n, p) for n, p in model.named_parameters() if p.requires_grad or id(p) in held]
    groups = [
        {"params": [p for n, p in named if n in decaying], "weight_decay": weight_decay},
        {"params": [p for n, p in named if n not in decaying], "weight_decay": 0.0},
    ]
    return [group for group in groups if group["params"]]


def _wrapped_optimizer(
    args: TrainingArguments, model: nn.Module, optimizer_cls: type[Optimizer] | None
) -> tuple[type[Optimizer], dict[str, Any]]:
    """The optimizer to wrap and its options, as the Trainer would choose them."""
    if optimizer_cls is not None:
        return optimizer_cls, {"lr": args.learning_rate}
    kind, options = Trainer.get_optimizer_cls_and_kwargs(args, model)
    if not _is_optimizer_class(kind) or options.keys() & {"params", "model", "optimizer_dict"}:
        raise ValueError(
            f"args.optim={str(args.optim)!r} makes an optimizer that chooses parameters itself, "
            "so that it cannot be wrapped; take another, such as 'adamw_torch', or pass "
            "optimizer_cls."
        )
    return kind, options


def _is_optimizer_class(kind: object) -> bool:
    return isinstance(kind, type) and issubclass(kind, Optimizer)


def _unwrapped(optimizer: Any) -> DynamicAllocationOptimizer:
    """The optimizer itself, which Accelerate has wrapped."""
    while not isinstance(optimizer, DynamicAllocationOptimizer):
        inner = getattr(optimizer, "optimizer", None)
        if inner is None:
            raise TypeError(
                "AllocationCallback reports on a DynamicAllocationOptimizer, and the Trainer has "
                f"{type(optimizer).__name__}; give it "
                "optimizer_cls_and_kwargs=dynalora_optimizer(args) or optimizers=(optimizer, None)."
            )
        optimizer = inner
    return optimizer


def _numbers(optimizer: DynamicAllocationOptimizer) -> dict[str, float]:
    numbers: dict[str, float] = {"active_groups": len(optimizer.active_groups)}
    try:
        report = optimizer.memory_report()
    except RuntimeError:  # nothing was measured: there is no budget
        return numbers
    numbers["predicted_peak_bytes"] = report.current.peak
    whole = report.all_active.backward_flops
    numbers["backward_share"] = report.current.backward_flops / max(whole, 1)
    return numbers
