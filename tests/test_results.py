"""The results: the texts say what the stored runs give, and each run says how it was made."""

import importlib
import json
import re
import sys
from pathlib import Path

import pytest

pytest.importorskip("transformers")
pytest.importorskip("peft")
pytest.importorskip("matplotlib")

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
sys.path[:0] = [str(BENCHMARKS), str(BENCHMARKS / "results")]  # as for a script there
_full_tables = importlib.import_module("_full_tables")
_gpu_tables = importlib.import_module("_gpu_tables")
_quality_tables = importlib.import_module("_quality_tables")
gpu_lines = importlib.import_module("gpu._lines")
gpu_part = importlib.import_module("gpu.part")
_stored = importlib.import_module("_stored")
tables = importlib.import_module("tables")

STORED = [
    *(BENCHMARKS / "results").glob("*.jsonl"),
    _quality_tables.INTERVALS,
]
RUN = {"command": "python x.py", "date": "2026-01-01", "versions": {}, "hardware": {}}


def test_the_texts_are_those_of_the_stored_runs(capsys):
    assert tables.main(["--check"]) == 0, capsys.readouterr().out
    assert not capsys.readouterr().out


@pytest.mark.parametrize("name", tables.TABLES)
def test_a_number_changed_in_any_table_is_found(name, tmp_path, capsys):
    whole, copy = marked(name), tmp_path / "copy.md"
    last = [*re.finditer(r"^\|.*", whole, re.MULTILINE)][-1]  # lines about refused rows may follow
    place = last.start() + max(found.start() for found in re.finditer(r"\d", last[0]))
    digit = "1" if whole[place] != "1" else "2"
    copy.write_text(f"{whole[:place]}{digit}{whole[place + 1 :]}\n", "utf-8")
    assert tables.main(["--check", str(copy)]) == 1
    said = capsys.readouterr().out
    assert said.startswith(f"--- {copy}\n+++ the stored runs\n")
    assert len(re.findall(r"^-\| ", said, re.MULTILINE)) == 1
    assert tables.main(["--write", str(copy)]) == 0
    assert copy.read_text("utf-8") == f"{whole}\n"


def marked(name):
    """Return a table with its marks, from the first text that has it."""
    pattern = re.compile(rf"<!-- table: {name} -->\n.*?{tables.END}", re.DOTALL)
    return next(m[0] for path in tables.TEXTS if (m := pattern.search(path.read_text("utf-8"))))


def test_no_table_of_the_results_stands_without_its_runs():
    outside = tables.MARKED.sub("", tables.RESULTS.read_text("utf-8"))
    assert not re.findall(r"^\|.*", outside, re.MULTILINE)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (f"<!-- table: nothing -->\n{tables.END}", "there is no table nothing; there are over"),
        ("<!-- table: quality -->\n| a |", "1 tables begin and 0 end; each ends with <!-- end"),
    ],
)
def test_a_mark_that_is_wrong_ends_in_one_sentence(text, message, tmp_path):
    (tmp_path / "text.md").write_text(text, "utf-8")
    with pytest.raises(SystemExit, match=f"^tables: {message}"):
        tables.main(["--check", str(tmp_path / "text.md")])


@pytest.mark.parametrize("path", STORED, ids=lambda path: path.stem)
def test_each_stored_row_says_how_when_and_where_it_was_measured(path):
    for row in _stored.read(path):
        run = row["run"]
        script = re.search(r"python ((benchmarks|examples|tests)/\S+\.py)", run["command"])[1]
        assert (BENCHMARKS.parent / script).is_file()
        assert re.fullmatch(r"\d{4}-\d\d-\d\d", run["date"])
        assert "commit" in run or "of commit" in run["recorded"]
        assert {"torch"} <= run["versions"].keys()
        assert {"card", "processor", "cores", "threads"} == run["hardware"].keys()


def test_the_rows_of_the_gpu_kit_are_of_one_run_on_a_gpu():
    rows = list(gpu_lines.read(_gpu_tables.FOLDER))
    assert {row["part"] for row in rows} == {*gpu_part.MODULES, "tests"}
    same = ("dry_run", "command", "card", "driver", "torch", "cuda", "packages", "python")
    assert len({json.dumps([row[name] for name in same]) for row in rows}) == 1
    for row in rows:
        assert row.keys() == set(gpu_lines.FIELDS)
        assert row["status"] in gpu_lines.STATUSES
    assert rows[0]["dry_run"] is False
    assert rows[0]["command"] in tables.RESULTS.read_text("utf-8")


