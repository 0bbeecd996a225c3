"""The Pareto front by brute force, the correlation by hand, and rows as the unit of evidence."""

import math

import numpy as np
import pytest
from builders import MODEL, RECORDS, SEEDS, dependence, encoder, scores
from hypothesis import given
from hypothesis import strategies as st

from ubmoe.config import UserError, load_config
from ubmoe.results import tradeoff
from ubmoe.results.records import Records

NUMBERS = st.integers(0, 9)


@given(st.lists(st.tuples(NUMBERS, NUMBERS), min_size=1, unique=True))
def test_the_front_is_what_nothing_surpasses(pairs):
    beaten = {
        a
        for a, (x, y) in enumerate(pairs)
        for b, (u, v) in enumerate(pairs)
        if a != b and u >= x and v >= y
    }
    found = tradeoff.front(pairs)
    assert set(found) == set(range(len(pairs))) - beaten
    assert [pairs[each][0] for each in found] == sorted(pairs[each][0] for each in found)


def study(rows):
    """Records of encoders {row: (DP-after, perplexity)}, the base at 30 and 4."""
    found = {}
    for number, (row, (after, perplexity)) in enumerate({"base": (30.0, 4.0), **rows}.items()):
        name, train = f"r{number}", [] if row == "base" else row.split("+")
        model = f"Qwen/{MODEL}" if row == "base" else "bi"
        found |= encoder(name, 0, 50.0 + number, train) | dependence(name, 0, model, after)
        generation = {**scores(40.0 - number, perplexity), "metrics": {"mmlu": "acc"}}
        config = {"model": {"name": model}, "seed": 0}
        found[f"{name}.evaluation.seed0"] = {"config": config, "generation": generation}
    return found


ROWS = {"ffn": (31.0, 5.0), "attention": (33.0, 8.0), "all": (36.0, 7.0)}


def test_lost_generation_is_the_log_of_the_perplexity_over_the_base():
    found = tradeoff.tuned(MODEL, Records.of_names(study(ROWS)), SEEDS)
    assert [(each.row, each.after) for each in found] == [
        ("ffn", 1.0),
        ("attention", 3.0),
        ("all", 6.0),
    ]
    assert [math.exp(each.lost) for each in found] == pytest.approx([1.25, 2.0, 1.75])
    correlation = tradeoff.correlation(found)
    assert correlation.value == pytest.approx(0.5)  # ranks 1, 2, 3 and 1, 3, 2
    assert (correlation.interval, correlation.rows) == (None, 3)  # of so few, none
    assert str(correlation).endswith("over 3 rows (too few for an interval)")


def test_seeds_of_one_row_are_no_new_evidence():
    rng = np.random.default_rng(0)
    rows = [tradeoff.Tuned(str(n), "f", *pair) for n, pair in enumerate(rng.normal(size=(6, 2)))]
    once, thrice = tradeoff.correlation(rows), tradeoff.correlation(rows * 3)
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
    found = tradeoff.tuned(MODEL, Records.of_names(records), SEEDS)
    assert [each.row for each in found if each.is_control] == ["ffn causal"]
    sts, axes = tradeoff.claim_figure(MODEL, found).axes
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
    found = tradeoff.tuned(MODEL, Records.of_names(records), SEEDS)
    assert [(each.first, each.without_first) for each in found] == [
        (-3.0, 0.5),
        (-8.0, -1.0),
        (-7.0, 1.0),
    ]
    fallen = tradeoff.correlation(found, "first")
    assert fallen.value == pytest.approx(-1)  # ranks 3, 1, 2 and 1, 3, 2
    panels = tradeoff.claim_figure(MODEL, found).axes
    assert [each.get_xlabel().partition(",")[0] for each in panels] == [
        "STS under its own mask",
        "DP-after",
        "first",
        "after without first",
    ]


def test_without_tasks_the_plane_is_of_perplexity_alone(tmp_path):
    records = study(ROWS)
    for key, record in records.items():
        if ".evaluation." in key:
            record["generation"] |= {"average": None, "tasks": {}, "metrics": {}}
    keys = [f"model.name=Qwen/{MODEL}", f"output_dir={tmp_path}"]
    assert "tradeoff.png" in tradeoff.draw(load_config(None, keys), Records.of_names(records))
    left, right = tradeoff.plane_figure(
        MODEL, tradeoff.points(MODEL, Records.of_names(records), SEEDS)
    ).axes
    assert [each.get_text() for each in left.texts] == ["not run"]
    assert len(right.texts) == len(ROWS) + 1 - sum("," in each.get_text() for each in right.texts)


def test_a_claim_of_too_few_rows_leaves_no_old_picture(tmp_path):
    keys = [f"model.name=Qwen/{MODEL}", f"output_dir={tmp_path}"]
    tradeoff.draw(load_config(None, keys), Records.of_names(study(ROWS)))
    said = tradeoff.draw(load_config(None, keys), Records.of_names(study({"ffn": (31.0, 5.0)})))
    assert said == f"{tmp_path}/tradeoff.png" and not (tmp_path / "claim.png").exists()


def test_points_and_pictures_come_from_the_records(tmp_path):
    keys = [f"model.name=Qwen/{MODEL}", f"output_dir={tmp_path}"]
    records = study(ROWS) | {"m.generation.seed0": RECORDS["m.generation.seed0"]}
    mixture = dict(records["m.generation.seed0"])
    mixture["sts"] = [
        {"route": route, "attention": "bidirectional", "average": 55.0}
        for route in ("learned", "uni")
    ]
    records["m.generation.seed0"] = mixture
    found = tradeoff.points(MODEL, Records.of_names(records), SEEDS)
    assert list(found) == ["base", "ffn", "attention", "all", "learned, top_k 2, chat"]
    assert (found["attention"].sts, found["attention"].tasks) == ([52.0], [38.0])
    assert found["learned, top_k 2, chat"].perplexity == [5.0]
    said = tradeoff.draw(load_config(None, keys), Records.of_names(records))
    assert said.splitlines() == [f"{tmp_path}/tradeoff.png", f"{tmp_path}/claim.png"]
    assert all((tmp_path / name).stat().st_size > 9000 for name in ("tradeoff.png", "claim.png"))


def test_a_picture_needs_models(tmp_path):
    with pytest.raises(UserError, match="0 models of tiny with STS and generation"):
        tradeoff.draw(load_config(None, [f"output_dir={tmp_path}"]), Records.of_names({}))


def test_points_that_are_close_share_a_label():
    points = [(0.9, 0.5), (0.1, 0.5), (0.12, 0.51), (0.12, 0.9), (0.14, 0.5)]
    assert tradeoff.close(points, 0.025) == [[1, 2, 4], [3], [0]]
