"""The example on conversations: on a tiny chat model, and once on the real weights."""

import importlib
import json
import shutil
import sys
from pathlib import Path

import pytest
import torch
from processes import kill_when, start
from text_runs import EXAMPLES, MARKS, WORDS, need_real_weights, tiny_chat
from toy import named

from dynalora_optim import LiveBytes
from dynalora_optim._base.live_bytes import storage_bytes

transformers = pytest.importorskip("transformers")
for package in ("jinja2", "tokenizers", "tqdm"):
    pytest.importorskip(package)

SCRIPT = EXAMPLES / "sft.py"
sys.path.insert(0, str(EXAMPLES))  # where Python puts it for a script there
_conversations = importlib.import_module("_conversations")
_common = importlib.import_module("_common")
sft = importlib.import_module("sft")

LENGTH = 40


def said(*contents, system=None):
    """Messages of a user and the assistant in turn."""
    first = [{"role": "system", "content": system}] if system else []
    roles = ("user", "assistant") * len(contents)
    return first + [{"role": r, "content": c} for r, c in zip(roles, contents, strict=False)]


def conversations():
    """36 of them, of several lengths; the answers repeat a word of the question."""
    pairs = [(a, b) for a in WORDS[3:9] for b in WORDS[3:9]]
    found = [said(f"the film was {a} and {b}", a) for a, b in pairs]
    found[1::3] = [said(f"{a} and {b}", a, b, b) for a, b in pairs[1::3]]
    found[2::3] = [said(f"was {a} and {b}", a, system="the film") for a, b in pairs[2::3]]
    return found


def write_lines(path, found):
    path.write_text("\n\n".join(json.dumps({"messages": one}) for one in found), "utf-8")
    return path


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return tiny_chat(tmp_path_factory.mktemp("tiny-chat"))


@pytest.fixture(scope="module")
def tokenizer(checkpoint):
    return _common.pretrained("AutoTokenizer", str(checkpoint))


@pytest.fixture
def model(checkpoint):
    return transformers.AutoModelForCausalLM.from_pretrained(checkpoint).eval()


@pytest.fixture(scope="module")
def lines(tmp_path_factory):
    return write_lines(tmp_path_factory.mktemp("data") / "some.jsonl", conversations())


@pytest.fixture
def arguments(checkpoint, lines, tmp_path):
    return [
        *("--model", str(checkpoint), "--data", str(lines), "--output", str(tmp_path / "run")),
        *("--steps", "12", "--period", "2", "--length", str(LENGTH), "--lr", "0.02"),
        *("--rank", "4", "--total", "1MiB"),
    ]


def written(tokenizer, messages):
    return _conversations.written(tokenizer, "here", messages)


def summary(folder):
    return json.loads((folder / "summary.json").read_text("utf-8"))


def test_a_run_learns_answers_and_leaves_an_adapter_that_peft_loads(
    arguments, checkpoint, tokenizer, tmp_path, capsys
):
    peft = pytest.importorskip("peft")
    assert sft.main([*arguments, "--steps", "100"]) == 0
    printed, run = capsys.readouterr().out, tmp_path / "run"
    for expected in ("token accuracy after", "question: ", "answer before: ", "answer after: "):
        assert expected in printed
    found = summary(run)
    assert found["loss_after"] < found["loss_before"] - 0.3
    assert found["token_accuracy_after"] > found["token_accuracy_before"]
    assert {path.name for path in run.iterdir()} == {"adapter", "allocation.json", "summary.json"}

    base = transformers.AutoModelForCausalLM.from_pretrained(checkpoint)
    theirs = peft.PeftModel.from_pretrained(base, str(run / "adapter")).eval()
    _, held_out, _ = _conversations.load_conversations(
        tokenizer, Path(arguments[3]), subset=None, rows=100, length=LENGTH
    )
    losses = []
    for one in held_out:
        ids, labels = torch.tensor([one.input_ids]), torch.tensor(one.labels)
        with torch.no_grad():
            logits = theirs(input_ids=ids).logits[0, :-1]
        every = torch.nn.functional.cross_entropy(logits, labels[1:], reduction="none")
        losses += every[labels[1:] != -100].tolist()
    assert sum(losses) / len(losses) == pytest.approx(found["loss_after"], abs=1e-5)
    saved = _common.pretrained("AutoTokenizer", str(run / "adapter"))
    assert saved.chat_template == tokenizer.chat_template


