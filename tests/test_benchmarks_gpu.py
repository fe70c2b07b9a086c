"""The GPU kit, rehearsed on a CPU: every row is there, and one that fails takes no other along."""

from __future__ import annotations

import importlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

pytest.importorskip("transformers")
pytest.importorskip("peft")

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "benchmarks"))  # as run.sh has it
_apart = importlib.import_module("gpu._apart")
_lines = importlib.import_module("gpu._lines")
kit = importlib.import_module("gpu.kit")
part = importlib.import_module("gpu.part")
summary = importlib.import_module("gpu.summary")


# The whole of it


@pytest.fixture(scope="module")
def dry_run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("kit")
    command = ["bash", str(ROOT / "benchmarks/gpu/run.sh"), "--dry-run", str(folder)]
    environment = {**os.environ, "PYTHON": sys.executable, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    return folder, done.stdout


def rows_of(folder: Path, name: str) -> dict[str, dict]:
    return {line["row"]: line for line in _lines.read(folder) if line["part"] == name}


@pytest.mark.parametrize("name", part.MODULES)
def test_every_row_of_a_part_is_written_and_says_how_it_ended(dry_run, name):
    folder, printed = dry_run
    found = rows_of(folder, name)
    assert list(found) == [row.name for row in part.rows_of(name, dry_run=True)]
    for row, line in found.items():
        assert line.keys() == set(_lines.FIELDS)
        assert line["status"] in ("ok", "refused", "missing"), line["reason"]
        assert bool(line["reason"]) == (line["status"] != "ok")
        assert bool(line["values"]) == (line["status"] == "ok")
        assert line["torch"] == torch.__version__
        assert line["dry_run"] is True
        assert line["command"].startswith("bash benchmarks/gpu/run.sh --dry-run ")
        assert f"[{name}] {row}: {line['status']}" in printed


def test_the_rows_of_memory_and_speed_are_those_of_the_gpu(dry_run):
    folder, _ = dry_run
    found = rows_of(folder, "memory_and_speed")
    assert list(found) == [row.name for row in part.rows_of("memory_and_speed", dry_run=False)]
    refused = {row: line["reason"] for row, line in found.items() if line["status"] == "refused"}
    assert {row for row in found if "Budget(0.15, " in row} <= refused.keys()
    for row, reason in refused.items():
        assert "ours, Budget(" in row
        assert "cannot hold a step" in reason
    missing = [row for row, line in found.items() if line["status"] == "missing"]
    assert all("Liger" in row for row in missing)
    for line in found.values():
        if line["status"] == "ok":
            values = line["values"]
            assert values["gradient_norm"] > 0
            assert values["backward_flops"] > 0
            assert values["steps_timed"] > 0
            assert values.get("steps_beyond", 0) == 0
            assert values.get("largest_error", 0.0) == pytest.approx(0, abs=0.03)


def test_all_active_takes_less_than_peft_and_a_budget_less_than_that(dry_run):
    found = rows_of(dry_run[0], "memory_and_speed")
    peaks = [
        found[f"Llama-3.2-1B, 2 x 2048: {way}"]["values"]["peak_above"]
        for way in (
            "peft LoRA",
            "ours, all active",
            "ours, Budget(0.75, 1)",
            "ours, Budget(0.5, 1)",
        )
    ]
    assert peaks == sorted(peaks, reverse=True)


def test_the_tests_for_a_gpu_are_rows_and_skipped_here(dry_run):
    found = rows_of(dry_run[0], "tests")
    assert len(found) > 60
    for line in found.values():
        assert (line["status"], line["reason"]) == ("skipped", "Skipped: needs a CUDA device")


def test_the_summary_counts_what_happened(dry_run):
    folder, printed = dry_run
    found = json.loads((folder / "summary.json").read_text())
    assert list(found["counts"]) == sorted(p.name for p in kit.PARTS)
    assert len(found["bars"]) == len(summary.BARS) + 2
    assert {bar[-1] for bar in found["bars"]} == {"a dry run"}
    # A model this small cannot keep the smallest budget: that row is refused, with its reason.
    measured = [bar for bar in found["bars"][: len(summary.BARS)] if "chunked" not in bar[0]]
    assert not any(bar[1] == "-" for bar in measured)
    assert "\nmemory_and_speed: " in printed
    files = [path.name for path in folder.iterdir()]
    assert len(files) <= 8, "as many come back from the machine"


def test_a_second_run_into_the_same_folder_is_refused(dry_run, capsys):
    with pytest.raises(SystemExit):
        kit.main(["--dry-run", str(dry_run[0])])
    assert "has rows of another run" in capsys.readouterr().err


def test_without_a_gpu_a_dry_run_is_proposed(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(_lines, "_card", lambda: ("", ""))
    with pytest.raises(SystemExit):
        kit.main([str(tmp_path)])
    assert "no GPU was found; pass --dry-run" in capsys.readouterr().err


def test_the_parts_fit_into_eight_minutes():
    assert sum(p.seconds for p in kit.PARTS) <= 480
    assert [p.name for p in kit.PARTS] == ["tests", *part.MODULES]


# A row in a process of its own


def outcome(work, seconds: float = 30.0, again=()):
    return _apart.run_apart(_apart.Row("a row", work), seconds=seconds, again=again)


def test_values_come_back():
    done = outcome(lambda: {"pid": os.getpid(), "x": 1.5})
    assert done.status == "ok"
    assert done.values["x"] == 1.5
    assert done.values["pid"] != os.getpid()


def refuse():
    raise _apart.Refused("too small")


def lack():
    raise _apart.Missing("no such package")


def run_out():
    raise torch.OutOfMemoryError("CUDA out of memory.\nTried to allocate")


def fail():
    raise KeyError("x")


def crash():
    os.kill(os.getpid(), signal.SIGKILL)


@pytest.mark.parametrize(
    ("work", "status", "reason"),
    [
        (refuse, "refused", "too small"),
        (lack, "missing", "no such package"),
        (run_out, "out of memory", "CUDA out of memory."),
        (fail, "failed", "KeyError: 'x'"),
        (crash, "failed", f"its process ended with exit code {-signal.SIGKILL}"),
        (lambda: time.sleep(60), "failed", "stopped at its time limit, 1 s"),
    ],
    ids=["refused", "missing", "out of memory", "failed", "crashed", "too slow"],
)
def test_a_row_that_ends_badly_says_why(work, status, reason, capfd):
    done = outcome(work, seconds=1.0)
    assert (done.status, done.reason, done.values) == (status, reason, {})


def test_where_an_import_has_started_cuda_python_is_started_anew(monkeypatch, tmp_path):
    monkeypatch.setattr(torch.cuda, "_is_in_bad_fork", lambda: True)  # seen by the child
    path = os.pathsep.join(map(str, (ROOT, ROOT / "adapters", ROOT / "benchmarks")))
    monkeypatch.setenv("PYTHONPATH", path)
    name = "3 groups: not measured"
    again = ["-m", "gpu.part", "overhead", str(tmp_path), "--dry-run", "--row", name]
    done = outcome(fail, seconds=120.0, again=again)  # this work is not done: the other Python's is
    assert done.status == "ok", done.reason
    assert done.values["plain_ops"] > 0


def test_rows_for_which_no_time_is_left_are_skipped(monkeypatch, tmp_path):
    monkeypatch.setenv(_lines.FACTS, json.dumps(_lines.facts("a command", dry_run=True)))
    part.run("workspaces", tmp_path, until=time.monotonic(), dry_run=True)
    found = list(_lines.read(tmp_path))
    assert [line["row"] for line in found] == [
        row.name for row in part.rows_of("workspaces", dry_run=True)
    ]
    assert {line["status"] for line in found} == {"skipped"}
    assert {line["reason"] for line in found} == {"no time is left for it"}


def test_a_part_ends_before_it_is_stopped(monkeypatch, tmp_path):
    monkeypatch.setenv(_lines.FACTS, json.dumps(_lines.facts("a command", dry_run=True)))
    slow = [_apart.Row(name, lambda: time.sleep(60)) for name in ("slow", "later")]
    monkeypatch.setattr(part, "rows_of", lambda *_, **__: slow)
    monkeypatch.setattr(part, "LEAST", 1e-3)
    part.run("overhead", tmp_path, until=time.monotonic() + part.ENDING + 1, dry_run=True)
    found = {line["row"]: line["reason"] for line in _lines.read(tmp_path)}
    assert found == {"slow": "stopped at its time limit, 1 s", "later": "no time is left for it"}
    start = time.monotonic()
    command = kit.command_of(kit.PARTS[-1], tmp_path, 60.0, ["--dry-run"])
    assert float(command[command.index("--until") + 1]) <= start + 60 - kit.GRACE + 1


def test_a_part_that_breaks_or_hangs_is_a_row_of_its_own(monkeypatch, tmp_path):
    lines = _lines.Lines(tmp_path, "overhead", {})
    for command, reason in (
        (["-c", "raise SystemExit(3)"], "exit code 3"),
        (["-c", "import time; time.sleep(60)"], "stopped at its time limit, 6 s"),
    ):
        monkeypatch.setattr(kit, "command_of", lambda *_, c=command, **__: [sys.executable, *c])
        kit.run_part(kit.PARTS[-1], tmp_path, seconds=6.0, passed_on=[], lines=lines)
        *_, last = _lines.read(tmp_path)
        assert (last["row"], last["status"], last["reason"]) == ("the part", "failed", reason)


# The bars


def line(row: str, **values: float) -> dict:
    return {"part": "memory_and_speed", "row": row, "status": "ok", "values": values}


def test_a_bar_compares_two_rows_and_says_when_one_is_missing():
    bar = summary.Bar("tokens", "ours", "theirs", "speed", 1.05, summary.operator.ge)
    rows = {"ours": line("ours", speed=21.0), "theirs": line("theirs", speed=20.0)}
    assert bar.line(rows) == ["tokens", "1.050", ">= 1.05", "ok"]
    rows["ours"]["values"]["speed"] = 20.0
    assert bar.line(rows)[-1] == "MISSED"
    assert bar.line({"ours": rows["ours"]})[-1] == "not measured"


def test_each_bar_names_rows_that_are_measured():
    names = {row.name for row in part.rows_of("memory_and_speed", dry_run=False)}
    for bar in summary.BARS:
        assert {bar.row, bar.of} <= names


def test_the_bar_of_half_the_memory_is_measured_for_each_shape(dry_run):
    found = rows_of(dry_run[0], "memory_and_speed")
    bars = {bar.name: bar for bar in summary.BARS}
    for shape in (case.name for case in importlib.import_module("gpu.lora").SHAPES):
        name = f"{shape}: Budget(0.5, 0.6), chunked loss"
        for what, value, limit in (
            ("peak", "peak_above", 0.5),
            ("tokens/s", "tokens_per_s_mean", 1.25),
        ):
            bar = bars[f"{name}: {what} / peft LoRA"]
            assert (bar.value, bar.limit) == (value, limit)
            assert found[bar.row]["status"] == "ok", "a budget of half is not refused"


def test_a_row_says_how_much_of_a_step_the_host_takes(dry_run):
    for line in rows_of(dry_run[0], "memory_and_speed").values():
        if line["status"] == "ok":
            assert 0 < line["values"]["host_s"] <= line["values"]["step_s"] * 1.5


def test_one_step_beyond_its_budget_misses_the_bar():
    lines = [line("a", steps_beyond_allocated=0), line("b", steps_beyond_allocated=1)]
    found = {bar[0]: bar[-1] for bar in summary.promises(lines)}
    assert found["steps beyond their budget"] == "MISSED"
    assert found["waits that the wrapper adds to a step"] == "not measured"
