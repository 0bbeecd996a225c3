"""Pairs of runs that differ in the mask alone, against scipy's own t test and regression."""

import math

import numpy as np
import pytest
from builders import MODEL, SEEDS, causal, measured, shares
from scipy.stats import linregress, ttest_1samp
from scipy.stats import t as student

from studies.compare import runs
from studies.compare.records import Records

RNG = np.random.default_rng(4)


def test_a_mean_over_runs_has_the_interval_of_a_t_test():
    values = RNG.normal(2.0, size=6)
    actual = runs.MeanWithCI.estimate(values)
    expected = ttest_1samp(values, 0).confidence_interval()
    assert (actual.value, actual.runs) == (pytest.approx(values.mean()), 6)
    assert actual.interval == pytest.approx((expected.low, expected.high))
    assert runs.MeanWithCI.estimate(values[:2]) is None


def test_at_equal_sts_is_where_the_line_crosses_zero():
    gaps = RNG.normal(3.0, 5.0, size=7)
    values = 0.4 + 0.1 * gaps + RNG.normal(size=7) / 3
    line = linregress(gaps, values)
    half = student.ppf(0.975, 5) * line.intercept_stderr
    actual = runs.MeanWithCI.estimate(values, gaps)
    assert actual.value == pytest.approx(line.intercept)
    assert actual.interval == pytest.approx((line.intercept - half, line.intercept + half))
    assert str(actual.exp).startswith(f"{math.exp(line.intercept):.2f} (")
    assert runs.MeanWithCI.estimate(values[:3], gaps[:3]) is None  # one degree of freedom
    assert runs.MeanWithCI.estimate(values, np.abs(gaps)) is None  # beyond what was seen


def tuned(name, seed, after, losses, sts=None, **stage):
    """An encoder with another DP-after and other losses; tuned causally, where its STS is given."""
    actual = measured(name, seed, ["ffn"], shares(after), losses)
    if sts is not None:
        causal(actual, sts)
    actual[f"{name}.sts.seed{seed}"]["config"]["bi"]["stages"][0] |= stage
    return actual


