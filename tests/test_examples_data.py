"""The examples' data and models: splits, files, batches, and where the adapters go."""

import importlib
import sys
from collections import Counter
from pathlib import Path

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st

transformers = pytest.importorskip("transformers")

EXAMPLES = Path(__file__).parents[1] / "examples"
sys.path.insert(0, str(EXAMPLES))  # where Python puts it for a script there
_common = importlib.import_module("_common")
Row = _common.Row

rows = st.lists(
    st.builds(Row, st.text(max_size=3), st.integers(0, 2), st.none() | st.just("pair")),
    max_size=60,
).filter(lambda rows: all(count > 1 for count in Counter(row.label for row in rows).values()))


@given(rows)
def test_split_is_complete_and_disjoint(rows):
    train, held_out = _common.split_tenth(rows)
    assert Counter(train) + Counter(held_out) == Counter(rows)


@given(rows)
def test_split_is_stratified(rows):
    _, held_out = _common.split_tenth(rows)
    taken = Counter(row.label for row in held_out)
    for label, count in Counter(row.label for row in rows).items():
        assert taken[label] == max(1, round(count / 10))


@given(rows, st.randoms(use_true_random=False))
def test_split_depends_on_the_texts_alone(rows, random):
    assume(len({row.text for row in rows}) == len(rows))
    shuffled = random.sample(rows, len(rows))
    torch.manual_seed(random.randrange(1000))
    assert set(_common.split_tenth(shuffled)[1]) == set(_common.split_tenth(rows)[1])


def test_split_is_the_same_for_ever():
    rows = [Row(f"text {i}", i % 2) for i in range(40)]
    # The two smallest sha256 sums of the even texts and of the odd ones.
    expected = ["text 13", "text 19", "text 26", "text 30"]
    assert [row.text for row in _common.split_tenth(rows)[1]] == expected


def test_a_class_of_one_row_cannot_be_split():
    with pytest.raises(ValueError, match="class 1 has 1 row"):
        _common.split_tenth([Row("a", 0), Row("b", 0), Row("c", 1)])


def test_csv_labels_may_be_words(tmp_path):
    path = tmp_path / "texts.csv"
    path.write_text('label,text\nspam,"buy, now"\nham,hello\n', "utf-8")
    assert _common.read_csv(path) == [Row("buy, now", 1), Row("hello", 0)]


@pytest.mark.parametrize(
    ("content", "message"),
    [("a,b\n1,2\n", "columns text,label"), ("text,label\nx,1\ny,1\n", "at least two classes")],
)
def test_csv_that_cannot_be_learned_is_refused(content, message, tmp_path):
    path = tmp_path / "texts.csv"
    path.write_text(content, "utf-8")
    with pytest.raises(ValueError, match=message):
        _common.read_csv(path)


def test_blocks_hold_all_text_in_order_without_padding():
    class Letters:
        eos_token_id = 0

        def __call__(self, texts, add_special_tokens):
            assert not add_special_tokens
            return {"input_ids": [[ord(letter) - 96 for letter in text] for text in texts]}

    rows = [_common.Row(text, 0) for text in ("abc", "de", "fgh")]
    blocks = _common.token_blocks(Letters(), rows, 4)
    assert [block["input_ids"].tolist() for block in blocks] == [[1, 2, 3, 0], [4, 5, 0, 6]]
    assert all(torch.equal(block["input_ids"], block["labels"]) for block in blocks)
    with pytest.raises(ValueError, match="3 texts with 11 tokens do not fill 12"):
        _common.token_blocks(Letters(), rows, 12)


def test_a_file_of_lines_is_read_without_its_blanks(tmp_path):
    path = tmp_path / "lines.txt"
    path.write_text("one\n\n  two \n", "utf-8")
    assert [row.text for row in _common.read_lines(path)] == ["one", "two"]
    path.write_text("one\n", "utf-8")
    with pytest.raises(ValueError, match="at least two lines of text; it has 1"):
        _common.read_lines(path)


def test_order_of_batches_follows_the_seed():
    examples = [{"x": torch.tensor(i)} for i in range(10)]

    def order(seed):
        batches = _common.training_batches(examples, batch_size=4, steps=5, seed=seed)
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
    batches = _common.batched(examples, batch_size=4)
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
        _common.training_batches([{}], batch_size=4, steps=1, seed=0)


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
def test_the_head_is_found_in_each_family(model_type):
    model = tiny_model(model_type)
    assert _common.head_modules(model) == CONFIGS[model_type][1]
