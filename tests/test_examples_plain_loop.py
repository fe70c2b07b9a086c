"""The plain loop, on a tiny checkpoint: it learns, updates two thirds, and exports for peft."""

import importlib
import re
import sys
from pathlib import Path

import pytest
import torch
from tiny_checkpoint import write_checkpoint, write_texts

transformers = pytest.importorskip("transformers")

EXAMPLES = Path(__file__).parents[1] / "examples"
sys.path.insert(0, str(EXAMPLES))  # where Python puts it for a script there
_common = importlib.import_module("_common")
plain_loop = importlib.import_module("plain_loop")


@pytest.fixture
def arguments(tmp_path):
    (tmp_path / "model").mkdir()
    folder = write_checkpoint(tmp_path / "model", dropout=0.0)
    texts = write_texts(tmp_path / "texts.csv")
    return [
        *("--model", str(folder), "--data", str(texts), "--output", str(tmp_path / "run")),
        *("--steps", "50", "--batch-size", "8", "--length", "8", "--lr", "0.02", "--period", "5"),
    ]


def test_it_learns_and_peft_reads_what_it_exports(arguments, tmp_path, capsys):
    peft = pytest.importorskip("peft")
    assert plain_loop.main(arguments) == 0
    said = capsys.readouterr().out
    losses = [float(loss) for loss in re.findall(r"loss ([\d.]+), active 3\n", said)]
    assert losses[-1] < losses[0] < 0.7
    found = float(re.search(r"held-out accuracy ([\d.]+)\n", said)[1])
    assert found == 1.0

    options = _common.parser("", length=8).parse_args(arguments)
    sentences = _common.Sentences.load(options)
    adapter = str(tmp_path / "run" / "adapter")
    theirs = peft.PeftModel.from_pretrained(sentences.classifier(seed=1), adapter)
    assert _common.accuracy(theirs, sentences.held_out) == found


def test_what_cannot_be_had_ends_in_one_sentence(arguments):
    with pytest.raises(SystemExit, match=r"^plain_loop: .*nowhere\.csv"):
        plain_loop.main([*arguments, "--data", "nowhere.csv"])


def test_the_same_seed_gives_the_same_adapter(arguments, tmp_path):
    weights = []
    for name in ("first", "second"):
        options = ["--steps", "3", "--output", str(tmp_path / name)]
        assert plain_loop.main([*arguments, *options]) == 0
        saved = tmp_path / name / "adapter" / "adapter_model.safetensors"
        weights.append(saved.read_bytes())
    assert weights[0] == weights[1]
    assert torch.initial_seed() == 0
