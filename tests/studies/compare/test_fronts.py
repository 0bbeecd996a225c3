"""Points by hand, masks by what the section `bi` says, the paper's score by its table."""

import pytest

from studies.compare import fronts, tradeoff
from studies.compare.records import Records
from ubmoe.config import load_config
from ubmoe.results.records import Record

MODEL = "tiny"


def scored(name, points, **bi):
    """A record of (step, STS, perplexities of two texts)."""
    trajectory = [
        {
            "stage": 0,
            "step": step,
            "sts": {"tasks": {"STSB-dev": sts}, "average": sts},
            "perplexity": {"chats": {"perplexity": one}, "wiki": {"perplexity": other}},
        }
        for step, sts, one, other in points
    ]
    stage = {"objective": "simcse", "train": ["ffn"]}
    own = {"attention": "bidirectional", "stages": [stage]} | bi
    config = {"model": {"name": MODEL}, "bi": own}
    section = {"tasks": {}, "average": None, "stages": [], "trajectory": trajectory}
    return Record(name, "sts", 0, {"config": config, "sts": section})


FIRST = scored("first", [(0, 60.0, 10.0, 20.0), (40, 70.0, 20.0, 160.0)])


def test_a_ratio_is_the_geometric_mean_over_the_texts():
    """Twice and eight times: the root of 16."""
    assert fronts.ratios(FIRST) == [(60.0, 1.0), (70.0, pytest.approx(4.0))]


@pytest.mark.parametrize(
    ("bi", "expected"),
    [
        ({}, "bidirectional"),
        ({"attention": "causal"}, "causal"),
        ({"layers": "none", "keep_sink": True}, "causal"),
        ({"layers": {"from": 11}}, "bidirectional in later layers"),
        ({"keep_sink": True}, "bidirectional, sink kept"),
        ({"layers": [3, 7], "keep_sink": True}, "bidirectional in later layers, sink kept"),
    ],
)
def test_a_mask_is_what_the_configuration_says(bi, expected):
    assert fronts.mask(scored("any", [], **bi)) == expected


def test_a_line_a_run_a_colour_a_mask_and_the_untrained_in_black():
    again = scored("again", [(0, 60.0, 10.0, 20.0), (20, 65.0, 11.0, 21.0)])
    causal = scored("causal", [(0, 50.0, 10.0, 20.0), (9, 66.0, 12.0, 20.0)], attention="causal")
    [axes] = fronts.figure(MODEL, [FIRST, causal, again]).axes
    *runs, untrained, ring = axes.lines
    assert [list(line.get_xdata()) for line in runs] == [[50, 66], [60, 70], [60, 65]]
    assert runs[0].get_color() != runs[1].get_color() == runs[2].get_color()
    assert list(untrained.get_xdata()) == [50, 60] and untrained.get_color() == "black"
    assert axes.get_yscale() == "log" and list(ring.get_xdata()) == [72.61]
    names = [text.get_text() for text in axes.get_legend().texts]
    assert names[:3] == ["causal", "bidirectional", "untrained"]


def test_lines_of_other_modules_forms_and_losses_are_told_apart():
    def changed(name, points=FIRST.section["trajectory"], **stage):
        record = scored(name, [], attention="causal", form="plain" if name == "plain" else "eol")
        record.section["trajectory"] = points
        record.config["bi"]["stages"] = [{"objective": "simcse", "train": ["ffn"]} | stage]
        return record

    still = [point | {"step": 0} for point in FIRST.section["trajectory"]]
    records = [
        changed("causal"),
        changed("attention", train=["attention"]),
        changed("plain"),
        changed("with LM loss", lm_weight=1.0),
        changed("LM loss alone", lm_weight=1e6),
        changed("noise", points=still),
    ]
    names = [fronts.kind(record) for record in records]
    assert names == [
        *("causal", "causal, attention", "causal, plain mean", "causal, with LM loss"),
        *("causal, LM loss alone", "noise"),
    ]
    [axes] = fronts.figure(MODEL, records).axes
    drawn = {line.get_label(): line for line in axes.lines}
    looks = {
        (line.get_color(), line.get_linestyle(), line.get_marker(), line.get_markerfacecolor())
        for line in map(drawn.__getitem__, names)
    }
    assert len(looks) == len(records)
    assert {drawn[name].get_color() for name in names[3:]} == {"grey"}


def test_the_paper_is_held_beside_the_same_task():
    assert fronts.paper("STSB-test")[0] == 72.61
    assert fronts.paper("STSB-test, STS12")[0] == 66.96


def test_runs_that_were_scored_on_their_way_are_a_picture(tmp_path):
    none = scored("none", [])
    config = load_config(None, [f"output_dir={tmp_path}"])
    assert tradeoff.draw(config, Records([FIRST, none])) == f"{tmp_path}/fronts.png"
    assert fronts.of_model(MODEL, Records([FIRST, none])) == [FIRST]
