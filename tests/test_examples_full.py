"""Full-parameter training by blocks, the example: on a tiny Llama, and once on the real weights."""

import importlib
import json
import re
import shutil
import sys

import pytest
import torch
from processes import kill_when, start
from text_runs import EXAMPLES, need_real_weights, reviews, tiny_llama

transformers = pytest.importorskip("transformers")
for package in ("matplotlib", "tokenizers", "tqdm"):
    pytest.importorskip(package)

SCRIPT = EXAMPLES / "full_finetune.py"
sys.path.insert(0, str(EXAMPLES))  # where Python puts it for a script there
full_finetune = importlib.import_module("full_finetune")

# Of the tiny Llama, in parameters: a block, the embeddings with the head and the last norm, all.
BLOCK = 2 * 32 * 32 + 2 * 16 * 32 + 3 * 32 * 64 + 2 * 32
OUTSIDE = 2 * 12 * 32 + 32
WHOLE = 3 * BLOCK + OUTSIDE
SIZES = ("weights", "master_weights", "gradients", "optimizer_state", "activations", "peak")


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
        *("--steps", "12", "--batch-size", "2", "--length", "8", "--lr", "0.02"),
    ]


def summary(folder):
    return json.loads((folder / "summary.json").read_text("utf-8"))


@pytest.mark.parametrize(
    ("method", "trained", "state"),
    [
        ("adamw", WHOLE, WHOLE),
        ("badam", BLOCK, BLOCK),
        ("badam --outside always_active", BLOCK + OUTSIDE, BLOCK + OUTSIDE),
        ("badam --pause keep --order random", BLOCK, 3 * BLOCK),
        ("lisa --layers 1 --pause drop", BLOCK + OUTSIDE, BLOCK + OUTSIDE),
        ("lisa", 2 * BLOCK + OUTSIDE, WHOLE),
        ("blocks --layers 2 --pause drop --checkpoint-idle", 2 * BLOCK, 2 * BLOCK),
        ("badam --fused-backward --period 4", BLOCK, BLOCK),
    ],
)
def test_a_method_learns_and_holds_what_it_promises(method, trained, state, arguments, tmp_path):
    assert full_finetune.main([*arguments, "--method", *method.split()]) == 0
    found = summary(tmp_path / "run")
    assert found["loss_after"] < found["loss_before"] - 0.05
    assert found["parameters"] == WHOLE
    assert found["trained_parameters"] == trained
    assert found["weights_bytes"] == pytest.approx(4 * WHOLE, rel=0.02)  # and a few buffers
    assert found["optimizer_state_bytes"] == pytest.approx(8 * state, rel=0.01)  # and step counts
    at_a_time = 32 * 64 if "--fused-backward" in method else trained  # the largest matrix alone
    assert found["gradients_bytes"] == 4 * at_a_time
    assert found["master_weights_bytes"] == 0


@pytest.mark.parametrize("amount", ["--total", "--memory"])
def test_blocks_on_a_budget_learn_and_hold_it(amount, arguments, tmp_path):
    arguments += ["--method", "budget", "--compute", "0.9", "--batch-size", "8", amount]
    with pytest.raises(SystemExit, match="cannot hold a step") as refused:
        full_finetune.main([*arguments, {"--total": "1KiB", "--memory": "0.01"}[amount]])
    (least,) = re.findall(rf"at least {amount[2:]}=([\d.]+) ", str(refused.value))
    given = f"{int(least) / 1024 + 1:.0f}KiB" if amount == "--total" else least
    assert full_finetune.main([*arguments, given]) == 0
    found = summary(tmp_path / "run")
    assert found["loss_after"] < found["loss_before"] - 0.05
    assert BLOCK <= found["trained_parameters"] < 3 * BLOCK
    if amount == "--total":
        assert found["peak_bytes"] <= int(least) + 2048


@pytest.mark.parametrize(
    ("options", "copied"),
    [
        ("--rounding nearest", BLOCK),
        ("--rounding stochastic", BLOCK),
        ("--rounding stochastic --fused-backward", BLOCK),
        ("--method adamw", WHOLE),
    ],
)
def test_bfloat16_weights_train_on_float32_copies(options, copied, arguments, tmp_path):
    low = ["--dtype", "bfloat16", "--steps", "40", *options.split()]
    assert full_finetune.main([*arguments, *low]) == 0
    found = summary(tmp_path / "run")
    assert found["loss_after"] < found["loss_before"] - 0.05
    assert found["master_weights_bytes"] == 4 * copied
    assert found["weights_bytes"] == pytest.approx(2 * WHOLE, rel=0.02)
    saved = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "run" / "model")
    assert {p.dtype for p in saved.parameters()} == {torch.bfloat16}


