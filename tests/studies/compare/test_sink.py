"""Rows with a causal control, drawn by length and by layer."""

import copy
import re

import pytest
from builders import SEEDS

from studies.compare import sink
from studies.compare.pages import renewed
from studies.compare.records import Records
from studies.compare.rows import RunRow
from ubmoe.report.figures import PALETTE
from ubmoe.results.records import Record

FULL = {"main": 1.0, "before": 60.0, "first": 20.0}


def section(after, without, first):
    whole = FULL | {"after": after, "without_first": {"after": without}}
    bucket = whole | {"texts": 3, "stderr": {"after": 0.5, "without_first": {"after": 0.25}}}
    empty = bucket | {"texts": 0} | dict.fromkeys((*FULL, "after"))
    return {
        **whole,
        "overall": whole,
        "buckets": [bucket | {"range": [0, 256]}, empty | {"range": [256, 512]}],
        "layers": [
            {"first": first, "after": after, "without_first": {"after": without}},
            {"first": 2 * first, "after": after - first, "without_first": {"after": without}},
        ],
    }


def records():
    actual = {}
    rows = {"base": None, "ffn": "bidirectional", "ffn causal": "causal", "all": "bidirectional"}
    for number, (row, attention) in enumerate(rows.items()):
        for seed in (0, 1) if row == "ffn" else (0,):
            name = f"r{number}"
            stages = [{"objective": "simcse", "train": row.split()[:1]}] if attention else []
            bi = {"stages": stages, "attention": attention}
            own = {"model": {"name": "small"}, "seed": seed, "bi": bi}
            actual[f"{name}.sts.seed{seed}"] = {"config": own, "sts": {"tasks": {}, "average": 1.0}}
            other = {"model": {"name": "bi" if attention else "small"}, "seed": seed}
            numbers = section(40.0 + number + seed, 50.0, 10.0 + number)
            actual[f"{name}.dependence.seed{seed}"] = {"config": other, "dependence": numbers}
    return Records.of_names(actual)


def test_only_rows_with_a_control_stand_beside_the_base():
    every = sink.measured("small", records(), SEEDS)
    rows = sink.with_controls(every)
    assert {row: len(own) for row, own in rows.items()} == {"base": 1, "ffn": 2, "ffn causal": 1}
    assert every.keys() - rows.keys() == {"all"}
    assert set(sink.with_controls(sink.measured("small", records(), [1]))) == {"base"}


def tuned(row, seed):
    """A run of the modules that the row's last word names."""
    *of, train = row.split()
    attention = "causal" if of else "bidirectional"
    bi = {"stages": [{"objective": "simcse", "train": [train]}], "attention": attention}
    made = Record(row, "sts", seed, {"config": {"seed": seed, "bi": bi}, "sts": {}})
    return RunRow(row, "encoder", made, {}, {}, (made,))


def test_no_more_rows_than_colours_are_drawn_and_first_those_of_more_runs(monkeypatch):
    runs = {"a": [1], "control of a": [1], "b": [1, 2], "control of b": [1], "c": [1]}
    runs |= {"control of c": [1]}
    rows = {row: [tuned(row, seed) for seed in seeds] for row, seeds in runs.items()}
    assert sink.with_controls(rows) == rows
    monkeypatch.setattr(sink, "PALETTE", PALETTE[:2])
    assert list(sink.with_controls(rows)) == ["a", "control of a", "b", "control of b"]
    monkeypatch.setattr(sink, "PALETTE", PALETTE[:1])
    assert list(sink.with_controls(rows)) == ["b", "control of b"]


def test_records_without_the_sink_are_left_out():
    older = copy.deepcopy(records())
    for record in older.of("dependence"):
        del record.section["first"]
    assert sink.measured("small", older, SEEDS) == {}


def test_lines_are_means_over_seeds():
    panels = sink.figure("small", sink.with_controls(sink.measured("small", records(), SEEDS))).axes
    lines = {axes.get_title(): {} for axes in panels}
    for axes in panels:
        for line in axes.lines:
            lines[axes.get_title()].setdefault(line.get_color() + line.get_linestyle(), line)
    after, without, first, _ = lines.values()
    blue = PALETTE[0]
    assert {key: list(line.get_ydata()) for key, line in after.items()} == {
        "black-": [40.0],
        f"{blue}-": [pytest.approx(41.5)],
        f"{blue}--": [42.0],
    }
    assert list(without[f"{blue}-"].get_ydata()) == [50.0]
    assert list(first[f"{blue}--"].get_ydata()) == [12.0, 24.0]


def test_layers_have_the_r_squared_of_the_sink():
    rows = sink.measured("small", records(), SEEDS)
    moved = sink.layers(rows)["ffn causal"]  # against the base: 2 more, first 2 and 4 more
    assert (list(moved.after), list(moved.first)) == ([2.0, 0.0], [2.0, 4.0])
    assert (list(moved.without), list(moved.by_sink)) == ([0.0, 0.0], [-1.0, -2.0])
    assert moved.r_squared == 1 - (3.0**2 + 2.0**2) / (1.0**2 + 1.0**2)
    text = "<!-- layers: small -->\n<!-- end -->"
    actual = re.sub(" +", " ", renewed(text, records(), SEEDS)).splitlines()
    assert actual[5] == "| ffn causal | 1 | 1 of 2 | 0 of 2 | -5.50 |"


def test_layers_want_a_base_on_the_same_texts():
    rows = sink.measured("small", records(), SEEDS)
    assert sink.layers({row: own for row, own in rows.items() if row != "base"}) == {}
    other = copy.deepcopy(records())
    other.by_name["r1.dependence.seed1"].section["by_text"] = {"tokens": [3]}
    assert set(sink.layers(sink.measured("small", other, SEEDS))) == {"all", "ffn causal"}


def test_the_last_panel_has_a_point_a_layer():
    *_, last = sink.figure(
        "small", sink.with_controls(sink.measured("small", records(), SEEDS))
    ).axes
    points = [line for line in last.lines if line.get_marker() == "o"]
    assert [list(line.get_ydata()) for line in points] == [[1.5, 0.5], [2.0, 0.0]]
    assert [line.get_markerfacecolor() for line in points] == [PALETTE[0], "white"]
