"""Rows whose layers were swapped, in a table and in a figure."""

import numpy as np
import pytest
from builders import SEEDS

from studies.compare import swapped
from studies.compare.pages import renewed
from studies.compare.records import Records
from ubmoe.report.figures import SWAPPED

PUT, BACK = [0.1, 0.4, 0.2, 0.05], [-0.3, -0.1, -0.5, -0.6]
RISEN = [1.0, 3.0, 2.0, 4.0]


def losses(change):
    per_answer = {"change": change, "interval": [change - 0.1, change + 0.1]}
    return per_answer | {"change": 10 * change, "by_answer": per_answer}


def dependence(risen):
    layers = [
        {"first": 20.0 - item, "after": 40.0 + item, "without_first": {"after": 50.0}}
        for item in risen
    ]
    whole = {"first": 20.0, "after": 40.0, "without_first": {"after": 50.0}}
    return {"overall": whole, **whole, "layers": layers}


def records(seeds=(0, 1), weights="new"):
    small, actual = {"model": {"name": "small"}}, {}
    bi = {"stages": [{"objective": "simcse", "train": ["ffn"]}], "attention": "bidirectional"}
    sts = {"tasks": {}, "average": 1.0}
    actual["base.sts.seed0"] = {"config": small | {"seed": 0, "bi": {"stages": []}}, "sts": sts}
    actual["base.dependence.seed0"] = {"config": small | {"seed": 0}} | {
        "dependence": dependence([0.0] * 4)
    }
    for seed in seeds:
        made = {"config": small | {"seed": seed, "bi": bi}, "sts": sts}
        actual[f"a.sts.seed{seed}"] = made | {"environment": {"weights": "new"}}
        own = {"model": {"name": "runs/bi"}, "seed": seed}
        actual[f"a.dependence.seed{seed}"] = {"config": own, "dependence": dependence(RISEN)}
        layers = [
            {"layer": number, "in": losses(put + seed), "back": losses(back + seed)}
            for number, (put, back) in enumerate(zip(PUT, BACK, strict=True))
        ]
        section = {"chats": 5, "whole": losses(0.9), "layers": layers, "bi_weights": weights}
        actual[f"a.swap.seed{seed}"] = {"config": small | {"seed": seed}, "swap": section}
    return Records.of_names(actual)


def test_a_row_is_shown_by_its_first_seed_that_was_swapped():
    both = swapped.swapped("small", records(), SEEDS)
    assert list(both) == ["ffn"]
    assert both["ffn"].changes("in") == pytest.approx(PUT)
    later = swapped.swapped("small", records(seeds=(1,)), SEEDS)
    assert later["ffn"].changes("back") == pytest.approx([item + 1 for item in BACK])


def test_a_swap_of_an_earlier_encoder_is_passed_over():
    assert swapped.swapped("small", records(weights="old"), SEEDS) == {}


def test_the_table_says_what_layers_cost_together_and_alone():
    lines = renewed("<!-- swap: small -->\n<!-- end -->", records(), SEEDS).splitlines()
    cells = [cell.strip() for cell in lines[3].strip("|").split("|")]
    assert cells == [
        *("ffn", "5", "+0.90", "+0.75", "-1.50"),
        *("1 (0.40), 2 (0.20), 0 (0.10)", "3 (0.60), 2 (0.50), 0 (0.30)", "0.22", "-0.67"),
    ]
    # ranks with the rise -0.2 and 0.4, with depth -0.4 and 0.8, the rise with depth 0.8
    expected = [(-0.2 + 0.4 * 0.8) / (0.84 * 0.36) ** 0.5, (0.4 - 0.8 * 0.8) / 0.36]
    [actual] = swapped.swapped("small", records(), SEEDS).values()
    assert [actual.rank_with_after(word) for word in ("in", "back")] == pytest.approx(expected)


def test_without_dependence_there_is_no_rank():
    without = {name: item.data for name, item in records().by_name.items()}
    del without["base.dependence.seed0"]
    [actual] = swapped.swapped("small", Records.of_names(without), SEEDS).values()
    assert actual.rank_with_after("in") is None


def test_the_picture_has_a_bar_a_layer_and_a_point_a_layer():
    bars, points = swapped.figure("small", swapped.swapped("small", records(), SEEDS)).axes
    heights = [bar.get_height() for bar in bars.patches]
    assert heights == pytest.approx(PUT + BACK)
    assert [text.get_text() for text in bars.get_legend().get_texts()] == [
        label for label, _ in SWAPPED.values()
    ]
    cost, saving = points.lines[:2]
    assert list(cost.get_xdata()) == RISEN and list(cost.get_ydata()) == pytest.approx(PUT)
    assert list(saving.get_ydata()) == pytest.approx([-item for item in BACK])


@pytest.mark.parametrize(
    ("changes", "after"),
    [
        ([0.1, 0.4, 0.2, 0.05], [0.0, 0.0, 0.0, 0.0]),
        ([0.1, 0.2, 0.3, 0.4], [1.0, 3.0, 2.0, 4.0]),  # depth says it all
        ([0.1, 0.2], [2.0, 1.0]),
    ],
)
def test_where_depth_leaves_nothing_there_is_no_rank(changes, after):
    layers = [{"in": losses(change), "back": losses(change)} for change in changes]
    section = {"chats": 5, "whole": losses(0.9), "layers": layers}
    actual = swapped.Swapped(section, np.array(after))
    assert actual.rank_with_after("in") is None
    assert "none and none" in swapped.figure("small", {"ffn": actual}).axes[1].get_title()
