"""Lost generation by hand, the rank correlation too, and rows as the unit of evidence."""

import math

import numpy as np
import pytest
from builders import MODEL, ROWS, SEEDS, study

from ubmoe.results import claim
from ubmoe.results.records import Records


def test_lost_generation_is_the_log_of_the_perplexity_over_the_base():
    found = claim.tuned(MODEL, Records.of_names(study(ROWS)), SEEDS)
    assert [(each.row, each.after) for each in found] == [
        ("ffn", 1.0),
        ("attention", 3.0),
        ("all", 6.0),
    ]
    assert [math.exp(each.lost) for each in found] == pytest.approx([1.25, 2.0, 1.75])
    correlation = claim.correlation(found)
    assert correlation.value == pytest.approx(0.5)  # ranks 1, 2, 3 and 1, 3, 2
    assert (correlation.interval, correlation.rows) == (None, 3)  # of so few, none
    assert str(correlation).endswith("over 3 rows (too few for an interval)")


def test_seeds_of_one_row_are_no_new_evidence():
    rng = np.random.default_rng(0)
    rows = [claim.Tuned(str(n), "f", *pair) for n, pair in enumerate(rng.normal(size=(6, 2)))]
    once, thrice = claim.correlation(rows), claim.correlation(rows * 3)
    assert thrice.value == pytest.approx(once.value) and thrice.interval == pytest.approx(
        once.interval
    )
    assert once.interval[0] < once.value < once.interval[1]


def test_the_causal_control_is_drawn_and_told_apart(tmp_path):
    records = study(ROWS)
    control = {key.replace("r1.", "r9."): value for key, value in records.items() if "r1." in key}
    sts = control["r9.sts.seed0"]
    config = sts["config"] | {"bi": sts["config"]["bi"] | {"attention": "causal"}}
    records |= control | {"r9.sts.seed0": sts | {"config": config}}
    found = claim.tuned(MODEL, Records.of_names(records), SEEDS)
    assert [each.row for each in found if each.is_control] == ["ffn causal"]
    sts, axes = claim.figure(MODEL, found).axes
    assert sts.get_xlabel() == "STS under its own mask"
    [hollow] = [line for line in sts.lines if line.get_fillstyle() == "none"]
    assert list(hollow.get_xdata()) == [52.0]  # 51 the average, each task one more
    assert (
        "over 4 rows" in axes.get_title()
        and "causally tuned rows: rank correlation " in axes.get_title()
    )
    assert "over 3 rows" in axes.get_title().splitlines()[1]
    drawn = {line.get_label(): line for line in axes.lines}
    assert list(drawn["ffn"].get_xdata()) == list(drawn["ffn causal"].get_xdata()) == [1.0]
    assert drawn["ffn causal"].get_fillstyle() == "none" != drawn["ffn"].get_fillstyle()


def test_every_cause_that_was_measured_has_a_panel(tmp_path):
    records = study(ROWS)
    sinks = [(20.0, 58.0), (17.0, 58.5), (12.0, 57.0), (13.0, 59.0)]  # the base's, and the rows'
    measured = [each for key, each in records.items() if ".dependence." in key]
    for record, sink in zip(measured, sinks, strict=True):
        record["dependence"] |= {"first": sink[0], "without_first": {"after": sink[1]}}
    found = claim.tuned(MODEL, Records.of_names(records), SEEDS)
    assert [(each.first, each.without_first) for each in found] == [
        (-3.0, 0.5),
        (-8.0, -1.0),
        (-7.0, 1.0),
    ]
    fallen = claim.correlation(found, "first")
    assert fallen.value == pytest.approx(-1)  # ranks 3, 1, 2 and 1, 3, 2
    panels = claim.figure(MODEL, found).axes
    assert [each.get_xlabel().partition(",")[0] for each in panels] == [
        "STS under its own mask",
        "DP-after",
        "first",
        "after without first",
    ]
