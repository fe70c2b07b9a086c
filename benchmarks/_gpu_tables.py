"""Make the tables of the GPU kit from its stored rows: memory, speed, overhead, hidden memory."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from _chunked_rows import chunked_name
from _measure import markdown
from _rows import ALL_ACTIVE, REFERENCE
from gpu._lines import read
from gpu.lora import LIGER
from gpu.summary import SHAPES as NAMES
from gpu.summary import promises

Line = Mapping[str, Any]
MIB, GIB = 2**20, 2**30
FOLDER = Path(__file__).resolve().parent / "results" / "gpu"
SHAPES = dict(zip(("1b", "1b_long", "8b"), NAMES, strict=True))
IN_README = (REFERENCE, LIGER, ALL_ACTIVE, chunked_name(0.3, 0.6), chunked_name(0.15, 0.6))
# When these rows were measured, peft's model ran before in the same process, and torch kept its
# memory reserved. The kit frees it now: leave this out when it has been measured again.
NOT_ALONE = [chunked_name(*budget) for budget in ((0.3, 0.6), (0.15, 1.0), (0.15, 0.6))]
KERNELS = ("as chosen", "flash", "efficient", "cuDNN", "math")


def lines_of(part: str) -> list[Line]:
    """Return the stored rows of a part."""
    return [line for line in read(FOLDER) if line["part"] == part]


def described() -> str:
    """Return the text above the first table: card, versions and date."""
    line = next(iter(read(FOLDER)))
    named = [line["card"], f"driver {line['driver']}", f"Python {line['python']}"]
    named += [f"torch {line['torch']}"]
    named += [f"{name} {version}" for name, version in line["packages"].items()]
    return f"{', '.join(named)}; {line['date'][:10]}."


def memory_table(shape: str) -> str:
    """Return the table of memory and speed of a shape. Refused rows follow, with the reason."""
    rows = _of_shape(shape)
    unit = rows[REFERENCE]["values"]
    header = ["row", "peak above (GiB)", "ratio", "whole, allocated (GiB)", "reserved (GiB)"]
    header += ["tokens/s, mean", "ratio", "tokens/s, median", "backward FLOPs, ratio", "TFLOP/s"]
    header += ["gradient norm", "largest error of a prediction", "steps beyond"]
    ran = {name: line["values"] for name, line in rows.items() if line["status"] == "ok"}
    table = markdown(header, [_memory_cells(name, v, unit) for name, v in ran.items()])
    return "\n\n".join([table, *_refused(rows)])


def _of_shape(shape: str) -> dict[str, Line]:
    """Return the rows of a shape by the way of training."""
    start = f"{SHAPES[shape]}: "
    found = [line for line in lines_of("memory_and_speed") if line["row"].startswith(start)]
    return {line["row"].removeprefix(start): line for line in found}


def _memory_cells(name: str, values: Line, unit: Line) -> list[str]:
    peak, speed = values["peak_above"], values["tokens_per_s_mean"]
    line = [name, _gib(peak), _ratio(values, unit, "peak_above"), _gib(values["peak_allocated"])]
    line += ["-" if name in NOT_ALONE else _gib(values["peak_reserved"])]
    line += [f"{speed:,.0f}", _ratio(values, unit, "tokens_per_s_mean")]
    line += [f"{values['tokens_per_s']:,.0f}", _ratio(values, unit, "backward_flops")]
    line += [f"{values['tflop_per_s']:.0f}", f"{values['gradient_norm']:.3f}"]
    if "limit" not in values:
        return [*line, "-", "-"]
    return [*line, f"{values['largest_error']:+.1e}", str(values["steps_beyond_allocated"])]


def _gib(size: float) -> str:
    return f"{size / GIB:.2f}"


def _ratio(values: Line, unit: Line, what: str) -> str:
    return f"{values[what] / unit[what]:.3f}"


def _refused(rows: Mapping[str, Line]) -> list[str]:
    """Return one sentence for each reason of a refusal: its first sentence, and which rows."""
    names: dict[str, list[str]] = {}
    for name, line in rows.items():
        if line["status"] != "ok":
            names.setdefault(line["reason"].split(". ")[0], []).append(name)
    return [f"Refused: {'; '.join(found)}. {reason}." for reason, found in names.items()]


def readme_table() -> str:
    """Return the table of the README: a large model, as ratios to peft's LoRA."""
    rows = _of_shape("8b")
    unit = rows[REFERENCE]["values"]
    lines = []
    for name in IN_README:
        values = rows[name]["values"]
        ratios = [_ratio(values, unit, what) for what in ("peak_above", "tokens_per_s_mean")]
        line = [re.sub(r"(Budget\(.*\))", r"`\1`", name), *(f"{float(r):.2f}" for r in ratios)]
        lines.append([*line, f"{values['peak_allocated'] / GIB:.1f}"])
    head = f"{SHAPES['8b']} tokens, bfloat16, H100; ratios to peft's LoRA"
    return markdown([head, "peak", "tokens/s", "GiB with weights"], lines)


