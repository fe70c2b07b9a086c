"""The language suite of the sweep: questions and plain text, on a tiny Llama."""

from __future__ import annotations

import importlib
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from tiny_checkpoint import BAD, GOOD, write_checkpoint

pytest.importorskip("transformers")
pytest.importorskip("accelerate")

QUALITY = Path(__file__).parents[1] / "benchmarks" / "quality"
sys.path.insert(0, str(QUALITY))  # where Python puts it for a script there
_kinds = importlib.import_module("_kinds")
_methods = importlib.import_module("_methods")
_shared = importlib.import_module("_shared")
_suite = importlib.import_module("_suite")
_training = importlib.import_module("_training")
script = importlib.import_module("sweep")

ROWS = [
    _shared.Row(f"the film was {a} {b}", kind)
    for kind, words in enumerate((BAD, GOOD))
    for a in words
    for b in words
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A tiny Llama with the tokenizer of the tiny BERT, whose words are whole tokens."""
    import transformers

    folder = write_checkpoint(tmp_path_factory.mktemp("language"))
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    tokenizer.eos_token = "[SEP]"
    tokenizer.save_pretrained(folder)
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 3}
    config = transformers.LlamaConfig(
        vocab_size=len(tokenizer), num_attention_heads=2, tie_word_embeddings=True, **sizes
    )
    transformers.LlamaForCausalLM(config).save_pretrained(folder)
    return folder


@pytest.fixture
def settings(folder, monkeypatch):
    answers = {"asks": "answer", "answers": ("dull", "fine")}
    rows = (ROWS, ROWS, ROWS)
    tasks = {
        "answers": _suite.Recipe(lambda: _suite.SuiteTask(*rows, **answers), ("accuracy",), 8, 24),
        "text": _suite.Recipe(
            lambda: _suite.SuiteTask(*rows, asks="next token"), ("minus loss",), 8, 8
        ),
    }
    monkeypatch.setitem(_suite.SUITES, "language", tasks)
    _training.prepare.cache_clear()
    return _training.Settings("language", "answers", "lora", 2e-2, 0, str(folder), 40, 8, 24)


def test_a_language_models_head_is_not_new(settings):
    work = _training.prepare("language", "answers", settings.model, 24)
    model, optimizer = _training.started(settings, work)
    assert _methods.new_heads(model) == []
    assert not any(p.requires_grad for n, p in model.named_parameters() if "lora" not in n)
    assert len(optimizer.param_groups) == 1


@pytest.mark.parametrize("task", ["answers", "text"])
@pytest.mark.parametrize(
    "name", ["lora", "full", "static@targets=all-linear", "budget-0.40@memory=0.9,compute=1.0"]
)
def test_a_language_model_learns(task, name, settings):
    found = _training.run(replace(settings, task=task, method=name, max_length=24))
    first, *_, last = [evaluation["loss"] for evaluation in found["evaluations"]]
    assert last < first
    if task == "answers":
        assert set(found["predictions"]) <= {0, 1}
    else:
        assert found["test"]["minus loss"] == pytest.approx(-np.mean(found["predictions"]), 1e-3)


def test_the_loss_of_a_question_is_that_of_its_answer_alone(settings):
    work = _training.prepare("language", "answers", settings.model, 24)
    for example, row in zip(work.test, ROWS, strict=True):
        kept = example["labels"][example["labels"] != _kinds.IGNORED]
        word = work.kind.tokenizer.convert_ids_to_tokens(kept.tolist())
        assert word == [("dull", "fine")[row.label], "[SEP]"]
        assert work.kind.truth(example) == row.label
    model, _ = _training.started(settings, work)
    batch = torch.utils.data.default_collate(work.test[:4])
    inputs = {key: batch[key] for key in ("input_ids", "attention_mask", "labels")}
    _, losses = work.kind.predict(model.eval(), dict(batch))
    assert losses.mean().item() == pytest.approx(model(**inputs).loss.item(), rel=1e-5)


def test_the_likeliest_answer_is_chosen_among_the_answers_only(settings):
    work = _training.prepare("language", "answers", settings.model, 24)
    batch = torch.utils.data.default_collate(work.test[:1])
    place = (batch["labels"] != _kinds.IGNORED).int().argmax() - 1

    class Says(torch.nn.Module):
        def forward(self, input_ids, attention_mask):
            logits = torch.zeros(*input_ids.shape, len(work.kind.tokenizer))
            logits[0, place, work.kind.first[1]] = 1.0  # "fine"
            logits[0, place, 0] = 9.0  # not an answer
            logits[0, place + 1, work.kind.first[0]] = 9.0  # too late
            return type("Output", (), {"logits": logits})

    predicted, _ = work.kind.predict(Says(), dict(batch))
    assert predicted.tolist() == [1]


def test_answers_that_begin_alike_are_refused(settings):
    work = _training.prepare("language", "answers", settings.model, 24)
    with pytest.raises(ValueError, match="begin with the same token"):
        _kinds.Answer(("fine", "fine dull"), work.kind.tokenizer)


def test_padding_takes_no_part_in_the_loss_of_a_text(settings):
    work = _training.prepare("language", "text", settings.model, 24)
    for example in work.test:
        padding = example["attention_mask"] == 0
        assert padding.any()
        assert (example["labels"][padding] == _kinds.IGNORED).all()
        assert torch.equal(example["labels"][~padding], example["input_ids"][~padding])


def test_the_suite_has_its_own_model():
    assert script.model_of(script.parse(["--suite", "language"])) == _shared.CAUSAL_LM
    assert script.model_of(script.parse([])) == _shared.CLASSIFIER
    assert script.model_of(script.parse(["--model", "my-folder"])) == "my-folder"