def test_the_loss_is_that_of_the_answers_and_their_ends(tokenizer):
    one = written(tokenizer, said("the film was fine", "dull and", "was", "cold", system="the"))
    kept = [token for token in one.labels if token != -100]
    assert tokenizer.convert_ids_to_tokens(kept) == ["dull", "and", MARKS[1], "cold", MARKS[1]]
    expected = tokenizer.apply_chat_template(one.messages, return_dict=True)["input_ids"]
    assert one.input_ids == expected
    assert all(label in (-100, token) for label, token in zip(one.labels, expected, strict=True))


def test_a_packed_row_is_its_conversations_alone(tokenizer, model):
    """Logits, and the loss of a batch of three rows with padding."""
    found = [written(tokenizer, messages) for messages in conversations()[:5]]
    rows = _conversations.pack(found, LENGTH)
    assert sorted(map(len, rows)) == [1, 2, 2]
    fields = [_conversations.as_row(row, LENGTH, tokenizer.pad_token_id) for row in rows]
    assert [int(row["tokens"]) for row in fields] == [
        sum(len(one.input_ids) for one in row) for row in rows
    ]
    batch = torch.utils.data.default_collate(fields)
    batch.pop("tokens")
    with torch.no_grad():
        output = model(**batch, use_cache=False)
        losses = []
        for row, logits in zip(rows, output.logits, strict=True):
            end = 0
            for one in row:
                begin, end = end, end + len(one.input_ids)
                alone = model(input_ids=torch.tensor([one.input_ids])).logits[0]
                torch.testing.assert_close(logits[begin:end], alone, rtol=1e-5, atol=1e-6)
                logs = alone.log_softmax(-1)
                losses += [
                    -logs[i - 1, token].item()
                    for i, token in enumerate(one.labels)
                    if token != -100
                ]
    assert output.loss.item() == pytest.approx(sum(losses) / len(losses), rel=1e-5)


@pytest.mark.parametrize("implementation", ["sdpa", "eager", "everything before"])
def test_attention_across_boundaries_is_refused(implementation, tokenizer, model):
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    def before(module, query, key, value, attention_mask, **options):  # has no mask of its own
        return sdpa_attention_forward(module, query, key, value, None, **options)

    transformers.AttentionInterface.register("everything before", before)
    for parameter in model.parameters():  # large enough that it matters
        parameter.data.mul_(5)
    model.set_attn_implementation(implementation)
    rows = [[written(tokenizer, messages) for messages in conversations()[:2]]]
    if implementation != "everything before":
        _conversations.check_boundaries(model, rows)
        return
    with pytest.raises(ValueError, match=r"attend to each other.*pass --no-packing"):
        _conversations.check_boundaries(model, rows)
    _conversations.check_boundaries(model, [[one] for one in rows[0]])


@pytest.mark.parametrize(("length", "filled"), [(13, 0.9), (50, 0.9), (500, 0.9)])
def test_packing_keeps_every_conversation_once(length, filled, tokenizer):
    found = [written(tokenizer, messages) for messages in conversations() * 8]
    found = [one for one in found if len(one.input_ids) <= length]
    rows = _conversations.pack(found, length)
    assert sorted(one.text for row in rows for one in row) == sorted(one.text for one in found)
    sizes = [sum(len(one.input_ids) for one in row) for row in rows]
    assert max(sizes) <= length
    assert sum(sizes) >= filled * length * len(rows)


