"""Lost generation by hand, the rank correlation too, and rows as the unit of evidence."""

import json
import math

import numpy as np
import pytest
from builders import MODEL, ROWS, SEEDS, study

from studies.compare import claim
from studies.compare.records import Records
from ubmoe.bootstrap import correlations, interval


def test_lost_generation_is_the_log_of_the_perplexity_over_the_base():
    actual = claim.tuned(MODEL, Records.of_names(study(ROWS)), SEEDS)
    assert [(item.row, item.causes["DP-after"]) for item in actual] == [
        ("ffn", 1.0),
        ("attention", 3.0),
        ("all", 6.0),
    ]
    assert [math.exp(item.lost) for item in actual] == pytest.approx([1.25, 2.0, 1.75])
    correlation = claim.correlation(actual)
    assert correlation.value == pytest.approx(0.5)  # ranks 1, 2, 3 and 1, 3, 2
    assert (correlation.interval, correlation.rows) == (None, 3)  # of so few, none
    assert str(correlation) == "0.50, n = 3"


def test_an_answer_counts_once_and_gain_is_over_what_reads_alike():
    records = study(ROWS)
    for number, losses in enumerate(([1.0, 8.0], [4.0, 8.0], [1.0, 16.0], [3.0, 10.0])):
        generation = records[f"r{number}.evaluation.seed0"]["generation"]
        generation["answers"] = {"losses": losses, "tokens": [1, 4]}
    actual = claim.tuned(MODEL, Records.of_names(records), SEEDS)
    assert [item.per_answer for item in actual] == [1.5, 1.0, 1.25]  # (4 - 1 + 0) / 2, and so on
    assert claim.correlation(actual, per_answer=True).value == pytest.approx(-0.5)
    assert [item.causes[claim.GAIN] for item in actual] == [1.0, 2.0, 3.0]  # a row a point more
    records["r0.sts.seed0"]["config"]["bi"] |= {"pooling": "last"}
    actual = claim.tuned(MODEL, Records.of_names(records), SEEDS)
    assert [claim.GAIN in item.causes for item in actual] == [False] * 3


def test_seeds_of_one_row_are_no_new_evidence():
    rng = np.random.default_rng(0)
    rows = [
        claim.Tuned(json.dumps({"row": number}), "f", lost, {"DP-after": after})
        for number, (lost, after) in enumerate(rng.normal(size=(10, 2)))
    ]
    once, again = claim.correlation(rows), claim.correlation([*rows, rows[0], rows[0]])
    assert again == once
    assert once.interval[0] < once.value < once.interval[1]


def test_rows_of_equal_steps_are_those_of_most_rows_without_a_language_model_loss():
    def row(name, *stages):
        return claim.Tuned(json.dumps({"name": name, "stages": stages}), name, 1.0, {})

    stage = {"max_steps": 60, "learning_rate": 1e-3}
    equal = [row("a", stage), row("b", stage | {"lm_weight": 0.0}), row("a", stage)]
    others = [
        *(row("c", stage | {"max_steps": 20}) for _ in range(5)),  # one row, however many seeds
        *(row("d", stage | {"lm_weight": 1.0}), row("e", stage, stage)),
        *(row("f", stage | {"learning_rate": 3e-4}), row("g")),
    ]
    assert claim.of_equal_steps([*others, *equal]) == equal
    assert claim.of_equal_steps([]) == []


