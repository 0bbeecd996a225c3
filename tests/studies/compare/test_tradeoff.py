"""The Pareto front by brute force, and points by hand."""

import math

import pytest
from builders import MODEL, RECORDS, ROWS, SEEDS, causal, encoder, measured, shares, study
from hypothesis import given
from hypothesis import strategies as st
from matplotlib.figure import Figure

from studies.compare import tradeoff
from studies.compare.records import Records
from ubmoe.config import UserError, load_config
from ubmoe.files import save_figure

NUMBERS = st.integers(0, 9)


@given(st.lists(st.tuples(NUMBERS, NUMBERS), min_size=1, unique=True))
def test_the_front_is_what_nothing_surpasses(pairs):
    beaten = {
        a
        for a, (x, y) in enumerate(pairs)
        for b, (u, v) in enumerate(pairs)
        if a != b and u >= x and v >= y
    }
    actual = tradeoff.front(pairs)
    assert set(actual) == set(range(len(pairs))) - beaten
    assert [pairs[item][0] for item in actual] == sorted(pairs[item][0] for item in actual)


def test_without_tasks_the_plane_is_of_perplexity_alone(tmp_path):
    records = study(ROWS)
    for key, record in records.items():
        if ".evaluation." in key:
            record["generation"] |= {"average": None, "tasks": {}, "metrics": {}}
    keys = [f"model.name=Qwen/{MODEL}", f"output_dir={tmp_path}"]
    assert "tradeoff.png" in tradeoff.draw(load_config(None, keys), Records.of_names(records))
    [only] = tradeoff.plane_figure(
        MODEL, tradeoff.points(MODEL, Records.of_names(records), SEEDS)
    ).axes
    assert only.get_ylabel().startswith("perplexity")
    assert ", ".join(text.get_text() for text in only.texts) == "1, 2, 3"


def test_a_claim_of_too_few_rows_leaves_no_old_picture(tmp_path):
    keys = [f"model.name=Qwen/{MODEL}", f"output_dir={tmp_path}"]
    tradeoff.draw(load_config(None, keys), Records.of_names(study(ROWS)))
    save_figure(Figure(), tmp_path / "sink.png")  # of other records
    said = tradeoff.draw(load_config(None, keys), Records.of_names(study({"ffn": (31.0, 5.0)})))
    assert said == f"{tmp_path}/tradeoff.png" and len(list(tmp_path.iterdir())) == 1


def test_pairs_that_tell_of_sts_alone_are_no_picture(tmp_path):
    keys = [f"model.name=Qwen/{MODEL}", f"output_dir={tmp_path}"]
    records = study(ROWS)
    for seed in range(3):
        records |= encoder("a", seed, 50.0, ["ffn"]) | encoder("b", seed, 40.0, ["ffn"], "causal")
    assert "masks.png" not in tradeoff.draw(load_config(None, keys), Records.of_names(records))
    for seed in range(3):
        for name in "ab":
            records |= measured(name, seed, ["ffn"], shares(), [1.0, 2.0, 3.0, 4.0])
        causal({key: record for key, record in records.items() if key == f"b.sts.seed{seed}"}, 40.0)
    records |= measured("r0", 0, [], shares(), [1.0, 2.0, 3.0, 4.0])
    assert "masks.png" in tradeoff.draw(load_config(None, keys), Records.of_names(records))


def test_a_mixture_is_placed_where_it_embeds_as_its_tuned_expert_does():
    record = dict(RECORDS["m.generation.seed0"])
    record["sts"] = [
        {"route": "learned", "attention": mask, "average": score}
        for mask, score in (("bidirectional", 22.0), ("causal", 42.0))
    ]
    for mask, sts in (("bidirectional", 22.0), ("causal", 42.0)):
        generation = record["generation"] | {"bi_attention": mask}
        records = study(ROWS) | {"m.generation.seed0": record | {"generation": generation}}
        actual = tradeoff.points(MODEL, Records.of_names(records), SEEDS)
        [point] = [item for item in actual.values() if item.kind == "mixture"]
        assert (point.sts, point.is_control) == ([sts], mask == "causal")


