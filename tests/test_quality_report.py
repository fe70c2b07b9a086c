"""The report of a sweep: rates, means, paired intervals and figures, of runs known by hand."""

import importlib
import json
import re
import sys
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("transformers")
pytest.importorskip("matplotlib")

QUALITY = Path(__file__).parents[1] / "benchmarks" / "quality"
sys.path.insert(0, str(QUALITY))  # where Python puts it for a script there
_bootstrap = importlib.import_module("_bootstrap")
_compare = importlib.import_module("_compare")
_curves = importlib.import_module("_curves")
_figures = importlib.import_module("_figures")
_suite = importlib.import_module("_suite")
_shared = importlib.import_module("_shared")
_store = importlib.import_module("_store")
_training = importlib.import_module("_training")
script = importlib.import_module("sweep")
report = importlib.import_module("report")

ROWS = 400
LABELS = [i % 2 for i in range(ROWS)]


@pytest.fixture(autouse=True)
def tasks(monkeypatch):
    """Two tasks whose test rows have the labels above."""
    rows = [_shared.Row(str(i), label) for i, label in enumerate(LABELS)]
    task = _suite.Recipe(lambda: _suite.SuiteTask([], [], rows), ("accuracy",), 4, 8)
    monkeypatch.setitem(_suite.SUITES, "offline", {"easy": task, "hard": task})
    _compare.labels.cache_clear()
    yield
    _compare.labels.cache_clear()


def line(method="lora", task="easy", lr=1e-3, seed=0, *, wrong=(), validation=0.5, **other):
    """A finished run that errs on the test rows in ``wrong``."""
    predictions = [float(1 - y if i in wrong else y) for i, y in enumerate(LABELS)]
    settings = {
        **{"suite": "offline", "task": task, "method": method, "lr": lr, "seed": seed},
        **{"model": "m", "steps": 4, "batch_size": 2, "max_length": 8, "layers": None},
    }
    found = {
        "settings": settings,
        "evaluations": [{"step": s, "loss": 1 / s, "accuracy": 0.5} for s in (2, 4)],
        "validation": {"accuracy": validation},
        "validation_loss": 0.5,
        "test": {"accuracy": 1 - len(wrong) / ROWS},
        "predictions": predictions,
        "peak_bytes": 100,
        "saved_bytes": 80,
        "active_parameters": 10.0,
        "counts": {},
    }
    return {**found, **other}


def test_a_method_stands_at_the_rate_that_validation_rows_chose():
    lines = [
        line(lr=1e-3, wrong=range(40), validation=0.8),
        line(lr=2e-3, wrong=range(80), validation=0.9),
        line(lr=5e-3, wrong=range(0), validation=0.9, validation_loss=0.6),
        line(lr=2e-3, seed=1, wrong=range(120), validation=0.8),
        line(lr=5e-3, seed=1, validation=0.7),
        line(lr=1e-2, validation=0.95),  # with one seed alone: too few to be chosen
    ]
    cell = _compare.Sweep(lines).cells["lora", "easy"]
    assert cell.lr == 2e-3
    assert cell.scores == pytest.approx([0.8, 0.7])
    assert cell.mean == pytest.approx(0.75)
    assert cell.deviation == pytest.approx(0.1 / 2**0.5)


def test_a_tie_goes_to_the_lower_loss_and_a_diverged_run_never_wins():
    nan = float("nan")
    lines = [
        line(lr=1e-3, validation=nan),
        line(lr=2e-3, validation=0.9, validation_loss=nan),
        line(lr=5e-3, validation=0.7, validation_loss=0.3),
        line(lr=1e-2, validation=0.7, validation_loss=0.2),
    ]
    assert _compare.at_best_rate(lines).lr == 1e-2


def test_a_seed_that_ran_twice_counts_once():
    lines = [line(seed=0), line(seed=1, wrong=range(40)), line(seed=1, wrong=range(80))]
    assert _compare.Sweep(lines).cells["lora", "easy"].scores == pytest.approx([1, 0.8])


def test_equal_predictions_differ_by_exactly_nothing():
    both = [line(name, wrong=range(50), seed=seed) for name in ("a", "b") for seed in range(3)]
    difference = _compare.Sweep(both).difference("a", "b")
    assert (difference.value, difference.low, difference.high) == (0, 0, 0)