def test_pairs_are_of_one_seed_and_of_equal_settings_but_for_the_mask():
    records = measured("c", 0, [], shares(), [1.0, 2.0, 3.0, 4.0])
    records |= tuned("a", 0, 5.0, [1.5, 2.5, 3.5, 4.5]) | tuned("a", 1, 4.0, [1.0, 2.0, 3.0, 8.0])
    records |= tuned("z", 0, 2.0, [1.5, 2.5, 3.5, 3.5], 45.0)
    records |= tuned("z", 1, 3.0, [1.0, 2.0, 3.0, 6.0], 47.0)
    far = {"warmup_steps": 9, "learning_rate": 2.0}  # as fast, both of them
    records |= tuned("d", 1, 9.0, [2.0, 2.0, 3.0, 4.0], **far)
    records |= tuned("e", 1, 3.0, [1.0, 2.0, 3.0, 4.0], 51.0, **far)
    records |= tuned(
        "f", 1, 9.0, [1.0, 1.0, 1.0, 1.0], temperature=0.1
    )  # another temperature, no control
    records |= tuned("g", 1, 9.0, [1.0, 1.0, 1.0, 1.0], max_steps=9)  # longer
    records |= tuned("h", 1, 9.0, [1.0, 1.0, 1.0, 1.0], 50.0, max_steps=9)
    for name, moved in (("a.evaluation.seed1", 1), ("z.evaluation.seed1", 0)):  # one seed of two
        essays = {"answers": {"losses": [8.0, 7.0 + moved], "tokens": [4, 6]}}
        for item in (name, "c.evaluation.seed0"):  # and the base
            records[item]["generation"]["further"] = {"essays": essays}
    asked = {"a.evaluation.seed1": [1, 1, 1, 0], "z.evaluation.seed1": [1, 0, 0, 0]}
    asked |= {"c.evaluation.seed0": [0, 0, 0, 0], "a.evaluation.seed0": [1, 0, 1]}
    for name, right in asked.items():
        answered = {"questions": {"quiz": right, "hard": right}, "stderr": {"quiz": {}}}
        records[name]["generation"] |= answered
    records["z.evaluation.seed0"]["generation"] |= answered | {"questions": {"quiz": [1, 0]}}
    for name, row in (("d", "ffn far"), ("g", "ffn long")):
        records[f"{name}.sts.seed1"]["config"]["results"] = {"row": row}
        control = records[f"{chr(ord(name) + 1)}.sts.seed1"]
        control["config"]["results"] = {"row": f"{row} causal"}
    for key in ("a.sts.seed0", "z.sts.seed0"):  # a task of these alone
        records[key]["sts"]["tasks"] |= {"another": 90.0 * (key < "b")}
    records = Records.of_names(records)
    [(kind, own)] = runs.pairs(MODEL, records, SEEDS).items()
    assert kind == "ffn" and [item.row for item in own] == ["ffn", "ffn", "ffn far"]
    assert [item.cells["DP-after"] for item in own] == [3.0, 1.0, 6.0]
    assert [item.cells[runs.GAP] for item in own] == [6.0, 4.0, 0.0]  # STS of 51 each, but causally
    ratios = [item.cells["perplexity"] for item in own]
    assert ratios == pytest.approx([math.exp(item / 10) for item in (1, 2, 1)])
    essays = [item.cells.get("perplexity of essays") for item in own]
    assert essays == [None, pytest.approx(math.exp(1 / 10)), None]
    short = [item.cells["perplexity, 3 answers of 1 to 3 tokens"] for item in own]
    assert short == pytest.approx([math.exp(item / 6) for item in (1, 2, 1)])  # 2, 3 and 1
    long = [item.cells["perplexity, 1 answers of 4 to 20 tokens"] for item in own]
    assert long == pytest.approx([1.0, 1.0, 1.0])
    quiz = [item.cells.get("quiz, in points") for item in own]
    assert quiz == [None, 50.0, None]  # two of four; of other questions none
    assert not any("hard" in column for item in own for column in item.cells)  # no share
    changes = runs.changes(MODEL, records, SEEDS)
    after = {kind: {item.cells["DP-after"] for item in own} for kind, own in changes.items()}
    assert after == {"ffn": {5.0, 4.0, 9.0}, "ffn causal": {2.0, 3.0}}
    quiz = [item.cells.get("quiz, in points") for item in changes["ffn"]]
    assert quiz == [None, 75.0, None]  # the first was asked others than the base
    assert not any(
        runs.GAP in item.cells for item in changes["ffn"]
    )  # the base reads bidirectionally


def test_perplexities_are_ratios_and_what_few_pairs_tell_has_no_interval():
    own = [
        runs.Pair("ffn", {"perplexity": ratio, "DP-after": after, "STS": gap})
        for ratio, after, gap in (
            (0.5, 1.0, -2.0),
            (0.25, 3.0, 1.0),
            (1.0, 2.0, 2.0),
            (0.7, 4.0, 5),
        )
    ]
    actual = runs.mean_with_ci(own, "perplexity")
    logs = ttest_1samp(np.log([0.5, 0.25, 1.0, 0.7]), 0).confidence_interval()
    assert actual.value == pytest.approx((0.5 * 0.25 * 0.7) ** 0.25)
    assert actual.interval == pytest.approx((math.exp(logs.low), math.exp(logs.high)))
    assert runs.mean_with_ci(own, "DP-after").value == 2.5
    equal = runs.mean_with_ci(own, "DP-after", at_equal_sts=True)
    assert equal.value == pytest.approx(linregress([-2, 1, 2, 5], [1, 3, 2, 4]).intercept)
    assert runs.mean_with_ci(own, "per answer") is None
    assert runs.mean_with_ci(own[:2], "DP-after") is None
    without = [runs.Pair("ffn", {"DP-after": 9.0}), *own]  # no task that both have
    assert runs.mean_with_ci(without, "DP-after").runs == 5
    assert runs.mean_with_ci(without, "DP-after", at_equal_sts=True) == equal


