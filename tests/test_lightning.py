"""Lightning: what its users do, with the real package, beside the plain optimizer."""

from __future__ import annotations

import copy
import logging
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.optim import AdamW, lr_scheduler
from torch.utils.data import DataLoader
from toy import ToyModel, batch, same, weights

from dynalora_optim import DynamicAllocationOptimizer

pl = pytest.importorskip("lightning.pytorch")
callbacks = pytest.importorskip("lightning.pytorch.callbacks")
loggers = pytest.importorskip("lightning.pytorch.loggers")
fabric = pytest.importorskip("lightning.fabric")

for name in ("lightning.pytorch", "lightning.fabric"):
    logging.getLogger(name).setLevel(logging.ERROR)
pytestmark = pytest.mark.filterwarnings("ignore")
Plain = type(None)


class Task(pl.LightningModule):
    """A model with two param groups, of which one has no weight decay, and a scheduler."""

    def __init__(self, options: dict[str, Any] | None, manual: bool = False) -> None:
        super().__init__()
        self.model = ToyModel()
        self.options = options
        self.automatic_optimization = not manual

    def training_step(self, x: torch.Tensor, index: int) -> torch.Tensor:
        loss = self.model(x).square().mean()
        if not self.automatic_optimization:
            optimizer, scheduler = self.optimizers(), self.lr_schedulers()
            optimizer.zero_grad()
            self.manual_backward(loss)
            self.clip_gradients(optimizer, 1.0, "norm")
            optimizer.step()
            scheduler.step()
        return loss

    def inner(self) -> torch.optim.Optimizer:
        named = [(n, p) for n, p in self.model.named_parameters() if p.requires_grad]
        decay = [p for n, p in named if not n.endswith("bias")]
        rest = [p for n, p in named if n.endswith("bias")]
        return AdamW([{"params": decay}, {"params": rest, "weight_decay": 0.0}], lr=0.02)

    def configure_optimizers(self) -> Any:
        optimizer = self.inner()
        if self.options is not None:
            optimizer = DynamicAllocationOptimizer(optimizer, self.model, **self.options)
        scheduler = lr_scheduler.LambdaLR(optimizer, [lambda s: 0.9**s, lambda s: 0.8**s])
        return [optimizer], [{"scheduler": scheduler, "interval": "step"}]


def trainer(folder: Path, **options: Any) -> Any:
    return pl.Trainer(
        **{
            "max_epochs": 2,
            "accelerator": "cpu",
            "logger": False,
            "enable_checkpointing": False,
            "enable_progress_bar": False,
            "enable_model_summary": False,
            "default_root_dir": folder,
            "gradient_clip_val": 1.0,
            **options,
        }
    )


def loader() -> DataLoader:
    return DataLoader([batch(step)[0] for step in range(20)], batch_size=4)


def fitted(folder: Path, options: Any, manual: bool = False, fits: int = 1, **more: Any) -> Task:
    task = Task(options, manual)
    for _ in range(fits):
        if manual:
            more["gradient_clip_val"] = None
        trainer(folder, **more).fit(task, loader())
    return task


@pytest.mark.parametrize("fits", [1, 2])
@pytest.mark.parametrize("manual", [False, True])
def test_all_active_is_the_plain_optimizer(manual, fits, tmp_path):
    plain = fitted(tmp_path, None, manual, fits)
    ours = fitted(tmp_path, {"active": 1.0}, manual, fits)
    assert same(weights(plain.model), weights(ours.model))
    assert not same(weights(plain.model), weights(ToyModel()))


def test_accumulation_and_a_monitor_see_the_users_groups(tmp_path):
    rows = []
    for options in (None, {"active": 1.0}):
        logger = loggers.CSVLogger(tmp_path / str(len(rows)))
        monitor = callbacks.LearningRateMonitor(log_weight_decay=True)
        task = fitted(
            tmp_path,
            options,
            logger=logger,
            callbacks=[monitor],
            log_every_n_steps=1,
            accumulate_grad_batches=2,
        )
        names = [n.replace("DynamicAllocationOptimizer", "AdamW") for n in monitor.lrs]
        rows.append((names, list(monitor.lrs.values()), weights(task.model)))
    (names, rates, expected), (others, theirs, found) = rows
    assert names == others == ["lr-AdamW/pg1", "lr-AdamW/pg2"]
    assert rates == theirs
    assert len(rates[0]) > 3
    assert same(expected, found)