def test_the_interval_is_that_of_the_paired_rows():
    """b errs where a does and on d rows more: the difference has the variance of d among n."""
    extra = 60
    lines = [
        line("a", wrong=range(50)),
        line("b", wrong=range(50 + extra)),
    ]
    difference = _compare.Sweep(lines).difference("a", "b")
    share = extra / ROWS
    half = 1.96 * (share * (1 - share) / ROWS) ** 0.5
    assert difference.value == pytest.approx(share)
    assert difference.low == pytest.approx(share - half, abs=half / 5)
    assert difference.high == pytest.approx(share + half, abs=half / 5)


def test_seeds_are_drawn_too_and_only_those_of_both():
    lines = [line("a", seed=seed) for seed in range(3)]
    lines += [line("b", seed=seed, wrong=range(100 * seed)) for seed in (0, 1, 2, 3)]
    difference = _compare.Sweep(lines).difference("a", "b")
    assert difference.value == pytest.approx(0.25)  # seeds 0, 1, 2: 0, 0.25, 0.5
    assert difference.low < 0.1  # by rows alone it would be 0.22
    assert difference.high > 0.4


def test_a_method_without_a_task_is_compared_over_those_it_has():
    lines = [line("lora", task) for task in ("easy", "hard")]
    lines.append(line("vera", "easy", wrong=range(4)))
    sweep = _compare.Sweep(lines)
    assert sweep.difference("vera", "lora").tasks == ("easy",)
    rows = report.main_table(sweep, "lora").splitlines()
    assert rows[2].split(" | ")[1:4] == ["100.0", "100.0", "100.0"]
    cells = rows[3].strip("| ").split(" | ")
    assert cells[:4] == ["vera", "99.0", "-", "99.0†"]
    assert cells[-1].startswith("-1.0 [")
    assert cells[-1].endswith("†")


def test_sizes_are_in_units_of_the_references():
    lines = [line("lora"), line("static", peak_bytes=40, saved_bytes=20)]
    row = report.main_table(_compare.Sweep(lines), "lora").splitlines()[-1]
    assert "| 0.40 | 0.25 |" in row


def test_runs_of_other_settings_are_not_thrown_together():
    other = line(seed=1)
    other["settings"]["steps"] = 8
    with pytest.raises(ValueError, match=r"easy differ in more.*'steps': 4.*'steps': 8.*folders"):
        _compare.Sweep([line(), other])


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.setattr(_bootstrap, "DRAWS", 100)
    counts = {f"encoder.layer.{i}.attention.self.{kind}": i for i in range(4) for kind in "qv"}
    names = [
        "lora",
        "static",
        "forward",
        "forward@active=2",
        "forward@active=4",
        "forward@period=5",
    ]
    names.append("forward@allocator=topk,active=2")
    lines = [
        line(name, task, seed=seed, wrong=range(i), counts=counts if "@" not in name else {})
        for i, name in enumerate(names)
        for task in ("easy", "hard")
        for seed in range(2)
    ]
    text = "".join(json.dumps(found) + "\n" for found in lines)
    (tmp_path / "runs.jsonl").write_text(text + text[:100], "utf-8")  # half a last line
    return tmp_path


def test_all_tables_and_figures_are_written(folder, capsys):
    assert report.main([str(folder), "--pairs", "forward:static"]) == 0
    text = (folder / "report.md").read_text("utf-8")
    assert {path.name for path in folder.iterdir()} == {
        *("runs.jsonl", "report.md", *(f"figure{i}.png" for i in range(1, 6)))
    }
    for i in range(1, 6):
        assert f"](figure{i}.png)" in text
        assert (folder / f"figure{i}.png").read_bytes()[:4] == b"\x89PNG"
    assert re.search(r"\| forward \| static \| -0\.[23] \[", text)  # -0.25
    assert "| learning rate of the head | easy | hard |" in text
    assert "| forward@active=4 |" in capsys.readouterr().out


def test_a_report_may_be_of_some_methods_in_an_order_of_ones_own(folder, capsys):
    assert report.main([str(folder), "--methods", "static,forward@active=4,lora"]) == 0
    rows = capsys.readouterr().out.splitlines()[2:5]
    assert [row.split(" | ")[0].strip("| ") for row in rows] == [
        "static",
        "forward@active=4",
        "lora",
    ]