@pytest.mark.parametrize("folder", ["", "short", "mpnet"])
def test_the_sweeps_ran_on_what_the_text_names(folder):
    runs = _quality_tables.finished(_quality_tables.FOLDER / folder / "runs.jsonl")
    named = {f"{r['versions']['device']}, {r['versions']['threads']} thread per run" for r in runs}
    named |= {f"{name} {r['versions'][name]}" for r in runs for name in ("torch", "transformers")}
    text = tables.RESULTS.read_text("utf-8")
    assert len(named) == 3
    assert all(what in text for what in named)


def test_a_part_that_is_measured_again_replaces_its_rows_and_no_others(tmp_path):
    path = tmp_path / "new" / "rows.jsonl"
    _stored.write(path, "a", [{"row": "x", "value": 1}, {"row": "y", "value": 2}], RUN)
    _stored.write(path, "b", [{"row": "x", "value": 3}], RUN)
    stored = _stored.write(path, "a", [{"row": "z", "value": 4}], RUN)
    assert stored == _stored.read(path, "a") == [{"part": "a", "row": "z", "value": 4, "run": RUN}]
    assert [row["value"] for row in _stored.read(path)] == [3, 4]
    assert [found.name for found in path.parent.iterdir()] == ["rows.jsonl"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, "there are no stored runs at .*rows.jsonl; a script with --output writes them"),
        ('{"part": "a", "row": "x", "run": {}}', "has no rows of part 'b'; it has .'a'."),
        ('{"part": "a", "row"', "line 1, is not a row: "),
        ('{"part": "a"}', "line 1, is not a row: part, row or run is missing"),
        ("3", "line 1, is not a row: "),
    ],
)
def test_a_file_that_is_no_file_of_runs_is_refused(text, message, tmp_path):
    path = tmp_path / "rows.jsonl"
    if text is not None:
        path.write_text(text + "\n", "utf-8")
    with pytest.raises(ValueError, match=message):
        _stored.read(path, "b")


def test_a_run_names_its_command_from_the_root_and_what_it_ran_on(monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    run = _stored.run_of(str(BENCHMARKS / "memory.py"), ["--shape", "a b"])
    assert run["command"] == "OMP_NUM_THREADS=1 python benchmarks/memory.py --shape 'a b'"
    assert run["versions"]["torch"] == importlib.import_module("torch").__version__
    assert run["hardware"]["cores"] >= 1
    assert run["commit"] is None or re.fullmatch(r"[0-9a-f]{7,}(-dirty)?", run["commit"])
    monkeypatch.delenv("OMP_NUM_THREADS")
    assert _stored.run_of(str(BENCHMARKS / "memory.py"), [])["command"] == (
        "python benchmarks/memory.py"
    )


def test_what_is_stored_of_full_parameter_training_is_what_was_measured():
    rows = _stored.read(BENCHMARKS / "results" / "full_parameter.jsonl", "SmolLM2-135M")
    measured = _full_tables.Measured.of_rows(rows)
    again = [
        {"part": r["part"], **new, "run": r["run"]}
        for r, new in zip(rows, measured.to_rows(), strict=True)
    ]
    assert again == rows


def test_an_interval_of_other_runs_is_refused(monkeypatch, tmp_path):
    rows = _stored.read(_quality_tables.INTERVALS)
    moved = [row | {"value": row["value"] + 1e-6} for row in rows]
    path = tmp_path / "intervals.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in moved), "utf-8")
    monkeypatch.setattr(_quality_tables, "INTERVALS", path)
    with pytest.raises(ValueError, match=r"for full minus lora, but the runs give .* --intervals"):
        _quality_tables.quality()
    path.write_text(json.dumps(rows[1] | {"part": "few"}) + "\n", "utf-8")
    with pytest.raises(ValueError, match="no interval of random@active=2 minus lora; python"):
        _quality_tables.few()


@pytest.mark.slow
@pytest.mark.parametrize("part", _quality_tables.PARTS)
def test_the_intervals_are_those_of_the_runs_and_the_labels(part):
    drawn = _quality_tables.compute_intervals(part)
    kept = _stored.read(_quality_tables.INTERVALS, part)
    for new, old in zip(drawn, kept, strict=True):
        assert (new["row"], new["less"], new["tasks"]) == (old["row"], old["less"], old["tasks"])
        for number in ("value", "low", "high"):
            assert new[number] == pytest.approx(old[number], abs=1e-9)


def test_every_figure_of_the_texts_is_drawn_from_the_runs(tmp_path):
    tables.figures(tmp_path)
    drawn = {path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*.png")}
    text = "".join(path.read_text("utf-8") for path in tables.TEXTS)
    shown = {*re.findall(r"!\[[^]]*\]\((?:benchmarks/)?results/(\S+)\)", text)}
    assert all((BENCHMARKS / "results" / name).is_file() for name in shown)
    # Of the sweep over all linear layers the runs were not kept, only what they showed.
    assert drawn == shown - {"quality/all-linear/figure5.png"}