def test_the_picture_has_a_point_a_pair_and_the_mean_of_each_kind():
    kinds = {
        kind: [
            runs.Pair(kind, {"perplexity": ratio, "DP-after": ratio + more, "STS": 2.0})
            for ratio in (0.5, 0.25, 1.0)
        ]
        for kind, more in (("ffn", 0.0), ("attention", 1.0))
    }
    kinds["ffn"][0].cells["perplexity of essays"] = 2.0
    kinds["ffn"][1].cells["perplexity, 9 answers of over 20 tokens"] = 3.0
    kinds["ffn"][1].cells["quiz, in points"] = 3.0
    kinds["attention"][0].cells["perplexity"] = 2.0
    actual = runs.figure("small", kinds)
    ratios, scores, points = actual.axes
    called = [[text.get_text() for text in axes.get_yticklabels()] for axes in actual.axes]
    assert called[0] == [
        "perplexity, per token",
        "9 answers of over 20 tokens",
        "perplexity of essays",
    ]
    assert called[1:] == [["STS", "quiz"], ["DP-after"]]
    assert scores.get_xlabel() == "bidirectional minus causal (points)"
    assert points.get_xlabel().endswith("(percentage points of attention)")
    for own, lines in zip(kinds.values(), (ratios.lines[:3], ratios.lines[3:6]), strict=True):
        drawn, interval, mean = lines
        assert list(drawn.get_xdata()) == [item.cells["perplexity"] for item in own]
        expected = runs.mean_with_ci(own, "perplexity")
        assert tuple(interval.get_xdata()) == expected.interval
        assert mean.get_xdata() == [expected.value]
    labels = [text.get_text() for text in actual.legends[0].get_texts()]
    assert labels == ["ffn", "attention"]


def test_kinds_of_one_name_stay_apart():
    records = measured("c", 0, [], shares(), [1.0, 2.0, 3.0, 4.0])
    for number, (name, temperature) in enumerate((("a", 0.1), ("b", 0.2), ("d", 0.3))):
        for seed in range(3 * number, 3 * number + 3):
            losses = [1.5, 2.5, 3.5, 4.5]
            records |= tuned(name, seed, float(number), losses, temperature=temperature)
    for seed in range(3, 6):  # another temperature than the control's of this seed and name
        records |= tuned("z", seed, 2.0, [1.5, 2.5, 3.5, 3.5], 45.0, temperature=0.3)
    records = Records.of_names(records)
    changes = runs.changes(MODEL, records, range(9))
    after = {kind: {item.cells["DP-after"] for item in own} for kind, own in changes.items()}
    assert after == {
        **{"ffn": {0.0}, "ffn, other settings 1": {1.0}, "ffn, other settings 2": {2.0}},
        "ffn causal": {2.0},
    }
    assert runs.pairs(MODEL, records, range(9)) == {}


def test_what_is_of_other_texts_than_the_bases_is_not_averaged():
    records = measured("c", 0, [], shares(), [1.0, 2.0, 3.0, 4.0])
    for seed in range(3):
        records |= tuned("a", seed, 5.0, [1.5, 2.5, 3.5, 4.5])
        records |= tuned("z", seed, 2.0, [1.5, 2.5, 3.5, 3.5], 45.0)
    for name in "az":  # other answers, of the same length
        records[f"{name}.evaluation.seed2"]["inputs"] = {"ubmoe.dataset": "other"}
    [own] = runs.pairs(MODEL, Records.of_names(records), SEEDS).values()
    assert ["perplexity" in item.cells for item in own] == [True, True, False]
    lengths = ["perplexity, 3 answers of 1 to 3 tokens" in item.cells for item in own]
    assert lengths == [True, True, False] and all("DP-after" in item.cells for item in own)


def test_a_picture_without_perplexities_has_no_panel_of_ratios():
    own = [runs.Pair("ffn", {"DP-after": item, "STS": item}) for item in (1.0, 2.0, 4.0)]
    actual = runs.figure("small", {"ffn": own})
    assert [axes.get_xlabel() for axes in actual.axes] == [
        "bidirectional minus causal (points)",
        "bidirectional minus causal\n(percentage points of attention)",
    ]
    assert [text.get_text() for text in actual.legends[0].get_texts()] == ["ffn"]