def test_without_packing_a_row_is_a_conversation(arguments, capsys):
    assert sft.main([*arguments, "--steps", "2", "--no-packing"]) == 0
    assert "32 conversations in 32 rows, 0 left out" in capsys.readouterr().out


def test_a_data_set_as_the_hub_has_them(lines, tokenizer, tmp_path, monkeypatch):
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    folder = tmp_path / "conversations"
    folder.mkdir()
    shutil.copy(lines, folder / "train.jsonl")
    options = {"subset": None, "length": LENGTH}
    ours = _conversations.load_conversations(tokenizer, lines, rows=20, **options)
    theirs = _conversations.load_conversations(tokenizer, folder, rows=20, **options)
    assert ours == theirs
    assert len(ours[0]) + len(ours[1]) == 20


def test_the_default_asks_about_labelled_reviews(monkeypatch):
    monkeypatch.setattr(_conversations, "movie_reviews", lambda: [("fine", 1), ("dull", 0)])
    found = {m[-2]["content"].split()[-1]: m[-1] for _, m in _conversations.read(None, None, 9)}
    assert found == {
        "fine": {"role": "assistant", "content": "Positive."},
        "dull": {"role": "assistant", "content": "Negative."},
    }


def left(run):
    """What a run must leave alike, however often it was interrupted."""
    found = summary(run)
    return (
        (run / "adapter" / "adapter_model.safetensors").read_bytes(),
        (run / "allocation.json").read_bytes(),
        [found[name] for name in ("before", "after", "active_modules", "peak_bytes")],
    )


def test_a_run_goes_on_from_its_checkpoint_bit_for_bit(arguments, tmp_path, capsys):
    arguments += ["--save-every", "7", "--period", "3"]  # a checkpoint within a period
    assert sft.main(arguments) == 0
    assert "from step 0\n" in capsys.readouterr().out
    run, straight = tmp_path / "run", tmp_path / "straight"
    run.rename(straight)
    run.mkdir()
    shutil.copy(straight / "checkpoint.pt", run)
    assert sft.main(arguments) == 0
    assert "from step 7\n" in capsys.readouterr().out
    assert left(run) == left(straight)
    assert sft.main([*arguments, "--save-every", "20"]) == 0, "another one may be saved elsewhen"
    with pytest.raises(SystemExit, match=r"belongs to a run with total=1MiB, not 2MiB; remove it"):
        sft.main([*arguments, "--total", "2MiB"])


@pytest.mark.slow
def test_killed_and_started_again_it_ends_bit_for_bit_alike(arguments, tmp_path, capsys):
    pytest.importorskip("psutil")
    given = [*arguments, "--save-every", "3", "--steps", "60"]
    run, straight = tmp_path / "run", tmp_path / "straight"
    assert sft.main([*given, "--output", str(straight)]) == 0
    process = start(SCRIPT, *given)
    kill_when((run / "checkpoint.pt").exists, process)
    assert not (run / "adapter").exists(), "it was killed too late to say anything"
    capsys.readouterr()
    assert sft.main(given) == 0
    said = capsys.readouterr().out
    assert any(f"from step {step}\n" in said for step in range(3, 61, 3))
    assert left(run) == left(straight)


def test_every_step_stays_within_the_total(arguments, monkeypatch, tmp_path):
    from dynalora_optim.integrations.transformers import ChunkedLossHandle

    with pytest.raises(SystemExit) as refused:
        sft.main([*arguments, "--total", "1kB"])
    total = named(refused.value) * 11 // 10
    peaks, memory, take = [], LiveBytes(), sft.train_step

    def watched(run, batch):
        assert isinstance(run.model.forward, ChunkedLossHandle)
        memory.restart()
        take(run, batch)
        peaks.append(memory.peak + storage_bytes([*run.model.parameters(), *run.model.buffers()]))

    def train(*args):
        with memory:  # begins here: what the data take is not part of the total
            trained(*args)

    trained = sft.train
    monkeypatch.setattr(sft, "train_step", watched)
    monkeypatch.setattr(sft, "train", train)
    assert sft.main([*arguments, "--steps", "30", "--total", str(total)]) == 0
    found = summary(tmp_path / "run")
    assert len(peaks) == 30
    assert 0.8 * total < max(peaks) <= found["peak_bytes"] <= total
    assert found["peak_all_active_bytes"] > total
    assert 0 < found["active_modules"] < found["modules"]


