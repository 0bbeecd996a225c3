"""What longer tuning does, of rows that differ in their steps alone."""

import math

import pytest
from builders import MODEL, SEEDS, causal, encoder, measured, shares

from studies.compare import steps
from studies.compare.records import Records

LOSSES = [1.0, 2.0, 3.0, 4.0]


def tuned(name, seed, count, after, sts=50.0, more=0.0, **stage):
    """An encoder of so many steps, its DP-after and the sum of its losses above the base's."""
    losses = [LOSSES[0] + more, *LOSSES[1:]]
    actual = measured(name, seed, ["ffn"], shares(after), losses)
    record = actual[f"{name}.sts.seed{seed}"]
    record["config"]["bi"]["stages"][0] |= {"max_steps": count} | stage
    record["sts"]["tasks"] = dict.fromkeys(record["sts"]["tasks"], sts)
    record["config"]["results"] = {"row": f"ffn {count}" if count != 60 else "ffn"}
    return actual


def records():
    actual = measured("c", 0, [], shares(), LOSSES)
    actual |= encoder("d", 0, 30.0, [], attention="causal")
    actual |= tuned("a", 0, 20, 2.0, sts=40.0, more=1.0) | tuned("b", 0, 60, 4.0, more=2.0)
    actual |= tuned("b", 1, 60, 6.0, sts=52.0, more=4.0)
    actual |= tuned("e", 1, 240, 9.0, learning_rate=2.0)  # not in its steps alone
    actual |= tuned("f", 2, -1, 9.0)  # by epochs
    alone = causal(tuned("z", 0, 60, 1.0), 45.0)  # of one number of steps
    alone["z.sts.seed0"]["config"]["results"] = {"row": "ffn causal"}
    return actual | alone


def test_runs_stand_by_their_steps_after_the_untrained_model():
    [(row, longer)] = steps.by_steps(MODEL, Records.of_names(records()), SEEDS).items()
    own = longer.metrics
    assert (longer.is_control, longer.run) == (False, None)
    assert row == "ffn" and list(own) == [0, 20, 60]
    assert [[run["DP-after"] for run in runs] for runs in own.values()] == [[0], [2], [4, 6]]
    assert [[run["STS"] for run in runs] for runs in own.values()] == [[51], [40], [50, 52]]
    actual = [run["perplexity"] for runs in own.values() for run in runs]
    assert actual == pytest.approx([math.exp(item / 10) for item in (0, 1, 2, 4)])  # 10 tokens


def test_a_row_tuned_causally_begins_at_the_model_that_reads_causally():
    every = records() | causal(tuned("y", 0, 20, 1.0), 33.0)
    every["y.sts.seed0"]["config"]["results"] = {"row": "ffn 20 causal"}
    actual = steps.by_steps(MODEL, Records.of_names(every), SEEDS)
    assert actual.keys() == {"ffn", "ffn causal"}
    assert (actual["ffn causal"].is_control, actual["ffn causal"].run) == (True, "ffn")
    assert [[run["STS"] for run in runs] for runs in actual["ffn causal"].metrics.values()] == [
        [31.0],
        [33.0],
        [45.0],
    ]
    assert (
        actual["ffn causal"].metrics[0][0]["perplexity"] == 1.0
    )  # the base's, whose weights it has


def test_without_a_base_nothing_is_shown():
    alone = tuned("a", 0, 20, 2.0) | tuned("b", 0, 60, 4.0)
    assert steps.by_steps(MODEL, Records.of_names(alone), SEEDS) == {}


def test_the_picture_goes_through_the_means():
    rows = {
        "ffn": {0: [{"STS": 10.0}], 20: [{"STS": 20.0, "perplexity": 2.0}]},
        "control": {0: [{"STS": 30.0}], 60: [{"STS": 40.0, "perplexity": 8.0}]},
    }
    rows["ffn"][20].append({"STS": 24.0, "perplexity": 8.0})
    rows = {
        "ffn": steps.BySteps(rows["ffn"]),
        "control": steps.BySteps(rows["control"], True, "ffn"),
    }
    sts, ratio, *_ = steps.figure("small", rows).axes
    lines = {line.get_label(): line for line in sts.lines if not line.get_label().startswith("_")}
    assert [list(lines["ffn"].get_data()[item]) for item in (0, 1)] == [[0, 1], [10.0, 22.0]]
    assert list(lines["control"].get_xdata()) == [0, 2]  # of 0, 20 and 60
    assert lines["control"].get_linestyle() == "--"
    assert lines["control"].get_color() == lines["ffn"].get_color()
    means = [line for line in ratio.lines if not line.get_label().startswith("_")]
    assert [list(line.get_ydata()) for line in means] == [
        pytest.approx([4.0]),
        pytest.approx([8.0]),
    ]