def test_a_figure_without_runs_says_how_to_make_them(tmp_path):
    (tmp_path / "runs.jsonl").write_text(json.dumps(line()) + "\n", "utf-8")
    assert report.main([str(tmp_path), "--output", str(tmp_path / "out")]) == 0
    text = (tmp_path / "out" / "report.md").read_text("utf-8")
    command = re.search(
        "Periods: there are no runs; `python benchmarks/quality/sweep.py (.*)` makes them", text
    )[1]
    options = script.parse(command.split())
    assert (options.suite, options.tasks, options.output) == ("offline", ["easy"], tmp_path)
    assert options.methods == ["forward@period=10", "forward@period=50"]
    wanted = script.settings(options, "easy", "lora", 1e-3)
    assert asdict(wanted) == line()["settings"]  # so that the new runs can stand beside the old
    assert [path.name for path in (tmp_path / "out").glob("*.png")] == ["figure1.png"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nowhere"], "there is no folder .*nowhere; sweep.py --output"),
        (["empty"], "there are no finished runs in .*empty"),
        (["broken"], "broken/runs.jsonl has a line that is not a run of sweep.py: KeyError"),
        (["changed"], "a run of easy has 3 predictions .* does not agree with the 400 test rows"),
        (["", "--pairs", "lora"], "--pairs lora is not two methods such as forward:random"),
        (["", "--reference", "vera"], r"there are no runs of vera; there are runs of \['lora'"),
        (["", "--pairs", "lora:vera"], "there are no runs of vera"),
        (["", "--methods", "lora,vera"], "there are no runs of vera in "),
    ],
)
def test_bad_input_ends_in_one_sentence(arguments, message, folder):
    where, *more = arguments
    (folder / "empty").mkdir()
    changed = [line(), line("vera", predictions=[0.0, 1.0, 0.0])]
    for name, lines in (("broken", [{"loss": 1}]), ("changed", changed)):
        (folder / name).mkdir()
        text = "".join(json.dumps(found) + "\n" for found in lines)
        (folder / name / "runs.jsonl").write_text(text, "utf-8")
    with pytest.raises(SystemExit, match=f"^report: (/.*)?{message}"):
        report.main([str(folder / where), *more])


def test_bootstrap_of_a_correlation_takes_rows_of_both_together():
    truth = np.linspace(0, 1, 50)
    noise = np.random.default_rng(0).normal(size=50)
    runs = [{"test": {"Pearson": 0}, "predictions": (truth + s * noise).tolist()} for s in (0, 1)]
    drawn = _bootstrap.bootstrap(truth, runs[:1], runs[1:], np.random.default_rng(0))
    assert drawn.shape == (1000,)
    assert (drawn > 0).all()
    expected = 1 - np.corrcoef(truth, truth + noise)[0, 1]
    assert drawn.mean() == pytest.approx(expected, abs=0.05)


@pytest.mark.parametrize("metric", [*_suite.METRICS])
def test_sums_over_all_rows_give_the_metric_of_the_rows_drawn(metric, monkeypatch):
    monkeypatch.setattr(_bootstrap, "DRAWS", 10)
    generator = np.random.default_rng(0)
    if metric in ("Pearson", "Spearman"):
        truth = 1e3 + generator.normal(size=60)
        predictions = truth + generator.normal(size=60)
    else:
        truth = generator.integers(2, size=60)
        predictions = np.where(generator.random(60) < 0.8, truth, 1 - truth).astype(float)
    counts = _bootstrap.drawn_rows(60, generator)
    assert (counts.sum(1) == 60).all()
    rows = [np.repeat(np.arange(60), draw.astype(int)) for draw in counts]
    expected = [_suite.METRICS[metric](truth[r], predictions[r]) for r in rows]
    found = _bootstrap.resampled(metric, counts, truth, predictions)
    np.testing.assert_allclose(found, expected, rtol=1e-12)


@pytest.mark.parametrize("metric", ["Pearson", "F1", "Matthews correlation"])
def test_a_constant_prediction_is_worth_nothing(metric):
    truth, counts = np.arange(10) % 2, np.ones((3, 10))
    found = _bootstrap.resampled(metric, counts, truth, np.full(10, 0.1 * (metric == "Pearson")))
    assert (found == 0).all()


@pytest.mark.parametrize(
    ("name", "option", "expected"),
    [
        ("forward@active=4", "active", ("forward", 4)),
        ("random@active=2,period=50", "period", ("random@active=2", 50)),
        ("forward@allocator=topk,active=2", "active", ("forward@allocator=topk", 2)),
        ("forward@active=2/3", "active", None),  # a share, not a number of modules
        ("forward", "active", None),
    ],
)
def test_methods_that_differ_in_a_number_are_a_family(name, option, expected):
    assert _curves.family(name, option) == expected