GOOD = json.dumps({"messages": said("the film", "fine")})
SPOILT = {
    '{"messages"': "is not JSON",
    "[1]": "must have the form",
    '{"messages": []}': "must have the form",
    '{"messages": [{"content": "a"}]}': "role of message 1 must be one of system, user, assistant",
    '{"messages": [{"role": "bot", "content": "a"}]}': "and is 'bot'",
    '{"messages": [{"role": "user"}]}': "content of message 1 must be a text, and is None",
    json.dumps({"messages": said("the film", " \n")}): "message 2, an answer .* is empty",
    json.dumps({"messages": said("the film")}): "the assistant answer last",
    json.dumps({"messages": said("the", "film")[1:]}): "a user must ask first",
}


@pytest.mark.parametrize(("line", "rule"), SPOILT.items())
def test_a_line_that_breaks_a_rule_is_named(line, rule, arguments, tmp_path):
    path = tmp_path / "spoilt.jsonl"
    path.write_text("\n".join([GOOD, "", line, GOOD]), "utf-8")
    with pytest.raises(SystemExit, match=rf"^sft: \S*spoilt\.jsonl, line 3.*{rule}.*remove it"):
        sft.main([*arguments, "--data", str(path)])


STRICT = "{{ raise_exception('no system message') if messages[0]['role'] == 'system' }}" + "x"
REWRITES = "{% for m in messages %}{{ loop.last and m['content'] or '-' }}{% endfor %}"


@pytest.mark.parametrize(
    ("template", "message"),
    [
        (None, "no chat template.*pass one with --model"),
        (STRICT, r"line \d+: the chat template does not fit .*no system message.*remove it"),
        (REWRITES, r"line \d+: the chat template does not fit .*another way.*only its last answer"),
    ],
)
def test_a_template_that_cannot_be_used_is_named(template, message, arguments, tmp_path):
    folder = tmp_path / "model"
    shutil.copytree(arguments[1], folder)
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    (folder / "chat_template.jinja").unlink()
    tokenizer.chat_template = template
    tokenizer.save_pretrained(folder)
    with pytest.raises(SystemExit, match=f"^sft: .*{message}"):
        sft.main([*arguments, "--model", str(folder)])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("--model nowhere", "could not load the model nowhere"),
        ("--data nowhere.jsonl", "nowhere.jsonl does not exist; pass a file of JSON lines"),
        ("--data no/where", "could not load the data set no/where .*pass the id of a data set"),
        ("--length 5", "of which 0 differ and have at most 5 tokens.*a larger --length"),
        ("--rows 1", "has 1 conversations.*two are needed"),
        ("--batch-size 1000", "batch_size=1000 exceeds"),
        ("--total much", "total='much'"),
        ("--compute 0", "compute=0"),
        ("--lr -1", "learning rate: -1"),
    ],
)
def test_bad_input_ends_in_one_sentence(options, message, arguments, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(SystemExit, match=f"^sft: .*{message}"):
        sft.main([*arguments, *options.split()])


@pytest.mark.slow
def test_on_the_real_weights_the_loss_falls_within_the_total(tmp_path):
    need_real_weights()
    options = ["--steps", "8", "--rows", "400", "--output", str(tmp_path)]
    assert sft.main(options) == 0
    found = summary(tmp_path)
    assert found["loss_after"] < found["loss_before"] - 0.1
    assert found["peak_bytes"] <= 2**30 < found["peak_all_active_bytes"]
