"""The Accelerate example: two real processes, a real SIGKILL in mid-period, and a resumed run."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import pytest
from processes import accelerate_launch, finished, kill_when, start
from tiny_checkpoint import write_checkpoint, write_texts

pytest.importorskip("transformers")
pytest.importorskip("accelerate")
pytest.importorskip("psutil")  # accelerate needs it too
pytest.importorskip("tqdm")

pytestmark = pytest.mark.distributed
SCRIPT = Path(__file__).parents[1] / "examples" / "accelerate_finetune.py"
STEPS, SAVE_EVERY, PERIOD = 61, 7, 9
CHECKPOINTS = range(SAVE_EVERY, STEPS, SAVE_EVERY)
assert all(step % PERIOD for step in CHECKPOINTS), "each is in the middle of a period"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A tiny BERT and a tiny data set, as files."""
    folder = write_checkpoint(tmp_path_factory.mktemp("work"), layers=3)
    write_texts(folder / "texts.csv")
    return folder


def launch(folder: Path, output: Path, *options: str, processes: int = 1) -> subprocess.Popen[str]:
    """Start the script as a user would, by ``accelerate launch``."""
    arguments = [
        *("--model", folder, "--data", folder / "texts.csv", "--output", output),
        *("--steps", STEPS, "--period", PERIOD, "--batch-size", "4", "--length", "8"),
        *("--save-every", SAVE_EVERY, "--memory", "0.9", "--compute", "0.9"),
    ]
    return start(SCRIPT, *arguments, *options, launcher=accelerate_launch(processes))


def weights(output: Path) -> bytes:
    return (output / "adapter" / "adapter_model.safetensors").read_bytes()


def check(folder: Path, tmp_path: Path, *options: str, processes: int = 1) -> None:
    straight, broken = tmp_path / "straight", tmp_path / "broken"
    said = finished(launch(folder, straight, *options, processes=processes))
    assert f"{processes} processes, from step 0" in said
    assert json.loads((straight / "summary.json").read_text())["num_processes"] == processes

    process = launch(folder, broken, *options, processes=processes)
    kill_when(lambda: any(broken.glob("step-*")), process)
    assert not (broken / "adapter").exists(), "it was killed too late to say anything"
    half = broken / f".step-{STEPS - 1}.tmp"  # as a kill in the middle of save() leaves it
    half.mkdir()
    (half / "optimizer.bin").write_bytes(b"half")
    said = finished(launch(folder, broken, *options, processes=processes))
    assert any(f"{processes} processes, from step {step}\n" in said for step in CHECKPOINTS)
    assert not half.exists()
    assert weights(broken) == weights(straight)
    assert (broken / "record.json").read_bytes() == (straight / "record.json").read_bytes()


def test_two_processes_killed_and_resumed_end_bit_for_bit_alike(folder, tmp_path):
    check(folder, tmp_path, processes=2)


@pytest.mark.slow
@pytest.mark.parametrize("processes", [1, 2])
@pytest.mark.parametrize("lr_time", ["global", "local"])
@pytest.mark.parametrize(
    "allocator",
    ["discounted", "topk", "threshold", "stochastic", "random", "round_robin", "budget"],
)
def test_every_allocator_killed_and_resumed(allocator, lr_time, processes, folder, tmp_path):
    check(folder, tmp_path, "--allocator", allocator, "--lr-time", lr_time, processes=processes)