@pytest.mark.parametrize("options", [None, {"active": 2, "period": 2, "allocator": "round_robin"}])
def test_a_checkpoint_resumes_bit_for_bit(options, tmp_path):
    whole = fitted(tmp_path, options, max_epochs=4)
    first = Task(options)
    half = trainer(tmp_path, max_epochs=2, enable_checkpointing=True)
    half.fit(first, loader())
    half.save_checkpoint(tmp_path / "half.ckpt")
    second = Task(options)
    trainer(tmp_path, max_epochs=4).fit(second, loader(), ckpt_path=tmp_path / "half.ckpt")
    assert same(weights(whole.model), weights(second.model))


class Unfreeze(callbacks.BaseFinetuning):
    """Trains without the adapters of the last layers, and with them from epoch 1 on."""

    def __init__(self, lowest: int) -> None:
        super().__init__()
        self.layers = slice(lowest, None)

    def freeze_before_training(self, pl_module: Task) -> None:
        self.freeze(pl_module.model.layers[self.layers])

    def finetune_function(self, pl_module: Task, epoch: int, optimizer: Any) -> None:
        if epoch == 1:
            adapters = [
                p
                for n, p in pl_module.model.layers[self.layers].named_parameters()
                if "base" not in n
            ]
            for parameter in adapters:
                parameter.requires_grad_(True)
            optimizer.add_param_group({"params": adapters, "lr": 0.01})


class Simple(Task):
    """With one rate: a scheduler does not take in groups that are added later."""

    def configure_optimizers(self) -> Any:
        optimizer = self.inner()
        if self.options is not None:
            return DynamicAllocationOptimizer(optimizer, self.model, **self.options)
        return optimizer


@pytest.mark.parametrize("lowest", [0, 3])  # 0: the head alone at first, as BackboneFinetuning does
@pytest.mark.parametrize("resume", [False, True])
def test_base_finetuning_is_as_with_the_plain_optimizer(resume, lowest, tmp_path):
    def run(options):
        task = Simple(options)
        if resume:
            first = Simple(options)
            half = trainer(
                tmp_path, max_epochs=2, callbacks=[Unfreeze(lowest)], enable_checkpointing=True
            )
            half.fit(first, loader())
            half.save_checkpoint(tmp_path / "half.ckpt")
        path = tmp_path / "half.ckpt" if resume else None
        one = trainer(tmp_path, max_epochs=4, callbacks=[Unfreeze(lowest)])
        one.fit(task, loader(), ckpt_path=path)
        assert len(one.optimizers[0].param_groups) == 3
        return weights(task.model)

    expected = run(None)
    found = run({"active": 1.0})
    assert same(expected, found)
    assert not torch.equal(
        found["layers.5.0.A"], dict(ToyModel().named_parameters())["layers.5.0.A"]
    )


def test_fabric_is_the_plain_loop(tmp_path):
    def run(options):
        torch.manual_seed(0)
        one = fabric.Fabric(accelerator="cpu", devices=1)
        task = Task(options)
        (optimizer,), _ = task.configure_optimizers()
        model, optimizer = one.setup(task.model, optimizer)
        for step in range(6):
            one.backward(model(batch(step)).square().mean())
            one.clip_gradients(model, optimizer, max_norm=0.1)
            optimizer.step()
            optimizer.zero_grad()
            if step == 2:
                state = {"model": model, "optimizer": optimizer}
                one.save(tmp_path / "fabric.ckpt", state)
                kept = copy.deepcopy(weights(task.model))
                one.load(tmp_path / "fabric.ckpt", state)
                assert same(kept, weights(task.model))
        return weights(task.model)

    assert same(run(None), run({"active": 1.0}))
    with warnings.catch_warnings():
        run({"active": 2, "period": 1})