def test_a_run_leaves_its_model_table_and_history(arguments, checkpoint, tmp_path, capsys):
    assert full_finetune.main(arguments) == 0
    printed, run = capsys.readouterr().out, tmp_path / "run"
    assert all(f"{name.replace('_', ' ')} (MiB)" in printed for name in SIZES)
    assert {path.name for path in run.iterdir()} == {
        *("allocation.json", "allocation.png", "model", "summary.json")
    }
    before = transformers.AutoModelForCausalLM.from_pretrained(checkpoint).state_dict()
    after = transformers.AutoModelForCausalLM.from_pretrained(run / "model").state_dict()
    moved = {name for name, value in after.items() if not torch.equal(value, before[name])}
    assert moved == {name for name in before if ".layers." in name}, "the rest stays frozen"
    assert not full_finetune.main([*arguments, "--model", str(run / "model")]), "it loads again"


def left(run):
    """What a run must leave alike, however often it was interrupted."""
    history = run / "allocation.json"
    return (
        (run / "model" / "model.safetensors").read_bytes(),
        summary(run)["training_loss"],
        history.read_bytes() if history.exists() else None,
    )


def dropping_out(checkpoint, folder):
    """Write the same model with dropout: the random numbers of a run must go on as well."""
    shutil.copytree(checkpoint, folder)
    config = json.loads((folder / "config.json").read_text("utf-8"))
    (folder / "config.json").write_text(json.dumps({**config, "attention_dropout": 0.1}), "utf-8")


def test_a_measured_step_trains_like_any_other(arguments, tmp_path, monkeypatch):
    assert full_finetune.main(arguments) == 0
    monkeypatch.setattr(full_finetune, "is_measured", lambda step, settings: step == 3)
    assert full_finetune.main([*arguments, "--output", str(tmp_path / "other")]) == 0
    assert left(tmp_path / "other") == left(tmp_path / "run")


@pytest.mark.parametrize(
    "options",
    [
        "--dtype bfloat16 --rounding stochastic --period 4",
        pytest.param("--method lisa --period 4", marks=pytest.mark.slow),
        pytest.param("--method blocks --fused-backward --period 4", marks=pytest.mark.slow),
        pytest.param("--method adamw", marks=pytest.mark.slow),
    ],
)
def test_killed_and_started_again_it_ends_bit_for_bit_alike(
    options, arguments, checkpoint, tmp_path, capsys
):
    pytest.importorskip("psutil")
    dropping_out(checkpoint, tmp_path / "dropout")
    # A checkpoint every 3 steps, another block every 4: it is killed within a period.
    given = [*arguments, *options.split(), "--save-every", "3", "--steps", "61"]
    given += ["--model", str(tmp_path / "dropout")]
    straight, run = tmp_path / "straight", tmp_path / "run"
    assert full_finetune.main([*given, "--output", str(straight)]) == 0
    assert "from step 0\n" in capsys.readouterr().out

    process = start(SCRIPT, *given)
    kill_when((run / "checkpoint.pt").exists, process)
    assert not (run / "model").exists(), "it was killed too late to say anything"
    assert full_finetune.main(given) == 0
    said = capsys.readouterr().out
    assert any(f"from step {step}\n" in said for step in range(3, 61, 3))
    assert left(run) == left(straight)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("--model nowhere", "could not load the model nowhere"),
        ("--data nowhere.txt", r"nowhere\.txt"),
        ("--method adamw --order random", "--method adamw takes no --order"),
        ("--method badam --layers 2", "--method badam takes no --layers"),
        ("--rounding nearest", "pass --dtype bfloat16 as well"),
        ("--method blocks --layers 9", "active=9 exceeds the 3"),
        ("--method budget", "pass exactly one of them"),
        ("--method budget --total much", "not an amount of memory"),
        ("--steps 1", "--steps 1 must be at least 2"),
        ("--length 1", "--length 1 must be at least 2"),
        ("--length 100000", "do not fill 100000 tokens"),
        ("--batch-size 1000", "batch_size=1000 exceeds"),
        ("--lr -1", "learning rate: -1"),
    ],
)
def test_bad_input_ends_in_one_sentence(options, message, arguments, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(SystemExit, match=f"^full_finetune: .*{message}"):
        full_finetune.main([*arguments, *options.split()])


def test_a_checkpoint_of_another_run_or_half_of_one_is_refused(arguments, tmp_path):
    saving = [*arguments, "--save-every", "5"]
    assert full_finetune.main(saving) == 0
    with pytest.raises(SystemExit, match=r"belongs to a run with seed=0, not 1; remove it"):
        full_finetune.main([*saving, "--seed", "1"])
    path = tmp_path / "run" / "checkpoint.pt"
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(SystemExit, match="is not a checkpoint of this script; remove it"):
        full_finetune.main(saving)


@pytest.mark.slow
def test_on_the_real_weights_the_loss_falls(tmp_path):
    need_real_weights()
    options = ["--steps", "20", "--output", str(tmp_path)]
    assert full_finetune.main(options) == 0
    found = summary(tmp_path)
    assert found["loss_after"] < found["loss_before"] - 0.1
    assert found["gradients_bytes"] + found["optimizer_state_bytes"] < 0.1 * found["weights_bytes"]