def test_a_line_has_all_values_of_its_family_and_the_usual_one():
    names = ["forward", "forward@period=5", "gradient@period=5", "forward@active=2"]
    found = _curves.curves(_compare.Sweep(line(name) for name in names), "period", "easy")
    assert {label: sorted(points) for label, points in found.items()} == {
        "forward": [5, 20],
        "gradient": [5],
    }
    lines = [line("forward", counts=dict.fromkeys("abcdef", 1)), line("forward@active=2")]
    found = _curves.curves(_compare.Sweep(lines), "active", "easy")
    assert sorted(found["forward"]) == [2, 4]  # two thirds of six modules


def test_memory_is_compared_on_the_tasks_of_all_numbers_of_active_modules():
    names = ["lora", "static"]
    lines = [line(name, task) for name in names for task in ("easy", "hard")]
    sweep = _compare.Sweep([*lines, line("forward@active=2", "hard")])
    assert _curves._common(sweep, "lora", ["forward@active=2"]) == ("hard",)
    assert _curves._common(sweep, "lora", []) == ("easy", "hard")


def test_shares_are_of_modules_by_layer_and_of_whole_blocks():
    def shares(counts):
        return _figures._shares([_compare.Cell((line(counts=counts),))])

    assert shares({"m.layer.0.a.query": 1, "m.layer.1.a.query": 4}) == {
        (0, "query"): 0.25,
        (1, "query"): 1.0,
    }
    assert shares({"m.layer.3": 2}) == {(3, "block"): 0.5}
    assert shares({"m.0.attention.output.dense": 1, "m.0.intermediate.dense": 2}) == {
        (0, "output.dense"): 0.25,
        (0, "intermediate.dense"): 0.5,
    }
    both = {"m.0.attention.output.dense": 1, "m.0.output.dense": 2}  # of BERT, not to be mixed
    assert shares(both) == {(0, "attention.output.dense"): 0.25, (0, "output.dense"): 0.5}


def test_more_methods_than_colours_are_all_drawn_and_labelled():
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    canvas = Figure(layout="constrained", dpi=150)
    FigureCanvasAgg(canvas)
    names = [f"budget-0.40@active={k}" for k in range(1, 30)]
    lines = [line("lora"), *(line(n, peak_bytes=9 * i) for i, n in enumerate(names, start=1))]
    assert _curves.memory(_compare.Sweep(lines), "lora", canvas)
    texts = canvas.axes[0].texts
    assert {text.get_text() for text in texts} == {"lora", *map(str, range(1, 30))}
    boxes = [_curves._text_box(canvas, text) for text in texts]
    assert not any(a.overlaps(b) for i, a in enumerate(boxes) for b in boxes[:i])


def test_other_rows_of_the_same_number_are_noticed():
    """The predictions no longer give the metric that the run had noted."""
    moved = line("vera", wrong=range(40))
    moved["predictions"] = moved["predictions"][1:] + moved["predictions"][:1]
    with pytest.raises(ValueError, match=r"400 predictions with accuracy 0\.9000, which does not"):
        _compare.Sweep([line(), moved]).difference("vera", "lora")


def test_runs_of_two_suites_are_not_thrown_together():
    other = line(task="cola")
    other["settings"]["suite"] = "glue"
    with pytest.raises(ValueError, match=r"several suites, \['glue', 'offline'\]"):
        _compare.Sweep([line(), other])


def test_sizes_that_nothing_weighed_are_no_number():
    lines = [line(saved_bytes=0), line("static", saved_bytes=20)]
    assert "| 1.00 | nan |" in report.main_table(_compare.Sweep(lines), "lora").splitlines()[-1]


def test_pairs_may_have_commas_between_them():
    given = ["forward:random,gradient@active=2,period=5:static@top=1/6", "vera:lora"]
    assert report.parse(["runs", "--pairs", *given]).pairs == [
        *("forward:random", "gradient@active=2,period=5:static@top=1/6", "vera:lora")
    ]


# The runs that are kept


@pytest.mark.parametrize("folder", [".", "short", "mpnet"])
def test_a_sweep_goes_on_from_the_runs_that_are_kept(folder):
    runs = _store.finished(_shared.STORED / folder / "runs.jsonl")
    assert runs
    for run in runs:
        assert _training.Settings(**run["settings"]).key == run["key"]
