"""The record: every reallocation, its counts, its file and its picture."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from strategies import any_allocator
from toy import ToyModel, names, train, wrapped

from dynalora_optim import AllocationRecord, Reallocation
from dynalora_optim.allocation._plot import by_layer


@given(any_allocator, st.integers(1, 5), st.integers(0, 12))
def test_counts_are_the_steps_each_module_was_active(allocator, period, steps):
    model = ToyModel()
    optimizer = wrapped(model, allocator=allocator, period=period, active=2)
    expected = dict.fromkeys(names(), 0)
    for step in range(steps):
        for name in optimizer.active_groups:
            expected[name] += 1
        train(model, optimizer, 1, start=step)
    assert optimizer.record.counts() == expected
    assert len(optimizer.record) == 1 + steps // period


def test_an_entry_holds_step_scores_and_choice():
    model = ToyModel()
    optimizer = wrapped(model, active=2, period=2, allocator="topk")
    assert optimizer.record[0].scores == dict.fromkeys(names(), 0.0)
    train(model, optimizer, 2)
    entry = optimizer.record[1]
    assert entry.step == 2
    assert list(entry.chosen) == optimizer.active_groups
    assert entry.scores == optimizer.tracker.scores()
    best = sorted(entry.scores, key=entry.scores.__getitem__)[-2:]
    assert set(entry.chosen) == set(best)


def test_to_json_holds_the_whole_record(tmp_path: Path):
    model = ToyModel()
    optimizer = wrapped(model, active=2, period=2)
    train(model, optimizer, 5)
    path = tmp_path / "record.json"
    optimizer.record.to_json(path)
    entries = json.loads(path.read_text())
    assert [(entry["step"], entry["steps"]) for entry in entries] == [(0, 2), (2, 2), (4, 1)]
    again = AllocationRecord()
    again.load_state_dict(entries)
    assert list(again) == list(optimizer.record)
    assert again.counts() == optimizer.record.counts()


def test_a_failed_write_leaves_the_old_file_whole(tmp_path: Path, monkeypatch):
    path = tmp_path / "record.json"
    record = AllocationRecord()
    record.append(Reallocation(0, {"a": 0.0}, ("a",)))
    record.to_json(path)
    old = path.read_text()

    def full_disk(self, *args, **kwargs):
        self.touch()
        raise OSError("No space left on device")

    monkeypatch.setattr(Path, "write_text", full_disk)
    record.advance()
    with pytest.raises(OSError, match="No space left"):
        record.to_json(path)
    assert path.read_text() == old
    assert [file.name for file in tmp_path.iterdir()] == ["record.json"]


def test_layers_and_modules_are_told_from_the_names():
    counts = {
        "bert.encoder.layer.0.attention.self.query": 3,
        "bert.encoder.layer.0.attention.self.value": 4,
        "bert.encoder.layer.11.attention.self.query": 5,
        "h.2.mlp.experts.7.up": 6,
        "pooler": 7,
    }
    assert by_layer(counts) == {
        ("0", "attention.self.query"): 3,
        ("0", "attention.self.value"): 4,
        ("11", "attention.self.query"): 5,
        ("2", "mlp.experts.7.up"): 6,
        ("-", "pooler"): 7,
    }


def test_plot_draws_layer_by_module(tmp_path: Path):
    pytest.importorskip("matplotlib")
    model = ToyModel()
    optimizer = wrapped(model, active=2, period=1)
    train(model, optimizer, 5)
    path = tmp_path / "heatmap.png"
    optimizer.record.plot(path)
    assert path.read_bytes().startswith(b"\x89PNG\r\n\x1a\n")


def test_plot_needs_an_entry_and_matplotlib(tmp_path: Path, monkeypatch):
    with pytest.raises(ValueError, match="empty record"):
        AllocationRecord().plot(tmp_path / "x.png")
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ImportError, match=r"dynalora-optim\[plot\]"):
        wrapped(ToyModel()).record.plot(tmp_path / "x.png")
    assert not list(tmp_path.iterdir())
