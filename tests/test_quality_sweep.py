"""The sweep: tasks, methods and metrics by hand, and runs on a tiny checkpoint, killed as well."""

import argparse
import importlib
import json
import statistics
import sys
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from processes import accelerate_launch, finished, kill_when, start
from tiny_checkpoint import write_checkpoint, write_texts

pytest.importorskip("transformers")
pytest.importorskip("accelerate")
pytest.importorskip("peft")
pytest.importorskip("sklearn")

QUALITY = Path(__file__).parents[1] / "benchmarks" / "quality"
sys.path.insert(0, str(QUALITY))  # where Python puts it for a script there
_importances = importlib.import_module("_importances")
_methods = importlib.import_module("_methods")
_shared = importlib.import_module("_shared")
_store = importlib.import_module("_store")
_training = importlib.import_module("_training")
_suite = importlib.import_module("_suite")
script = importlib.import_module("sweep")
SCRIPT = QUALITY / "sweep.py"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A tiny BERT without dropout, whose masks would depend on what drew numbers before."""
    folder = write_checkpoint(tmp_path_factory.mktemp("work"), layers=3, dropout=0.0)
    write_texts(folder / "texts.csv")
    return folder


@pytest.fixture
def settings(folder):
    return _training.Settings(
        suite="offline",
        task=str(folder / "texts.csv"),
        method="lora",
        lr=1e-2,
        seed=0,
        model=str(folder),
        steps=8,
        batch_size=4,
        max_length=8,
    )


# Tasks and metrics


def test_metrics_are_those_of_their_definitions():
    labels, predictions = np.array([0, 1, 1, 1]), np.array([0, 1, 1, 0])
    tp, tn, fp, fn = 2, 1, 0, 1
    matthews = (tp * tn - fp * fn) / np.sqrt((tp + fp) * (tp + fn) * (tn + fp) * (tn + fn))
    found = {name: metric(labels, predictions) for name, metric in _suite.METRICS.items()}
    assert found["accuracy"] == 0.75
    assert found["Matthews correlation"] == pytest.approx(matthews)
    assert found["F1"] == pytest.approx(2 * tp / (2 * tp + fp + fn))


def test_correlations_by_hand_and_of_a_constant():
    x, y = np.array([0.0, 1.0, 2.0]), np.array([1.0, 3.0, 2.0])
    assert _suite.METRICS["Pearson"](x, y) == pytest.approx(0.5)
    assert _suite.METRICS["Spearman"](x, np.array([1.0, 30.0, 40.0])) == pytest.approx(1)
    assert _suite.METRICS["Pearson"](x, np.ones(3)) == 0


texts = st.lists(st.text(max_size=4), unique=True, min_size=1, max_size=60)


@given(texts, st.randoms(use_true_random=False))
def test_a_split_by_hash_is_complete_disjoint_and_the_same_in_any_order(found, random):
    rows = [_shared.Row(text, 0.5) for text in found]
    parts = _suite.split_by_hash(rows)
    assert Counter(row for part in parts for row in part) == Counter(rows)
    assert [len(part) for part in parts][:1] == [round(0.6 * len(rows))]
    assert _suite.split_by_hash(random.sample(rows, len(rows))) == parts


def test_glue_reports_on_the_official_validation_rows(monkeypatch):
    train = [_shared.Row(f"text {i}", i % 2) for i in range(40)]
    held_out = [_shared.Row("held out", 1)]
    monkeypatch.setattr(_suite, "load_glue", lambda name: (train, held_out))
    task = _suite.recipe("glue", "rte").load()
    assert task.test == held_out
    assert set(task.train) | set(task.validation) == set(train)
    assert not set(task.train) & set(task.validation)
    ratings = _suite.recipe("glue", "stsb").load()
    assert ratings.is_regression
    assert ratings.num_labels == 1
    assert set(ratings.train) | set(ratings.validation) == set(train)


@pytest.mark.parametrize("task", _suite.SUITES["offline"])
def test_real_tasks_are_what_they_are_said_to_be(task):
    try:
        loaded = _suite.recipe("offline", task).load()
    except OSError as error:
        pytest.skip(f"the data are neither cached nor to be fetched: {error}")
    sizes = {
        "rotten_tomatoes": (7678, 852, 2128, 2),
        "vader_tweets": (2520, 420, 1260, 1),
        "r8": (4878, 541, 2189, 8),
        "bbc": (1276, 213, 638, 5),
        "20newsgroups": (10140, 1126, 7528, 20),
    }
    parts = (loaded.train, loaded.validation, loaded.test)
    assert (*map(len, parts), loaded.num_labels) == sizes[task]
    seen = {row.text for row in (*loaded.train, *loaded.validation)}
    assert not seen & {row.text for row in loaded.test}


@given(st.lists(st.integers(1, 9), min_size=4, max_size=300), st.integers(0, 3))
def test_length_grouped_batches_are_whole_epochs_in_a_seeds_order(lengths, seed):
    examples = [
        {"attention_mask": torch.ones(9).cumsum(0) <= length, "row": torch.tensor(i)}
        for i, length in enumerate(lengths)
    ]

    def order():
        batches = _training.length_grouped_batches(
            examples, batch_size=4, steps=len(lengths) // 4, seed=seed
        )
        return [batch["row"].tolist() for batch in batches]

    rows = [row for batch in order() for row in batch]
    assert all(len(batch) == 4 for batch in order())
    assert order() == order()
    assert len(set(rows)) == len(rows)  # none twice in an epoch


# Methods


def test_options_follow_an_at():
    found = _methods.method("forward@active=4,period=10,allocator=topk")
    assert found.allocation == {
        **_methods.METHODS["forward"].allocation,
        **{"active": 4, "period": 10, "allocator": "topk"},
    }
    assert _methods.method("static@top=1/6").top == pytest.approx(1 / 6)
    assert _methods.method("forward@targets=all-linear").targets == "all-linear"
    assert _methods.method("budget-0.40@longer=1.25").longer == 1.25
    assert script.names("lora,forward@active=4,period=10,vera") == [
        *("lora", "forward@active=4,period=10", "vera")
    ]


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("loar", "no method 'loar'"),
        ("forward@active", "'active' is not an option"),
        ("lora@period=2", "lora makes no choices"),
        ("lora@targets=query", r"'lora@targets=query': targets= must be all-linear"),
    ],
)
def test_what_is_no_method_is_refused(name, message):
    with pytest.raises(ValueError, match=message):
        _methods.method(name)


ADAPTER, HEAD = 8 * (16 + 16), 16 * 2 + 2  # parameters of a LoRA layer and of the head
BLOCK = 4 * (16 * 16 + 16) + 2 * 16 * 32 + 32 + 16 + 2 * (16 + 16)  # attention, MLP, two norms


@pytest.mark.parametrize(
    ("name", "trained"),
    [
        ("lora", 6 * ADAPTER + HEAD),
        ("lora-peft", 6 * ADAPTER + HEAD),
        (
            "lora@targets=all-linear",
            3 * (4 * ADAPTER + 2 * 8 * (16 + 32)) + ADAPTER + HEAD,
        ),  # pooler
        ("lora-peft@targets=all-linear", 3 * (4 * ADAPTER + 2 * 8 * (16 + 32)) + ADAPTER + HEAD),
        ("static", 2 * ADAPTER + HEAD),
        ("static@top=2/3", 4 * ADAPTER + HEAD),
        ("top-blocks", BLOCK + HEAD),
        ("top-blocks@top=2/3", 2 * BLOCK + HEAD),
        ("lora-checkpointed", 6 * ADAPTER + HEAD),
        ("random@active=2", 2 * ADAPTER + HEAD),
        ("forward@active=3", 3 * ADAPTER + HEAD),
        ("vera", 6 * (16 + 128) + HEAD),
        ("dynavera@active=3", 3 * (16 + 128) + HEAD),
    ],
)
def test_a_method_trains_so_many_parameters(name, trained, settings):
    result = _training.run(replace(settings, method=name))
    assert result["active_parameters"] == trained


@pytest.mark.parametrize("name", _methods.METHODS)
def test_every_method_learns_the_tiny_task(name, settings):
    lr = 0.05 if "vera" in name else 0.02
    if _methods.method(name).allocation and "memory" in _methods.method(name).allocation:
        name += "@memory=0.75,compute=0.9"  # a model this small cannot keep less
    result = _training.run(replace(settings, method=name, lr=lr, steps=60))
    first, *_, last = [evaluation["loss"] for evaluation in result["evaluations"]]
    assert last < first
    assert result["peak_bytes"] > 0
    assert 0 < result["saved_bytes"] <= result["peak_bytes"]
    json.dumps(result)


@pytest.mark.parametrize("kind", ["lora", "vera"])
def test_ours_and_pefts_are_one_method(kind, settings):
    ours, theirs = (_training.run(replace(settings, method=kind + by)) for by in ("", "-peft"))
    losses = [[e["loss"] for e in found["evaluations"]] for found in (ours, theirs)]
    assert losses[0] == pytest.approx(losses[1], abs=1e-5)
    assert ours["predictions"] == theirs["predictions"]
    assert ours["active_parameters"] == theirs["active_parameters"]


def test_a_longer_run_has_that_many_times_the_steps(settings):
    result = _training.run(replace(settings, method="random@longer=1.5", steps=8))
    assert result["evaluations"][-1]["step"] == 12
    assert 0 < max(result["counts"].values()) <= 12


def test_checkpointing_changes_nothing_but_the_memory(settings):
    plain, less = (
        _training.run(replace(settings, method=name)) for name in ("lora", "lora-checkpointed")
    )
    assert less["evaluations"] == plain["evaluations"]
    assert less["saved_bytes"] < plain["saved_bytes"]


def test_state_is_counted_in_full_and_of_what_is_active(settings):
    """AdamW keeps two numbers of four bytes for each parameter, and a step of four bytes."""
    plain = _training.run(replace(settings, method="top-blocks"))
    tensors = 16 + 2  # of a block, and of the head
    assert plain["state_bytes"] == 8 * (BLOCK + HEAD) + 4 * tensors == plain["active_state_bytes"]
    name = "blocks-0.30@memory=0.75,compute=0.9,period=2"
    some = _training.run(replace(settings, method=name, steps=24))
    assert some["active_state_bytes"] < some["state_bytes"] <= 3 * 8 * BLOCK + 8 * HEAD + 4 * 50


def test_the_top_share_of_the_blocks_can_be_active_in_every_step(settings):
    chosen = replace(settings, method="blocks-0.30@memory=0.75,compute=0.9,always=1/3")
    model, optimizer = _training.started(chosen, work(chosen))
    top = model.get_submodule("bert.encoder.layer.2").parameters()
    assert optimizer.groups == ["bert.encoder.layer.0", "bert.encoder.layer.1"]
    optimizer.hold(optimizer.groups[:1])
    active = {*map(id, optimizer.active_parameters())}
    assert {*map(id, top)} < active


def test_all_methods_start_from_one_head_and_see_one_order(settings):
    first = _training.Loop(*_training.started(settings, work(settings)), settings, work(settings))
    other = replace(settings, method="full")
    second = _training.Loop(*_training.started(other, work(other)), other, work(other))
    for mine, theirs in zip(first.batches(), second.batches(), strict=True):
        assert torch.equal(mine["input_ids"], theirs["input_ids"])
    assert torch.equal(first._bare.classifier.weight, second._bare.classifier.weight)


def work(settings):
    return _training.prepare(settings.suite, settings.task, settings.model, settings.max_length)


def test_the_expected_decrease_is_adams_to_first_order():
    """One step of Adam without momentum, from the same gradients, moves by lr times the score."""
    measure = _importances.ExpectedDecrease(beta=0.9)
    parameter = torch.nn.Parameter(torch.randn(3, 4))
    optimizer = torch.optim.Adam([parameter], lr=1e-3, betas=(0.0, 0.9), eps=0.0)
    for _ in range(4):
        parameter.grad = torch.randn(3, 4)
        before = parameter.detach().clone()
        score = measure.score_gradients([parameter])
        optimizer.step()
        decrease = ((before - parameter.detach()) * parameter.grad).sum()
        assert decrease == pytest.approx(1e-3 * score.item(), rel=1e-3)


def test_the_bandit_tries_all_and_then_the_best_most_often():
    import random

    from dynalora_optim import AllocationContext

    bandit, scores, updates = _importances.UpperConfidence(0.2), (1.0, 3.0, 2.0), [0, 0, 0]
    for t in range(60):
        context = AllocationContext(scores, tuple(updates), 1, t, random.Random(0))
        (chosen,) = bandit.select(context)
        assert t >= 3 or updates[chosen] == 0
        updates[chosen] += 1
    assert updates[1] > updates[2] > updates[0] > 0


# The sweep


@pytest.fixture
def options(settings, tmp_path):
    return script.parse(
        [
            *("--model", settings.model, "--tasks", settings.task, "--output", str(tmp_path)),
            *("--methods", "lora,random", "--seeds", "2", "--lrs", "1e-3,5e-2"),
            *("--steps", "8", "--batch-size", "4", "--max-length", "8"),
        ]
    )


def lines(folder):
    return [json.loads(line) for line in (folder / "runs.jsonl").read_text("utf-8").splitlines()]


def test_the_best_rates_of_the_first_seed_run_with_every_seed(options, tmp_path):
    options.lrs, options.seeds = (1e-3, 1e-2, 5e-2), 3
    results = script.sweep(options)
    done = [(s["method"], s["lr"], s["seed"]) for s in (r["settings"] for r in lines(tmp_path))]
    assert len(done) == len(set(done)) == 2 * (3 + 2 * 2)
    for name in ("lora", "random"):
        mine = [r for r in lines(tmp_path) if r["settings"]["method"] == name]

        def worth(runs):
            return (
                statistics.fmean(r["validation"]["accuracy"] for r in runs),
                -statistics.fmean(r["validation_loss"] for r in runs),
            )

        rates = {lr: [r for r in mine if r["settings"]["lr"] == lr] for lr in options.lrs}
        loser = min(options.lrs, key=lambda lr: worth(rates[lr][:1]))
        assert sorted(len(runs) for runs in rates.values()) == [1, 3, 3]
        assert len(rates.pop(loser)) == 1
        best = max(rates.values(), key=worth)
        assert [r for r in results if r["settings"]["method"] == name] == sorted(
            best, key=lambda r: r["settings"]["seed"]
        )


def test_what_is_finished_is_not_done_again(options, tmp_path, monkeypatch):
    first = script.sweep(options)
    text = (tmp_path / "runs.jsonl").read_bytes()
    monkeypatch.setattr(script, "run", lambda settings: pytest.fail(f"again: {settings}"))
    assert script.sweep(options) == first
    assert (tmp_path / "runs.jsonl").read_bytes() == text


def test_a_line_that_was_cut_short_is_done_again(options, tmp_path):
    path = tmp_path / "runs.jsonl"
    script.sweep(options)
    whole = path.read_bytes()
    path.write_bytes(whole[:-20])
    assert len(_store.finished(path)) == len(whole.splitlines()) - 1
    script.sweep(options)
    volatile = {"seconds", "seconds_per_step"}
    again = [{k: v for k, v in line.items() if k not in volatile} for line in lines(tmp_path)]
    before = [json.loads(line) for line in whole.splitlines()]
    assert again == [{k: v for k, v in line.items() if k not in volatile} for line in before]


def arguments(folder, output, *more):
    return [
        *("--model", folder, "--tasks", folder / "texts.csv", "--output", output),
        *("--lrs", "1e-2", "--steps", 8, "--batch-size", 4, "--max-length", 8, *more),
    ]


def test_a_killed_sweep_goes_on_in_several_jobs(folder, tmp_path):
    given = arguments(folder, tmp_path, "--methods", "lora,static,random", "--seeds", 2)
    process = start(SCRIPT, *given)
    kill_when((tmp_path / "runs.jsonl").exists, process)
    done = [line["key"] for line in _store.finished(tmp_path / "runs.jsonl")]
    assert len(done) < 6, "it was killed too late to say anything"
    finished(start(SCRIPT, *given, "--jobs", 2))
    keys = [line["key"] for line in lines(tmp_path)]
    assert keys[: len(done)] == done
    assert len(keys) == len(set(keys)) == 6


@pytest.mark.distributed
def test_two_processes_train_together_and_write_one_line_a_run(folder, tmp_path):
    given = arguments(folder, tmp_path, "--methods", "lora,random", "--seeds", 1)
    finished(start(SCRIPT, *given, launcher=accelerate_launch(2)))
    assert [line["processes"] for line in lines(tmp_path)] == [2, 2]
    rows = _suite.recipe("offline", str(folder / "texts.csv")).load().test
    assert all(len(line["predictions"]) == len(rows) for line in lines(tmp_path))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--tasks", "sst3"], r"no task 'sst3'.*rotten_tomatoes"),
        (["--methods", "loar"], "no method 'loar'"),
        (["--tasks", "nowhere.csv"], r"nowhere\.csv"),
    ],
)
def test_bad_input_ends_in_one_sentence(arguments, message, settings):
    with pytest.raises(SystemExit, match=f"^sweep: .*{message}"):
        script.main(["--model", settings.model, "--tasks", settings.task, *arguments])


def test_processes_that_train_together_take_one_run_at_a_time(monkeypatch, options):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ValueError, match="--jobs 2"):
        script.check(argparse.Namespace(**{**vars(options), "jobs": 2}))


@pytest.mark.slow
def test_on_real_sentences_lora_and_a_random_choice_learn(tmp_path):
    """The command of the README, in small: two layers of the real checkpoint."""
    assert not script.main(
        [
            *(
                "--suite",
                "offline",
                "--methods",
                "lora,random,forward",
                "--tasks",
                "rotten_tomatoes",
            ),
            *("--seeds", "1", "--steps", "200", "--layers", "2", "--lrs", "5e-3"),
            *("--output", str(tmp_path)),
        ]
    )
    accuracies = [line["test"]["accuracy"] for line in lines(tmp_path)]
    assert len(accuracies) == 3
    assert min(accuracies) > 0.54  # half of the rows are of each class; a standard error is 0.011


def test_root_mean_square_and_alignment_by_hand():
    parameters = [torch.nn.Parameter(torch.zeros(n)) for n in (1, 3)]
    for parameter, gradient in zip(parameters, ([3.0], [4.0, 0.0, 0.0]), strict=True):
        parameter.grad = torch.tensor(gradient)
    assert _importances.RootMeanSquare().score_gradients(parameters).item() == 2.5  # sqrt(25 / 4)
    alignment = _importances.Alignment(beta=0.0)  # the mean is the last gradient
    assert alignment.score_gradients(parameters).item() == 1
    parameters[1].grad = torch.tensor([-4.0, 0.0, 0.0])
    cosine = (3 * 3 - 4 * 4) / 25
    assert alignment.score_gradients(parameters).item() == pytest.approx((1 + cosine) / 2)


def test_a_softmax_draw_is_uniform_when_hot_and_the_best_when_cold():
    import random

    from dynalora_optim import AllocationContext

    context = AllocationContext((1.0, 3.0, 2.0), (0, 0, 0), 1, 0, random.Random(0))
    weights = _importances.Softmax(1.0).weights(context)
    assert weights == pytest.approx([np.exp((y - 3) / 2) for y in (1, 3, 2)])  # the mean is 2
    assert _importances.Softmax(1e-3).select(context) == [1]
    assert _importances.Softmax(1e9).weights(context) == pytest.approx([1, 1, 1])


def test_costs_are_ratios_of_the_same_steps(folder, capsys):
    """Recomputing the blocks costs another forward pass of them; a static top saves backward."""
    cost = importlib.import_module("cost")
    file = folder / "costs.jsonl"
    task = str(folder / "texts.csv")
    methods = "lora,lora-checkpointed,static,budget-0.75@memory=0.9"
    small = ["--steps", "6", "--batch-size", "4", "--model", str(folder)]
    command = ["--tasks", task, "--methods", methods, "--output", str(file), *small]
    assert cost.main(command) == 0
    lines = map(json.loads, file.read_text().splitlines())
    rows = {row["row"]: row for row in lines if row["part"] == task}
    lora, checkpointed, static, _ = (rows[name]["flops"] for name in methods.split(","))
    assert static < lora < checkpointed < 1.7 * lora
    assert all(row["seconds"] > 0 for row in rows.values())
    assert "| lora | 1.000 | 1.000 |" in capsys.readouterr().out