def full_table() -> str:
    """Return the table of full-parameter training."""
    header = ["row", "peak above (GiB)", "whole, allocated (GiB)", "tokens/s, mean"]
    header += ["a switch adds (ms)", "and to the step after it (ms)"]
    lines = []
    for row in lines_of("full_parameters"):
        values = row["values"]
        line = [row["row"], _gib(values["peak_above"]), _gib(values["peak_allocated"])]
        line += [f"{values['tokens_per_s_mean']:,.0f}"]
        times = [values.get(what) for what in ("switch_s", "first_step_after_s")]
        lines.append([*line, *("-" if x is None else f"{x * 1e3:+.1f}" for x in times)])
    return markdown(header, lines)


def overhead_table() -> str:
    """Return the table of what the wrapper adds; a part that was stopped left rows out."""
    found = {line["row"]: line["values"] for line in lines_of("overhead") if line["values"]}
    groups, wrappers = (
        list(dict.fromkeys(name.split(": ")[place] for name in found)) for place in (0, 1)
    )
    header = ["row", "launches of plain AdamW's step", "added", "waits of the wrapped step"]
    header += ["host time of plain AdamW's step (ms)", "added (ms)"]
    lines = []
    for name in [f"{group}: {wrapper}" for group in groups for wrapper in wrappers]:
        if values := found.get(name):
            launches = [values[f"{kind}_launches"] for kind in ("plain", "added")]
            line = [name, *(f"{x:.0f}" for x in launches), f"{values['wrapped_waits']:.0f}"]
            times = [values["plain_host_ms"], values["added_host_ms"]]
            lines.append([*line, f"{times[0]:.1f}", f"{times[1]:+.1f}"])
        else:
            lines.append([name, *["not measured"] * 5])
    return markdown(header, lines)


def attention_table() -> str:
    """Return the table of the memory that kernels of attention use outside of tensors, in MiB."""
    header = ["attention of", *(f"{kernel}: forward, backward" for kernel in KERNELS)]
    lines = []
    for row in lines_of("workspaces"):
        if row["row"].startswith("attention "):
            cells = [_hidden(row["values"], f"{kernel}: ") for kernel in KERNELS]
            lines.append([row["row"].removeprefix("attention "), *cells])
    return markdown(header, lines)


def _hidden(values: Line, kernel: str = "") -> str:
    return _sizes(values, *(f"{kernel}{when}_hidden" for when in ("forward", "backward")))


def _sizes(values: Line, *names: str) -> str:
    """Return values in MiB, or "-" if there are none, as for a kernel that is not available."""
    return ", ".join(f"{values[name] / MIB:.0f}" for name in names if name in values) or "-"


def others_table() -> str:
    """Return the table of other operations: counted, hidden, and kept after the first use."""
    lines = []
    for row in lines_of("workspaces"):
        name, values = row["row"], row["values"]
        if "forward_hidden" in values:
            counted = _sizes(values, "forward_counted", "backward_counted")
            lines.append([name, counted, _hidden(values), _sizes(values, "kept_after_the_first")])
        elif "counted" in values:
            hidden = {"hidden": values["requested"] - values["counted"]}
            lines.append(
                [f"{name}: a step", _sizes(values, "counted"), _sizes(hidden, "hidden"), "-"]
            )
    header = ["operation", "counted (MiB): forward, backward", "hidden (MiB)", "kept (MiB)"]
    return markdown(header, lines)


def bars_table() -> str:
    """Return the table of the targets of `summary.py`."""
    table = markdown(["target", "value", "limit", ""], promises(list(read(FOLDER))))
    return f"{described()}\n\n{table}"


def tests_table() -> str:
    """Return how many tests passed, by file."""
    found: dict[str, list[bool]] = {}
    for line in lines_of("tests"):
        passed = line["status"] == "ok"
        for name in (line["row"].split("::")[0], "all"):
            found.setdefault(name, []).append(passed)
    found["all"] = found.pop("all")  # last
    return markdown(
        ["tests", "ran", "passed"],
        [[name, len(passed), sum(passed)] for name, passed in found.items()],
    )


TABLES: dict[str, Callable[[], str]] = {
    "gpu_tests": tests_table,
    "gpu_full": full_table,
    "gpu_overhead": overhead_table,
    "gpu_attention": attention_table,
    "gpu_others": others_table,
    "gpu_bars": bars_table,
    "gpu_readme": readme_table,
}