def test_a_row_and_its_control_are_drawn_together():
    moved, lost = np.random.default_rng(1).normal(size=(2, 16))
    rows = [
        claim.Tuned(
            json.dumps({"row": number // 2, "attention": number % 2}), "f", own, {"DP-after": after}
        )
        for number, (after, own) in enumerate(zip(moved, lost, strict=True))
    ]
    pairs = [str(number // 2) for number in range(16)]
    expected = interval(correlations(moved, lost, families=pairs))
    actual = claim.correlation(rows)
    assert actual.rows == 16 and actual.interval == tuple(expected)
    assert tuple(interval(correlations(moved, lost))) != actual.interval
    assert claim.correlation(rows[:-2]).interval is None  # of seven, none


def test_seeds_are_one_point_at_their_mean_however_their_rows_are_called():
    records = study(ROWS)
    more = study({"ffn": (37.0, 5.0)})
    for kind in ("sts", "dependence", "evaluation"):  # named otherwise, tuned alike
        record = more[f"r1.{kind}.seed0"]
        record["config"] |= {"seed": 1} | ({"results": {"row": "again"}} if kind == "sts" else {})
        records[f"r8.{kind}.seed1"] = record
    actual = claim.tuned(MODEL, Records.of_names(records), SEEDS)
    correlation = claim.correlation(actual)
    # DP-after of ffn is now 1 and 7, on average 4: ranks 2, 1, 3 against 1, 3, 2
    assert (len(actual), correlation.rows) == (4, 3)
    assert correlation.value == pytest.approx(-0.5)


def test_over_seeds_a_common_slope_within_rows_is_what_correlates():
    """Against the regression with a mean for each row, whose slope explains this much."""
    rng = np.random.default_rng(3)
    rows = [str(row) for row in (0, 0, 0, 1, 1, 2, 2, 2, 2, 3)]
    moved, lost = rng.normal(size=(2, len(rows)))
    lost += 0.8 * moved + 5 * np.array(list(map(int, rows)))  # rows far apart
    actual = [
        claim.Tuned(row, "f", own, {"DP-after": after})
        for row, own, after in zip(rows, lost, moved, strict=True)
    ]
    own_means = np.array([[row == item for item in "0123"] for row in rows], float)
    both = np.column_stack([moved, own_means])
    left = [
        lost - design @ np.linalg.lstsq(design, lost, rcond=None)[0] for design in (own_means, both)
    ]
    slope = np.linalg.lstsq(both, lost, rcond=None)[0][0]
    explained = 1 - (left[1] @ left[1]) / (left[0] @ left[0])
    correlation = claim.over_seeds(actual)
    assert correlation.value == pytest.approx(np.sign(slope) * math.sqrt(explained))
    assert correlation.rows == 9  # the last row has one seed
    half = 1.959964 / math.sqrt(9 - 3 - 1 - 1)
    z = math.atanh(correlation.value)
    assert correlation.interval == pytest.approx((math.tanh(z - half), math.tanh(z + half)))
    assert claim.over_seeds(actual[:4]) is None  # three seeds of one row: one degree of freedom
    assert claim.over_seeds([]) is None
    line = [claim.Tuned("a", "f", 2.0 * n, {"DP-after": float(n)}) for n in range(4)]
    assert str(claim.over_seeds(line)) == "1.00 (1.00 to 1.00), n = 4"


def test_perplexity_of_other_chats_is_not_compared():
    records = study(ROWS)
    for number in (0, 1, 2):
        asked = {"dataset": "d", "max_rows": None, "held_out": 9 if number < 2 else 8}
        records[f"r{number}.evaluation.seed0"]["config"]["ubmoe"] = asked
    actual = claim.tuned(MODEL, Records.of_names(records), SEEDS)
    assert [item.row for item in actual] == ["ffn"]


def test_the_causal_control_is_drawn_and_distinct(tmp_path):
    records = study(ROWS)
    control = {key.replace("r1.", "r9."): value for key, value in records.items() if "r1." in key}
    sts = control["r9.sts.seed0"]
    config = sts["config"] | {"bi": sts["config"]["bi"] | {"attention": "causal"}}
    records |= control | {"r9.sts.seed0": sts | {"config": config}}
    actual = claim.tuned(MODEL, Records.of_names(records), SEEDS)
    assert [item.row for item in actual if item.is_control] == ["ffn causal"]
    sts, axes = claim.figure(MODEL, actual).axes
    assert sts.get_xlabel() == "STS under its own mask"
    [hollow] = [line for line in sts.lines if line.get_fillstyle() == "none"]
    assert list(hollow.get_xdata()) == [52.0]  # 51 the average, each task one more
    first, second = axes.get_title().splitlines()
    assert first.startswith("rank correlation ") and first.endswith("n = 4")
    assert second.startswith("tuned bidirectionally alone ") and second.endswith("n = 3")
    drawn = {line.get_label(): line for line in axes.lines}
    assert list(drawn["ffn"].get_xdata()) == list(drawn["ffn causal"].get_xdata()) == [1.0]
    assert drawn["ffn causal"].get_fillstyle() == "none" != drawn["ffn"].get_fillstyle()


def test_every_cause_that_was_measured_has_a_panel(tmp_path):
    records = study(ROWS)
    sinks = [(20.0, 58.0), (17.0, 58.5), (12.0, 57.0), (13.0, 59.0)]  # the base's, and the rows'
    measured = [record for key, record in records.items() if ".dependence." in key]
    for record, sink in zip(measured, sinks, strict=True):
        record["dependence"] |= {"first": sink[0], "without_first": {"after": sink[1]}}
    actual = claim.tuned(MODEL, Records.of_names(records), SEEDS)
    moved = [(item.causes["first"], item.causes["after without first"]) for item in actual]
    assert moved == [(-3.0, 0.5), (-8.0, -1.0), (-7.0, 1.0)]
    fallen = claim.correlation(actual, "first")
    assert fallen.value == pytest.approx(-1)  # ranks 3, 1, 2 and 1, 3, 2
    panels = claim.figure(MODEL, actual).axes
    assert [panel.get_xlabel().partition(",")[0] for panel in panels] == [
        "STS under its own mask",
        "DP-after",
        "first",
        "after without first",
    ]
    longest = max(len(line) for panel in panels for line in panel.get_xlabel().split("\n"))
    assert longest <= claim.WIDTH  # else the next panel's would lie over it


def test_a_panel_is_of_the_encoders_of_which_its_cause_was_measured():
    names = [f"kind {n}" for n in range(4)]
    kinds = [
        claim.Tuned(json.dumps({"row": n}), name, 0.1 * n, {"first": float(n)})
        for n, name in enumerate(names)
    ]
    kinds[0].causes["STS"] = kinds[1].causes["STS"] = 50.0
    drawn = claim.figure(MODEL, kinds)
    sts, first = (
        {line.get_label(): line.get_color() for line in axes.lines if line.get_label() in names}
        for axes in drawn.axes
    )
    assert list(sts) == ["kind 0", "kind 1"] and list(first) == names
    assert sts.items() <= first.items()  # a row has its colour in every panel
    [legend] = drawn.legends
    assert [text.get_text() for text in legend.texts] == names


def test_no_two_kinds_look_alike():
    kinds = [
        claim.Tuned(json.dumps({"row": n}), f"kind {n}", 0.1 * n, {"STS": float(n)})
        for n in range(9)
    ]
    [axes] = claim.figure(MODEL, kinds).axes
    looks = {(line.get_marker(), line.get_color()) for line in axes.lines[:9]}
    assert len(looks) == 9
