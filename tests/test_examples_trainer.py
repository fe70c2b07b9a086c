"""The Trainer's example: on a tiny Llama folder, and once on the real checkpoint."""

import importlib
import inspect
import json
import shutil
import subprocess
import sys

import pytest
import torch
from processes import accelerate_launch, environment, finished, kill_when, start, torchrun
from text_runs import EXAMPLES, need_real_weights, reviews, tiny_llama

transformers = pytest.importorskip("transformers")
for package in ("accelerate", "matplotlib", "tokenizers", "tqdm"):
    pytest.importorskip(package)

if "factory" not in inspect.getsource(transformers.Trainer.create_optimizer):
    pytest.skip("this Trainer hands no model to an optimizer", allow_module_level=True)

SCRIPT = EXAMPLES / "trainer_finetune.py"
sys.path.insert(0, str(EXAMPLES))  # where Python puts it for a script there
_common = importlib.import_module("_common")
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
    _, rows = _common.split_tenth(_common.read_lines(text))
    tokenizer = _common.pretrained("AutoTokenizer", str(checkpoint))
    blocks = _common.token_blocks(tokenizer, rows, 8)
    return {name: torch.stack([block[name] for block in blocks]) for name in blocks[0]}


def test_a_run_lowers_the_loss_and_leaves_its_results(
    arguments, checkpoint, text, tmp_path, capsys
):
    peft = pytest.importorskip("peft")
    assert trainer_finetune.main(arguments) == 0
    printed = capsys.readouterr().out
    assert "loss before" in printed
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
    assert "peak (MiB)" in capsys.readouterr().out


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