def test_points_and_pictures_come_from_the_records(tmp_path):
    keys = [f"model.name=Qwen/{MODEL}", f"output_dir={tmp_path}"]
    records = study(ROWS) | {"m.generation.seed0": RECORDS["m.generation.seed0"]}
    mixture = dict(records["m.generation.seed0"])
    mixture["sts"] = [
        {"route": route, "attention": "bidirectional", "average": 55.0}
        for route in ("learned", "uni")
    ]
    records["m.generation.seed0"] = mixture
    actual = tradeoff.points(MODEL, Records.of_names(records), SEEDS)
    assert list(actual) == ["base", "ffn", "attention", "all", "learned, top_k 2, chat"]
    assert (actual["attention"].sts, actual["attention"].tasks) == (
        [53.0],
        [38.0],
    )  # each task is one above the average
    assert actual["learned, top_k 2, chat"].perplexity == [5.0]
    assert not any(item.is_control for item in actual.values())
    records["r3.sts.seed0"]["config"]["bi"]["attention"] = "causal"
    again = tradeoff.points(MODEL, Records.of_names(records), SEEDS)
    assert [name for name, item in again.items() if item.is_control] == ["all causal"]
    said = tradeoff.draw(load_config(None, keys), Records.of_names(records))
    assert said.splitlines() == [f"{tmp_path}/tradeoff.png", f"{tmp_path}/claim.png"]
    assert all((tmp_path / name).stat().st_size > 9000 for name in ("tradeoff.png", "claim.png"))


def test_averages_are_of_the_tasks_that_all_have_and_perplexities_middle_as_their_axis():
    records = study({"ffn": (31.0, 5.0)})
    generation = records["r0.evaluation.seed0"]["generation"]  # the base was asked more
    generation["tasks"] |= {"piqa": {"acc": 90.0}}
    generation |= {"metrics": {"mmlu": "acc", "piqa": "acc"}, "average": 65.0}
    again = study({"ffn": (31.0, 20.0)})
    for kind in ("sts", "dependence", "evaluation"):
        records[f"r1.{kind}.seed1"] = again[f"r1.{kind}.seed0"]
        records[f"r1.{kind}.seed1"]["config"] = {**again[f"r1.{kind}.seed0"]["config"], "seed": 1}
    actual = tradeoff.points(MODEL, Records.of_names(records), SEEDS)
    assert (actual["base"].tasks, actual["ffn"].tasks) == ([40.0], [39.0, 39.0])
    axes = tradeoff.plane_figure(MODEL, actual).axes[1]
    bars = axes.containers[1]
    assert bars.lines[0].get_ydata()[0] == pytest.approx(10.0)  # of 5 and 20
    ends = bars.lines[2][1].get_segments()[0][:, 1]
    factor = math.exp(math.log(4) / math.sqrt(2))  # two logs that are log 4 apart
    assert sorted(ends) == pytest.approx([10 / factor, 10 * factor])


def test_a_base_under_another_mask_generates_as_the_base_does():
    records = study(ROWS) | encoder("late", 0, 60.0, [], "causal")
    actual = tradeoff.points(MODEL, Records.of_names(records), SEEDS)["base causal"]
    assert (actual.kind, actual.sts, actual.perplexity) == ("base", [61.0], [4.0])
    records["r0.evaluation.seed0"]["environment"] = {"weights": "other"}
    records["late.sts.seed0"]["environment"] = {"weights": "own"}
    assert "base causal" not in tradeoff.points(MODEL, Records.of_names(records), SEEDS)


def test_a_picture_needs_models(tmp_path):
    with pytest.raises(UserError, match="0 models of tiny with STS and generation"):
        tradeoff.draw(load_config(None, [f"output_dir={tmp_path}"]), Records.of_names({}))


def test_only_the_front_is_named_and_kinds_are_keys():
    """What another surpasses in both has a point and no name; its kind has one key."""
    placed = {
        "base": tradeoff.Point("base", sts=[20.0], perplexity=[3.0]),
        "best": tradeoff.Point("encoder", sts=[40.0], perplexity=[5.0]),
        "worse": tradeoff.Point("encoder", sts=[30.0], perplexity=[9.0]),
    }
    drawn = tradeoff.plane_figure(MODEL, placed)
    [axes], [legend] = drawn.axes, drawn.legends
    assert [text.get_text() for text in axes.texts] == ["1", "2"]
    names = ["base", "encoder", "1 base", "2 best"]
    assert [text.get_text() for text in legend.texts] == names


def test_points_that_are_close_share_a_label():
    points = [(0.9, 0.5), (0.1, 0.5), (0.12, 0.51), (0.12, 0.9), (0.14, 0.5)]
    assert tradeoff.close(points, 0.025) == [[1, 2, 4], [3], [0]]
