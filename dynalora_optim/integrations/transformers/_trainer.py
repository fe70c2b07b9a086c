"""The factory of the Trainer's optimizer, and the callback."""

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

logger = logging.getLogger(__name__)

_ALLOCATION_OPTIONS = tuple(inspect.signature(DynamicAllocationOptimizer).parameters)[2:]


def dynalora_optimizer(
    args: TrainingArguments,
    *,
    optimizer_cls: type[Optimizer] | None = None,
    optimizer_kwargs: Mapping[str, Any] | None = None,
    **allocation: Any,
) -> tuple[type[OptimizerFactory], dict[str, Any]]:
    """Return the value for ``optimizer_cls_and_kwargs`` of a ``Trainer``.

    Args:
        args: The Trainer's own arguments. Its ``optim``, ``learning_rate``, ``weight_decay`` and so
            on have their usual meaning, and are read when the optimizer is built.
        optimizer_cls: The optimizer to wrap, in place of ``args.optim``. It gets the
            ``learning_rate`` and the ``weight_decay`` of ``args``.
        optimizer_kwargs: More options of the wrapped optimizer; they replace those of ``args``.
        **allocation: Options of `DynamicAllocationOptimizer`, such as ``active`` and ``period``.

    Raises:
        TypeError: ``args`` or ``optimizer_cls`` is of another kind, or an option is unknown.
        ValueError: ``optimizer_kwargs`` has an option that the Trainer sets.

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
    """Builds a `DynamicAllocationOptimizer` for the model that the Trainer passes to it.

    The Trainer creates the factory without arguments, and calls it with the model and the options
    from `dynalora_optimizer`.

    Raises:
        NotImplementedError: This version of transformers accepts optimizer classes only.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        if args or kwargs:
            raise NotImplementedError(
                "this version of transformers does not pass the model to the factory of its "
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
            ValueError: The optimizer that ``args.optim`` names cannot be wrapped; or for a reason
                that `DynamicAllocationOptimizer` describes.
        """
        rule = allocation.get("groups", "auto")
        groups = _weight_decay_groups(model, args.weight_decay, rule)
        kind, options = _wrapped_optimizer(args, model, optimizer_cls)
        inner = kind(groups, **{**options, **(optimizer_kwargs or {})})
        return DynamicAllocationOptimizer(inner, model, **allocation)


class AllocationCallback(TrainerCallback):  # type: ignore[misc]  # untyped here
    """Reports on the allocation while a ``Trainer`` trains, and saves it in ``output_dir``.

    Each training log gets ``active_groups``, the number of active module groups. With a `Budget` it
    also gets ``predicted_peak_bytes``, the most bytes that a step holds, and ``backward_share``,
    the backward FLOPs as a share of those with all modules active; both are for the current choice.
    They are added to the ``log_history``, and callbacks after this one receive them.

    At the end ``output_dir`` contains ``allocation.json``, the whole record, and, if matplotlib is
    installed, ``allocation.png``, the heatmap.
    """

    def on_train_begin(
        self, args: TrainingArguments, state: Any, control: Any, **kwargs: Any
    ) -> None:
        """Raise TypeError if the Trainer has another kind of optimizer."""
        _unwrapped(kwargs.get("optimizer"))

    def on_log(
        self,
        args: TrainingArguments,
        state: Any,
        control: Any,
        logs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        """Add numbers to the training logs; evaluation logs, the user's metrics, do not change."""
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
    """Return the Trainer's two groups: with weight decay, and without (biases and norms).

    An empty group is left out. All adapter parameters are included, even if their
    ``requires_grad`` is False at the moment.
    """
    adapters = find_groups(model) if rule == "auto" else []
    held = {id(parameter) for group in adapters for parameter in group.parameters()}
    # A method of the Trainer that uses only its argument.
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
    """Return the optimizer to wrap and its options, as the Trainer would choose them."""
    if optimizer_cls is not None:
        return optimizer_cls, {"lr": args.learning_rate}
    kind, options = Trainer.get_optimizer_cls_and_kwargs(args, model)
    if not _is_optimizer_class(kind) or options.keys() & {"params", "model", "optimizer_dict"}:
        raise ValueError(
            f"args.optim={str(args.optim)!r} makes an optimizer that chooses parameters itself, "
            "so that it cannot be wrapped; pass another, such as 'adamw_torch', or pass "
            "optimizer_cls."
        )
    return kind, options


def _is_optimizer_class(kind: object) -> bool:
    return isinstance(kind, type) and issubclass(kind, Optimizer)


def _unwrapped(optimizer: Any) -> DynamicAllocationOptimizer:
    """Return the optimizer itself, which Accelerate has wrapped."""
    while not isinstance(optimizer, DynamicAllocationOptimizer):
        inner = getattr(optimizer, "optimizer", None)
        if inner is None:
            raise TypeError(
                "AllocationCallback reports on a DynamicAllocationOptimizer, but the Trainer has "
                f"{type(optimizer).__name__}; pass to the Trainer "
                "optimizer_cls_and_kwargs=dynalora_optimizer(args) or optimizers=(optimizer, None)."
            )
        optimizer = inner
    return optimizer


def _numbers(optimizer: DynamicAllocationOptimizer) -> dict[str, float]:
    numbers: dict[str, float] = {"active_groups": len(optimizer.active_groups)}
    try:
        report = optimizer.memory_report()
    except RuntimeError:  # nothing was measured, because there is no budget
        return numbers
    numbers["predicted_peak_bytes"] = report.current.peak
    whole = report.all_active.backward_flops
    numbers["backward_share"] = report.current.backward_flops / max(whole, 1)
    return numbers
